//! Tests of reading and writing, on checkpoints of a few kilobytes.

mod gguf;
mod gguf_damage;
mod mutated;
mod naive;
mod open;
mod safetensors;
mod streaming;
mod writer;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{CheckpointWriter, expected_tensors};
use crate::{Dtype, ModelConfig, TensorInfo, tensor::bytes_from_f32};

/// The configuration of a model of two layers.
fn tiny_config(model_type: &str) -> Value {
    json!({
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 20,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "sliding_window": null,
        "tie_word_embeddings": false,
    })
}

fn parse(raw: &Value) -> ModelConfig {
    ModelConfig::from_json(raw, "config.json").unwrap()
}

/// Multiples of 1/8 that differ from tensor to tensor.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    let mut state = name
        .bytes()
        .fold(7_u32, |state, byte| state * 31 % 65_521 + u32::from(byte));
    (0..count)
        .map(|_| {
            state = (state * 75 + 74) % 65_537;
            (state % 33) as f32 / 8.0 - 2.0
        })
        .collect()
}

fn tiny_tensors(config: &ModelConfig, dtype: Dtype) -> Vec<TensorInfo> {
    expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| TensorInfo { name, dtype, shape })
        .collect()
}

fn tensor_bytes(info: &TensorInfo) -> Vec<u8> {
    bytes_from_f32(
        info.dtype,
        &numbers(&info.name, info.element_count().unwrap()),
    )
    .unwrap()
}

/// Writes a whole checkpoint; returns its folder and the temporary folder around it.
fn tiny_checkpoint(raw: &Value, dtype: Dtype, max_shard_bytes: u64) -> (TempDir, PathBuf) {
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("model");
    write_checkpoint(
        &folder,
        raw,
        &tiny_tensors(&parse(raw), dtype),
        max_shard_bytes,
    );
    (around, folder)
}

fn write_checkpoint(folder: &Path, raw: &Value, tensors: &[TensorInfo], max_shard_bytes: u64) {
    let writer = CheckpointWriter::create(folder, tensors.to_vec(), max_shard_bytes).unwrap();
    for info in tensors {
        writer.write(&info.name, &tensor_bytes(info)).unwrap();
    }
    writer
        .write_file("config.json", raw.to_string().as_bytes())
        .unwrap();
    writer.finish().unwrap();
}

/// The message of a refusal; any other outcome fails the test.
fn refusal<T: std::fmt::Debug>(result: Result<T, crate::Error>) -> String {
    match result {
        Err(crate::Error::Refusal(refusal)) => refusal.to_string(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

/// The file names in a folder, sorted.
fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
