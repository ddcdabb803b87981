//! The `config.json` that GGUF metadata amounts to.
//!
//! Keys are those of ggml's `docs/gguf.md` and of llama.cpp's converter. The result is a
//! configuration that transformers reads as well; it is parsed like any other afterwards.

use serde_json::{Map, Value as Json, json};

use super::header::Header;
use crate::{Architecture, Error, RopeScaling, RopeSpec, tensor::shape_text};

/// Keys, after the architecture's prefix, that change the computation in ways mlac does not
/// implement when they are there and not 0.
const UNSUPPORTED_KEYS: [&str; 13] = [
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "rope.dimension_sections",
    "rope.scaling.yarn_log_multiplier",
    "interleave_moe_layer_step",
];

/// What to do when a key says something that mlac does not implement.
const OTHER_MODEL: &str = "use a supported model, or its safetensors checkpoint";

/// The family of a file.
pub(super) fn architecture(header: &Header<'_>) -> Result<Architecture, Error> {
    let key = "general.architecture";
    let supported = "llama (Mistral too), qwen2 or qwen3";
    match header.text(key)? {
        Some("llama") => Ok(Architecture::Llama),
        Some("qwen2") => Ok(Architecture::Qwen2),
        Some("qwen3") => Ok(Architecture::Qwen3),
        Some(other) => Err(header.refuse(key, supported, format!("{other:?}"), OTHER_MODEL)),
        None => Err(header.refuse(key, supported, "no such key", "get the file again")),
    }
}

struct Keys<'h, 'a> {
    header: &'h Header<'a>,
    prefix: &'static str,
}

impl Keys<'_, '_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn integer(&self, name: &str) -> Result<u64, Error> {
        let key = self.key(name);
        self.header.integer(&key)?.ok_or_else(|| {
            self.header
                .refuse(&key, "a whole number", "no such key", "get the file again")
        })
    }

    fn opt_integer(&self, name: &str) -> Result<Option<u64>, Error> {
        self.header.integer(&self.key(name))
    }

    fn opt_number(&self, name: &str) -> Result<Option<f64>, Error> {
        self.header.number(&self.key(name))
    }

    fn refuse(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        self.header
            .refuse(&self.key(name), expected, found, OTHER_MODEL)
    }
}

/// The configuration; `rope_factors` is the content of `rope_freqs.weight`, if there is one.
pub(super) fn config_json(
    header: &Header<'_>,
    architecture: Architecture,
    rope_factors: Option<&[f32]>,
) -> Result<Json, Error> {
    let keys = Keys {
        header,
        prefix: architecture.model_type(),
    };
    for name in UNSUPPORTED_KEYS {
        if header.get(&keys.key(name)).is_some() && keys.opt_number(name)? != Some(0.0) {
            return Err(keys.refuse(name, "no such key, or 0", "another value"));
        }
    }
    let factor = "rope.scaling.attn_factor";
    if let Some(value) = keys
        .opt_number(factor)?
        .filter(|value| (value - 1.0).abs() > 0.0)
    {
        return Err(keys.refuse(factor, "no such key, or 1", value.to_string()));
    }
    let heads = keys.integer("attention.head_count")?;
    let hidden = keys.integer("embedding_length")?;
    let head_dim = head_dim(&keys, heads, hidden)?;
    let tensor = |name: &str| header.tensors.iter().find(|tensor| tensor.name == name);
    let vocab_size = match keys.opt_integer("vocab_size")? {
        Some(size) => size,
        // Newer converters leave the key out: the embedding has one row for each token.
        None => tensor("token_embd.weight").map_or(0, |tensor| tensor.shape[0] as u64),
    };
    let epsilon = "attention.layer_norm_rms_epsilon";

    let mut json = Map::new();
    let mut set = |key: &str, value: Json| json.insert(key.to_owned(), value);
    set(
        "architectures",
        json!([format!("{}ForCausalLM", architecture.class_prefix())]),
    );
    set("model_type", json!(architecture.model_type()));
    set("vocab_size", json!(vocab_size));
    set("hidden_size", json!(hidden));
    set(
        "intermediate_size",
        json!(keys.integer("feed_forward_length")?),
    );
    set("num_hidden_layers", json!(keys.integer("block_count")?));
    set("num_attention_heads", json!(heads));
    // Absent means multi-head attention.
    set(
        "num_key_value_heads",
        json!(
            keys.opt_integer("attention.head_count_kv")?
                .unwrap_or(heads)
        ),
    );
    set("head_dim", json!(head_dim));
    set("hidden_act", json!("silu"));
    set(
        "max_position_embeddings",
        json!(keys.integer("context_length")?),
    );
    let Some(epsilon_value) = keys.opt_number(epsilon)? else {
        return Err(header.refuse(
            &keys.key(epsilon),
            "a number",
            "no such key",
            "get the file again",
        ));
    };
    set("rms_norm_eps", json!(epsilon_value));
    // llama.cpp takes 10000 when the key is absent, as in files made from Llama 1 and 2.
    let theta = keys.opt_number("rope.freq_base")?.unwrap_or(10_000.0);
    set("rope_theta", json!(theta));
    let scaling = match rope_factors {
        Some(factors) => {
            let declared = header.text(&keys.key("rope.scaling.type"))?;
            if let Some(kind) = declared.filter(|&kind| kind != "none") {
                return Err(keys.refuse(
                    "rope.scaling.type",
                    "no other rule beside the tensor rope_freqs.weight",
                    format!("{kind:?}"),
                ));
            }
            llama3_scaling(header, theta, factors)?
        }
        None => scaling(&keys)?,
    };
    set("rope_scaling", scaling);
    set(
        "tie_word_embeddings",
        json!(tensor("output.weight").is_none()),
    );
    set(
        "attention_bias",
        json!(tensor("blk.0.attn_q.bias").is_some()),
    );
    if architecture == Architecture::Llama {
        set("mlp_bias", json!(tensor("blk.0.ffn_up.bias").is_some()));
    } else {
        set("use_sliding_window", json!(false));
    }
    special_ids(header, &mut set)?;
    set("torch_dtype", json!("float32"));
    Ok(Json::Object(json))
}

/// `attention.key_length`, else the share of the hidden size; the whole head has to be rotated.
fn head_dim(keys: &Keys<'_, '_>, heads: u64, hidden: u64) -> Result<u64, Error> {
    let rotated = keys.opt_integer("rope.dimension_count")?;
    let head_dim = match keys.opt_integer("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(keys.refuse(
                "attention.head_count",
                format!("a divisor of embedding_length = {hidden}"),
                heads.to_string(),
            ));
        }
    };
    let value = keys.opt_integer("attention.value_length")?;
    for (name, length) in [
        ("rope.dimension_count", rotated),
        ("attention.value_length", value),
    ] {
        if let Some(length) = length.filter(|&length| length != head_dim) {
            return Err(keys.refuse(
                name,
                format!("the head size, {head_dim}"),
                length.to_string(),
            ));
        }
    }
    Ok(head_dim)
}

/// The rule of the `rope.scaling` keys.
fn scaling(keys: &Keys<'_, '_>) -> Result<Json, Error> {
    let kind = keys.header.text(&keys.key("rope.scaling.type"))?;
    let factor = || -> Result<f64, Error> {
        keys.opt_number("rope.scaling.factor")?
            .ok_or_else(|| keys.refuse("rope.scaling.factor", "a number", "no such key"))
    };
    match kind {
        // `rope.scale_linear` is what `rope.scaling` was called before there were other rules.
        None => match keys.opt_number("rope.scale_linear")? {
            Some(factor) if factor > 1.0 => Ok(json!({ "rope_type": "linear", "factor": factor })),
            _ => Ok(Json::Null),
        },
        Some("none") => Ok(Json::Null),
        Some("linear") => Ok(json!({ "rope_type": "linear", "factor": factor()? })),
        Some("yarn") => {
            let mut rule = json!({
                "rope_type": "yarn",
                "factor": factor()?,
                "original_max_position_embeddings":
                    keys.integer("rope.scaling.original_context_length")?,
            });
            for name in ["beta_fast", "beta_slow"] {
                if let Some(value) = keys.opt_number(&format!("rope.scaling.yarn_{name}"))? {
                    rule[name] = json!(value);
                }
            }
            Ok(rule)
        }
        Some(other) => Err(keys.refuse(
            "rope.scaling.type",
            "none, linear or yarn",
            format!("{other:?}"),
        )),
    }
}

/// The rule behind the tensor `rope_freqs.weight`, by which llama.cpp divides frequencies.
///
/// Its converter writes it for Llama 3.1 and later with the parameters all these models share;
/// only the largest divisor differs. What does not come out the same is refused.
fn llama3_scaling(header: &Header<'_>, theta: f64, factors: &[f32]) -> Result<Json, Error> {
    let head_dim = factors.len() * 2;
    let largest = factors.iter().copied().fold(1.0_f32, f32::max);
    let (low, high, length) = (1.0, 4.0, 8192);
    let table = |scaling| RopeSpec { theta, scaling }.table(head_dim).inv_freq;
    let plain = table(RopeScaling::Default);
    let scaled = table(RopeScaling::Llama3 {
        factor: f64::from(largest),
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: length,
    });
    let same = plain
        .iter()
        .zip(&scaled)
        .zip(factors)
        .all(|((plain, scaled), factor)| (plain / scaled / factor - 1.0).abs() < 1e-4);
    if !same {
        return Err(header.refuse(
            "tensor rope_freqs.weight",
            format!("Llama 3's divisors (low 1, high 4, length {length})"),
            format!("others, {} up to {largest}", shape_text(&[factors.len()])),
            "use the model's safetensors checkpoint",
        ));
    }
    if largest <= 1.0 {
        return Ok(Json::Null);
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }))
}

/// Token ids that a configuration names.
fn special_ids(
    header: &Header<'_>,
    set: &mut impl FnMut(&str, Json) -> Option<Json>,
) -> Result<(), Error> {
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "bos_token_id"),
        ("tokenizer.ggml.padding_token_id", "pad_token_id"),
    ] {
        set(name, json!(header.integer(key)?));
    }
    let mut ends: Vec<u64> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        ends.extend(header.integer(key)?.filter(|id| !ends.contains(id)));
    }
    set(
        "eos_token_id",
        match ends.as_slice() {
            [] => Json::Null,
            [end] => json!(end),
            ends => json!(ends),
        },
    );
    Ok(())
}
