use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{Refusal, RopeScaling, checkpoint::expected_tensors};

/// A small configuration of a family, as transformers 4 writes it.
fn base(model_type: &str) -> Value {
    let mut json = json!({
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": null,
        "eos_token_id": 7,
        "tie_word_embeddings": true,
    });
    match model_type {
        "mistral" => json["sliding_window"] = Value::Null,
        "qwen3" => json["head_dim"] = json!(16),
        "gpt_oss" => {
            let keys = json!({
                "hidden_size": 64,
                "intermediate_size": 96,
                "head_dim": 16,
                "num_local_experts": 8,
                "num_experts_per_tok": 4,
                "experts_per_token": 4,
                "swiglu_limit": 7.0,
                "attention_bias": true,
                "tie_word_embeddings": false,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "rope_theta": 150_000,
                "rope_scaling": {
                    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": 4096, "truncate": false,
                },
                "quantization_config": {
                    "quant_method": "mxfp4",
                    "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
                },
            });
            for (key, value) in keys.as_object().unwrap() {
                json[key] = value.clone();
            }
        }
        _ => {}
    }
    json
}

fn parse(json: &Value) -> Result<ModelConfig, Refusal> {
    ModelConfig::from_json(json, "config.json")
}

fn with(model_type: &str, changes: &Value) -> Value {
    let mut json = base(model_type);
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    json
}

fn without(model_type: &str, key: &str) -> Value {
    let mut json = base(model_type);
    json.as_object_mut().unwrap().remove(key);
    json
}

#[test]
fn llama_is_read_whole() {
    let config = parse(&base("llama")).unwrap();
    let expected = ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 48,
        intermediate_size: 80,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 96,
        max_position_embeddings: 256,
        rms_norm_eps: 1e-5,
        rope: RopeSpec {
            theta: 50_000.0,
            scaling: RopeScaling::Default,
        },
        tie_word_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sinks: false,
        moe: None,
        sliding_window: vec![None; 4],
        eos_token_ids: vec![7],
        mla: None,
    };
    assert_eq!(config, expected);
    assert_eq!(config.group_size(), 3);
    assert_eq!(config.gqa_cache_width(), 32);
}

#[test]
fn families_differ_in_biases_and_norms() {
    let flags = |json: &Value| {
        let config = parse(json).unwrap();
        (
            config.qkv_bias,
            config.o_bias,
            config.mlp_bias,
            config.qk_norm,
            config.head_dim,
        )
    };
    let biased = json!({ "attention_bias": true, "mlp_bias": true });
    assert_eq!(flags(&base("llama")), (false, false, false, false, 8));
    assert_eq!(flags(&with("llama", &biased)), (true, true, true, false, 8));
    assert_eq!(
        flags(&with("mistral", &biased)),
        (false, false, false, false, 8)
    );
    assert_eq!(flags(&base("qwen2")), (true, false, false, false, 8));
    assert_eq!(flags(&base("qwen3")), (false, false, false, true, 16));
    assert_eq!(
        flags(&with("qwen3", &biased)),
        (true, true, false, true, 16)
    );
    assert_eq!(flags(&with("llama", &json!({ "head_dim": 32 }))).4, 32);
}

#[test]
fn defaults_that_belong_to_the_format() {
    let llama = |key| parse(&without("llama", key)).unwrap();
    assert_eq!(llama("num_key_value_heads").num_key_value_heads, 6);
    assert!(!llama("tie_word_embeddings").tie_word_embeddings);
    assert!((llama("rope_theta").rope.theta - 10_000.0).abs() < 1e-9);
    assert_eq!(llama("eos_token_id").eos_token_ids, [2]);
    assert_eq!(llama("hidden_act"), llama("rope_scaling"));
    assert!(
        parse(&without("qwen2", "eos_token_id"))
            .unwrap()
            .eos_token_ids
            .is_empty()
    );
    let none = with("llama", &json!({ "eos_token_id": null }));
    assert!(parse(&none).unwrap().eos_token_ids.is_empty());
    let many = with("llama", &json!({ "eos_token_id": [3, 5] }));
    assert_eq!(parse(&many).unwrap().eos_token_ids, [3, 5]);
}

#[test]
fn rope_rules_in_both_styles() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    let yarn = |original, factor, truncate| RopeScaling::Yarn {
        factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_position_embeddings: original,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate,
    };
    let cases = [
        (json!({ "rope_type": "default" }), RopeScaling::Default),
        (
            json!({ "type": "linear", "factor": 2 }),
            RopeScaling::Linear { factor: 2.0 },
        ),
        (
            json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }),
            llama3,
        ),
        (
            json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64 }),
            yarn(64, 4.0, true),
        ),
        // The original length defaults to the promised one, a null factor to their ratio.
        (
            json!({ "rope_type": "yarn", "factor": 4.0, "truncate": false }),
            yarn(256, 4.0, false),
        ),
        (
            json!({ "rope_type": "yarn", "factor": null, "original_max_position_embeddings": 64 }),
            yarn(64, 4.0, true),
        ),
    ];
    for (rule, expected) in cases {
        let old = parse(&with("llama", &json!({ "rope_scaling": rule }))).unwrap();
        assert_eq!(
            old.rope,
            RopeSpec {
                theta: 50_000.0,
                scaling: expected.clone()
            }
        );
        let mut rule = rule;
        rule["rope_theta"] = json!(1e6);
        let mut new = without("llama", "rope_theta");
        new["rope_parameters"] = rule;
        assert_eq!(
            parse(&new).unwrap().rope,
            RopeSpec {
                theta: 1e6,
                scaling: expected
            }
        );
    }
    let outer = with(
        "llama",
        &json!({
            "rope_scaling":
                { "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64 },
            "original_max_position_embeddings": 32,
        }),
    );
    assert_eq!(parse(&outer).unwrap().rope.scaling, yarn(32, 2.0, true));
}

#[test]
fn windows_by_family() {
    let windows = |json: &Value| parse(json).unwrap().sliding_window;
    let mistral = with("mistral", &json!({ "sliding_window": 32 }));
    assert_eq!(windows(&mistral), [Some(32); 4]);
    assert_eq!(windows(&base("mistral")), [None; 4]);
    for family in ["qwen2", "qwen3"] {
        let unused = json!({ "sliding_window": 32, "max_window_layers": 2 });
        assert_eq!(windows(&with(family, &unused)), [None; 4]);
        let used = json!(
            { "use_sliding_window": true, "sliding_window": 32, "max_window_layers": 3 }
        );
        assert_eq!(windows(&with(family, &used)), [None, None, None, Some(32)]);
        let (full, sliding) = ("full_attention", "sliding_attention");
        let listed = json!({
            "use_sliding_window": true, "sliding_window": 32, "max_window_layers": 3,
            "layer_types": [sliding, full, sliding, full],
        });
        assert_eq!(
            windows(&with(family, &listed)),
            [Some(32), None, Some(32), None]
        );
    }
}

/// Every refusal as one text: what is looked at, expected, found, and the way out.
#[test]
fn refusals() {
    let full = "full_attention";
    let cases = [
        json!([]),
        without("llama", "model_type"),
        with("llama", &json!({ "model_type": "gpt2" })),
        with("llama", &json!({ "model_type": "llama_mla_mla" })),
        with("llama", &json!({ "model_type": 3 })),
        without("llama", "hidden_size"),
        with("llama", &json!({ "hidden_size": 0 })),
        with("llama", &json!({ "hidden_size": -48 })),
        with("llama", &json!({ "hidden_size": 48.5 })),
        with("llama", &json!({ "hidden_size": u64::MAX })),
        with("llama", &json!({ "hidden_size": 50 })),
        with("llama", &json!({ "num_hidden_layers": 100_000 })),
        with("llama", &json!({ "num_key_value_heads": 4 })),
        with("llama", &json!({ "head_dim": 7 })),
        with("llama", &json!({ "hidden_act": "gelu" })),
        with("llama", &json!({ "rms_norm_eps": 0.0 })),
        with("llama", &json!({ "attention_bias": "yes" })),
        with("llama", &json!({ "eos_token_id": -1 })),
        with(
            "llama",
            &json!({ "quantization_config": { "quant_method": "gptq" } }),
        ),
        with("llama", &json!({ "num_local_experts": 8 })),
        with("llama", &json!({ "rope_theta": -1.0 })),
        with("llama", &json!({ "partial_rotary_factor": 0.5 })),
        with("llama", &json!({ "rope_scaling": [] })),
        with(
            "llama",
            &json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }),
        ),
        with("llama", &json!({ "rope_scaling": { "type": "linear" } })),
        with("llama", &json!({ "rope_scaling": { "type": "yarn" } })),
        with(
            "llama",
            &json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 4.0, "high_freq_factor": 1.0 } }),
        ),
        with(
            "llama",
            &json!({ "rope_scaling": { "mrope_section": [8, 8] } }),
        ),
        with(
            "llama",
            &json!({ "rope_scaling": { "type": "linear", "factor": 2.0 },
            "rope_parameters": { "rope_type": "default" } }),
        ),
        with(
            "llama",
            &json!({ "rope_parameters": { full: { "rope_type": "default" } } }),
        ),
        with("llama", &json!({ "layer_types": [full, full] })),
        with(
            "llama",
            &json!({ "layer_types": [full, full, full, "chunked_attention"] }),
        ),
        with(
            "llama",
            &json!({ "layer_types": [full, full, full, "sliding_attention"] }),
        ),
        with(
            "mistral",
            &json!({ "layer_types": [full, full, full, "sliding_attention"] }),
        ),
        without("mistral", "sliding_window"),
        without("mistral", "num_key_value_heads"),
        with(
            "qwen2",
            &json!({ "use_sliding_window": true, "sliding_window": 8 }),
        ),
        with(
            "qwen2",
            &json!({ "layer_types": [full, full, full, "sliding_attention"] }),
        ),
        without("qwen3", "head_dim"),
    ];
    let texts: Vec<String> = cases
        .iter()
        .map(|json| parse(json).unwrap_err().to_string())
        .collect();
    insta::assert_snapshot!(texts.join("\n"));
}

fn mla_of(config: &ModelConfig, rotary: [usize; 2]) -> MlaConfig {
    let encoder = MlaEncoder::of(config.architecture);
    let layer = |qk_rope_head_dim| MlaLayer {
        kv_lora_rank: 10,
        qk_rope_head_dim,
        qk_nope_head_dim: config.head_dim,
        v_head_dim: config.head_dim,
        encoder,
    };
    MlaConfig {
        layers: BTreeMap::from([(1, layer(rotary[0])), (3, layer(rotary[1]))]),
        attention_scale: (config.head_dim as f64).powf(-0.5),
        o_bias: true,
    }
}

#[test]
fn gpt_oss_is_read_whole() {
    let config = parse(&base("gpt_oss")).unwrap();
    assert_eq!(
        config.moe,
        Some(MoeConfig {
            num_experts: 8,
            experts_per_token: 4,
            swiglu_limit: 7.0,
            swiglu_alpha: 1.702,
            format: ExpertFormat::Mxfp4,
        })
    );
    assert!(config.sinks && config.qkv_bias && config.o_bias && !config.mlp_bias);
    assert_eq!(
        config.sliding_window,
        [Some(128), None, Some(128), None],
        "windows alternate"
    );
    let RopeScaling::Yarn { truncate, .. } = config.rope.scaling else {
        panic!("no YaRN in {:?}", config.rope);
    };
    assert!(!truncate);
    let table = config.rope.table(config.head_dim);
    let expected = 0.1 * 32.0_f64.ln() + 1.0;
    assert!((table.attention_factor - expected).abs() < 1e-12);

    assert_eq!(parse(&without("gpt_oss", "layer_types")).unwrap(), config);

    let mut dense = base("gpt_oss");
    dense.as_object_mut().unwrap().remove("quantization_config");
    let dense = parse(&dense).unwrap();
    assert_eq!(dense.moe.unwrap().format, ExpertFormat::Dense);
    let shape = |config: &ModelConfig, name: &str| {
        let name = format!("model.layers.3.{name}");
        expected_tensors(config)
            .into_iter()
            .find(|(n, _)| *n == name)
            .unwrap_or_else(|| panic!("no {name}"))
            .1
    };
    let experts = "mlp.experts";
    for (config, name, expected) in [
        (&config, "gate_up_proj_blocks", vec![8, 192, 2, 16]),
        (&config, "gate_up_proj_scales", vec![8, 192, 2]),
        (&config, "gate_up_proj_bias", vec![8, 192]),
        (&config, "down_proj_blocks", vec![8, 64, 3, 16]),
        (&config, "down_proj_scales", vec![8, 64, 3]),
        (&config, "down_proj_bias", vec![8, 64]),
        (&dense, "gate_up_proj", vec![8, 64, 192]),
        (&dense, "down_proj", vec![8, 96, 64]),
        (&dense, "down_proj_bias", vec![8, 64]),
    ] {
        assert_eq!(
            shape(config, &format!("{experts}.{name}")),
            expected,
            "{name}"
        );
    }
    assert_eq!(shape(&config, "self_attn.sinks"), [6]);
    assert_eq!(shape(&config, "mlp.router.weight"), [8, 64]);
}

#[test]
fn gpt_oss_refusals() {
    let refused = |key: &str, json: &Value| {
        let refusal = parse(json).unwrap_err();
        assert!(refusal.subject.contains(key), "{refusal}");
    };
    for key in ["num_local_experts", "sliding_window", "rope_theta"] {
        refused(key, &without("gpt_oss", key));
    }
    let mut json = base("gpt_oss");
    for key in ["num_experts_per_tok", "experts_per_token"] {
        json.as_object_mut().unwrap().remove(key);
    }
    refused("num_experts_per_tok", &json);
    for (key, changes) in [
        ("experts_per_token", json!({ "experts_per_token": 3 })),
        (
            "num_experts_per_tok",
            json!({ "experts_per_token": 9, "num_experts_per_tok": 9 }),
        ),
        ("swiglu_limit", json!({ "swiglu_limit": -1.0 })),
        ("swiglu_alpha", json!({ "swiglu_alpha": 0 })),
        ("intermediate_size", json!({ "intermediate_size": 80 })),
        (
            "quantization_config",
            json!({ "quantization_config": { "quant_method": "gptq" } }),
        ),
        ("layer_types", json!({ "layer_types": ["full_attention"] })),
    ] {
        refused(key, &with("gpt_oss", &changes));
    }
    let others = json!({ "quantization_config": { "quant_method": "mxfp4" } });
    refused("quantization_config", &with("llama", &others));
}

#[test]
fn mla_keys_round_trip() {
    for architecture in Architecture::ALL {
        for rotary in [[4, 4], [4, 6]] {
            let raw = base(architecture.model_type());
            let source = parse(&raw).unwrap();
            let mla = mla_of(&source, rotary);
            let json = mla_config_json(&raw, &source, &mla);
            let back = parse(&json).unwrap();
            assert_eq!(
                back,
                ModelConfig {
                    mla: Some(mla),
                    ..source.clone()
                }
            );
            assert_eq!(json["kv_lora_rank"], json!(10));
            assert_eq!(json["qk_rope_head_dim"].is_array(), rotary[0] != rotary[1]);
            assert_eq!(json["rope_theta"], raw["rope_theta"]);
            assert_eq!(back.mla_layer(1).unwrap().cache_width(), 14);
            assert!(back.mla_layer(0).is_none());
            assert!(back.layer_o_bias(1) && back.layer_o_bias(0) == source.o_bias);
        }
    }
}

#[test]
fn mla_refusals() {
    let raw = base("qwen3");
    let source = parse(&raw).unwrap();
    let good = mla_config_json(&raw, &source, &mla_of(&source, [4, 6]));
    let changed = |key: &str, value: Value| {
        let mut json = good.clone();
        json[key] = value;
        json
    };
    let cases = [
        changed("mla_layers", json!([3, 1])),
        changed("mla_layers", json!([1, 4])),
        changed("mla_layers", json!([])),
        changed("mla_layers", Value::Null),
        changed("mla_encoder", json!("hidden")),
        changed("mla_encoder", Value::Null),
        changed("kv_lora_rank", json!(0)),
        changed("kv_lora_rank", json!([10])),
        changed("kv_lora_rank", json!(129)),
        changed("qk_rope_head_dim", json!(5)),
        changed("qk_rope_head_dim", json!(0)),
        changed("qk_rope_head_dim", json!(34)),
        changed("qk_nope_head_dim", json!(8)),
        changed("v_head_dim", json!(0)),
        changed("attention_scale", json!(0)),
        changed("mla_o_bias", Value::Null),
    ];
    let texts: Vec<String> = cases
        .iter()
        .map(|json| parse(json).unwrap_err().to_string())
        .collect();
    insta::assert_snapshot!(texts.join("\n"));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9_]{0,12}".prop_map(Value::from),
        Just(json!("yarn")),
        Just(json!("sliding_attention")),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("(type|factor|truncate|rope_theta)", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever a key holds, the file is read or refused, and what is read implies tensors whose
    /// sizes can be counted.
    #[test]
    fn hostile_values_never_panic(
        family in prop::sample::select(Architecture::ALL.to_vec()),
        mla in any::<bool>(),
        keys in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..3),
    ) {
        let raw = base(family.model_type());
        let mut json = raw.clone();
        if mla {
            let source = parse(&raw).unwrap();
            json = mla_config_json(&raw, &source, &mla_of(&source, [4, 6]));
        }
        for extra in ["layer_types", "use_sliding_window", "max_window_layers", "head_dim"] {
            json[extra] = Value::Null;
        }
        let names: Vec<String> = json.as_object().unwrap().keys().cloned().collect();
        for (at, value) in keys {
            json[at.get(&names)] = value;
        }
        if let Ok(config) = parse(&json) {
            let _ = config.rope.table(config.head_dim.min(1 << 10));
            for (name, shape) in expected_tensors(&config) {
                let info = crate::TensorInfo::new(name, crate::Dtype::F32, shape);
                prop_assert!(info.byte_len().is_ok());
            }
        }
    }
}
