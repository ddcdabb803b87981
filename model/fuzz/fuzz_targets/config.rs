//! A `config.json`: read or refused, and what is read implies tensors whose bytes can be counted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlac_model::{Dtype, ModelConfig, TensorInfo, checkpoint::expected_tensors};

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = serde_json::from_slice(bytes) else {
        return;
    };
    let Ok(config) = ModelConfig::from_json(&json, "config.json") else {
        return;
    };
    let _ = config.rope.table(config.head_dim);
    for (name, shape) in expected_tensors(&config) {
        assert!(TensorInfo::new(name, Dtype::F32, shape).byte_len().is_ok());
    }
});
