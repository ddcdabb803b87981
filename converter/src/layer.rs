//! What goes into and comes out of the conversion of one layer.

use faer::c64;
use mlac_model::{MlaEncoder, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Error, refuse};
use crate::linalg::Matrix;

/// Shape of a grouped-query attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttentionShape {
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Query heads, H.
    pub query_heads: usize,
    /// KV heads, G; divides H.
    pub kv_heads: usize,
    /// Numbers of one head, d (even).
    pub head_dim: usize,
}

impl AttentionShape {
    /// The shape of every attention layer of a model.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            query_heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        }
    }

    /// Query heads of one KV head, H / G.
    pub fn group_size(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The KV head that query head `head` reads.
    pub fn group_of(&self, head: usize) -> usize {
        head / self.group_size()
    }

    /// Numbers of the queries of one token, H * d.
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Numbers of the keys (or the values) of one token, G * d.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Numbers a GQA cache holds per token, 2 * G * d: the width of the stacked vector `[k ; v]`.
    pub fn stacked_width(&self) -> usize {
        2 * self.kv_width()
    }

    /// Frequencies of the rotation, d / 2.
    pub fn frequencies(&self) -> usize {
        self.head_dim / 2
    }

    /// Refuses shapes no attention layer has.
    pub fn check(&self) -> Result<(), Error> {
        let Self {
            hidden,
            query_heads,
            kv_heads,
            head_dim,
        } = *self;
        if hidden == 0 || query_heads == 0 || kv_heads == 0 || head_dim == 0 {
            return Err(refuse(
                "attention shape",
                "sizes above zero",
                format!("{self:?}"),
                "check config.json",
            ));
        }
        if query_heads % kv_heads != 0 {
            return Err(refuse(
                "num_key_value_heads",
                format!("a divisor of the {query_heads} query heads"),
                kv_heads.to_string(),
                "check config.json",
            ));
        }
        if head_dim % 2 != 0 {
            return Err(refuse(
                "head_dim",
                "an even number (rotary pairs)",
                head_dim.to_string(),
                "check config.json",
            ));
        }
        Ok(())
    }
}

/// Rotary embedding of a layer, half-split: component `l` pairs with `l + d/2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// Radians per position, `[d/2]`.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (1 unless `YaRN`): scores carry its square in all dims.
    pub attention_factor: f64,
}

/// How a layer attends, apart from its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention {
    /// Heads and sizes.
    pub shape: AttentionShape,
    /// Rotation of queries and keys.
    pub rotary: Rotary,
    /// Factor on the scores before the softmax, usually `head_dim^-0.5`.
    pub scale: f64,
    /// Positions a query sees, itself included; `None`: all before it.
    pub sliding_window: Option<usize>,
    /// A logit per query head that joins the scores in the softmax and whose probability goes
    /// nowhere, `[H]`. Adding a constant to all scores of a head is then no longer invisible.
    pub sinks: Option<Vec<f32>>,
}

impl Attention {
    /// Refuses an attention whose parts contradict each other.
    pub fn check(&self) -> Result<(), Error> {
        self.shape.check()?;
        let found = self.rotary.inv_freq.len();
        if found != self.shape.frequencies() {
            return Err(refuse(
                "rotary frequencies",
                format!("{} (head_dim / 2)", self.shape.frequencies()),
                found.to_string(),
                "build the table with the layer's head_dim",
            ));
        }
        if !self.rotary.inv_freq.iter().all(|x| x.is_finite())
            || !self.rotary.attention_factor.is_finite()
            || !self.scale.is_finite()
        {
            return Err(refuse(
                "rotary table and attention scale",
                "finite numbers",
                "NaN or infinity",
                "check rope_scaling in config.json",
            ));
        }
        if let Some(sinks) = &self.sinks
            && (sinks.len() != self.shape.query_heads || !sinks.iter().all(|x| x.is_finite()))
        {
            return Err(refuse(
                "sinks",
                format!(
                    "{} finite numbers, one per query head",
                    self.shape.query_heads
                ),
                format!("{} numbers, or NaN or infinity among them", sinks.len()),
                "make config.json and the checkpoint agree",
            ));
        }
        if self.sliding_window == Some(0) {
            return Err(refuse(
                "sliding_window",
                "at least 1",
                "0",
                "check config.json",
            ));
        }
        Ok(())
    }

    /// The sink of a query head.
    pub fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.as_ref().map(|s| s[head])
    }

    /// Oldest position that position `t` attends to.
    pub fn first_visible(&self, t: usize) -> usize {
        self.sliding_window.map_or(0, |w| (t + 1).saturating_sub(w))
    }
}

/// A linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// `[out, in]`, row-major as in the checkpoint.
    pub weight: Matrix<f32>,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl Projection {
    fn check(&self, layer: usize, name: &str, out: usize, input: usize) -> Result<(), Error> {
        let subject = format!("layer {layer} {name}");
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        if (rows, cols) != (out, input) {
            return Err(refuse(
                format!("{subject}.weight"),
                format!("shape [{out}, {input}]"),
                format!("[{rows}, {cols}]"),
                "make config.json and the checkpoint agree",
            ));
        }
        if let Some(bias) = &self.bias
            && bias.len() != out
        {
            return Err(refuse(
                format!("{subject}.bias"),
                format!("shape [{out}]"),
                format!("[{}]", bias.len()),
                "make config.json and the checkpoint agree",
            ));
        }
        let bias_finite = self
            .bias
            .as_ref()
            .is_none_or(|b| b.iter().all(|x| x.is_finite()));
        if !self.weight.is_finite() || !bias_finite {
            return Err(refuse(
                subject,
                "finite numbers",
                "NaN or infinity",
                "repair or download the checkpoint again",
            ));
        }
        Ok(())
    }
}

/// The attention weights of one GQA layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWeights {
    /// Index of the layer, for messages.
    pub layer: usize,
    /// Heads, rotation, scale, window.
    pub attention: Attention,
    /// What the converted layer's encoder takes.
    pub encoder: MlaEncoder,
    /// `q_proj` `[H*d, D]`.
    pub q: Projection,
    /// `k_proj` `[G*d, D]`.
    pub k: Projection,
    /// `v_proj` `[G*d, D]`.
    pub v: Projection,
    /// `o_proj` `[D, H*d]`.
    pub o: Projection,
    /// Weight of the RMS norm before attention `[D]`; used when there is no calibration.
    pub input_norm: Option<Vec<f32>>,
    /// Per-head RMS norm of queries `[d]` (Qwen3).
    pub q_norm: Option<Vec<f32>>,
    /// Per-head RMS norm of keys `[d]` (Qwen3).
    pub k_norm: Option<Vec<f32>>,
}

impl LayerWeights {
    /// Refuses weights whose shapes contradict the attention or that are not finite.
    pub fn check(&self) -> Result<(), Error> {
        self.attention.check()?;
        let shape = self.attention.shape;
        self.q
            .check(self.layer, "q_proj", shape.query_width(), shape.hidden)?;
        self.k
            .check(self.layer, "k_proj", shape.kv_width(), shape.hidden)?;
        self.v
            .check(self.layer, "v_proj", shape.kv_width(), shape.hidden)?;
        self.o
            .check(self.layer, "o_proj", shape.hidden, shape.query_width())?;
        let norms = [
            ("input_layernorm", &self.input_norm, shape.hidden),
            ("q_norm", &self.q_norm, shape.head_dim),
            ("k_norm", &self.k_norm, shape.head_dim),
        ];
        for (name, norm, size) in norms {
            let Some(norm) = norm else { continue };
            let subject = format!("layer {} {name}.weight", self.layer);
            if norm.len() != size {
                return Err(refuse(
                    subject,
                    format!("shape [{size}]"),
                    format!("[{}]", norm.len()),
                    "make config.json and the checkpoint agree",
                ));
            }
            if !norm.iter().all(|x| x.is_finite()) {
                return Err(refuse(
                    subject,
                    "finite numbers",
                    "NaN or infinity",
                    "repair or download the checkpoint again",
                ));
            }
        }
        if self.q_norm.is_some() != self.k_norm.is_some() {
            return Err(refuse(
                format!("layer {} q_norm and k_norm", self.layer),
                "both or neither",
                "only one of them",
                "make config.json and the checkpoint agree",
            ));
        }
        // Keys that pass a norm cannot be encoded from the hidden state linearly.
        if (self.encoder == MlaEncoder::NormedKey) != self.k_norm.is_some() {
            return Err(refuse(
                format!("layer {} mla_encoder", self.layer),
                "normed_key for keys with a norm, and only for them",
                self.encoder.name(),
                "choose the encoder of the model's family",
            ));
        }
        Ok(())
    }
}

/// How many numbers a converted layer caches per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankChoice {
    /// Numbers in the latent, r.
    pub kv_lora_rank: usize,
    /// Numbers in the shared rotary key, `d_r` (even).
    pub qk_rope_head_dim: usize,
}

impl RankChoice {
    /// The ranks at which the conversion is exact: every key component keeps its rotation in the
    /// rotary key (`d_r = G*d`) and the latent holds all values (`r = G*d`).
    pub fn exact(shape: &AttentionShape) -> Self {
        Self {
            kv_lora_rank: shape.kv_width(),
            qk_rope_head_dim: shape.kv_width(),
        }
    }

    /// Numbers cached per token, r + `d_r`.
    pub fn width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    /// Refuses ranks that the layer cannot have.
    pub fn check(&self, shape: &AttentionShape) -> Result<(), Error> {
        let (r, d_r) = (self.kv_lora_rank, self.qk_rope_head_dim);
        if d_r == 0 || d_r % 2 != 0 || d_r > shape.kv_width() {
            return Err(refuse(
                "qk_rope_head_dim",
                format!(
                    "an even number from 2 to {} (kv heads * head_dim)",
                    shape.kv_width()
                ),
                d_r.to_string(),
                "choose another --rope-dim",
            ));
        }
        let most = shape.stacked_width() - d_r;
        if r == 0 || r > most {
            return Err(refuse(
                "kv_lora_rank",
                format!("1 to {most} (2 * kv heads * head_dim - qk_rope_head_dim)"),
                r.to_string(),
                "choose another --kv-lora-rank, or max",
            ));
        }
        Ok(())
    }
}

/// A converted layer in terms of the stacked vector `s = [k ; v]` `[2*G*d]` (after biases and key
/// norm, before rotation) and the query heads `q_h` `[d]` (after bias and query norm, before
/// rotation).
///
/// `row = encoder @ s`; `c = row[..r]`, `k_rope = rotate(row[r..])`;
/// `score_h = scale * (q_h . (w_uk[h] @ c) + rotate(q_rope[h] @ q_h) . k_rope)`;
/// `out_h = sum_s p * (w_uv[h] @ c_s)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerFactors {
    /// Heads and sizes.
    pub shape: AttentionShape,
    /// r and `d_r`.
    pub ranks: RankChoice,
    /// `[r + d_r, 2*G*d]`: r latent rows, then `d_r` rotary rows (first all real parts, then all
    /// imaginary parts, half-split).
    pub encoder: Matrix<f64>,
    /// Per query head `[d, r]`; carries the square of the attention factor.
    pub w_uk: Vec<Matrix<f64>>,
    /// Per query head `[d, r]`.
    pub w_uv: Vec<Matrix<f64>>,
    /// Per query head `[d_r, d]`; carries the square of the attention factor.
    pub q_rope: Vec<Matrix<f64>>,
    /// Radians per position of the rotary key, `[d_r/2]`.
    pub inv_freq: Vec<f32>,
    /// Refitted `o_proj` `[D, H*d]`.
    pub o: Option<Matrix<f64>>,
    /// Refitted bias of `o_proj` `[D]`.
    pub o_bias: Option<Vec<f64>>,
}

/// One rotary component: a complex-linear mix of the KV heads at one frequency, `z = sum_g
/// encoder[g] k[g, l]`, of which `decoder[g] z` goes back to head g.
#[derive(Debug, Clone, PartialEq)]
pub struct Component {
    /// Index l of the frequency, below d/2.
    pub frequency: usize,
    /// Share of each KV head's key in it, `[G]`.
    pub encoder: Vec<c64>,
    /// How much of it each KV head's key holds, `[G]`.
    pub decoder: Vec<c64>,
    /// Weighted energy `E|z|^2` in the metric the basis was chosen in.
    pub energy: f64,
}
