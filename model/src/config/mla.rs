//! The keys that make a `config.json` the one of an MLA checkpoint.
//!
//! `mla_layers` lists the converted layers; `kv_lora_rank`, `qk_rope_head_dim`, `qk_nope_head_dim`
//! and `v_head_dim` are numbers, or lists parallel to `mla_layers` where layers differ.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    Architecture, MlaConfig, MlaEncoder, MlaLayer, ModelConfig,
    fields::{Fields, short},
    hf::LARGEST_HEAD,
};
use crate::Refusal;

impl MlaEncoder {
    /// The value of the key `mla_encoder`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hidden => "hidden",
            Self::NormedKey => "normed_key",
            Self::KeptQuery => "kept_query",
        }
    }

    /// Whether a tensor below `self_attn.` of a converted layer is the source's own, byte for byte.
    pub fn keeps(self, tensor: &str) -> bool {
        let module = tensor.split_once('.').map_or(tensor, |(module, _)| module);
        match self {
            Self::Hidden => module == "sinks",
            Self::KeptQuery => ["sinks", "q_proj"].contains(&module),
            Self::NormedKey => {
                ["sinks", "q_proj", "q_norm", "k_proj", "k_norm", "v_proj"].contains(&module)
            }
        }
    }

    /// The form a converted layer of this family has.
    pub fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => Self::Hidden,
            Architecture::Qwen3 => Self::NormedKey,
            Architecture::GptOss => Self::KeptQuery,
        }
    }
}

/// The `config.json` of a converted model: the source's keys, and those of the MLA form.
///
/// `source_raw` is the source's own `config.json` and `source` what was read from it.
pub fn mla_config_json(source_raw: &Value, source: &ModelConfig, mla: &MlaConfig) -> Value {
    let layers: Vec<usize> = mla.layers.keys().copied().collect();
    let column = |of: fn(&MlaLayer) -> usize| -> Value {
        let values: Vec<usize> = mla.layers.values().map(of).collect();
        match values.first() {
            Some(first) if values.iter().all(|value| value == first) => json!(first),
            _ => json!(values),
        }
    };
    let mut json = source_raw.clone();
    let keys = [
        (
            "model_type",
            json!(format!("{}_mla", source.architecture.model_type())),
        ),
        (
            "architectures",
            json!([format!(
                "{}MlaForCausalLM",
                source.architecture.class_prefix()
            )]),
        ),
        ("mla_layers", json!(layers)),
        ("kv_lora_rank", column(|layer| layer.kv_lora_rank)),
        ("qk_rope_head_dim", column(|layer| layer.qk_rope_head_dim)),
        ("qk_nope_head_dim", column(|layer| layer.qk_nope_head_dim)),
        ("v_head_dim", column(|layer| layer.v_head_dim)),
        (
            "mla_encoder",
            json!(MlaEncoder::of(source.architecture).name()),
        ),
        ("attention_scale", json!(mla.attention_scale)),
        ("mla_o_bias", json!(mla.o_bias)),
    ];
    if let Some(object) = json.as_object_mut() {
        object.extend(keys.map(|(key, value)| (key.to_owned(), value)));
    }
    json
}

/// Reads the MLA keys; `config` is the rest of the same file.
pub(super) fn read(fields: &Fields<'_>, config: &ModelConfig) -> Result<MlaConfig, Refusal> {
    let layers = layer_list(fields, config.num_hidden_layers)?;
    let encoder = MlaEncoder::of(config.architecture);
    match fields.opt_str("mla_encoder")? {
        Some(name) if name == encoder.name() => {}
        Some(other) => {
            return Err(fields.refuse(
                "mla_encoder",
                format!(
                    "{:?}, the form of {}",
                    encoder.name(),
                    config.architecture.model_type()
                ),
                format!("{other:?}"),
                "convert the model again",
            ));
        }
        None => {
            return Err(fields.missing(
                "mla_encoder",
                "\"hidden\", \"normed_key\" or \"kept_query\"",
            ));
        }
    }
    let count = layers.len();
    let ranks = fields.sizes("kv_lora_rank", count)?;
    let rotary = fields.sizes("qk_rope_head_dim", count)?;
    let nope = fields.sizes("qk_nope_head_dim", count)?;
    let values = fields.sizes("v_head_dim", count)?;
    let mut converted = BTreeMap::new();
    for (at, &index) in layers.iter().enumerate() {
        let layer = MlaLayer {
            kv_lora_rank: ranks[at],
            qk_rope_head_dim: rotary[at],
            qk_nope_head_dim: nope[at],
            v_head_dim: values[at],
            encoder,
        };
        check(fields, config, index, &layer)?;
        converted.insert(index, layer);
    }
    Ok(MlaConfig {
        layers: converted,
        attention_scale: fields.positive("attention_scale")?,
        o_bias: fields
            .opt_bool("mla_o_bias")?
            .ok_or_else(|| fields.missing("mla_o_bias", "true or false"))?,
    })
}

fn layer_list(fields: &Fields<'_>, layers: usize) -> Result<Vec<usize>, Refusal> {
    let expected = format!("a list of layers from 0 to {}, ascending", layers - 1);
    let Some(value) = fields.get("mla_layers") else {
        return Err(fields.missing("mla_layers", &expected));
    };
    let wrong = || {
        fields.refuse(
            "mla_layers",
            &expected,
            short(value),
            "convert the model again",
        )
    };
    let list: Vec<usize> = value
        .as_array()
        .ok_or_else(wrong)?
        .iter()
        .map(|entry| {
            entry
                .as_u64()
                .filter(|&layer| layer < layers as u64)
                .map(|layer| layer as usize)
        })
        .collect::<Option<_>>()
        .ok_or_else(wrong)?;
    if list.is_empty() || !list.is_sorted_by(|a, b| a < b) {
        return Err(wrong());
    }
    Ok(list)
}

fn check(
    fields: &Fields<'_>,
    config: &ModelConfig,
    index: usize,
    layer: &MlaLayer,
) -> Result<(), Refusal> {
    let refuse = |key: &str, expected: String, found: usize| {
        Err(fields.refuse(
            key,
            format!("{expected} in layer {index}"),
            found,
            "convert the model again",
        ))
    };
    if layer.kv_lora_rank == 0 || layer.kv_lora_rank > config.gqa_cache_width() {
        return refuse(
            "kv_lora_rank",
            format!("1 to {}, the GQA cache's width,", config.gqa_cache_width()),
            layer.kv_lora_rank,
        );
    }
    let keys = config.gqa_cache_width() / 2;
    let rotary = layer.qk_rope_head_dim;
    if rotary == 0 || rotary % 2 == 1 || rotary > keys {
        return refuse(
            "qk_rope_head_dim",
            format!("an even number from 2 to {keys}, all keys' width,"),
            rotary,
        );
    }
    if layer.v_head_dim == 0 || layer.v_head_dim > LARGEST_HEAD {
        return refuse(
            "v_head_dim",
            format!("1 to {LARGEST_HEAD}"),
            layer.v_head_dim,
        );
    }
    let nope = layer.qk_nope_head_dim;
    match layer.encoder {
        MlaEncoder::NormedKey | MlaEncoder::KeptQuery if nope != config.head_dim => {
            return refuse(
                "qk_nope_head_dim",
                format!("head_dim = {}", config.head_dim),
                nope,
            );
        }
        _ if nope == 0 || nope > LARGEST_HEAD => {
            return refuse("qk_nope_head_dim", format!("1 to {LARGEST_HEAD}"), nope);
        }
        _ => {}
    }
    Ok(())
}
