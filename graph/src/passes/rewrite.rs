//! A graph once more, some of its nodes replaced.

use crate::{
    error::{Error, NodeError},
    ir::{Definition, GraphBuilder, Initializer, Node, ValueId},
    validate::ValidGraph,
};

/// Builds `graph` again; where `replace` gives values, they stand for the node's outputs, in a scope of its name.
pub(super) fn rewrite(
    graph: &ValidGraph,
    mut replace: impl FnMut(
        &mut GraphBuilder,
        &Node,
        &[Option<ValueId>],
    ) -> Result<Option<Vec<ValueId>>, NodeError>,
) -> Result<ValidGraph, Error> {
    let graph = graph.graph();
    let mut b = GraphBuilder::new(graph.name());
    let mut new: Vec<Option<ValueId>> = vec![None; graph.values().len()];
    for (id, value) in graph.values() {
        new[id.0 as usize] = match &value.definition {
            Definition::Input => Some(b.input(&value.name, value.ty.dtype, value.ty.shape.clone())),
            Definition::Initializer(Initializer::Inline(tensor)) => {
                Some(b.constant(tensor.clone()))
            }
            Definition::Initializer(Initializer::Weight(weight)) => Some(b.weight(weight.clone())),
            Definition::Node { .. } => None,
        };
    }
    for (_, node) in graph.nodes() {
        let inputs: Vec<Option<ValueId>> = node
            .inputs
            .iter()
            .map(|input| input.and_then(|id| new[id.0 as usize]))
            .collect();
        let outputs = match b.scope(&node.name, |b| replace(b, node, &inputs))? {
            Some(outputs) => outputs,
            None => b.apply(&node.name, node.op.clone(), &inputs)?,
        };
        for (old, output) in node.outputs.iter().zip(outputs) {
            new[old.0 as usize] = Some(output);
        }
    }
    for &output in graph.outputs() {
        if let Some(value) = new[output.0 as usize] {
            b.output(&graph.value(output).name, value);
        }
    }
    b.finish()
}
