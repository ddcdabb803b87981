//! `mlac::LatentAttention` in graphs: the node, the forms that have it, what is refused, attention alone.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "a test crate has no interface"
)]

mod common;

use common::{converted, gpt_oss, llama, qwen2};
use mlac_graph::builders::{
    DecoderOptions, GqaForm, LayerKernels, MlaForm, Runtime, StepForm, StepOptions, decoder_graph,
    decoder_graph_with_kernels, latent_attention_graph, step_graph,
};
use mlac_graph::ir::{DType, GraphBuilder, MLAC_DOMAIN, Op};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_graph::{Error, ValidGraph};
use mlac_model::{ExpertFormat, ModelConfig};

fn form(runtime: Runtime, dtype: DType) -> DecoderOptions {
    DecoderOptions {
        runtime,
        dtype,
        ..DecoderOptions::default()
    }
}

fn operators(graph: &ValidGraph) -> Vec<&Op> {
    let nodes = graph.graph().nodes().map(|(_, node)| &node.op);
    nodes
        .filter(|op| matches!(op, Op::LatentAttention { .. }))
        .collect()
}

fn type_of(graph: &ValidGraph, name: &str) -> String {
    let graph = graph.graph();
    let ty = graph.input_type(name).or_else(|| graph.output_type(name));
    ty.map_or_else(|| format!("no {name}"), ToString::to_string)
}

#[test]
fn the_form_for_onnx_runtime_keeps_caches_in_place() {
    // Layer 0 has a window, layer 1 has none, layer 2 is not converted.
    let cfg = converted(gpt_oss(3, ExpertFormat::Mxfp4), &[0, 1]);
    let graph = decoder_graph(&cfg, &form(Runtime::OnnxRuntime, DType::F32)).unwrap();
    let widths: Vec<usize> = (0..2)
        .map(|layer| cfg.mla_layer(layer).unwrap().cache_width())
        .collect();
    let window = cfg.sliding_window[0].unwrap();
    for part in ["past", "present"] {
        assert_eq!(
            type_of(&graph, &format!("{part}_latent.0")),
            format!("f32[batch, capacity_w{window}, {}]", widths[0])
        );
        assert_eq!(
            type_of(&graph, &format!("{part}_latent.1")),
            format!("f32[batch, capacity, {}]", widths[1])
        );
    }
    let found = operators(&graph);
    assert_eq!(found.len(), 2);
    for (op, expected) in found.into_iter().zip([Some(window), None]) {
        let &Op::LatentAttention {
            sliding_window,
            plugin,
            ..
        } = op
        else {
            unreachable!()
        };
        assert_eq!((sliding_window, plugin), (expected, None));
    }
}

#[test]
fn one_length_serves_all_layers() {
    let cfg = converted(llama(3), &[0, 1, 2]);
    let graph = decoder_graph(&cfg, &form(Runtime::OnnxRuntime, DType::F32)).unwrap();
    let lengths = graph.graph().nodes().filter(|(_, node)| {
        matches!(node.op, Op::Cast { to: DType::I32 }) && node.name.starts_with("past_lengths")
    });
    assert_eq!(lengths.count(), 1);
    assert_eq!(
        graph.input_names()[..3],
        ["input_ids", "position_ids", "attention_mask"]
    );
}

#[test]
fn the_form_for_plugins_packs_its_inputs() {
    let cfg = converted(gpt_oss(2, ExpertFormat::Dense), &[1]);
    let graph = decoder_graph(&cfg, &form(Runtime::TensorRtPlugin, DType::F16)).unwrap();
    assert_eq!(type_of(&graph, "past_lengths"), "i32[batch]");
    assert!(!graph.input_names().contains(&"attention_mask"));
    let &Op::LatentAttention { plugin, .. } = operators(&graph)[0] else {
        unreachable!()
    };
    assert_eq!(plugin, Some(2), "sinks and nothing else");
    let attributes = operators(&graph)[0].attributes();
    let names: Vec<&str> = attributes.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        [
            "kv_lora_rank",
            "scale",
            "sliding_window",
            "plugin_version",
            "plugin_namespace",
            "optional_inputs",
            "with_lse"
        ]
    );
}

/// The written node of a plugin has no empty inputs; for ONNX Runtime the left-out ones are empty.
#[test]
fn left_out_inputs_are_empty_or_packed() {
    let written = |plugin: Option<u8>| -> Vec<u8> {
        let mut b = GraphBuilder::new("one");
        let query = b.input(
            "query",
            DType::F16,
            vec![1.into(), 1.into(), 2.into(), 6.into()],
        );
        let rows = b.input("rows", DType::F16, vec![1.into(), 1.into(), 6.into()]);
        let cache = b.input("cache", DType::F16, vec![1.into(), 8.into(), 6.into()]);
        let past = b.input("lengths", DType::I32, vec![1.into()]);
        let sinks = b.input("sinks", DType::F32, vec![2.into()]);
        let op = Op::LatentAttention {
            kv_lora_rank: 4,
            scale: 0.5,
            sliding_window: None,
            plugin,
            kernels: plugin.is_none().then(|| [7, 1, 0xff].into()),
        };
        let inputs = [
            Some(query),
            Some(rows),
            Some(cache),
            Some(past),
            None,
            Some(sinks),
        ];
        let out = b.apply("attention", op, &inputs).unwrap();
        b.output("sums", out[0]);
        b.output("cache_out", out[1]);
        to_bytes(&b.finish().unwrap(), &MemoryWeights::new()).unwrap()
    };
    // NodeProto: input = 1, so a name is 0x0a, its length, its bytes.
    let names = |middle: &[u8]| [b"\x0a\x07lengths", middle, b"\x0a\x05sinks"].concat();
    let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|at| at == part);
    assert!(holds(&written(None), &names(b"\x0a\x00")));
    assert!(holds(&written(Some(2)), &names(b"")));
    assert!(holds(&written(Some(2)), b"plugin_namespace"));
    assert!(!holds(&written(None), b"plugin"));
    // AttributeProto: name = 1, s = 4.
    let kernels = b"\x0a\x07kernels\x22\x03\x07\x01\xff";
    assert!(holds(&written(None), kernels));
    assert!(!holds(&written(Some(2)), b"kernels"));
    assert!(holds(&written(None), MLAC_DOMAIN.as_bytes()));
}

#[test]
fn what_the_operator_does_not_take_is_an_error_of_the_node() {
    let node = |rank: usize, scale: f32, rows: usize, plugin: Option<u8>| -> String {
        let mut b = GraphBuilder::new("one");
        let query = b.input(
            "query",
            DType::F32,
            vec!["n".into(), "t".into(), 2.into(), 6.into()],
        );
        let new = b.input(
            "rows",
            DType::F32,
            vec!["n".into(), "t".into(), rows.into()],
        );
        let cache = b.input("cache", DType::F32, vec!["n".into(), "c".into(), 6.into()]);
        let past = b.input("lengths", DType::I32, vec!["n".into()]);
        let op = Op::LatentAttention {
            kv_lora_rank: rank,
            scale,
            sliding_window: None,
            plugin,
            kernels: None,
        };
        let inputs = [query, new, cache, past].map(Some);
        match b.apply("attention", op, &inputs) {
            Ok(out) => b.ty(out[0]).to_string() + " " + &b.ty(out[1]).to_string(),
            Err(error) => error.to_string(),
        }
    };
    assert_eq!(node(4, 0.5, 6, None), "f32[n, t, 2, 4] f32[n, c, 6]");
    assert!(
        node(7, 0.5, 6, None).contains("expected a query of 7"),
        "{}",
        node(7, 0.5, 6, None)
    );
    assert!(node(0, 0.5, 6, None).contains("at least 1"));
    assert!(node(4, 0.0, 6, None).contains("a positive scale"));
    assert!(node(4, 0.5, 5, None).contains("new rows of shape [n, t, 6]"));
    assert!(node(4, 0.5, 6, Some(2)).contains("optional inputs 0 declared"));
}

#[test]
fn forms_that_do_not_fit_are_refused() {
    let refusal =
        |options: DecoderOptions| match decoder_graph(&converted(llama(1), &[0]), &options) {
            Err(Error::Refused(refusal)) => refusal.to_string(),
            other => panic!("not refused: {other:?}"),
        };
    let expanded = DecoderOptions {
        mla_form: MlaForm::Expanded,
        ..form(Runtime::OnnxRuntime, DType::F32)
    };
    assert!(refusal(expanded).starts_with("form of the MLA layers: expected absorbed"));
    let wide = form(Runtime::TensorRtPlugin, DType::F32);
    assert!(refusal(wide).contains("expected f16, which its kernels take, found f32"));
}

/// The attention alone has the decoder's caches in every form, and only the form that asks for the node has it.
#[test]
fn attention_alone_has_the_caches_of_its_form() {
    let configurations: [ModelConfig; 3] = [
        converted(llama(2), &[1]),
        converted(qwen2(2), &[1]),
        converted(gpt_oss(2, ExpertFormat::Dense), &[1]),
    ];
    let runtimes = [
        (Runtime::Standard, DType::F32),
        (Runtime::TensorRt, DType::F16),
        (Runtime::OnnxRuntime, DType::F32),
        (Runtime::TensorRtPlugin, DType::F16),
    ];
    for cfg in &configurations {
        for (runtime, dtype) in runtimes {
            let options = form(runtime, dtype);
            let alone = latent_attention_graph(cfg, 1, &options).unwrap();
            assert_eq!(
                operators(&alone).len(),
                usize::from(runtime.has_latent_attention())
            );
            let whole = decoder_graph(cfg, &options).unwrap();
            for name in ["past_latent.1", "present_latent.1"] {
                assert_eq!(type_of(&alone, name), type_of(&whole, name));
            }
            let (heads, shape) = (cfg.num_attention_heads, cfg.mla_layer(1).unwrap());
            assert_eq!(
                type_of(&alone, "sums"),
                format!("{dtype}[batch, seq, {heads}, {}]", shape.kv_lora_rank)
            );
            assert!(!alone.input_names().contains(&"position_ids"));
            assert_eq!(
                alone.input_names().contains(&"attention_mask"),
                runtime != Runtime::TensorRtPlugin
            );
        }
    }
}

#[test]
fn attention_alone_is_of_converted_layers_in_absorbed_form() {
    let cfg = converted(llama(2), &[1]);
    let refusal = |layer, mla_form| {
        let options = DecoderOptions {
            mla_form,
            ..DecoderOptions::default()
        };
        match latent_attention_graph(&cfg, layer, &options) {
            Err(Error::Refused(refusal)) => refusal.to_string(),
            other => panic!("not refused: {other:?}"),
        }
    };
    assert_eq!(
        refusal(0, MlaForm::Absorbed),
        "attention of layer 0 over latents: expected a converted layer, found one that is not converted; fix: choose one that is"
    );
    assert!(refusal(1, MlaForm::Expanded).contains("found the expanded form"));
}

#[test]
fn a_step_by_the_operator() {
    let options = StepOptions {
        form: StepForm::MlaOperator,
        dtype: DType::F32,
        product: mlac_graph::builders::CacheProduct::default(),
    };
    let graph = step_graph(&converted(llama(1), &[0]), 0, &options, None).unwrap();
    insta::assert_snapshot!(graph.graph().to_string());
}

#[test]
fn the_form_for_the_cuda_provider_brings_kernels_and_has_neither_mask_nor_rings() {
    // Layer 0 has a window, layer 1 has none, layer 2 is not converted.
    let cfg = converted(gpt_oss(3, ExpertFormat::Mxfp4), &[0, 1]);
    let options = form(Runtime::OnnxRuntimeCuda, DType::F16);
    let kernels: LayerKernels = (0..2)
        .map(|layer| (layer, [7_u8, layer as u8, 0xff].into()))
        .collect();
    let graph = decoder_graph_with_kernels(&cfg, &options, kernels.clone()).unwrap();
    assert_eq!(type_of(&graph, "past_lengths"), "i32[batch]");
    assert!(!graph.input_names().contains(&"attention_mask"));
    for layer in 0..2 {
        let width = cfg.mla_layer(layer).unwrap().cache_width();
        for part in ["past", "present"] {
            assert_eq!(
                type_of(&graph, &format!("{part}_latent.{layer}")),
                format!("f16[batch, capacity, {width}]")
            );
        }
    }
    let found = operators(&graph);
    assert_eq!(found.len(), 2);
    for (layer, op) in found.into_iter().enumerate() {
        let Op::LatentAttention {
            sliding_window,
            plugin,
            kernels: brought,
            ..
        } = op
        else {
            unreachable!()
        };
        assert_eq!(
            (*sliding_window, *plugin),
            (cfg.sliding_window[layer], None)
        );
        assert_eq!(brought.as_ref(), kernels.get(&layer));
    }
    // Experts are in standard operators: those of mlac are for a CPU.
    let mut ops = graph.graph().nodes().map(|(_, node)| &node.op);
    assert!(!ops.any(|op| matches!(op, Op::Mxfp4Experts { .. })));
}

#[test]
fn what_the_cuda_provider_cannot_run_is_refused() {
    let refusal = |cfg: &ModelConfig, options: DecoderOptions, kernels: LayerKernels| {
        match decoder_graph_with_kernels(cfg, &options, kernels) {
            Err(Error::Refused(refusal)) => refusal.to_string(),
            other => panic!("not refused: {other:?}"),
        }
    };
    let cfg = converted(llama(2), &[0, 1]);
    let options = form(Runtime::OnnxRuntimeCuda, DType::F16);
    let one: LayerKernels = std::iter::once((0, [1].into())).collect();
    let said = refusal(&cfg, options, one);
    assert!(
        said.starts_with("layer 1 of a graph for the CUDA"),
        "{said}"
    );
    let wide = form(Runtime::OnnxRuntimeCuda, DType::F32);
    let said = refusal(&cfg, wide, LayerKernels::new());
    assert!(said.contains("expected f16, which its kernels take, found f32"));
    for runtime in [Runtime::OnnxRuntimeCuda, Runtime::TensorRtPlugin] {
        let said = refusal(&llama(1), form(runtime, DType::F16), LayerKernels::new());
        assert!(
            said.contains("expected converted layers, found none"),
            "{said}"
        );
    }
    let operator = DecoderOptions {
        gqa_form: GqaForm::GroupQueryAttention,
        ..options
    };
    let said = refusal(&cfg, operator, LayerKernels::new());
    assert!(said.contains("expected primitives"), "{said}");
}
