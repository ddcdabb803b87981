//! Lowering of `mlac::Linear16` to standard operators, for runtimes without it.

use std::collections::BTreeMap;

use super::rewrite::rewrite;
use crate::{
    error::{Error, NodeError},
    ir::{DType, Definition, GraphBuilder, Initializer, Node, Op, Transform, ValueId},
    validate::ValidGraph,
};

/// `graph` with every `Linear16` as the builders' standard form has it: weights `[in, out]`, cast where they are read.
///
/// # Errors
/// Weights that are not the graph's own are refused: they are transposed when the file is written.
pub fn lower_linear16(graph: &ValidGraph) -> Result<ValidGraph, Error> {
    rewrite(graph, |b, node, inputs| match node.op {
        Op::Linear16 => standard(b, node, inputs).map(|out| Some(vec![out])),
        _ => Ok(None),
    })
}

fn standard(
    b: &mut GraphBuilder,
    node: &Node,
    inputs: &[Option<ValueId>],
) -> Result<ValueId, NodeError> {
    let refuse = |found: String| NodeError {
        node: format!("{} (Linear16)", node.name),
        expected: "x and a weight of the graph as the checkpoint has it".to_owned(),
        found,
    };
    let (Some(&Some(x)), Some(&Some(weight))) = (inputs.first(), inputs.get(1)) else {
        return Err(refuse(format!("{} inputs", inputs.len())));
    };
    let value = b.graph().value(weight);
    let mut weight = match &value.definition {
        Definition::Initializer(Initializer::Weight(weight))
            if weight.transform == Transform::AsIs && weight.shape == weight.source_shape =>
        {
            weight.clone()
        }
        _ => return Err(refuse(value.ty.to_string())),
    };
    // What is cast has the type that it is stored in.
    b.keep_stored(BTreeMap::from([(weight.name.clone(), weight.dtype)]));
    weight.dtype = DType::F32;
    let product = b.product("product", x, weight)?;
    match inputs.get(2).copied().flatten() {
        Some(bias) => b.add("bias", product, bias),
        None => Ok(product),
    }
}
