//! `config.json` as transformers writes it, version 4 and version 5.
//!
//! Defaults: transformers leaves keys out of the file when they equal the default of its class, so
//! the defaults of `LlamaConfig`, `MistralConfig`, `Qwen2Config`, `Qwen3Config` and `GptOssConfig`
//! (transformers 5.23) belong to the format. They are applied here, each with a comment, and only to the keys
//! that published files do leave out; any other missing key is refused.

use serde_json::Value;

use super::{
    Architecture, ModelConfig,
    fields::{Fields, short},
    mla, moe, rope,
};
use crate::{Refusal, RopeSpec};

/// Keys that change what the model computes and that mlac does not implement.
const UNSUPPORTED_KEYS: [&str; 10] = [
    "quantization_config",
    "compression_config",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "no_rope_layers",
    "text_config",
];

/// Limits far above any model, so that the bytes of every tensor can be counted in 64 bits.
const MOST_LAYERS: usize = 4096;
const WIDEST: usize = 1 << 20;
const MOST_HEADS: usize = 1 << 14;
/// Largest head, GQA or MLA.
pub(super) const LARGEST_HEAD: usize = 1 << 14;

impl ModelConfig {
    /// Reads a configuration from the content of a `config.json`; `file` names it in messages.
    pub fn from_json(raw: &Value, file: &str) -> Result<Self, Refusal> {
        let fields = Fields::new(raw, file, "")?;
        let (architecture, is_mla) = model_type(&fields)?;
        refuse_unsupported(&fields, architecture)?;

        let hidden_size = fields.size_to("hidden_size", WIDEST)?;
        let num_hidden_layers = fields.size_to("num_hidden_layers", MOST_LAYERS)?;
        let num_attention_heads = fields.size_to("num_attention_heads", MOST_HEADS)?;
        // Absent means multi-head attention (Llama 1). MistralConfig alone has another default, 8,
        // which no published file relies on.
        let num_key_value_heads = match fields.opt_size_to("num_key_value_heads", MOST_HEADS)? {
            Some(heads) => heads,
            None if architecture == Architecture::Mistral && !fields.has("num_key_value_heads") => {
                return Err(fields.missing("num_key_value_heads", "a whole number"));
            }
            None => num_attention_heads,
        };
        let head_dim = head_dim(&fields, architecture, hidden_size, num_attention_heads)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(fields.refuse(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads = {num_attention_heads}"),
                num_key_value_heads,
                "correct the value in the file",
            ));
        }
        let max_position_embeddings = fields.size("max_position_embeddings")?;
        let (qkv_bias, o_bias, mlp_bias) = biases(&fields, architecture)?;

        let mut config = Self {
            architecture,
            hidden_size,
            intermediate_size: fields.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps")?,
            rope: read_rope(&fields, file, architecture, max_position_embeddings)?,
            // False is the default of all four classes.
            tie_word_embeddings: fields.opt_bool("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias,
            o_bias,
            mlp_bias,
            qk_norm: architecture == Architecture::Qwen3,
            sinks: architecture == Architecture::GptOss,
            moe: moe::read(&fields, architecture)?,
            sliding_window: sliding_window(&fields, architecture, num_hidden_layers)?,
            eos_token_ids: eos_token_ids(&fields, architecture)?,
            mla: None,
        };
        moe::check_blocks(&fields, &config)?;
        if is_mla {
            config.mla = Some(mla::read(&fields, &config)?);
        }
        Ok(config)
    }
}

/// The rotary embedding. GPT-OSS has a base of its own, so a file that lost it is refused.
fn read_rope(
    fields: &Fields<'_>,
    file: &str,
    architecture: Architecture,
    max_position_embeddings: usize,
) -> Result<RopeSpec, Refusal> {
    let inside = |object: &str| {
        fields
            .get(object)
            .is_some_and(|o| o.get("rope_theta").is_some())
    };
    let has = fields.has("rope_theta") || inside("rope_parameters") || inside("rope_scaling");
    if architecture == Architecture::GptOss && !has {
        return Err(fields.missing("rope_theta", "a number above 0"));
    }
    rope::read(fields, file, max_position_embeddings)
}

/// The family, and whether the model has MLA layers.
fn model_type(fields: &Fields<'_>) -> Result<(Architecture, bool), Refusal> {
    let supported = || {
        let names: Vec<&str> = Architecture::ALL.iter().map(|a| a.model_type()).collect();
        format!("one of {} (or one of them with _mla)", names.join(", "))
    };
    let Some(name) = fields.opt_str("model_type")? else {
        return Err(fields.missing("model_type", &supported()));
    };
    let base = name.strip_suffix("_mla");
    Architecture::from_model_type(base.unwrap_or(name))
        .map(|architecture| (architecture, base.is_some()))
        .ok_or_else(|| {
            fields.refuse(
                "model_type",
                supported(),
                format!("{name:?}"),
                "use a supported model",
            )
        })
}

fn refuse_unsupported(fields: &Fields<'_>, architecture: Architecture) -> Result<(), Refusal> {
    for key in UNSUPPORTED_KEYS {
        if architecture == Architecture::GptOss && moe::KEYS.contains(&key) {
            continue;
        }
        if let Some(value) = fields.get(key) {
            return Err(fields.refuse(
                key,
                "no such key: mlac does not implement what it asks for",
                short(value),
                "use a dense checkpoint with f32, f16 or bf16 weights, or GPT-OSS",
            ));
        }
    }
    // "silu" is the default of all four classes.
    match fields.opt_str("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(fields.refuse(
            "hidden_act",
            "\"silu\"",
            format!("{other:?}"),
            "use a model whose MLP is gated by SiLU",
        )),
    }
}

fn head_dim(
    fields: &Fields<'_>,
    architecture: Architecture,
    hidden_size: usize,
    heads: usize,
) -> Result<usize, Refusal> {
    let head_dim = match fields.opt_size_to("head_dim", LARGEST_HEAD)? {
        Some(head_dim) => head_dim,
        // Qwen3Config's default is 128 whatever the hidden size; its published files all have the key.
        None if architecture == Architecture::Qwen3 => {
            return Err(fields.missing("head_dim", "a whole number"));
        }
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(fields.refuse(
                "num_attention_heads",
                format!("a divisor of hidden_size = {hidden_size}, as there is no head_dim"),
                heads,
                "correct the value or add head_dim",
            ));
        }
    };
    if head_dim % 2 == 1 {
        return Err(fields.refuse(
            "head_dim",
            "an even number: rotary embedding turns pairs",
            head_dim,
            "use a model with an even head size",
        ));
    }
    Ok(head_dim)
}

/// Biases of (q, k, v), o and the MLP. Absent keys mean none, as in all published files of the
/// families that know the key.
fn biases(fields: &Fields<'_>, architecture: Architecture) -> Result<(bool, bool, bool), Refusal> {
    let attention = fields.opt_bool("attention_bias")?.unwrap_or(false);
    let mlp = fields.opt_bool("mlp_bias")?.unwrap_or(false);
    Ok(match architecture {
        Architecture::Llama => (attention, attention, mlp),
        Architecture::Qwen3 => (attention, attention, false),
        Architecture::Mistral => (false, false, false),
        Architecture::Qwen2 => (true, false, false),
        // True is the default of GptOssConfig.
        Architecture::GptOss => {
            let attention = fields.opt_bool("attention_bias")?.unwrap_or(true);
            (attention, attention, false)
        }
    })
}

/// The window of every layer.
fn sliding_window(
    fields: &Fields<'_>,
    architecture: Architecture,
    layers: usize,
) -> Result<Vec<Option<usize>>, Refusal> {
    let window = match architecture {
        Architecture::Llama => None,
        // MistralConfig's default, 4096, would change the model silently if a file lost the key.
        Architecture::Mistral if !fields.has("sliding_window") => {
            return Err(fields.missing("sliding_window", "a whole number or null"));
        }
        Architecture::Mistral => fields.opt_size("sliding_window")?,
        // GptOssConfig's default, 128, would change the model silently if a file lost the key.
        Architecture::GptOss => Some(fields.size("sliding_window")?),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            // False is the default of both classes.
            if fields.opt_bool("use_sliding_window")?.unwrap_or(false) {
                fields.opt_size("sliding_window")?
            } else {
                None
            }
        }
    };
    let types = layer_types(fields, layers)?;
    match architecture {
        Architecture::Llama => match types {
            Some(types) if types.contains(&true) => Err(fields.refuse(
                "layer_types",
                "\"full_attention\" only: llama has no sliding window",
                "\"sliding_attention\"",
                "use a supported model",
            )),
            _ => Ok(vec![None; layers]),
        },
        Architecture::Mistral => match types {
            Some(types) if types.iter().any(|&slides| slides != window.is_some()) => Err(fields
                .refuse(
                    "layer_types",
                    "the same attention in every layer, as sliding_window has it",
                    "alternating layers",
                    "use a model of a supported type",
                )),
            _ => Ok(vec![window; layers]),
        },
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::GptOss => {
            let types = match (types, window) {
                (Some(types), None) if types.contains(&true) => {
                    return Err(fields.refuse(
                        "layer_types",
                        "\"full_attention\" only, as use_sliding_window is false or sliding_window null",
                        "\"sliding_attention\"",
                        "correct use_sliding_window or layer_types",
                    ));
                }
                (Some(types), _) => types,
                // GptOssConfig alternates, beginning with a window.
                (None, Some(_)) if architecture == Architecture::GptOss => {
                    (0..layers).map(|layer| layer % 2 == 0).collect()
                }
                (None, None) => vec![false; layers],
                (None, Some(_)) => {
                    let first = match fields.get("max_window_layers") {
                        Some(value) => value.as_u64().ok_or_else(|| {
                            fields.refuse(
                                "max_window_layers",
                                "a whole number",
                                short(value),
                                "correct the value in the file",
                            )
                        })?,
                        None => return Err(fields.missing("max_window_layers", "a whole number")),
                    };
                    (0..layers).map(|layer| layer as u64 >= first).collect()
                }
            };
            Ok(types
                .into_iter()
                .map(|slides| window.filter(|_| slides))
                .collect())
        }
    }
}

/// For each layer whether `layer_types` says that it slides.
fn layer_types(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>, Refusal> {
    let Some(value) = fields.get("layer_types") else {
        return Ok(None);
    };
    let wrong = |found: String| {
        fields.refuse(
            "layer_types",
            format!("{layers} strings, \"full_attention\" or \"sliding_attention\""),
            found,
            "use a supported model",
        )
    };
    let list = value.as_array().ok_or_else(|| wrong(short(value)))?;
    if list.len() != layers {
        return Err(wrong(format!("a list of {}", list.len())));
    }
    list.iter()
        .map(|entry| match entry.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(wrong(short(entry))),
        })
        .collect::<Result<_, _>>()
        .map(Some)
}

fn eos_token_ids(fields: &Fields<'_>, architecture: Architecture) -> Result<Vec<u32>, Refusal> {
    if !fields.has("eos_token_id") {
        return Ok(match architecture {
            // The default of LlamaConfig and MistralConfig, left out by files that agree with it.
            Architecture::Llama | Architecture::Mistral => vec![2],
            Architecture::Qwen2 | Architecture::Qwen3 | Architecture::GptOss => Vec::new(),
        });
    }
    match fields.get("eos_token_id") {
        None => Ok(Vec::new()),
        Some(value) => token_ids(value).ok_or_else(|| {
            fields.refuse(
                "eos_token_id",
                "a token id or a list of them",
                short(value),
                "correct the value in the file",
            )
        }),
    }
}

/// One token id or a list of them.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        value => Some(vec![one(value)?]),
    }
}
