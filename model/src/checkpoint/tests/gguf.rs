//! Files written by candle, whose writer shares nothing with the reader under test.

use std::{fs, path::PathBuf};

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use serde_json::json;
use tempfile::TempDir;

use super::{listing, naive, numbers, refusal};
use crate::{Checkpoint, CheckpointWriter, Dtype, RopeScaling};

const HIDDEN: usize = 256;
const HEAD: usize = 64;
const VOCAB: usize = 17;

pub(super) type Metadata = Vec<(String, Value)>;
pub(super) type Tensors = Vec<(String, QTensor)>;

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

fn texts(values: &[&str]) -> Value {
    Value::Array(values.iter().map(|value| text(value)).collect())
}

/// Metadata of a model of one layer: 4 query heads, 2 KV heads.
pub(super) fn metadata(architecture: &str) -> Metadata {
    let key = |name: &str| format!("{architecture}.{name}");
    let tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "a",
        "b",
        "c",
        "1",
        "2",
        "\u{120}",
        "ab",
        "\u{120}ab",
        "12",
        "\u{10a}",
        "d",
        "e",
        "f",
        "g",
        "h",
    ];
    let mut kinds = vec![Value::I32(1); VOCAB];
    kinds[..2].fill(Value::I32(3));
    vec![
        ("general.architecture".into(), text(architecture)),
        (key("block_count"), Value::U32(1)),
        (key("context_length"), Value::U32(512)),
        (key("embedding_length"), Value::U32(HIDDEN as u32)),
        (key("feed_forward_length"), Value::U32(512)),
        (key("attention.head_count"), Value::U32(4)),
        (key("attention.head_count_kv"), Value::U32(2)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
        (key("rope.freq_base"), Value::F32(100_000.0)),
        (key("rope.dimension_count"), Value::U32(HEAD as u32)),
        (key("vocab_size"), Value::U32(VOCAB as u32)),
        ("tokenizer.ggml.model".into(), text("gpt2")),
        ("tokenizer.ggml.pre".into(), text("smollm")),
        ("tokenizer.ggml.tokens".into(), texts(&tokens)),
        ("tokenizer.ggml.token_type".into(), Value::Array(kinds)),
        (
            "tokenizer.ggml.merges".into(),
            texts(&["a b", "\u{120} ab", "1 2"]),
        ),
        ("tokenizer.ggml.bos_token_id".into(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".into(), Value::U32(0)),
        ("tokenizer.chat_template".into(), text("{{ messages }}")),
    ]
}

/// The llama.cpp names and shapes of the same model.
fn shapes(architecture: &str) -> Vec<(String, Vec<usize>)> {
    let layer = |name: &str| format!("blk.0.{name}");
    let keys = 2 * HEAD;
    let mut list = vec![
        ("token_embd.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("output_norm.weight".to_owned(), vec![HIDDEN]),
        (layer("attn_norm.weight"), vec![HIDDEN]),
        (layer("ffn_norm.weight"), vec![HIDDEN]),
        (layer("attn_q.weight"), vec![HIDDEN, HIDDEN]),
        (layer("attn_k.weight"), vec![keys, HIDDEN]),
        (layer("attn_v.weight"), vec![keys, HIDDEN]),
        (layer("attn_output.weight"), vec![HIDDEN, HIDDEN]),
        (layer("ffn_gate.weight"), vec![512, HIDDEN]),
        (layer("ffn_up.weight"), vec![512, HIDDEN]),
        (layer("ffn_down.weight"), vec![HIDDEN, 512]),
    ];
    match architecture {
        "qwen2" => list.extend([
            (layer("attn_q.bias"), vec![HIDDEN]),
            (layer("attn_k.bias"), vec![keys]),
            (layer("attn_v.bias"), vec![keys]),
        ]),
        "qwen3" => list.extend([
            (layer("attn_q_norm.weight"), vec![HEAD]),
            (layer("attn_k_norm.weight"), vec![HEAD]),
        ]),
        _ => {}
    }
    list
}

fn quantised(name: &str, shape: &[usize], dtype: GgmlDType) -> QTensor {
    let values = numbers(name, shape.iter().product());
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    QTensor::quantize(&tensor, dtype).unwrap()
}

/// All tensors; matrices of one type, vectors F32 as llama.cpp has them.
pub(super) fn tensors(architecture: &str, matrices: GgmlDType) -> Tensors {
    shapes(architecture)
        .into_iter()
        .map(|(name, shape)| {
            let dtype = if shape.len() == 2 {
                matrices
            } else {
                GgmlDType::F32
            };
            let tensor = quantised(&name, &shape, dtype);
            (name, tensor)
        })
        .collect()
}

pub(super) fn write(metadata: &Metadata, tensors: &Tensors) -> (TempDir, PathBuf) {
    let around = tempfile::tempdir().unwrap();
    let path = around.path().join("model.gguf");
    let metadata: Vec<_> = metadata
        .iter()
        .map(|(key, value)| (key.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut bytes = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
    fs::write(&path, bytes.into_inner()).unwrap();
    (around, path)
}

#[test]
fn every_type_is_dequantised_as_ggml_does() {
    // gate_proj is not permuted, so its numbers stay in place.
    let (gguf, hf) = (
        "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.gate_proj.weight",
    );
    for (dtype, kind) in [
        (GgmlDType::F32, "F32"),
        (GgmlDType::F16, "F16"),
        (GgmlDType::BF16, "BF16"),
        (GgmlDType::Q8_0, "Q8_0"),
        (GgmlDType::Q4_0, "Q4_0"),
        (GgmlDType::Q4_1, "Q4_1"),
        (GgmlDType::Q4K, "Q4_K"),
        (GgmlDType::Q6K, "Q6_K"),
    ] {
        let tensors = tensors("llama", dtype);
        let (_around, path) = write(&metadata("llama"), &tensors);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let stored_dtype = match kind {
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            _ => Dtype::F32,
        };
        assert_eq!(checkpoint.info(hf).unwrap().dtype, stored_dtype);
        let read = checkpoint.f32(hf, &[512, HIDDEN]).unwrap();
        if dtype.block_size() == 1 {
            // Multiples of 1/8 are exact in all three.
            assert_eq!(read, numbers(gguf, read.len()), "{kind}");
            continue;
        }
        let stored = tensors
            .iter()
            .find(|(name, _)| name == gguf)
            .unwrap()
            .1
            .data()
            .unwrap();
        let size = dtype.block_size();
        for (at, &found) in read.iter().enumerate() {
            let block = &stored[at / size * dtype.type_size()..][..dtype.type_size()];
            let expected = match kind {
                "Q4_K" => naive::q4_k(block, at % size),
                "Q6_K" => naive::q6_k(block, at % size),
                simple => naive::simple(simple, block, at % size),
            };
            let off = (f64::from(found) - expected).abs();
            assert!(
                off <= 1e-6 * expected.abs().max(1.0),
                "{kind} {at}: {found} {expected}"
            );
        }
    }
}

/// llama.cpp: `w.reshape(heads, 2, d / 2, in).swapaxes(1, 2).reshape(w.shape)`.
fn permuted_by_llama_cpp(rows: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len()];
    for (at, value) in rows.iter().enumerate() {
        let (row, column) = (at / width, at % width);
        let (head, part, pair) = (row / HEAD, row % HEAD / (HEAD / 2), row % (HEAD / 2));
        out[(head * HEAD + pair * 2 + part) * width + column] = *value;
    }
    out
}

#[test]
fn rotary_rows_come_back_in_hugging_face_order() {
    for (architecture, dtype) in [
        ("llama", GgmlDType::F32),
        ("llama", GgmlDType::F16),
        ("qwen2", GgmlDType::F32),
    ] {
        let mut tensors = tensors(architecture, dtype);
        let original = numbers("original", 2 * HEAD * HIDDEN);
        for (name, tensor) in &mut tensors {
            if name == "blk.0.attn_k.weight" {
                let stored = if architecture == "llama" {
                    permuted_by_llama_cpp(&original, HIDDEN)
                } else {
                    original.clone()
                };
                let stored = Tensor::from_vec(stored, (2 * HEAD, HIDDEN), &Device::Cpu).unwrap();
                *tensor = QTensor::quantize(&stored, dtype).unwrap();
            }
        }
        let (_around, path) = write(&metadata(architecture), &tensors);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let name = "model.layers.0.self_attn.k_proj.weight";
        assert_eq!(checkpoint.f32(name, &[2 * HEAD, HIDDEN]).unwrap(), original);
    }
}

#[test]
fn the_configuration_is_one_that_transformers_reads() {
    let (around, _path) = write(&metadata("llama"), &tensors("llama", GgmlDType::Q8_0));
    let checkpoint = Checkpoint::open(around.path()).unwrap();
    assert_eq!(
        *checkpoint.raw_config(),
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 17,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "rope_scaling": null,
            "tie_word_embeddings": true,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": 1,
            "pad_token_id": null,
            "eos_token_id": 0,
            "torch_dtype": "float32",
        })
    );
    assert_eq!(checkpoint.config().eos_token_ids, [0]);
    for architecture in ["qwen2", "qwen3"] {
        let (_around, path) = write(
            &metadata(architecture),
            &tensors(architecture, GgmlDType::F16),
        );
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.config().architecture.model_type(), architecture);
        assert_eq!(checkpoint.config().qkv_bias, architecture == "qwen2");
    }
}

/// Opens a llama with more metadata.
pub(super) fn opened_with(
    more: &[(&str, Value)],
    tensors: &Tensors,
) -> Result<Checkpoint, crate::Error> {
    let mut metadata = metadata("llama");
    for (key, value) in more {
        metadata.retain(|(other, _)| other != key);
        metadata.push(((*key).to_owned(), value.clone()));
    }
    let (_around, path) = write(&metadata, tensors);
    Checkpoint::open(&path)
}

#[test]
fn rotary_rules() {
    let plain = tensors("llama", GgmlDType::F16);
    let rule = |more: &[(&str, Value)], tensors: &Tensors| {
        opened_with(more, tensors).map(|checkpoint| checkpoint.config().rope.scaling.clone())
    };
    let kind = |name| ("llama.rope.scaling.type", text(name));
    let factor = ("llama.rope.scaling.factor", Value::F32(4.0));
    let original = (
        "llama.rope.scaling.original_context_length",
        Value::U32(128),
    );
    assert_eq!(rule(&[kind("none")], &plain).unwrap(), RopeScaling::Default);
    assert_eq!(
        rule(&[kind("linear"), factor.clone()], &plain).unwrap(),
        RopeScaling::Linear { factor: 4.0 }
    );
    match rule(&[kind("yarn"), factor, original], &plain).unwrap() {
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            ..
        } => {
            assert!((factor - 4.0).abs() < 1e-12 && original == 128);
        }
        other => panic!("{other:?}"),
    }
    let message = refusal(rule(&[kind("longrope")], &plain));
    assert!(
        message.contains("llama.rope.scaling.type: expected none, linear or yarn"),
        "{message}"
    );

    // Llama 3.1's divisors, from its rule with numbers of its own.
    let divisors = |factor: f32| -> Vec<f32> {
        (0..HEAD / 2)
            .map(|l| {
                let wavelength =
                    std::f32::consts::TAU * 100_000_f32.powf(2.0 * l as f32 / HEAD as f32);
                let turns = 8192.0 / wavelength;
                if turns < 1.0 {
                    factor
                } else if turns > 4.0 {
                    1.0
                } else {
                    let smooth = (turns - 1.0) / 3.0;
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect()
    };
    let with_divisors = |values: Vec<f32>| {
        let mut tensors = tensors("llama", GgmlDType::F16);
        let values = Tensor::from_vec(values, HEAD / 2, &Device::Cpu).unwrap();
        let values = QTensor::quantize(&values, GgmlDType::F32).unwrap();
        tensors.push(("rope_freqs.weight".into(), values));
        tensors
    };
    match rule(&[], &with_divisors(divisors(8.0))).unwrap() {
        RopeScaling::Llama3 {
            factor,
            original_max_position_embeddings: 8192,
            ..
        } => {
            assert!((factor - 8.0).abs() < 1e-6);
        }
        other => panic!("{other:?}"),
    }
    let mut other = divisors(8.0);
    other[20] *= 1.01;
    let message = refusal(rule(&[], &with_divisors(other)));
    assert!(
        message.contains("tensor rope_freqs.weight: expected Llama 3's divisors"),
        "{message}"
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let plain = tensors("llama", GgmlDType::F16);
    let cases = [
        (("general.architecture", text("gemma3")), "found \"gemma3\""),
        (("llama.expert_count", Value::U32(8)), "llama.expert_count"),
        (
            ("llama.attention.sliding_window", Value::U32(8)),
            "llama.attention.sliding_window",
        ),
        (
            ("llama.attention.head_count", text("4")),
            "llama.attention.head_count",
        ),
        (
            ("llama.rope.dimension_count", Value::U32(32)),
            "llama.rope.dimension_count",
        ),
        (
            ("llama.attention.value_length", Value::U32(32)),
            "llama.attention.value_length",
        ),
        (
            ("llama.attention.head_count_kv", Value::U32(3)),
            "num_key_value_heads",
        ),
        (
            ("llama.feed_forward_length", Value::U32(128)),
            "tensor model.layers.0.mlp.gate_proj.weight",
        ),
        (("split.count", Value::U16(2)), "gguf-split --merge"),
    ];
    for ((key, value), expected) in cases {
        let message = refusal(opened_with(&[(key, value)], &plain));
        assert!(message.contains(expected), "{message} / {expected}");
        assert!(message.contains("model.gguf"), "{message}");
    }
    let unsupported = tensors("llama", GgmlDType::Q5K);
    let message = refusal(opened_with(&[], &unsupported));
    assert!(
        message.contains("tensor token_embd.weight: expected one of F32, F16"),
        "{message}"
    );
    assert!(message.contains("found type 13 (Q5_K)"), "{message}");

    let mut more = tensors("llama", GgmlDType::F16);
    more.push((
        "blk.0.ffn_gate_inp.weight".into(),
        quantised("x", &[8, 256], GgmlDType::F32),
    ));
    let message = refusal(opened_with(&[], &more));
    assert!(
        message.contains("tensor blk.0.ffn_gate_inp.weight"),
        "{message}"
    );

    let mut missing = tensors("llama", GgmlDType::F16);
    missing.retain(|(name, _)| name != "blk.0.ffn_up.weight");
    let message = refusal(opened_with(&[], &missing));
    assert!(
        message.contains("tensor model.layers.0.mlp.up_proj.weight"),
        "{message}"
    );
}

#[test]
fn vocabulary_and_side_files() {
    let (around, path) = write(&metadata("llama"), &tensors("llama", GgmlDType::F16));
    let checkpoint = Checkpoint::open(&path).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    // Digits stay apart although "12" is a token with a merge.
    let ids = tokenizer.encode("<|im_start|>ab ab12").unwrap();
    assert_eq!(ids, [1, 8, 9, 5, 6]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "<|im_start|>ab ab12");
    assert_eq!(
        tokenizer.decode_without_special_tokens(&ids).unwrap(),
        "ab ab12"
    );
    assert_eq!(tokenizer.chat_template(), Some("{{ messages }}"));
    assert_eq!(tokenizer.vocab_size(), VOCAB);
    assert!(checkpoint.side_files().is_empty());

    // A safetensors copy has the same tokenizer, template and configuration.
    let folder = around.path().join("copy");
    let writer =
        CheckpointWriter::create(&folder, checkpoint.tensors().to_vec(), u64::MAX).unwrap();
    for info in checkpoint.tensors() {
        writer
            .write(&info.name, &checkpoint.bytes(&info.name).unwrap())
            .unwrap();
    }
    writer
        .write_file(
            "config.json",
            checkpoint.raw_config().to_string().as_bytes(),
        )
        .unwrap();
    for (name, content) in checkpoint.side_contents().unwrap() {
        writer.write_file(&name, &content).unwrap();
    }
    writer.finish().unwrap();
    let copy = Checkpoint::open(&folder).unwrap();
    assert_eq!(copy.config(), checkpoint.config());
    assert_eq!(
        copy.tokenizer()
            .unwrap()
            .encode("<|im_start|>ab ab12")
            .unwrap(),
        ids
    );
    assert_eq!(
        copy.tokenizer().unwrap().chat_template(),
        Some("{{ messages }}")
    );
    assert_eq!(listing(&folder).len(), 5);
    for info in checkpoint.tensors() {
        assert_eq!(
            checkpoint.sha256(&info.name).unwrap(),
            copy.sha256(&info.name).unwrap()
        );
    }
}

#[test]
fn two_files_are_one_too_many() {
    let (around, path) = write(&metadata("llama"), &tensors("llama", GgmlDType::F16));
    fs::copy(&path, around.path().join("other.gguf")).unwrap();
    let message = refusal(Checkpoint::open(around.path()));
    assert!(
        message.contains("expected one .gguf file, found 2 of them"),
        "{message}"
    );
}
