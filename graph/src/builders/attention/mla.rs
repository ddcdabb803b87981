//! Multi-head latent attention: one cached row `[c ; k_rope]` of `w = r + d_r` numbers per token,
//! shared by all heads; `c` is the latent, `k_rope` the rotated shared key.
//!
//! `score_h(t, s) = scale * (q_nope_h . W_UK_h c_s + q_rope_h . k_rope_s)`, `out_h = sum_s p W_UV_h c_s`.
//! Absorbed: `W_UK_h^T q_nope_h` meets the latents themselves and `W_UV_h` follows the sum.
//! Expanded: keys `[W_UK_h c ; k_rope]` and values `W_UV_h c` are made for every head.
//! (DeepSeek-V2, arXiv 2405.04434, section 2.1.)

use mlac_model::{MlaEncoder, MlaLayer};

use super::{Attended, Reach, append, by_head, from_heads, gqa, latent, softmax};
use crate::{
    builders::{
        context::{Context, MlaForm},
        rope::{Angles, rotate},
    },
    error::NodeError,
    ir::{DType, GraphBuilder, InlineTensor, Transform, ValueId, WeightRef},
};

/// One layer: where it is and its sizes.
struct Layer {
    index: usize,
    shape: MlaLayer,
    heads: usize,
    /// Factor on the scores.
    scale: f64,
    reach: Reach,
}

impl Layer {
    fn tensor(&self, part: &str) -> String {
        format!("model.layers.{}.self_attn.{part}", self.index)
    }
}

/// What the encoder makes of the new tokens.
struct Encoded {
    /// `[batch, H, seq, d_nope]`.
    q_nope: ValueId,
    /// `[batch, H, seq, d_r]`, rotated.
    q_rope: ValueId,
    /// `[batch, seq, w]`, rotary part rotated.
    row: ValueId,
}

/// Attention of the normed input `x [batch, seq, D]` over `past [batch, cached, w]` and the new tokens.
pub(in crate::builders) fn attend(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    index: usize,
    shape: MlaLayer,
    x: ValueId,
    past: Option<ValueId>,
) -> Result<Attended, NodeError> {
    let scale = cx.cfg.mla.as_ref().map_or(1.0, |m| m.attention_scale);
    let layer = Layer {
        index,
        shape,
        heads: cx.cfg.num_attention_heads,
        scale,
        reach: Reach::of(cx, index),
    };
    let encoded = encode(b, cx, &layer, x)?;
    match cx.mla_form {
        MlaForm::Absorbed => absorbed(b, cx, &layer, &encoded, past),
        MlaForm::Expanded => expanded(b, cx, &layer, &encoded, past),
    }
}

fn encode(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: &Layer,
    x: ValueId,
) -> Result<Encoded, NodeError> {
    let MlaLayer {
        kv_lora_rank: r,
        qk_rope_head_dim: d_r,
        qk_nope_head_dim: d_nope,
        ..
    } = layer.shape;
    let inv_freq = b.vector(&layer.tensor("rotary_inv_freq"), d_r / 2, DType::F32);
    let angles = cx.angles(b, &format!("rope.{}", layer.index), inv_freq, 1.0)?;
    let (cfg, form) = (cx.cfg, cx.rotary_form());
    let (heads, hidden) = (layer.heads, cfg.hidden_size);
    let row_tensor = layer.tensor("kv_a_proj_with_mqa");
    let (q_nope, q_rope, row) = match layer.shape.encoder {
        MlaEncoder::Hidden => {
            let width = heads * (d_nope + d_r);
            let q = b.linear("q", x, &layer.tensor("q_proj"), width, hidden, cfg.qkv_bias)?;
            let q = by_head(b, "q_by_head", q, heads)?;
            let parts = b.split("q_parts", q, 3, &[d_nope, d_r])?;
            let q_nope = b.transpose("q_nope", parts[0], &[0, 2, 1, 3])?;
            let q_rope = b.transpose("q_rope_in", parts[1], &[0, 2, 1, 3])?;
            (
                q_nope,
                q_rope,
                b.linear("row", x, &row_tensor, r + d_r, hidden, cfg.qkv_bias)?,
            )
        }
        MlaEncoder::KeptQuery => {
            let query = gqa::project_query(b, cx, layer.index, x)?;
            let (q_nope, q_rope) = query_parts(b, cx, layer, query)?;
            (
                q_nope,
                q_rope,
                b.linear("row", x, &row_tensor, r + d_r, hidden, cfg.qkv_bias)?,
            )
        }
        MlaEncoder::NormedKey => {
            let projected = gqa::project(b, cx, layer.index, x)?;
            let (q_nope, q_rope) = query_parts(b, cx, layer, projected.query)?;
            let keys_values = b.concat("keys_values", &[projected.key, projected.value], 2)?;
            let width = cfg.gqa_cache_width();
            (
                q_nope,
                q_rope,
                b.linear("row", keys_values, &row_tensor, r + d_r, width, false)?,
            )
        }
    };
    let q_rope = rotate(b, "q_rope", q_rope, heads, angles, form)?;
    let row = rotate_row(b, cx, row, r, d_r, angles)?;
    Ok(Encoded {
        q_nope,
        q_rope,
        row,
    })
}

/// From a query that the source's own projection made, `[batch, seq, H*d]`: the part that meets the
/// latent, which is the query itself, and the part to rotate, `q_rope_proj` of each head.
fn query_parts(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    layer: &Layer,
    query: ValueId,
) -> Result<(ValueId, ValueId), NodeError> {
    let (heads, d_r) = (layer.heads, layer.shape.qk_rope_head_dim);
    let d_nope = layer.shape.qk_nope_head_dim;
    let q = by_head(b, "q_by_head", query, heads)?;
    let q_nope = b.transpose("q_nope", q, &[0, 2, 1, 3])?;
    let to_rope = b.cast_weight(WeightRef {
        name: layer.tensor("q_rope_proj.weight"),
        source_shape: vec![heads * d_r, d_nope],
        transform: Transform::HeadTranspose { heads },
        dtype: cx.dtype,
        shape: vec![heads, d_nope, d_r],
    })?;
    Ok((q_nope, b.matmul("q_rope_in", q_nope, to_rope)?))
}

/// Rotates the last `d_r` numbers of `row [batch, seq, r + d_r]`.
fn rotate_row(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    row: ValueId,
    r: usize,
    d_r: usize,
    angles: Angles,
) -> Result<ValueId, NodeError> {
    let parts = b.split("row_parts", row, 2, &[r, d_r])?;
    let key = rotate(b, "k_rope", parts[1], 1, angles, cx.rotary_form())?;
    b.concat("new_row", &[parts[0], key], 2)
}

/// `kv_b_proj` `[H*(d_nope+d_v), r]` in part.
fn kv_b(cx: &Context<'_>, layer: &Layer, transform: Transform, shape: Vec<usize>) -> WeightRef {
    let up = layer.heads * (layer.shape.qk_nope_head_dim + layer.shape.v_head_dim);
    WeightRef {
        name: layer.tensor("kv_b_proj.weight"),
        source_shape: vec![up, layer.shape.kv_lora_rank],
        transform,
        dtype: cx.dtype,
        shape,
    }
}

/// `W_UK` `[H, d_nope, r]`.
fn key_up(b: &mut GraphBuilder, cx: &Context<'_>, layer: &Layer) -> Result<ValueId, NodeError> {
    let (heads, s) = (layer.heads, layer.shape);
    let (d_nope, d_v) = (s.qk_nope_head_dim, s.v_head_dim);
    let transform = Transform::KvBKey { heads, d_nope, d_v };
    b.cast_weight(kv_b(
        cx,
        layer,
        transform,
        vec![heads, d_nope, s.kv_lora_rank],
    ))
}

/// `W_UV^T` `[H, r, d_v]`.
fn value_up(b: &mut GraphBuilder, cx: &Context<'_>, layer: &Layer) -> Result<ValueId, NodeError> {
    let (heads, s) = (layer.heads, layer.shape);
    let (d_nope, d_v) = (s.qk_nope_head_dim, s.v_head_dim);
    let transform = Transform::KvBValue { heads, d_nope, d_v };
    b.cast_weight(kv_b(cx, layer, transform, vec![heads, s.kv_lora_rank, d_v]))
}

/// `mlac::LatentAttention` between the products with `W_UK` and `W_UV`, in the runtime's form.
fn absorbed(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: &Layer,
    encoded: &Encoded,
    past: Option<ValueId>,
) -> Result<Attended, NodeError> {
    let key_up = key_up(b, cx, layer)?;
    let query = b.matmul("q_absorbed", encoded.q_nope, key_up)?;
    let attention = latent::Attention {
        layer: layer.index,
        query: b.concat("q_row", &[query, encoded.q_rope], 3)?,
        new_rows: encoded.row,
        past,
        kv_lora_rank: layer.shape.kv_lora_rank,
        scale: layer.scale,
    };
    let latent::Step { sums, present } = latent::attend(b, cx, &layer.reach, &attention)?;
    let value_up = value_up(b, cx, layer)?;
    let heads = b.matmul("values_up", sums, value_up)?;
    Ok(Attended {
        heads: from_heads(b, "heads", heads)?,
        present,
    })
}

/// Attention over keys and values of every head, made from the cache.
fn expanded(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: &Layer,
    encoded: &Encoded,
    past: Option<ValueId>,
) -> Result<Attended, NodeError> {
    let cache = append(b, "cache", past, encoded.row, 1)?;
    let heads = over_all_heads(b, cx, layer, encoded, cache)?;
    Ok(Attended {
        heads: from_heads(b, "heads", heads)?,
        present: latent::kept(b, &layer.reach, layer.index, past, cache)?,
    })
}

/// Head outputs `[batch, H, seq, d_v]`.
fn over_all_heads(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: &Layer,
    encoded: &Encoded,
    cache: ValueId,
) -> Result<ValueId, NodeError> {
    let MlaLayer {
        kv_lora_rank: r,
        qk_rope_head_dim: d_r,
        qk_nope_head_dim,
        v_head_dim,
        ..
    } = layer.shape;
    let (heads, reach) = (layer.heads, &layer.reach);
    let (batch, total) = (cx.axes.batch.clone(), reach.rows.clone());
    let cache = b.unsqueeze("cache_head", cache, &[1])?;
    let parts = b.split("cache_parts", cache, 3, &[r, d_r])?;
    let (latent, rope) = (parts[0], parts[1]);
    let value_up = value_up(b, cx, layer)?;
    let values = b.matmul("values", latent, value_up)?;
    let key_up = key_up(b, cx, layer)?;
    let latent = b.transpose("latent_t", latent, &[0, 1, 3, 2])?;
    let keys = b.matmul("keys_nope", key_up, latent)?;
    let rope = b.transpose("rope_t", rope, &[0, 1, 3, 2])?;
    let shape = [batch.clone(), heads.into(), d_r.into(), total.clone()];
    let rope = b.expand("keys_rope", rope, &shape)?;
    let keys = b.concat("keys", &[keys, rope], 2)?;
    let query = b.concat("q_head", &[encoded.q_nope, encoded.q_rope], 3)?;
    let width = qk_nope_head_dim + d_r;
    if !cx.fuses(width) || v_head_dim > width {
        let query = b.scale("q_scaled", query, layer.scale)?;
        return softmax::keys_transposed(b, cx, reach, query, keys, values);
    }
    let keys = b.transpose("keys_by_token", keys, &[0, 1, 3, 2])?;
    if v_head_dim == width {
        return softmax::operator(b, cx, reach, layer.scale, query, keys, values);
    }
    // Fused attention takes values as wide as keys.
    let zero = b.constant(InlineTensor::float(cx.dtype, &[1, 1, 1, 1], &[0.0]));
    let shape = [batch, heads.into(), total, (width - v_head_dim).into()];
    let padding = b.expand("value_padding", zero, &shape)?;
    let values = b.concat("values_padded", &[values, padding], 3)?;
    let sums = softmax::operator(b, cx, reach, layer.scale, query, keys, values)?;
    b.slice("value_sums", sums, 3, 0..v_head_dim)
}
