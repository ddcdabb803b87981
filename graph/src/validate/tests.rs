//! One valid graph, and for every invariant a twin that breaks only that one.

use super::{Violation, seal};
use crate::ir::{
    DType, Definition, Dim, Graph, GraphBuilder, Initializer, InlineTensor, NodeId, Op, Transform,
    Value, ValueId,
};

/// `present_row.0 = Concat(past_row.0, x W^T)`, `y = present_row.0 + 1`.
fn valid() -> Graph {
    let mut b = GraphBuilder::new("twins");
    let x = b.input(
        "x",
        DType::F32,
        vec!["batch".into(), "seq".into(), 4.into()],
    );
    let past = b.input(
        "past_row.0",
        DType::F32,
        vec!["batch".into(), "past".into(), 3.into()],
    );
    let row = b.linear("row", x, "proj", 3, 4, false).unwrap();
    let present = b.concat("joined", &[past, row], 1).unwrap();
    let sum = b.scale("sum", present, 3.0).unwrap();
    b.output("y", sum);
    b.output("present_row.0", present);
    b.finish().unwrap().graph().clone()
}

fn find(graph: &Graph, name: &str) -> ValueId {
    graph.values().find(|(_, v)| v.name == name).unwrap().0
}

fn value<'g>(graph: &'g mut Graph, name: &str) -> &'g mut Value {
    let id = find(graph, name);
    &mut graph.values[id.0 as usize]
}

fn weight(graph: &mut Graph) -> &mut crate::ir::WeightRef {
    match &mut value(graph, "proj.weight.t").definition {
        Definition::Initializer(Initializer::Weight(w)) => w,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn breaks(change: impl FnOnce(&mut Graph)) -> String {
    let mut graph = valid();
    change(&mut graph);
    seal(graph).expect_err("the twin passed").to_string()
}

#[test]
fn the_original_is_valid() {
    assert!(seal(valid()).is_ok());
}

#[test]
fn handles_belong_to_the_graph() {
    let found = breaks(|g| g.nodes[0].inputs[0] = Some(ValueId(99)));
    assert_eq!(found, "row: handle 99 does not belong to the graph");
    let found = breaks(|g| g.outputs.push(ValueId(77)));
    assert_eq!(
        found,
        "graph outputs: handle 77 does not belong to the graph"
    );
    let found = breaks(|g| {
        value(g, "row").definition = Definition::Node {
            node: NodeId(9),
            output: 0,
        };
    });
    assert_eq!(found, "row: handle 9 does not belong to the graph");
}

#[test]
fn values_are_defined_once_and_before_use() {
    let found = breaks(|g| {
        let twice = g.inputs[0];
        g.inputs.push(twice);
    });
    assert_eq!(found, "value x: defined twice");
    let found = breaks(|g| {
        let late = g.nodes[2].outputs[0];
        g.nodes[1].inputs[1] = Some(late);
    });
    assert_eq!(found, "value y: used before it is defined");
    let found = breaks(|g| {
        let other = g.nodes[0].outputs[0];
        g.nodes[1].outputs = vec![other];
    });
    assert_eq!(
        found,
        "value row: output of a node that its definition does not name"
    );
    let found = breaks(|g| {
        g.inputs.remove(0);
    });
    assert_eq!(found, "value x: used before it is defined");
}

#[test]
fn names_are_unique_and_plain() {
    let found = breaks(|g| value(g, "x").name = "row".to_owned());
    assert_eq!(found, "name \"row\": used twice");
    let found = breaks(|g| g.nodes[0].name = g.nodes[1].name.clone());
    assert_eq!(found, "name \"joined\": used twice");
    let found = breaks(|g| value(g, "x").name = String::new());
    assert_eq!(found, "name \"\": empty");
    let found = breaks(|g| value(g, "x").name = "a b".to_owned());
    assert_eq!(found, "name \"a b\": not printable ASCII without spaces");
}

#[test]
fn types_follow_from_the_inputs() {
    let found = breaks(|g| value(g, "row").ty.shape[2] = Dim::known(5));
    assert!(
        found.starts_with("node row: inputs imply outputs f32[batch, seq, 3]"),
        "{found}"
    );
    let found = breaks(|g| value(g, "x").ty.shape[2] = Dim::known(5));
    assert!(
        found.starts_with("node row (MatMul): expected equal inner axes"),
        "{found}"
    );
    let found = breaks(|g| value(g, "row").content = Some(vec![]));
    assert!(found.starts_with("node row: inputs imply"), "{found}");
}

#[test]
fn outputs_are_computed_and_distinct() {
    let found = breaks(|g| g.outputs = vec![]);
    assert_eq!(found, "output twins: the graph has none");
    let found = breaks(|g| g.outputs.push(g.outputs[0]));
    assert_eq!(found, "output y: given twice");
    let found = breaks(|g| g.outputs.push(g.inputs[0]));
    assert_eq!(found, "output x: not computed by a node");
}

#[test]
fn nothing_is_dead() {
    let found = breaks(|g| {
        let unused = Value {
            name: "unused".to_owned(),
            ..g.value(g.inputs[0]).clone()
        };
        g.values.push(unused);
        g.inputs.push(ValueId(g.values.len() as u32 - 1));
    });
    assert_eq!(found, "input unused: no output needs it");
    let found = breaks(|g| {
        g.outputs.remove(0);
    });
    assert_eq!(found, "initializer const.0: no output needs it");
}

#[test]
fn symbols_are_axes_of_inputs() {
    // A dimension that only a node knows, in all values that follow from it.
    let found = breaks(|g| {
        for v in &mut g.values {
            if v.ty.rank() == 3 && v.name != "x" {
                v.ty.shape[0] = Dim::symbol("ghost");
            }
        }
        let ty = g.value(find(g, "row")).ty.clone();
        value(g, "x").ty.shape[0] = ty.shape[0].clone();
        let x = find(g, "x");
        let past = find(g, "past_row.0");
        g.inputs.retain(|&i| i != x && i != past);
        for id in [x, past] {
            let w = weight(g).clone();
            let v = &mut g.values[id.0 as usize];
            v.definition = Definition::Initializer(Initializer::Weight(w));
        }
    });
    assert!(
        found.contains("symbol ghost is not an axis of any input"),
        "{found}"
    );
}

#[test]
fn constants_fill_their_type() {
    let found = breaks(|g| {
        if let Definition::Initializer(Initializer::Inline(t)) = &mut value(g, "const.0").definition
        {
            t.bytes.push(0);
        }
    });
    assert_eq!(found, "initializer const.0: f32[] takes 4 bytes, it has 5");
}

#[test]
fn constants_are_small() {
    let mut b = GraphBuilder::new("large");
    let n = super::LARGEST_INLINE / 4 + 1;
    let x = b.input("x", DType::F32, vec![n.into()]);
    let large = b.constant(crate::ir::InlineTensor::float(
        DType::F32,
        &[n],
        &vec![0.0; n],
    ));
    let sum = b.add("sum", x, large).unwrap();
    b.output("y", sum);
    let found = b.finish().unwrap_err().to_string();
    assert!(
        found.contains("65540 bytes inside the graph, at most 65536 may be"),
        "{found}"
    );
}

#[test]
fn weights_fit_their_source() {
    let found = breaks(|g| weight(g).source_shape = vec![3, 5]);
    assert_eq!(
        found,
        "initializer proj.weight.t: the transform leaves 15 elements for [4, 3]"
    );
    let found = breaks(|g| weight(g).source_shape = vec![12]);
    assert_eq!(
        found,
        "initializer proj.weight.t: a transpose takes 2 axes, the tensor has shape [12]"
    );
    let found = breaks(|g| weight(g).shape = vec![3, 4]);
    assert_eq!(
        found,
        "initializer proj.weight.t: declared f32[4, 3], refers to f32[3, 4]"
    );
    let found = breaks(|g| {
        weight(g).transform = Transform::KvBKey {
            heads: 2,
            d_nope: 1,
            d_v: 1,
        };
    });
    assert_eq!(
        found,
        "initializer proj.weight.t: kv_b_proj has 3 rows, 2 heads of 1 + 1 need 4"
    );
}

#[test]
fn one_tensor_has_one_source_shape() {
    let mut b = GraphBuilder::new("two_shapes");
    let x = b.input("x", DType::F32, vec!["n".into(), 4.into()]);
    let a = b.linear("a", x, "proj", 4, 4, false).unwrap();
    let c = b.linear("c", a, "proj", 2, 4, false).unwrap();
    b.output("y", c);
    let found = b.finish().unwrap_err().to_string();
    assert!(
        found.ends_with("proj.weight read as [4, 4] and as [2, 4]"),
        "{found}"
    );
}

#[test]
fn caches_come_in_pairs() {
    let found = breaks(|g| value(g, "present_row.0").name = "other".to_owned());
    assert_eq!(found, "cache past_row.0: no output present_row.0");
    let found = breaks(|g| value(g, "past_row.0").name = "other".to_owned());
    assert_eq!(found, "cache present_row.0: no past input belongs to it");
}

#[test]
fn caches_grow_in_one_axis() {
    let mut b = GraphBuilder::new("growth");
    let past = b.input(
        "past_row.0",
        DType::F32,
        vec!["batch".into(), "past".into()],
    );
    let both = b.concat("both", &[past, past], 0).unwrap();
    let twice = b.concat("twice", &[both, both], 1).unwrap();
    b.output("present_row.0", twice);
    let found = b.finish().unwrap_err();
    assert!(
        matches!(found, crate::Error::Invalid(Violation::Cache { .. })),
        "{found}"
    );
}

#[test]
fn slashes_are_for_bodies() {
    let found = breaks(|g| value(g, "x").name = "a/b".to_owned());
    assert_eq!(found, "name \"a/b\": a slash");
}

/// `sum_i x[i]` over the first `past_row` rows, with what a body needs: carried and captured values.
fn with_loop() -> Graph {
    let mut b = GraphBuilder::new("loop");
    let x = b.input("x", DType::F32, vec!["n".into(), 4.into()]);
    let unused = b.input("unused", DType::F32, vec!["n".into()]);
    let zero = b.constant(InlineTensor::float(DType::F32, &[4], &[0.0; 4]));
    let trips = b.dim_scalar(&"n".into()).unwrap();
    let [sum] = b
        .repeat("sum", trips, [zero], [x, unused], |b, run| {
            let axis = Op::Gather { axis: 0 };
            let row = b.node("row", axis, &[run.captured[0], run.iteration])?;
            Ok([b.add("next", run.carried[0], row)?])
        })
        .unwrap();
    b.output("y", sum);
    b.finish().unwrap().graph().clone()
}

fn change_body(graph: &mut Graph, change: impl FnOnce(&mut Graph)) {
    for node in &mut graph.nodes {
        if let Op::Loop { body, .. } = &mut node.op {
            change(std::sync::Arc::make_mut(body));
            return;
        }
    }
    panic!("no loop");
}

#[test]
fn a_loop_lists_what_its_body_needs_and_no_more() {
    let graph = with_loop();
    let names: Vec<&str> = graph
        .inputs()
        .iter()
        .map(|&i| graph.value(i).name.as_str())
        .collect();
    assert_eq!(names, ["x"]);
    let (_, node) = graph.nodes().find(|(_, n)| n.op.name() == "Loop").unwrap();
    assert_eq!(node.inputs.len(), 4);
}

#[test]
fn bodies_are_graphs() {
    let broken = |change: fn(&mut Graph)| {
        let mut graph = with_loop();
        change_body(&mut graph, change);
        seal(graph).expect_err("the twin passed").to_string()
    };
    let found = broken(|g| g.nodes.swap(0, 1));
    assert!(
        found.starts_with("body of sum: value") && found.contains("definition does not name")
            || found.contains("used before it is defined"),
        "{found}"
    );
    let found = broken(|g| value(g, "next").name = "row".to_owned());
    assert_eq!(found, "body of sum: name \"row\": used twice");
    let found = broken(|g| {
        let id = find(g, "x");
        g.inputs.retain(|&i| i != id);
    });
    assert!(
        found.contains("expected 3 inputs, as the body has"),
        "{found}"
    );
    let found = broken(|g| value(g, "x").ty.shape[1] = Dim::known(5));
    assert!(
        found.contains("f32[n, 5] as input 3, x of the body"),
        "{found}"
    );
    let found = broken(|g| {
        let weight = crate::ir::WeightRef {
            name: "w".to_owned(),
            source_shape: vec![4],
            transform: Transform::AsIs,
            dtype: DType::F32,
            shape: vec![4],
        };
        let constants = g.values.iter_mut();
        for value in constants.filter(|v| matches!(v.definition, Definition::Initializer(_))) {
            value.definition = Definition::Initializer(Initializer::Weight(weight.clone()));
        }
    });
    assert!(found.starts_with("body of sum: initializer"), "{found}");
}

#[test]
fn carried_values_keep_their_type() {
    let mut b = GraphBuilder::new("growing");
    let x = b.input("x", DType::F32, vec!["n".into()]);
    let trips = b.dim_scalar(&"n".into()).unwrap();
    let found = b
        .repeat("grow", trips, [x], [], |b, run| {
            Ok([b.concat("twice", &[run.carried[0], run.carried[0]], 0)?])
        })
        .unwrap_err()
        .to_string();
    assert!(
        found.contains("expected f32[n] again as twice, found f32[2*n]"),
        "{found}"
    );
}

#[test]
fn a_symbol_has_one_meaning() {
    let tails = |axis: &str, count: usize| {
        let mut b = GraphBuilder::new("tails");
        let x = b.input("x", DType::F32, vec!["n".into()]);
        let y = b.input("y", DType::F32, vec![axis.into()]);
        let x = b.tail("x_end", x, 0, 4, "kept").unwrap();
        let y = b.tail("y_end", y, 0, count, "kept").unwrap();
        let sum = b.add("sum", x, y).unwrap();
        b.output("out", sum);
        b.finish().map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(tails("n", 4), Ok(()));
    let expected = "node y_end: brings in the symbol kept, which has another meaning";
    assert_eq!(tails("m", 4).unwrap_err(), expected);
    assert_eq!(tails("n", 5).unwrap_err(), expected);
    let mut b = GraphBuilder::new("distinct");
    let x = b.input("x", DType::I64, vec!["n".into()]);
    let op = Op::Unique { size: "n".into() };
    let distinct = b.node("distinct", op, &[x]).unwrap();
    b.output("out", distinct);
    let found = b.finish().unwrap_err().to_string();
    assert!(
        found.starts_with("node distinct: brings in the symbol n"),
        "{found}"
    );
}
