//! The oracles notice: a checkpoint whose configuration says something slightly else gives other
//! logits than transformers computed, far beyond every tolerance.

use std::fs;

use mlac_model::Checkpoint;
use mlac_tests::cases::Cases;
use mlac_tests::decode::decode_padded;
use mlac_tests::export::{export, standard};
use mlac_tests::fixtures::{self, PREFILL};
use mlac_tests::{Outcome, text};
use serde_json::{Value, json};

/// Of the logits' scale; every setting below moves them by more.
const NOTICED: f64 = 2e-2;

/// Fixture, place in its config.json, and another value for it.
fn settings() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        (
            "gpt_oss_dense",
            "/layer_types/1",
            json!("sliding_attention"),
        ),
        ("gpt_oss_dense", "/num_experts_per_tok", json!(2)),
        ("gpt_oss_dense", "/swiglu_alpha", json!(1.702)),
        ("gpt_oss_dense", "/swiglu_limit", json!(7.0)),
        ("gpt_oss_mha", "/rope_scaling/beta_fast", json!(0.7)),
        ("gpt_oss_mha", "/sliding_window", json!(9)),
        ("gpt_oss_mxfp4", "/rope_scaling/factor", json!(40.0)),
        ("gpt_oss_mxfp4", "/rope_theta", json!(100_000)),
        ("gpt_oss_mxfp4", "/sliding_window", json!(7)),
        ("gpt_oss_padded", "/layer_types/0", json!("full_attention")),
        ("gpt_oss_sinks", "/rope_scaling/beta_slow", json!(0.375)),
        ("gpt_oss_sinks", "/rope_scaling/truncate", json!(true)),
        ("gpt_oss_sinks", "/swiglu_limit", json!(7.0)),
        ("llama_gqa", "/rope_parameters/rope_theta", json!(20000.0)),
        ("llama_head_dim_linear", "/rope_scaling/factor", json!(5.0)),
        ("llama_llama3", "/rope_scaling/factor", json!(12.0)),
        ("llama_llama3", "/rope_scaling/low_freq_factor", json!(1.5)),
        ("llama_llama3", "/rope_scaling/high_freq_factor", json!(6.0)),
        ("llama_llama3", "/rope_scaling", json!(null)),
        ("llama_mqa", "/rms_norm_eps", json!(0.01)),
        ("llama_yarn", "/rope_parameters/factor", json!(12.0)),
        ("llama_yarn", "/rope_parameters/beta_fast", json!(1.5)),
        ("llama_yarn", "/rope_parameters/beta_slow", json!(0.375)),
        ("llama_yarn_mscale", "/rope_scaling/truncate", json!(true)),
        ("llama_yarn_mscale", "/rope_scaling/mscale", json!(1.5)),
        (
            "llama_yarn_mscale",
            "/rope_scaling/mscale_all_dim",
            json!(0.6),
        ),
        ("mistral_window", "/sliding_window", json!(10)),
        ("mistral_window", "/sliding_window", json!(null)),
        ("qwen2_bias", "/use_sliding_window", json!(true)),
        ("qwen2_window", "/max_window_layers", json!(2)),
        ("qwen2_window", "/use_sliding_window", json!(false)),
        ("qwen2_yarn", "/rope_scaling/factor", json!(6.0)),
        (
            "qwen3_bias_window_yarn",
            "/rope_parameters/attention_factor",
            json!(1.0),
        ),
        (
            "qwen3_bias_window_yarn",
            "/layer_types/1",
            json!("sliding_attention"),
        ),
        ("qwen3_norm", "/rms_norm_eps", json!(0.01)),
    ]
}

/// The largest difference from transformers, relative to the scale, with a changed configuration.
fn moved(name: &str, place: &str, value: &Value) -> Outcome<f64> {
    let model = fixtures::model(name)?;
    let scratch = tempfile::tempdir().map_err(text)?;
    let changed = scratch.path().join("changed");
    fs::create_dir(&changed).map_err(text)?;
    for entry in fs::read_dir(&model.folder).map_err(text)? {
        let path = entry.map_err(text)?.path();
        fs::copy(&path, changed.join(path.file_name().unwrap_or_default())).map_err(text)?;
    }
    let mut config = fixtures::json(&format!("{name}/config.json"))?;
    let slot = config
        .pointer_mut(place)
        .ok_or_else(|| format!("{name} has no {place}"))?;
    if slot == value {
        return Err(format!("{place} is {value} already"));
    }
    *slot = value.clone();
    fs::write(changed.join("config.json"), config.to_string()).map_err(text)?;
    Checkpoint::open(&changed).map_err(text)?;
    let onnx = scratch.path().join("onnx");
    export(&changed, &onnx, standard())?;
    let io = &model.io;
    let logits = decode_padded(&onnx, io, &[PREFILL, io.seq - PREFILL])?;
    let (found, expected) = (io.real(&logits), io.real(&io.logits));
    mlac_tests::compare::difference(&found, &expected).map(|found| found.of_scale)
}

#[test]
fn a_changed_setting_moves_the_logits() {
    let mut cases = Cases::new();
    for (name, place, value) in settings() {
        cases.run(format!("{name} {place} = {value}"), || {
            let found = moved(name, place, &value)?;
            if found > NOTICED {
                return Ok(());
            }
            Err(format!(
                "moves the logits by only {found:.1e} of their scale"
            ))
        });
    }
    cases.finish(35);
}
