//! Dead node elimination: what no output needs is not written.

use crate::ir::{Definition, Graph, ValueId};

/// What some output needs.
pub(crate) struct Live {
    /// By value handle.
    pub(crate) values: Vec<bool>,
    /// By node handle.
    pub(crate) nodes: Vec<bool>,
}

/// [`live`] of a loop's body, whose first `fixed` inputs stay in their places.
pub(crate) fn live_in_body(graph: &Graph, fixed: usize) -> Live {
    let mut live = live(graph);
    for input in graph.inputs.iter().take(fixed) {
        live.values[input.0 as usize] = true;
    }
    live
}

/// Walks back from the outputs. All outputs of a live node live, so that their order stays.
pub(crate) fn live(graph: &Graph) -> Live {
    let mut live = Live {
        values: vec![false; graph.values.len()],
        nodes: vec![false; graph.nodes.len()],
    };
    let mut open: Vec<ValueId> = graph.outputs.clone();
    while let Some(id) = open.pop() {
        if std::mem::replace(&mut live.values[id.0 as usize], true) {
            continue;
        }
        let Definition::Node { node, .. } = graph.value(id).definition else {
            continue;
        };
        if std::mem::replace(&mut live.nodes[node.0 as usize], true) {
            continue;
        }
        let node = graph.node(node);
        open.extend(node.inputs.iter().flatten());
        for output in &node.outputs {
            live.values[output.0 as usize] = true;
        }
    }
    live
}

#[cfg(test)]
mod tests {
    use crate::ir::{DType, GraphBuilder, InlineTensor};

    #[test]
    fn removes_what_no_output_needs() {
        let mut b = GraphBuilder::new("dead");
        let x = b.input("x", DType::F32, vec!["n".into()]);
        let y = b.input("y", DType::F32, vec!["n".into()]);
        let unused = b.constant(InlineTensor::float(DType::F32, &[1], &[2.0]));
        b.mul("unused", y, unused).unwrap();
        let sum = b.add("sum", x, x).unwrap();
        b.output("z", sum);
        let graph = b.finish().unwrap();
        assert_eq!(graph.graph().nodes().len(), 1);
        assert_eq!(graph.graph().values().len(), 2);
        assert_eq!(graph.input_names(), ["x"]);
    }

    #[test]
    fn keeps_all_outputs_of_a_live_node() {
        let mut b = GraphBuilder::new("split");
        let x = b.input("x", DType::F32, vec![4.into()]);
        let parts = b.split("parts", x, 0, &[1, 3]).unwrap();
        let sum = b.add("sum", parts[1], parts[1]).unwrap();
        b.output("z", sum);
        let graph = b.finish().unwrap();
        let (_, split) = graph.graph().nodes().next().unwrap();
        assert_eq!(split.outputs.len(), 2);
    }
}
