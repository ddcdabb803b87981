use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    listing, numbers, parse, refusal, tensor_bytes, tiny_checkpoint, tiny_config, tiny_tensors,
    write_checkpoint,
};
use crate::{
    Checkpoint, Dtype, MlaConfig, MlaEncoder, MlaLayer, TensorInfo, config::mla_config_json, mxfp4,
    tensor::shape_text,
};

#[test]
fn every_family_and_type_reads_back() {
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        for (dtype, shard) in [(Dtype::F32, u64::MAX), (Dtype::F16, 900), (Dtype::BF16, 1)] {
            let raw = tiny_config(family);
            let (_around, folder) = tiny_checkpoint(&raw, dtype, shard);
            let checkpoint = Checkpoint::open(&folder).unwrap();
            assert_eq!(checkpoint.config(), &parse(&raw));
            assert_eq!(checkpoint.raw_config(), &raw);
            assert_eq!(checkpoint.path(), folder);
            let tensors = tiny_tensors(checkpoint.config(), dtype);
            assert_eq!(checkpoint.tensors().len(), tensors.len());
            for info in tensors {
                assert_eq!(checkpoint.info(&info.name).unwrap(), &info);
                assert_eq!(*checkpoint.bytes(&info.name).unwrap(), tensor_bytes(&info));
                let read = checkpoint.f32(&info.name, &info.shape).unwrap();
                assert_eq!(read, numbers(&info.name, read.len()), "{}", info.name);
            }
        }
    }
}

#[test]
fn mla_forms_read_back() {
    for family in ["llama", "qwen2", "qwen3"] {
        let mut raw = tiny_config(family);
        raw["hidden_size"] = json!(12);
        let source = parse(&raw);
        let encoder = MlaEncoder::of(source.architecture);
        let layer = MlaLayer {
            kv_lora_rank: 5,
            qk_rope_head_dim: 6,
            qk_nope_head_dim: 4,
            v_head_dim: 4,
            encoder,
        };
        let mla = MlaConfig {
            layers: [(1, layer)].into(),
            attention_scale: 0.5,
            o_bias: true,
        };
        let raw = mla_config_json(&raw, &source, &mla);
        let (_around, folder) = tiny_checkpoint(&raw, Dtype::F32, u64::MAX);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let shape = |name: &str| {
            let name = format!("model.layers.1.self_attn.{name}");
            checkpoint
                .info(&name)
                .map(|info| shape_text(&info.shape))
                .ok()
        };
        assert_eq!(shape("kv_b_proj.weight").unwrap(), "[32, 5]");
        assert_eq!(shape("o_proj.bias").unwrap(), "[12]");
        assert_eq!(shape("rotary_inv_freq").unwrap(), "[3]");
        let input = if encoder == MlaEncoder::Hidden {
            12
        } else {
            16
        };
        assert_eq!(
            shape("kv_a_proj_with_mqa.weight").unwrap(),
            shape_text(&[11, input])
        );
        let queries = if encoder == MlaEncoder::Hidden {
            40
        } else {
            16
        };
        assert_eq!(shape("q_proj.weight").unwrap(), shape_text(&[queries, 12]));
        assert_eq!(
            shape("k_proj.weight").is_some(),
            encoder == MlaEncoder::NormedKey
        );
        assert_eq!(
            shape("q_rope_proj.weight").is_some(),
            encoder == MlaEncoder::NormedKey
        );
        assert_eq!(
            shape("kv_a_proj_with_mqa.bias").is_some(),
            family == "qwen2"
        );
        assert!(checkpoint.contains("model.layers.0.self_attn.k_proj.weight"));
    }
}

#[test]
fn digests_are_those_of_the_stored_bytes() {
    let raw = tiny_config("llama");
    let (_around, folder) = tiny_checkpoint(&raw, Dtype::F32, u64::MAX);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let digest = checkpoint.sha256("model.norm.weight").unwrap();
    assert_eq!(digest.len(), 64);
    assert_eq!(digest, checkpoint.sha256("model.norm.weight").unwrap());
    assert_ne!(digest, checkpoint.sha256("lm_head.weight").unwrap());
}

#[test]
fn reading_refuses_wrong_requests() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F32, u64::MAX);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let message = refusal(checkpoint.f32("model.norm.weight", &[17]));
    assert!(
        message.contains("model.safetensors: tensor model.norm.weight"),
        "{message}"
    );
    assert!(
        message.contains("expected shape [17], found shape [16]"),
        "{message}"
    );
    let message = refusal(checkpoint.bytes("model.norm.bias"));
    assert!(message.contains("tensor model.norm.bias"), "{message}");
}

#[test]
fn experts_are_decoded_one_by_one() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gpt_oss_mxfp4");
    let checkpoint = Checkpoint::open(folder).unwrap();
    let name = "model.layers.0.mlp.experts.down_proj";
    let scales = checkpoint.bytes(&format!("{name}_scales")).unwrap();
    let blocks = checkpoint.bytes(&format!("{name}_blocks")).unwrap();
    let mut all = vec![0.0; scales.len() * mxfp4::BLOCK];
    mxfp4::decode(&blocks, &scales, &mut all).unwrap();
    let stored = &checkpoint.info(&format!("{name}_scales")).unwrap().shape;
    let shape = [stored[0], stored[1], stored[2] * mxfp4::BLOCK];
    for (expert, expected) in all.chunks(shape[1] * shape[2]).enumerate() {
        let found = checkpoint
            .mxfp4_rows(name, &shape, expert..expert + 1)
            .unwrap();
        assert_eq!(found, expected, "expert {expert}");
    }
    let beyond = checkpoint.mxfp4_rows(name, &shape, shape[0]..shape[0] + 1);
    assert!(beyond.unwrap_err().to_string().contains("entries"));
    let wider = [shape[0], shape[1], shape[2] + mxfp4::BLOCK];
    assert!(checkpoint.mxfp4_rows(name, &wider, 0..1).is_err());
    assert!(checkpoint.mxfp4_rows("model.norm", &shape, 0..1).is_err());
}

#[test]
fn nan_is_named_by_tensor_and_index() {
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::BF16, u64::MAX);
    let file = folder.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let (layout, name) = (
        super::super::safetensors::read_layout(&bytes, &file).unwrap(),
        "lm_head.weight",
    );
    let at = layout
        .iter()
        .find(|(info, _)| info.name == name)
        .unwrap()
        .1
        .start;
    drop(checkpoint);
    let element = at + 2 * (16 * 3 + 5);
    bytes[element..element + 2].copy_from_slice(&[0xC0, 0x7F]);
    fs::write(&file, bytes).unwrap();
    let message = refusal(Checkpoint::open(&folder).unwrap().f32(name, &[20, 16]));
    assert!(
        message.contains("tensor lm_head.weight: expected finite numbers"),
        "{message}"
    );
    assert!(message.contains("NaN at [3, 5]"), "{message}");
}

/// Changes one thing about a checkpoint and returns what opening says.
fn opened_with(change: impl FnOnce(&mut Value, &mut Vec<TensorInfo>)) -> String {
    let mut raw = tiny_config("llama");
    let mut tensors = tiny_tensors(&parse(&raw), Dtype::F32);
    change(&mut raw, &mut tensors);
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("model");
    write_checkpoint(&folder, &raw, &tensors, u64::MAX);
    refusal(Checkpoint::open(&folder))
}

#[test]
fn weights_have_to_agree_with_the_configuration() {
    let message = opened_with(|_, tensors| {
        tensors.retain(|info| info.name != "model.layers.1.mlp.up_proj.weight");
    });
    assert!(
        message.contains("tensor model.layers.1.mlp.up_proj.weight"),
        "{message}"
    );
    assert!(message.contains("expected a tensor [24, 16]"), "{message}");

    let message = opened_with(|raw, _| raw["intermediate_size"] = json!(32));
    assert!(
        message.contains("model.layers.0.mlp.gate_proj.weight"),
        "{message}"
    );
    assert!(message.contains("expected shape [32, 16]"), "{message}");
    assert!(message.contains("found shape [24, 16]"), "{message}");

    let message = opened_with(|raw, _| raw["num_hidden_layers"] = json!(1));
    assert!(message.contains("tensor model.layers.1."), "{message}");
    assert!(
        message.contains("only tensors that a model of this configuration uses"),
        "{message}"
    );

    let message = opened_with(|_, tensors| {
        let shape = vec![16];
        tensors.push(TensorInfo::new(
            "model.layers.0.self_attn.q_proj.bias",
            Dtype::F32,
            shape,
        ));
    });
    assert!(message.contains("an unused F32 [16]"), "{message}");

    let message = opened_with(|raw, _| raw["tie_word_embeddings"] = json!(true));
    assert!(message.contains("tensor lm_head.weight"), "{message}");
    assert!(
        message.contains("the same tensor as model.embed_tokens.weight"),
        "{message}"
    );

    let message = opened_with(|raw, _| raw["model_type"] = json!("gemma3"));
    assert!(message.contains("config.json: model_type"), "{message}");
}

#[test]
fn integer_weights_are_refused() {
    let raw = tiny_config("llama");
    let (_around, folder) = tiny_checkpoint(&raw, Dtype::F32, u64::MAX);
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let needle = br#""model.norm.weight":{"dtype":"F32""#;
    let at = bytes
        .windows(needle.len())
        .position(|window| window == needle)
        .unwrap();
    let mut changed = bytes;
    changed[at + needle.len() - 4] = b'I';
    fs::write(&file, changed).unwrap();
    let message = refusal(Checkpoint::open(&folder));
    assert!(message.contains("tensor model.norm.weight"), "{message}");
    assert!(
        message.contains("expected dtype F32, F16 or BF16, found dtype I32"),
        "{message}"
    );
}

#[test]
fn redundant_tensors_of_old_files_are_accepted() {
    let mut raw = tiny_config("llama");
    raw["tie_word_embeddings"] = json!(true);
    let mut tensors = tiny_tensors(&parse(&raw), Dtype::F32);
    tensors.push(TensorInfo::new(
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        Dtype::F32,
        [2],
    ));
    tensors.push(TensorInfo {
        name: "lm_head.weight".into(),
        ..tensors[0].clone()
    });
    let around = tempfile::tempdir().unwrap();
    let folder = around.path().join("model");
    let writer = crate::CheckpointWriter::create(&folder, tensors.clone(), u64::MAX).unwrap();
    for info in &tensors {
        let source = if info.name == "lm_head.weight" {
            &tensors[0]
        } else {
            info
        };
        writer.write(&info.name, &tensor_bytes(source)).unwrap();
    }
    writer
        .write_file("config.json", raw.to_string().as_bytes())
        .unwrap();
    writer.finish().unwrap();
    assert!(
        Checkpoint::open(&folder)
            .unwrap()
            .contains("lm_head.weight")
    );
}

#[test]
fn folders_that_are_no_model() {
    let around = tempfile::tempdir().unwrap();
    let message = refusal(Checkpoint::open(around.path().join("absent")));
    assert!(
        message.contains("absent: expected an existing file or folder"),
        "{message}"
    );
    let message = refusal(Checkpoint::open(around.path()));
    assert!(
        message.contains("config.json: expected the model's configuration"),
        "{message}"
    );

    let config = around.path().join("config.json");
    fs::write(&config, tiny_config("llama").to_string()).unwrap();
    let message = refusal(Checkpoint::open(&config));
    assert!(
        message.contains("give the folder that holds it"),
        "{message}"
    );
    let message = refusal(Checkpoint::open(around.path()));
    assert!(message.contains("found none of them"), "{message}");
    fs::write(around.path().join("pytorch_model.bin"), "").unwrap();
    let message = refusal(Checkpoint::open(around.path()));
    assert!(
        message.contains("found pytorch_model.bin only"),
        "{message}"
    );
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        fs::write(around.path().join(name), "").unwrap();
    }
    let message = refusal(Checkpoint::open(around.path()));
    assert!(message.contains("found both"), "{message}");

    fs::write(&config, "{\"model_type\": ").unwrap();
    let error = Checkpoint::open(around.path()).unwrap_err().to_string();
    assert!(error.contains("config.json: expected the JSON"), "{error}");
    assert!(error.contains("line 1 column"), "{error}");
}

#[test]
fn side_files_and_generation_config() {
    let raw = tiny_config("llama");
    let (_around, folder) = tiny_checkpoint(&raw, Dtype::F32, u64::MAX);
    assert!(Checkpoint::open(&folder).unwrap().side_files().is_empty());
    fs::write(
        folder.join("generation_config.json"),
        r#"{"eos_token_id": [2, 9]}"#,
    )
    .unwrap();
    fs::write(folder.join("tokenizer_config.json"), "{}").unwrap();
    fs::write(folder.join("training_args.bin"), "x").unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.config().eos_token_ids, [2, 9]);
    assert_eq!(
        checkpoint.side_files(),
        [
            folder.join("generation_config.json"),
            folder.join("tokenizer_config.json")
        ]
    );
    let contents = checkpoint.side_contents().unwrap();
    assert_eq!(
        contents[1],
        ("tokenizer_config.json".to_owned(), b"{}".to_vec())
    );
    assert!(listing(&folder).contains(&"training_args.bin".to_owned()));

    fs::write(
        folder.join("generation_config.json"),
        r#"{"eos_token_id": "two"}"#,
    )
    .unwrap();
    let message = refusal(Checkpoint::open(&folder));
    assert!(
        message.contains("generation_config.json: eos_token_id"),
        "{message}"
    );
}

#[test]
fn a_checkpoint_is_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let (_around, folder) = tiny_checkpoint(&tiny_config("llama"), Dtype::F16, 900);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    shared(&checkpoint);
    std::thread::scope(|scope| {
        for info in checkpoint.tensors() {
            let checkpoint = &checkpoint;
            scope.spawn(move || checkpoint.f32(&info.name, &info.shape).unwrap());
        }
    });
}
