//! `mlac::Mxfp4Experts` in graphs: the node, the forms that have it, what is refused, the lowering.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "a test crate has no interface"
)]

mod common;

use common::{converted, gpt_oss, llama};
use mlac_graph::builders::{DecoderOptions, MlaForm, Runtime, decoder_graph, experts_graph};
use mlac_graph::ir::{DType, Dim, Graph, GraphBuilder, Op};
use mlac_graph::passes::lower_mxfp4_experts;
use mlac_graph::{Error, ValidGraph};
use mlac_model::ExpertFormat;

/// Names of all operators, those of loops' bodies too.
fn names(graph: &Graph) -> Vec<&'static str> {
    let mut all = Vec::new();
    for (_, node) in graph.nodes() {
        all.push(node.op.name());
        if let Op::Loop { body, .. } = &node.op {
            all.extend(names(body));
        }
    }
    all
}

fn count(graph: &ValidGraph, name: &str) -> usize {
    let all = names(graph.graph());
    all.iter().filter(|found| **found == name).count()
}

fn decoder(runtime: Runtime, format: ExpertFormat, dtype: DType) -> ValidGraph {
    let options = DecoderOptions {
        runtime,
        dtype,
        mla_form: MlaForm::Absorbed,
        ..DecoderOptions::default()
    };
    decoder_graph(&converted(gpt_oss(3, format), &[1]), &options).unwrap()
}

#[test]
fn only_the_form_for_onnx_runtime_has_the_node() {
    for dtype in [DType::F32, DType::F16] {
        let graph = decoder(Runtime::OnnxRuntime, ExpertFormat::Mxfp4, dtype);
        assert_eq!(count(&graph, "Mxfp4Experts"), 3);
        assert_eq!(count(&graph, "Loop"), 0);
    }
    for (runtime, format, dtype) in [
        (Runtime::Standard, ExpertFormat::Mxfp4, DType::F32),
        (Runtime::OnnxRuntime, ExpertFormat::Dense, DType::F32),
        (Runtime::TensorRt, ExpertFormat::Mxfp4, DType::F16),
        (Runtime::TensorRtPlugin, ExpertFormat::Mxfp4, DType::F16),
    ] {
        let graph = decoder(runtime, format, dtype);
        assert_eq!(count(&graph, "Mxfp4Experts"), 0, "{runtime:?} {format:?}");
    }
}

/// The checkpoint's bytes and shapes, so that the file has them as they are.
#[test]
fn blocks_and_scales_are_the_checkpoints() {
    let cfg = gpt_oss(1, ExpertFormat::Mxfp4);
    let graph = experts_graph(&cfg, 0, Runtime::OnnxRuntime).unwrap();
    let stored: Vec<_> = graph
        .graph()
        .weights()
        .filter(|weight| weight.dtype == DType::U8)
        .collect();
    assert_eq!(stored.len(), 4);
    for weight in stored {
        assert_eq!(weight.shape, weight.source_shape, "{}", weight.name);
    }
}

#[test]
fn the_lowering_is_the_standard_form() {
    let cfg = gpt_oss(1, ExpertFormat::Mxfp4);
    let graph = experts_graph(&cfg, 0, Runtime::OnnxRuntime).unwrap();
    let lowered = lower_mxfp4_experts(&graph).unwrap();
    let standard = experts_graph(&cfg, 0, Runtime::Standard).unwrap();
    // The operators may stand in another order: tables and routing before or after each other.
    let sorted = |graph: &ValidGraph| {
        let mut all = names(graph.graph());
        all.retain(|name| !matches!(*name, "Reshape" | "Cast"));
        all.sort_unstable();
        all
    };
    assert_eq!(sorted(&lowered), sorted(&standard));
    assert_eq!(count(&lowered, "Loop"), 1);
    let bytes = |graph: &ValidGraph| {
        let weights = graph.graph().weights();
        let mut keys: Vec<_> = weights
            .map(|weight| (weight.name.clone(), weight.dtype, weight.shape.clone()))
            .collect();
        keys.sort();
        keys
    };
    assert_eq!(bytes(&lowered), bytes(&standard));
}

/// A node of 4 experts, hidden size 64 and intermediate size 32; `change` edits the inputs' types.
fn node(change: impl Fn(&mut Vec<(DType, Vec<Dim>)>), limit: f32, alpha: f32) -> String {
    let known = |shape: &[usize]| shape.iter().map(|&n| n.into()).collect::<Vec<Dim>>();
    let token = |last: usize| vec!["n".into(), "t".into(), last.into()];
    let mut types = vec![
        (DType::F32, token(64)),
        (DType::I64, token(2)),
        (DType::F32, token(2)),
        (DType::U8, known(&[4, 64, 2, 16])),
        (DType::U8, known(&[4, 64, 2])),
        (DType::F32, known(&[4, 64])),
        (DType::U8, known(&[4, 64, 1, 16])),
        (DType::U8, known(&[4, 64, 1])),
        (DType::F32, known(&[4, 64])),
    ];
    change(&mut types);
    let mut b = GraphBuilder::new("one");
    let inputs: Vec<_> = types
        .into_iter()
        .enumerate()
        .map(|(i, (dtype, shape))| b.input(&format!("input_{i}"), dtype, shape))
        .collect();
    let op = Op::Mxfp4Experts {
        swiglu_limit: limit,
        swiglu_alpha: alpha,
    };
    match b.node("experts", op, &inputs) {
        Ok(out) => b.ty(out).to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_the_operator_does_not_take_is_an_error_of_the_node() {
    assert_eq!(node(|_| {}, 7.0, 1.7), "f32[n, t, 64]");
    for (input, axis, expected) in [
        (0, 2, "hidden_size, a multiple of 32"),
        (1, 1, "chosen experts i64[n, t, "),
        (2, 2, "weights f32[n, t, 2]"),
        (3, 1, "2 * intermediate_size, a multiple of 32"),
        (3, 2, "gate_up_blocks u8[4, 64, 2, 16]"),
        (4, 1, "gate_up_scales u8[4, 64, 2]"),
        (5, 0, "gate_up_bias f32[4, 64]"),
        (6, 3, "down_blocks u8[4, 64, 1, 16]"),
        (7, 2, "down_scales u8[4, 64, 1]"),
        (8, 1, "down_bias f32[4, 64]"),
    ] {
        let found = node(|types| types[input].1[axis] = 9.into(), 7.0, 1.7);
        assert!(found.contains(expected), "{input}: {found}");
    }
    let half = node(|types| types[0].0 = DType::F16, 7.0, 1.7);
    assert!(half.contains("hidden states f32[n, t, 64]"), "{half}");
    let limit = node(|_| {}, 0.0, 1.7);
    assert!(limit.contains("a positive swiglu_limit"), "{limit}");
    let alpha = node(|_| {}, 7.0, f32::NAN);
    assert!(alpha.contains("a finite swiglu_alpha"), "{alpha}");
}

#[test]
fn blocks_that_are_no_weight_are_not_lowered() {
    let mut b = GraphBuilder::new("one");
    let known = |shape: &[usize]| shape.iter().map(|&n| n.into()).collect::<Vec<Dim>>();
    let inputs = [
        b.input("hidden", DType::F32, known(&[3, 32])),
        b.input("experts", DType::I64, known(&[3, 1])),
        b.input("weights", DType::F32, known(&[3, 1])),
        b.input("blocks", DType::U8, known(&[2, 64, 1, 16])),
        b.input("scales", DType::U8, known(&[2, 64, 1])),
        b.input("bias", DType::F32, known(&[2, 64])),
        b.input("down_blocks", DType::U8, known(&[2, 32, 1, 16])),
        b.input("down_scales", DType::U8, known(&[2, 32, 1])),
        b.input("down_bias", DType::F32, known(&[2, 32])),
    ];
    let op = Op::Mxfp4Experts {
        swiglu_limit: 7.0,
        swiglu_alpha: 1.702,
    };
    let out = b.node("experts", op, &inputs).unwrap();
    b.output("out", out);
    let error = lower_mxfp4_experts(&b.finish().unwrap()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("blocks that are a weight of the graph"),
        "{error}"
    );
}

#[test]
fn a_model_without_experts_has_no_graph_of_them() {
    let error = experts_graph(&llama(1), 0, Runtime::Standard).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
}
