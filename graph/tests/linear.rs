//! `mlac::Linear16` in graphs: which linear layers are the node, what it takes, the lowering.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "a test crate has no interface"
)]

mod common;

use common::{converted, gpt_oss, llama, qwen2, stored};
use mlac_graph::ValidGraph;
use mlac_graph::builders::{
    CacheProduct, DecoderOptions, Runtime, StepForm, StepOptions, block_graph,
    decoder_graph_as_stored, step_graph,
};
use mlac_graph::ir::{DType, Dim, GraphBuilder, Op};
use mlac_graph::onnx::{MemoryWeights, Overlay};
use mlac_graph::passes::lower_linear16;
use mlac_model::{Dtype, ExpertFormat};

fn count(graph: &ValidGraph, name: &str) -> usize {
    let nodes = graph.graph().nodes();
    nodes.filter(|(_, node)| node.op.name() == name).count()
}

fn form(runtime: Runtime, dtype: DType) -> DecoderOptions {
    DecoderOptions {
        runtime,
        dtype,
        ..DecoderOptions::default()
    }
}

#[test]
fn only_the_form_for_onnx_runtime_in_f32_has_the_node() {
    let cfg = converted(llama(2), &[1]);
    let linear = |stored_as, runtime, dtype| {
        let source = stored(&cfg, stored_as);
        let graph = decoder_graph_as_stored(&cfg, &form(runtime, dtype), &source).unwrap();
        count(&graph, "Linear16")
    };
    // q, k, v, o and q, row, o; gate, up, down twice; the head.
    for stored_as in [Dtype::BF16, Dtype::F16] {
        assert_eq!(linear(stored_as, Runtime::OnnxRuntime, DType::F32), 14);
        assert_eq!(linear(stored_as, Runtime::Standard, DType::F32), 0);
    }
    assert_eq!(linear(Dtype::F32, Runtime::OnnxRuntime, DType::F32), 0);
    assert_eq!(linear(Dtype::BF16, Runtime::OnnxRuntime, DType::F16), 0);
    assert_eq!(linear(Dtype::BF16, Runtime::TensorRt, DType::F16), 0);
}

/// The checkpoint's layout, in one tensor for the lookup and the head where they are tied.
#[test]
fn weights_are_the_checkpoints() {
    for tied in [false, true] {
        let mut cfg = qwen2(1);
        cfg.tie_word_embeddings = tied;
        let source = stored(&cfg, Dtype::BF16);
        let options = form(Runtime::OnnxRuntime, DType::F32);
        let graph = decoder_graph_as_stored(&cfg, &options, &source).unwrap();
        let mut names: Vec<_> = graph.graph().weights().map(|w| &w.name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "a tensor is there twice");
        assert_eq!(count(&graph, "Gemm"), 0);
        for weight in graph.graph().weights().filter(|w| w.shape.len() > 1) {
            assert_eq!(weight.dtype, DType::BF16, "{}", weight.name);
            assert_eq!(weight.shape, weight.source_shape, "{}", weight.name);
        }
    }
}

#[test]
fn weights_in_f32_stay_products() {
    let cfg = llama(1);
    let below = stored(&cfg, Dtype::BF16);
    let name = "model.layers.0.self_attn.o_proj.weight";
    let shape = [cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim];
    let mut top = MemoryWeights::new();
    let numbers = vec![0.0; shape.iter().product()];
    top.insert(name, &shape, numbers).unwrap();
    let source = Overlay::new(&top, &below);
    let options = form(Runtime::OnnxRuntime, DType::F32);
    let graph = decoder_graph_as_stored(&cfg, &options, &source).unwrap();
    assert_eq!(count(&graph, "Linear16"), 7);
    let o = graph.graph().weights().find(|w| w.name == name).unwrap();
    assert_eq!(
        (o.dtype, &o.shape[..]),
        (DType::F32, &[shape[1], shape[0]][..])
    );
}

#[test]
fn a_step_has_what_the_decoder_has() {
    let step = |cfg: &_, form| {
        let options = StepOptions {
            form,
            dtype: DType::F32,
            product: CacheProduct::default(),
        };
        let source = stored(cfg, Dtype::BF16);
        let graph = step_graph(cfg, 0, &options, Some(&source)).unwrap();
        count(&graph, "Linear16")
    };
    let (gqa, mla) = (llama(1), converted(llama(1), &[0]));
    assert_eq!(step(&gqa, StepForm::GqaPrimitives), 0);
    assert_eq!(step(&gqa, StepForm::GqaOperator), 0);
    assert_eq!(step(&gqa, StepForm::GqaOperatorStored), 4);
    assert_eq!(step(&mla, StepForm::MlaAbsorbed), 0);
    assert_eq!(step(&mla, StepForm::MlaOperator), 3);
}

#[test]
fn the_lowering_is_the_standard_form() {
    let cfg = gpt_oss(1, ExpertFormat::Dense);
    let source = stored(&cfg, Dtype::BF16);
    let block = |runtime| {
        let options = form(runtime, DType::F32);
        block_graph(&cfg, 0, &options, Some(&source)).unwrap()
    };
    let node = block(Runtime::OnnxRuntime);
    assert_eq!(count(&node, "Linear16"), 5);
    let (lowered, standard) = (lower_linear16(&node).unwrap(), block(Runtime::Standard));
    let names = |graph: &ValidGraph| {
        let nodes = graph.graph().nodes();
        nodes.map(|(_, node)| node.op.name()).collect::<Vec<_>>()
    };
    assert_eq!(names(&lowered), names(&standard));
    let weights = |graph: &ValidGraph| {
        let mut all: Vec<_> = graph.graph().weights().cloned().collect();
        all.sort();
        all
    };
    assert_eq!(weights(&lowered), weights(&standard));
}

#[test]
fn a_block_for_onnx_runtime() {
    let cfg = converted(gpt_oss(1, ExpertFormat::Mxfp4), &[0]);
    let options = form(Runtime::OnnxRuntime, DType::F32);
    let source = stored(&cfg, Dtype::BF16);
    let graph = block_graph(&cfg, 0, &options, Some(&source)).unwrap();
    insta::assert_snapshot!(graph.graph().to_string());
}

/// A node with these inputs.
fn node(types: &[(DType, &[Dim])]) -> String {
    let mut b = GraphBuilder::new("one");
    let inputs: Vec<_> = types
        .iter()
        .enumerate()
        .map(|(i, (dtype, shape))| b.input(&format!("input_{i}"), *dtype, shape.to_vec()))
        .collect();
    match b.node("linear", Op::Linear16, &inputs) {
        Ok(out) => b.ty(out).to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_the_operator_does_not_take_is_an_error_of_the_node() {
    let x: (DType, &[Dim]) = (DType::F32, &["n".into(), "t".into(), 6.into()]);
    let weight: (DType, &[Dim]) = (DType::BF16, &[4.into(), 6.into()]);
    let bias: (DType, &[Dim]) = (DType::F32, &[4.into()]);
    assert_eq!(node(&[x, weight]), "f32[n, t, 4]");
    assert_eq!(node(&[x, (DType::F16, weight.1), bias]), "f32[n, t, 4]");
    let flat: &[Dim] = &[6.into()];
    for (inputs, expected) in [
        (&[x][..], "2 to 3 inputs"),
        (&[(DType::F16, x.1), weight], "x f32[tokens.., in]"),
        (&[(DType::F32, flat), weight], "x f32[tokens.., in]"),
        (
            &[x, (DType::F32, weight.1)],
            "weight [out, in], bf16 or f16",
        ),
        (&[x, (DType::BF16, flat)], "weight [out, in], bf16 or f16"),
        (
            &[x, (DType::BF16, &[6.into(), 4.into()])],
            "weight [out, 6]",
        ),
        (&[x, weight, (DType::F32, flat)], "bias f32[4]"),
        (&[x, weight, (DType::BF16, bias.1)], "bias f32[4]"),
    ] {
        let found = node(inputs);
        assert!(found.contains(expected), "{expected}: {found}");
    }
}

#[test]
fn a_weight_that_is_a_value_is_not_lowered() {
    let mut b = GraphBuilder::new("one");
    let x = b.input("x", DType::F32, vec!["n".into(), 6.into()]);
    let weight = b.input("weight", DType::BF16, vec![4.into(), 6.into()]);
    let out = b.node("linear", Op::Linear16, &[x, weight]).unwrap();
    b.output("out", out);
    let error = lower_linear16(&b.finish().unwrap()).unwrap_err();
    assert!(
        error.to_string().contains("a weight of the graph"),
        "{error}"
    );
}
