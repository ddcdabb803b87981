//! TensorRT for RTX builds GPT-OSS's decoder layers at their published sizes: grouped and latent
//! attention, sinks, a window, biases, MXFP4 experts. Nothing is run: there is no GPU.

use std::fs;
use std::path::Path;

use mlac_engines::tensorrt::{BuildOptions, BuildReport, Product, Profiles, Target, build_engines};
use mlac_graph::builders::{DecoderOptions, MlaForm, Runtime, block_graph};
use mlac_graph::ir::DType;
use mlac_graph::onnx::{MemoryWeights, write_folder};
use mlac_model::checkpoint::expected_tensors;
use mlac_model::{Dtype, MlaConfig, MlaEncoder, MlaLayer, ModelConfig};
use mlac_tests::cases::Cases;
use mlac_tests::{Outcome, text};
use serde_json::json;

/// GPT-OSS-20B with two layers, the first of which slides, and fewer experts and tokens.
fn gpt_oss(experts: usize) -> ModelConfig {
    let json = json!({
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 256, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "num_local_experts": experts, "num_experts_per_tok": 4,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 150_000, "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": false,
        },
        "quantization_config": { "quant_method": "mxfp4" },
    });
    ModelConfig::from_json(&json, "config.json").expect("a valid configuration")
}

/// The same with every layer converted.
fn converted(source: ModelConfig, kv_lora_rank: usize, qk_rope_head_dim: usize) -> ModelConfig {
    let layer = MlaLayer {
        kv_lora_rank,
        qk_rope_head_dim,
        qk_nope_head_dim: source.head_dim,
        v_head_dim: source.head_dim,
        encoder: MlaEncoder::KeptQuery,
    };
    ModelConfig {
        mla: Some(MlaConfig {
            layers: (0..source.num_hidden_layers).map(|i| (i, layer)).collect(),
            attention_scale: (source.head_dim as f64).powf(-0.5),
            o_bias: true,
        }),
        ..source
    }
}

/// Small numbers of every tensor of one layer.
fn weights(config: &ModelConfig, layer: usize) -> Outcome<MemoryWeights> {
    let mut weights = MemoryWeights::new();
    let prefix = format!("model.layers.{layer}.");
    for (name, shape) in expected_tensors(config) {
        if !name.starts_with(&prefix) {
            continue;
        }
        let count: usize = shape.iter().product();
        // Of period 251, a prime, so that no two rows of a matrix are equal.
        let byte = |i: usize| (i * 83 % 251) as u8;
        if name.ends_with("_blocks") || name.ends_with("_scales") {
            // Scales of 2^-17 to 2^-3 leave every product small.
            let scale = name.ends_with("_scales");
            let bytes = (0..count).map(|i| if scale { 110 + byte(i) % 15 } else { byte(i) });
            weights
                .insert_stored(&name, &shape, Dtype::U8, bytes.collect())
                .map_err(text)?;
        } else {
            let numbers = (0..count).map(|i| (f32::from(byte(i)) - 125.0) / 5000.0);
            weights
                .insert(&name, &shape, numbers.collect())
                .map_err(text)?;
        }
    }
    Ok(weights)
}

/// Engines of one layer in f16 for decode and prompts, sm89 and sm120.
fn build(config: &ModelConfig, layer: usize, work: &Path) -> Outcome<BuildReport> {
    let onnx = work.join("onnx");
    fs::create_dir(&onnx).map_err(text)?;
    let graph = |mla_form| {
        let options = DecoderOptions {
            dtype: DType::F16,
            runtime: Runtime::TensorRt,
            mla_form,
            ..DecoderOptions::default()
        };
        block_graph(config, layer, &options, None).map_err(text)
    };
    let (decoder, prefill) = (graph(MlaForm::Absorbed)?, graph(MlaForm::Expanded)?);
    let named = [("decoder.onnx", &decoder), ("prefill.onnx", &prefill)];
    let weights = weights(config, layer)?;
    write_folder(&onnx, &named, "data", &weights, &mut |_| {}).map_err(text)?;
    drop(weights);
    fs::write(onnx.join("config.json"), "{}").map_err(text)?;
    let target = |name: &str| Target::parse(name).map_err(text);
    let options = BuildOptions {
        product: Product::Rtx,
        targets: vec![target("sm89")?, target("sm120")?],
        profiles: Profiles {
            max_batch: 4,
            max_context: 4096,
            max_prefill: 512,
        },
        threads: 2,
        timing_cache: None,
    };
    build_engines(&onnx, &work.join("engines"), &options, &mut |_| {}).map_err(text)
}

#[test]
fn every_kind_of_layer_builds() {
    let few = 4;
    let layers = [
        ("grouped, window", gpt_oss(few), 0),
        ("grouped, full", gpt_oss(few), 1),
        // 184 + 64 + 8 numbers are the widest that fused attention takes.
        ("latent 184 + 64, full", converted(gpt_oss(few), 184, 64), 1),
        (
            "latent 256 + 64, window",
            converted(gpt_oss(few), 256, 64),
            0,
        ),
        (
            "latent 256 + 64, all experts",
            converted(gpt_oss(32), 256, 64),
            1,
        ),
    ];
    let mut cases = Cases::new();
    for (name, config, layer) in &layers {
        cases.run(*name, || {
            let work = tempfile::tempdir().map_err(text)?;
            let report = build(config, *layer, work.path())?;
            let engines = report.engines.len();
            if engines != 4 {
                return Err(format!(
                    "{engines} engines, expected two graphs for two targets"
                ));
            }
            let cache = &report.manifest.cache;
            let width = config
                .mla_layer(*layer)
                .map_or(config.gqa_cache_width(), MlaLayer::cache_width);
            let found: Vec<_> = cache
                .iter()
                .map(|c| (c.numbers_per_token(), c.window))
                .collect();
            let expected = [(width, config.sliding_window[*layer])];
            if found != expected {
                return Err(format!("caches {found:?}, expected {expected:?}"));
            }
            Ok(())
        });
    }
    cases.finish(layers.len());
}
