//! The configuration of a model in mlac's own terms, read from `config.json` or from GGUF metadata.

mod fields;
mod hf;
mod mla;
mod moe;
mod rope;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub(crate) use hf::token_ids;
pub use mla::mla_config_json;

use crate::rope::RopeSpec;

/// Which family of models the weights belong to; decides tensor names and biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Architecture {
    /// `model_type` "llama" (`SmolLM2` too).
    Llama,
    /// `model_type` "mistral".
    Mistral,
    /// `model_type` "qwen2": biases on q, k, v.
    Qwen2,
    /// `model_type` "qwen3": per-head RMS norm on q and k before `RoPE`.
    Qwen3,
    /// `model_type` "`gpt_oss`": biases, attention sinks, alternating windows, experts.
    GptOss,
}

impl Architecture {
    /// Every family.
    pub const ALL: [Self; 5] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::GptOss,
    ];

    /// The value of the key `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::GptOss => "gpt_oss",
        }
    }

    /// The family with this `model_type`.
    pub fn from_model_type(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|architecture| architecture.model_type() == name)
    }

    /// What transformers' class names begin with: `LlamaForCausalLM`.
    pub fn class_prefix(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
            Self::GptOss => "GptOss",
        }
    }
}

/// A decoder-only language model with grouped-query attention, or its MLA form.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a key of config.json"
)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP; of one expert's where there are experts.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads, H.
    pub num_attention_heads: usize,
    /// KV heads, G; divides H.
    pub num_key_value_heads: usize,
    /// Size of one head, d (even).
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the configuration promises, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary embedding of the layers that are not converted.
    pub rope: RopeSpec,
    /// Whether `lm_head` is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub o_bias: bool,
    /// Whether the three MLP projections have biases.
    pub mlp_bias: bool,
    /// Whether q and k pass a per-head RMS norm before `RoPE` (Qwen3).
    pub qk_norm: bool,
    /// Whether every query head has a sink: a learned logit that joins the scores in the softmax
    /// and takes its share of the probability nowhere (`self_attn.sinks` `[H]`).
    pub sinks: bool,
    /// The experts of every layer; `None`: one dense MLP.
    pub moe: Option<MoeConfig>,
    /// For each layer the number of positions a query sees, itself included; `None`: all.
    pub sliding_window: Vec<Option<usize>>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The layers that have MLA form, if any.
    pub mla: Option<MlaConfig>,
}

/// A mixture of experts in place of the MLP (GPT-OSS).
///
/// The router's `experts_per_token` largest logits choose, a softmax over these weighs. One expert
/// computes `down((up + 1) * gate * sigmoid(alpha * gate))` of `gate` cut at `swiglu_limit` from
/// above and `up` from both sides; gate and up rows alternate in one projection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// Experts of a layer, E.
    pub num_experts: usize,
    /// Experts that a token uses, K.
    pub experts_per_token: usize,
    /// Limit of gate and up.
    pub swiglu_limit: f64,
    /// Steepness of the gate's sigmoid.
    pub swiglu_alpha: f64,
    /// How the experts' matrices are stored.
    pub format: ExpertFormat,
}

/// How the experts' matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertFormat {
    /// `*_blocks` U8 `[E, out, in / 32, 16]` and `*_scales` U8 `[E, out, in / 32]`, see
    /// [`crate::mxfp4`].
    Mxfp4,
    /// Floats `[E, in, out]`.
    Dense,
}

/// The MLA form of a converted model.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaConfig {
    /// Converted layers by index.
    pub layers: BTreeMap<usize, MlaLayer>,
    /// Factor on the scores before the softmax in converted layers (the source's `head_dim^-0.5`).
    pub attention_scale: f64,
    /// Whether the output projection of converted layers has a bias (a refit may add one).
    pub o_bias: bool,
}

/// Shapes of one converted layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaLayer {
    /// Numbers in the latent, r.
    pub kv_lora_rank: usize,
    /// Numbers in the shared rotary key, `d_r` (even).
    pub qk_rope_head_dim: usize,
    /// Numbers of a query head that meet the latent.
    pub qk_nope_head_dim: usize,
    /// Numbers of a value head.
    pub v_head_dim: usize,
    /// How the cached row is computed from the layer's input.
    pub encoder: MlaEncoder,
}

impl MlaLayer {
    /// Numbers cached per token: r + `d_r`.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

/// How the cached row is computed from the layer's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlaEncoder {
    /// `kv_a_proj_with_mqa` takes the hidden state: `[r + d_r, hidden_size]`.
    Hidden,
    /// Qwen3: `k_proj`, `k_norm` and `v_proj` stay, `kv_a_proj_with_mqa` takes
    /// `[normed keys ; values]`: `[r + d_r, 2 * G * head_dim]`; `q_proj` and `q_norm` stay and
    /// `q_rope_proj` `[H * d_r, head_dim]` takes each normed query head to its rotary part.
    NormedKey,
    /// GPT-OSS: `kv_a_proj_with_mqa` takes the hidden state, `[r + d_r, hidden_size]`; `q_proj`
    /// stays as it is, a query head is its own `q_nope`, and `q_rope_proj` `[H * d_r, head_dim]`
    /// takes it (after its bias) to its rotary part. The function is that of [`Self::Hidden`] with
    /// `d_r / head_dim` times fewer numbers in the queries' projection.
    KeptQuery,
}

impl ModelConfig {
    /// Query heads that share one KV head, H / G.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Numbers cached per token by one GQA layer: 2 * G * d.
    pub fn gqa_cache_width(&self) -> usize {
        2 * self.num_key_value_heads * self.head_dim
    }

    /// Whether the output projection of a layer has a bias.
    pub fn layer_o_bias(&self, layer: usize) -> bool {
        match &self.mla {
            Some(mla) if mla.layers.contains_key(&layer) => mla.o_bias,
            _ => self.o_bias,
        }
    }

    /// The MLA shapes of a layer, if it is converted.
    pub fn mla_layer(&self, layer: usize) -> Option<&MlaLayer> {
        self.mla.as_ref().and_then(|m| m.layers.get(&layer))
    }
}
