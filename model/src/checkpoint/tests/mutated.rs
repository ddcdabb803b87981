//! Folders whose texts were changed at random: opened or refused, never more than that.

use std::{fs, path::Path, sync::OnceLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{listing, parse};
use crate::{
    Checkpoint, Dtype, Error, ModelConfig, TensorInfo, checkpoint::expected_tensors, mxfp4,
};

/// A model of two layers with experts in MXFP4.
fn experts_config() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": true,
        "eos_token_id": 2,
        "experts_per_token": 2,
        "head_dim": 4,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 131_072,
        "model_type": "gpt_oss",
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "quantization_config": { "quant_method": "mxfp4" },
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": false,
        },
        "rope_theta": 150_000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
        "vocab_size": 20,
    })
}

fn is_packed(name: &str) -> bool {
    name.ends_with("_blocks") || name.ends_with("_scales")
}

/// The files of that model, by name.
fn good_files() -> &'static [(String, Vec<u8>)] {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let raw = experts_config();
        let tensors: Vec<TensorInfo> = expected_tensors(&parse(&raw))
            .into_iter()
            .map(|(name, shape)| {
                let dtype = if is_packed(&name) {
                    Dtype::U8
                } else {
                    Dtype::BF16
                };
                TensorInfo { name, dtype, shape }
            })
            .collect();
        let around = tempfile::tempdir().unwrap();
        let folder = around.path().join("model");
        let writer = crate::CheckpointWriter::create(&folder, tensors.clone(), 8000).unwrap();
        for info in &tensors {
            writer
                .write(&info.name, &vec![60; info.byte_len().unwrap()])
                .unwrap();
        }
        writer
            .write_file("config.json", format!("{raw:#}").as_bytes())
            .unwrap();
        writer.finish().unwrap();
        listing(&folder)
            .into_iter()
            .map(|name| {
                let bytes = fs::read(folder.join(&name)).unwrap();
                (name, bytes)
            })
            .collect()
    })
}

/// One change of a text.
#[derive(Debug, Clone)]
enum Change {
    Byte(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// A run of digits becomes another number.
    Number(prop::sample::Index, &'static str),
    /// A part is repeated behind itself.
    Twice(prop::sample::Index, usize),
}

impl Change {
    /// Applies it to the first `text` bytes of a file.
    fn apply(&self, bytes: &mut Vec<u8>, text: usize) {
        let text = text.min(bytes.len()).max(1);
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Byte(at, byte) => bytes[at.index(text)] = *byte,
            Self::Cut(at) => bytes.truncate(at.index(text)),
            Self::Number(at, number) => {
                let from = at.index(text);
                let digit = |byte: &u8| byte.is_ascii_digit();
                let Some(start) = bytes[from..].iter().position(digit) else {
                    return;
                };
                let start = from + start;
                let length = bytes[start..].iter().take_while(|b| digit(b)).count();
                bytes.splice(start..start + length, number.bytes());
            }
            Self::Twice(at, length) => {
                let start = at.index(text);
                let part = bytes[start..(start + length).min(bytes.len())].to_vec();
                bytes.splice(start..start, part);
            }
        }
    }
}

fn any_change() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    let numbers = [
        "0",
        "1",
        "-1",
        "3",
        "0.5",
        "1e308",
        "1e999",
        "null",
        "\"x\"",
        "[]",
        "65536",
        "2147483648",
        "4294967296",
        "9007199254740993",
        "9223372036854775807",
        "18446744073709551615",
        "99999999999999999999",
    ];
    prop_oneof![
        3 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        1 => index().prop_map(Change::Cut),
        5 => (index(), prop::sample::select(numbers.to_vec()))
            .prop_map(|(at, number)| Change::Number(at, number)),
        1 => (index(), 1_usize..60).prop_map(|(at, length)| Change::Twice(at, length)),
    ]
}

/// Reads everything that an opened checkpoint offers.
fn read_all(checkpoint: &Checkpoint) {
    for info in checkpoint.tensors() {
        let bytes = checkpoint.bytes(&info.name).unwrap();
        assert_eq!(bytes.len(), info.byte_len().unwrap());
        checkpoint.sha256(&info.name).unwrap();
        if info.dtype.is_weight() {
            // NaN is refused here.
            let _ = checkpoint.f32(&info.name, &info.shape);
        }
    }
    for info in checkpoint.tensors() {
        if let Some(stem) = info.name.strip_suffix("_scales") {
            let scales = checkpoint.bytes(&info.name).unwrap();
            let blocks = checkpoint.bytes(&format!("{stem}_blocks")).unwrap();
            let mut numbers = vec![0.0; scales.len() * mxfp4::BLOCK];
            let _ = mxfp4::decode(&blocks, &scales, &mut numbers);
        }
    }
}

fn open(folder: &Path, files: &[(String, Vec<u8>)]) -> Result<Checkpoint, Error> {
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).unwrap();
    }
    Checkpoint::open(folder)
}

#[test]
fn the_unchanged_folder_opens() {
    let around = tempfile::tempdir().unwrap();
    assert!(good_files().len() > 3);
    read_all(&open(around.path(), good_files()).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn changed_folders_never_panic(
        file in any::<prop::sample::Index>(),
        changes in prop::collection::vec(any_change(), 1..4),
    ) {
        let mut files = good_files().to_vec();
        let at = file.index(files.len());
        let (name, bytes) = &mut files[at];
        // Of a shard the header: what follows are numbers, and all are.
        let is_shard = Path::new(name.as_str())
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        let text = if is_shard {
            8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
        } else {
            bytes.len()
        };
        for change in &changes {
            change.apply(bytes, text);
        }
        let around = tempfile::tempdir().unwrap();
        match open(around.path(), &files) {
            Ok(checkpoint) => read_all(&checkpoint),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    /// What a configuration implies can be counted, however large.
    #[test]
    fn changed_configurations_never_panic(
        changes in prop::collection::vec(any_change(), 1..5),
    ) {
        let mut text = experts_config().to_string().into_bytes();
        for change in &changes {
            let length = text.len();
            change.apply(&mut text, length);
        }
        let Ok(raw) = serde_json::from_slice(&text) else {
            return Ok(());
        };
        if let Ok(config) = ModelConfig::from_json(&raw, "config.json") {
            let _ = config.rope.table(config.head_dim);
            if config.num_hidden_layers < 1000 {
                for (name, shape) in expected_tensors(&config) {
                    prop_assert!(TensorInfo::new(name, Dtype::F32, shape).byte_len().is_ok());
                }
            }
        }
    }
}
