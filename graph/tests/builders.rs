//! What graphs promise to their callers, and what the builders refuse.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    reason = "a test crate has no interface"
)]

mod common;

use std::collections::BTreeSet;

use common::{converted, gpt_oss, llama, qwen2, qwen3, stored};
use mlac_graph::{
    Error,
    builders::{
        CacheProduct, DecoderOptions, GqaForm, LayerOptions, MlaForm, Runtime, StepForm,
        StepOptions, Tap, block_graph, decoder_graph, decoder_graph_as_stored, layer_graph,
        layer_graph_as_stored, step_graph,
    },
    ir::{DType, MICROSOFT_DOMAIN},
    onnx::{MemoryWeights, Overlay},
};
use mlac_model::{Dtype, ExpertFormat, ModelConfig, checkpoint::expected_tensors};

fn configurations() -> Vec<ModelConfig> {
    let biased = ModelConfig {
        o_bias: true,
        mlp_bias: true,
        ..qwen2(2)
    };
    vec![
        llama(2),
        biased.clone(),
        qwen3(2),
        converted(llama(3), &[0, 2]),
        converted(biased, &[0, 1]),
        converted(qwen3(3), &[1]),
        gpt_oss(3, ExpertFormat::Mxfp4),
        gpt_oss(1, ExpertFormat::Dense),
        converted(gpt_oss(3, ExpertFormat::Dense), &[0, 1]),
    ]
}

fn all_options() -> Vec<DecoderOptions> {
    let mut all = vec![];
    for dtype in [DType::F32, DType::F16] {
        for mla_form in [MlaForm::Absorbed, MlaForm::Expanded] {
            for product in [CacheProduct::QueryRows, CacheProduct::CacheRows] {
                for (runtime, gqa_form) in [
                    (Runtime::Standard, GqaForm::Primitives),
                    (Runtime::Standard, GqaForm::GroupQueryAttention),
                    (Runtime::TensorRt, GqaForm::Primitives),
                ] {
                    all.push(DecoderOptions {
                        dtype,
                        mla_form,
                        gqa_form,
                        runtime,
                        product,
                    });
                }
            }
        }
    }
    all
}

#[test]
fn every_form_reads_exactly_the_tensors_of_the_checkpoint() {
    for cfg in configurations() {
        let expected: BTreeSet<(String, Vec<usize>)> = expected_tensors(&cfg).into_iter().collect();
        for options in all_options() {
            let graph = decoder_graph(&cfg, &options).unwrap();
            let found: BTreeSet<(String, Vec<usize>)> = graph
                .graph()
                .weights()
                .map(|w| (w.name.clone(), w.source_shape.clone()))
                .collect();
            assert_eq!(found, expected, "{options:?}");
        }
    }
}

#[test]
fn every_form_has_the_same_interface() {
    for cfg in configurations() {
        for options in all_options() {
            let graph = decoder_graph(&cfg, &options).unwrap();
            let (graph, dtype) = (graph.graph(), options.dtype);
            let input = |name: &str| graph.input_type(name).unwrap().to_string();
            let output = |name: &str| graph.output_type(name).unwrap().to_string();
            assert_eq!(input("input_ids"), "i64[batch, seq]");
            assert_eq!(input("position_ids"), "i64[batch, seq]");
            assert_eq!(input("attention_mask"), "i64[batch, past+seq]");
            assert_eq!(output("logits"), format!("{dtype}[batch, seq, 97]"));
            let (groups, d) = (cfg.num_key_value_heads, cfg.head_dim);
            let mut caches = 0;
            for layer in 0..cfg.num_hidden_layers {
                let (rows, kept) = match cfg.sliding_window[layer] {
                    None => ("past".to_owned(), "past+seq".to_owned()),
                    Some(w) => (format!("past_w{w}"), format!("present_w{w}")),
                };
                if let Some(mla) = cfg.mla_layer(layer) {
                    let w = mla.cache_width();
                    let past = input(&format!("past_latent.{layer}"));
                    let present = output(&format!("present_latent.{layer}"));
                    assert_eq!(past, format!("{dtype}[batch, {rows}, {w}]"));
                    assert_eq!(present, format!("{dtype}[batch, {kept}, {w}]"));
                    caches += 1;
                    continue;
                }
                for part in ["key", "value"] {
                    let past = input(&format!("past_key_values.{layer}.{part}"));
                    let present = output(&format!("present.{layer}.{part}"));
                    assert_eq!(past, format!("{dtype}[batch, {groups}, {rows}, {d}]"));
                    assert_eq!(present, format!("{dtype}[batch, {groups}, {kept}, {d}]"));
                    caches += 1;
                }
            }
            assert_eq!(graph.inputs().len(), 3 + caches);
            assert_eq!(graph.outputs().len(), 1 + caches);
        }
    }
}

#[test]
fn tensorrt_gets_fused_attention_and_no_foreign_operator() {
    let count = |cfg: &ModelConfig, dtype: DType, name: &str| {
        let options = DecoderOptions {
            dtype,
            runtime: Runtime::TensorRt,
            ..DecoderOptions::default()
        };
        let graph = decoder_graph(cfg, &options).unwrap();
        assert!(
            graph
                .graph()
                .nodes()
                .all(|(_, n)| n.op.domain() != MICROSOFT_DOMAIN)
        );
        graph
            .graph()
            .nodes()
            .filter(|(_, n)| n.op.name() == name)
            .count()
    };
    let attention = |cfg: &ModelConfig, dtype: DType| {
        (count(cfg, dtype, "Attention"), count(cfg, dtype, "Softmax"))
    };
    let mut cfg = converted(llama(3), &[0, 1]);
    assert_eq!(count(&cfg, DType::F16, "RotaryEmbedding"), 0);
    // The latent rows of layer 0: 16 wide, then 264 (too wide), 20 (not a multiple of 8).
    for (rank, expected) in [(12, (3, 0)), (260, (2, 1)), (16, (2, 1))] {
        mla(&mut cfg).kv_lora_rank = rank;
        assert_eq!(attention(&cfg, DType::F16), expected, "rank {rank}");
        assert_eq!(attention(&cfg, DType::F32), (0, 3), "rank {rank}");
    }
}

#[test]
fn masks_and_tables_are_shared() {
    let mut cfg = llama(4);
    cfg.sliding_window = vec![None, Some(5), None, Some(5)];
    let graph = decoder_graph(&cfg, &DecoderOptions::default()).unwrap();
    let count = |name| {
        graph
            .graph()
            .nodes()
            .filter(|(_, n)| n.op.name() == name)
            .count()
    };
    assert_eq!(count("Where"), 2);
    assert_eq!(count("Cos"), 1);
}

#[test]
fn a_layer_computes_only_what_its_taps_need() {
    let options = |taps: &[Tap]| LayerOptions {
        taps: taps.to_vec(),
        dtype: DType::F32,
        cached: false,
    };
    let graph = layer_graph(&llama(2), 1, &options(&[Tap::Key, Tap::AttnIn])).unwrap();
    assert_eq!(graph.input_names(), ["hidden"]);
    assert_eq!(graph.output_names(), ["key", "attn_in"]);
    assert_eq!(
        graph.graph().output_type("key").unwrap().to_string(),
        "f32[batch, seq, 2, 8]"
    );
    let weights: Vec<&str> = graph.graph().weights().map(|w| w.name.as_str()).collect();
    assert_eq!(
        weights,
        [
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.self_attn.k_proj.weight"
        ]
    );
    let graph = layer_graph(&llama(2), 1, &options(&[Tap::HiddenOut])).unwrap();
    assert_eq!(graph.input_names(), ["hidden", "position_ids"]);
}

fn refusal<T>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refused(refusal)) => refusal.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn contradictions_in_a_configuration_are_refused() {
    type Change = fn(&mut ModelConfig);
    let cases: [(Change, &str); 12] = [
        (|c| c.hidden_size = 0, "hidden_size"),
        (|c| c.vocab_size = usize::MAX, "vocab_size"),
        (|c| c.num_key_value_heads = 4, "num_key_value_heads"),
        (|c| c.head_dim = 7, "head_dim"),
        (|c| c.sliding_window = vec![], "sliding_window"),
        (|c| c.sliding_window = vec![Some(0), None], "sliding_window"),
        (
            |c| c.mla.as_mut().unwrap().attention_scale = f64::NAN,
            "attention_scale",
        ),
        (
            |c| {
                let layers = &mut c.mla.as_mut().unwrap().layers;
                let shape = layers[&0];
                layers.insert(2, shape);
            },
            "mla_layers",
        ),
        (|c| mla(c).kv_lora_rank = 0, "kv_lora_rank"),
        (|c| mla(c).qk_rope_head_dim = 3, "qk_rope_head_dim"),
        (
            |c| mla(c).encoder = mlac_model::MlaEncoder::NormedKey,
            "mla_encoder",
        ),
        (
            |c| {
                c.qk_norm = true;
                mla(c).encoder = mlac_model::MlaEncoder::NormedKey;
                mla(c).qk_nope_head_dim = 6;
            },
            "qk_nope_head_dim",
        ),
    ];
    for (change, key) in cases {
        let mut cfg = converted(llama(2), &[0]);
        change(&mut cfg);
        let text = refusal(decoder_graph(&cfg, &DecoderOptions::default()));
        let subject = format!("configuration key {key}: expected ");
        assert!(text.starts_with(&subject), "{key}: {text}");
    }
}

fn mla(cfg: &mut ModelConfig) -> &mut mlac_model::MlaLayer {
    cfg.mla.as_mut().unwrap().layers.get_mut(&0).unwrap()
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let options = DecoderOptions {
        gqa_form: GqaForm::GroupQueryAttention,
        ..DecoderOptions::default()
    };
    let tensorrt = DecoderOptions {
        runtime: Runtime::TensorRt,
        ..options
    };
    assert_eq!(
        refusal(decoder_graph(&llama(1), &tensorrt)),
        "form of the GQA layers: expected operators that TensorRT knows, found com.microsoft::GroupQueryAttention; fix: use primitives for TensorRT"
    );
    let narrow = ModelConfig {
        head_dim: 12,
        ..llama(1)
    };
    assert_eq!(
        refusal(decoder_graph(&narrow, &options)),
        "form of the GQA layers: expected a head_dim that 8 divides, which com.microsoft::GroupQueryAttention needs, found 12; fix: use primitives"
    );
    let integers = DecoderOptions {
        dtype: DType::I64,
        ..DecoderOptions::default()
    };
    assert_eq!(
        refusal(decoder_graph(&llama(1), &integers)),
        "element type of the graph: expected f32 or f16, found i64; fix: choose a floating point type"
    );
    let step = StepOptions {
        form: StepForm::GqaOperator,
        dtype: DType::F32,
        product: CacheProduct::default(),
    };
    let cfg = converted(llama(1), &[0]);
    assert_eq!(
        refusal(step_graph(&cfg, 0, &step, None)),
        "attention of layer 0: expected the MLA form, the layer is converted, found gqa_operator; fix: choose a layer of that form"
    );
    assert_eq!(
        refusal(step_graph(&cfg, 1, &step, None)),
        "layer of the graph: expected one of the model's 1, counted from 0, found 1; fix: name a layer of the model"
    );
}

#[test]
fn taps_that_do_not_exist_are_refused() {
    let layer = |cfg: &ModelConfig, taps: &[Tap]| {
        let options = LayerOptions {
            taps: taps.to_vec(),
            dtype: DType::F32,
            cached: false,
        };
        refusal(layer_graph(cfg, 0, &options))
    };
    assert_eq!(
        layer(&llama(1), &[]),
        "taps of layer 0: expected at least one tap, found none; fix: name a value to look at"
    );
    assert_eq!(
        layer(&llama(1), &[Tap::Key, Tap::Key]),
        "taps of layer 0: expected distinct taps, found key; fix: name each tap once"
    );
    assert_eq!(
        layer(&converted(llama(1), &[0]), &[Tap::Heads, Tap::Key]),
        "taps of layer 0: expected taps that a converted layer has, found key; fix: tap the layer of the original model"
    );
}

#[test]
fn a_block_reads_its_layer_and_has_the_decoders_caches() {
    for cfg in configurations() {
        for options in all_options() {
            for layer in 0..cfg.num_hidden_layers {
                let block = block_graph(&cfg, layer, &options, None).unwrap();
                let prefix = format!("model.layers.{layer}.");
                let expected: BTreeSet<String> = expected_tensors(&cfg)
                    .into_iter()
                    .map(|(name, _)| name)
                    .filter(|name| name.starts_with(&prefix))
                    .collect();
                let weights = block.graph().weights();
                let found: BTreeSet<String> = weights.map(|w| w.name.clone()).collect();
                assert_eq!(found, expected);
                let whole = decoder_graph(&cfg, &options).unwrap();
                let inputs = block.input_names();
                assert_eq!(inputs[..3], ["hidden", "position_ids", "attention_mask"]);
                for name in &inputs[1..] {
                    let ty = block.graph().input_type(name);
                    assert_eq!(ty, whole.graph().input_type(name), "{name}");
                }
                let outputs = block.output_names();
                assert_eq!(outputs[0], "hidden_out");
                for name in &outputs[1..] {
                    let ty = block.graph().output_type(name);
                    assert_eq!(ty, whole.graph().output_type(name), "{name}");
                }
            }
        }
    }
}

#[test]
fn stored_weights_keep_their_type_and_everything_else_stays() {
    for cfg in configurations() {
        let source = stored(&cfg, Dtype::BF16);
        let tensors: BTreeSet<String> = expected_tensors(&cfg).into_iter().map(|t| t.0).collect();
        for options in all_options() {
            let graph = decoder_graph_as_stored(&cfg, &options, &source).unwrap();
            let plain = decoder_graph(&cfg, &options).unwrap();
            if options.dtype == DType::F16 {
                assert_eq!(graph, plain);
                continue;
            }
            let found: BTreeSet<String> = graph.graph().weights().map(|w| w.name.clone()).collect();
            assert_eq!(found, tensors);
            for w in graph.graph().weights().filter(|w| w.source_shape.len() > 1) {
                assert_ne!(w.dtype, DType::F32, "{} is kept", w.name);
            }
            assert_eq!(graph.input_names(), plain.input_names());
            assert_eq!(graph.output_names(), plain.output_names());
        }
        let options = LayerOptions {
            taps: vec![Tap::HiddenOut],
            dtype: DType::F32,
            cached: false,
        };
        // What lies on top has numbers only, which stay f32.
        let mut top = MemoryWeights::new();
        let o_proj = "model.layers.0.self_attn.o_proj.weight";
        let (_, shape) = expected_tensors(&cfg)
            .into_iter()
            .find(|t| t.0 == o_proj)
            .unwrap();
        top.insert(o_proj, &shape, vec![0.0; shape.iter().product()])
            .unwrap();
        let source = Overlay::new(&top, &source);
        let graph = layer_graph_as_stored(&cfg, 0, &options, &source).unwrap();
        for w in graph.graph().weights().filter(|w| w.source_shape.len() > 1) {
            assert_eq!(w.dtype == DType::F32, w.name == o_proj, "{}", w.name);
        }
    }
}

#[test]
fn experts_are_computed_in_the_form_of_the_runtime() {
    let count = |runtime, mla_form| {
        let options = DecoderOptions {
            runtime,
            mla_form,
            ..DecoderOptions::default()
        };
        let cfg = gpt_oss(1, ExpertFormat::Mxfp4);
        let graph = decoder_graph(&cfg, &options).unwrap();
        ["Loop", "Unique", "TopK"].map(|name| {
            let nodes = graph.graph().nodes();
            nodes.filter(|(_, n)| n.op.name() == name).count()
        })
    };
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        assert_eq!(count(Runtime::Standard, form), [1, 1, 1]);
    }
    assert_eq!(count(Runtime::TensorRt, MlaForm::Absorbed), [0, 0, 1]);
    assert_eq!(count(Runtime::TensorRt, MlaForm::Expanded), [1, 0, 1]);
}

#[test]
fn contradictions_about_experts_are_refused() {
    type Change = fn(&mut ModelConfig);
    let cases: [(Change, &str); 6] = [
        (
            |c| c.moe.as_mut().unwrap().num_experts = 0,
            "num_local_experts",
        ),
        (
            |c| c.moe.as_mut().unwrap().experts_per_token = 6,
            "num_experts_per_tok",
        ),
        (
            |c| c.moe.as_mut().unwrap().swiglu_limit = 0.0,
            "swiglu_limit",
        ),
        (
            |c| c.moe.as_mut().unwrap().swiglu_alpha = f64::NAN,
            "swiglu_alpha",
        ),
        (|c| c.hidden_size = 48, "hidden_size"),
        (
            |c| {
                c.qk_norm = true;
                *c = converted(c.clone(), &[0]);
            },
            "mla_encoder",
        ),
    ];
    for (change, key) in cases {
        let mut cfg = gpt_oss(2, ExpertFormat::Mxfp4);
        change(&mut cfg);
        let text = refusal(decoder_graph(&cfg, &DecoderOptions::default()));
        let subject = format!("configuration key {key}: expected ");
        assert!(text.starts_with(&subject), "{key}: {text}");
    }
}
