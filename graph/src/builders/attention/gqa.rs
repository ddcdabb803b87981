//! Grouped-query attention: H query heads share G cached key and value heads of `d` numbers.

use super::{Attended, Reach, append, by_head, from_heads, keep, merge_heads, softmax, to_heads};
use crate::{
    builders::{
        context::{Context, GqaForm},
        norm::rms_norm,
        present_kv_name,
        rope::rotate,
    },
    error::NodeError,
    ir::{Binary, DType, Dim, GraphBuilder, Op, ValueId},
};

/// Projections of the layer's input before rotation.
pub(in crate::builders) struct Projected {
    /// `[batch, seq, H*d]`, after bias and `q_norm`.
    pub(in crate::builders) query: ValueId,
    /// `[batch, seq, G*d]`, after bias and `k_norm`.
    pub(in crate::builders) key: ValueId,
    /// `[batch, seq, G*d]`, after bias.
    pub(in crate::builders) value: ValueId,
}

/// Projects the normed input `x [batch, seq, D]`.
pub(in crate::builders) fn project(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    layer: usize,
    x: ValueId,
) -> Result<Projected, NodeError> {
    let cfg = cx.cfg;
    let query = project_query(b, cx, layer, x)?;
    let (groups, width) = (
        cfg.num_key_value_heads,
        cfg.num_key_value_heads * cfg.head_dim,
    );
    let tensor = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
    let key = b.linear(
        "k",
        x,
        &tensor("k_proj"),
        width,
        cfg.hidden_size,
        cfg.qkv_bias,
    )?;
    let key = head_norm(b, cx, "k_norm", key, &tensor("k_norm"), groups)?;
    let value = b.linear(
        "v",
        x,
        &tensor("v_proj"),
        width,
        cfg.hidden_size,
        cfg.qkv_bias,
    )?;
    Ok(Projected { query, key, value })
}

/// Queries `[batch, seq, H*d]` of the normed input, after bias and `q_norm`.
pub(super) fn project_query(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    layer: usize,
    x: ValueId,
) -> Result<ValueId, NodeError> {
    let cfg = cx.cfg;
    let (heads, width) = (
        cfg.num_attention_heads,
        cfg.num_attention_heads * cfg.head_dim,
    );
    let tensor = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
    let query = b.linear(
        "q",
        x,
        &tensor("q_proj"),
        width,
        cfg.hidden_size,
        cfg.qkv_bias,
    )?;
    head_norm(b, cx, "q_norm", query, &tensor("q_norm"), heads)
}

/// Norm of every head of `x [batch, seq, heads*d]` when the model has one.
fn head_norm(
    b: &mut GraphBuilder,
    cx: &Context<'_>,
    name: &str,
    x: ValueId,
    tensor: &str,
    heads: usize,
) -> Result<ValueId, NodeError> {
    if !cx.cfg.qk_norm {
        return Ok(x);
    }
    let x = by_head(b, &format!("{name}.by_head"), x, heads)?;
    let x = rms_norm(b, name, x, tensor, cx.cfg.rms_norm_eps)?;
    merge_heads(b, &format!("{name}.merged"), x)
}

/// Attention over `past` (keys and values `[batch, G, cached, d]`; empty: no cache) and the new tokens.
pub(in crate::builders) fn attend(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    projected: &Projected,
    past: &[ValueId],
) -> Result<Attended, NodeError> {
    let cfg = cx.cfg;
    let (heads, groups) = (cfg.num_attention_heads, cfg.num_key_value_heads);
    let (angles, form) = (cx.gqa_angles(b)?, cx.rotary_form());
    let query = rotate(b, "q_rope", projected.query, heads, angles, form)?;
    let key = rotate(b, "k_rope", projected.key, groups, angles, form)?;
    if let (GqaForm::GroupQueryAttention, &[past_key, past_value]) = (cx.gqa_form, past) {
        let inputs = [query, key, projected.value, past_key, past_value];
        return group_query(b, cx, layer, inputs);
    }
    let query = to_heads(b, "q_heads", query, heads)?;
    let key = to_heads(b, "k_heads", key, groups)?;
    let value = to_heads(b, "v_heads", projected.value, groups)?;
    let key = append(b, "keys", past.first().copied(), key, 2)?;
    let value = append(b, "values", past.get(1).copied(), value, 2)?;
    let reach = Reach::of(cx, layer);
    let scale = (cfg.head_dim as f64).powf(-0.5);
    let sums = if cx.fuses(cfg.head_dim) {
        softmax::operator(b, cx, &reach, scale, query, key, value)?
    } else {
        let query = b.scale("q_scaled", query, scale)?;
        softmax::grouped(b, cx, &reach, query, key, value)?
    };
    Ok(Attended {
        heads: from_heads(b, "heads", sums)?,
        present: if past.is_empty() {
            vec![]
        } else {
            present(b, &reach, layer, key, value)?
        },
    })
}

fn present(
    b: &mut GraphBuilder,
    reach: &Reach,
    layer: usize,
    key: ValueId,
    value: ValueId,
) -> Result<Vec<(String, ValueId)>, NodeError> {
    let key = keep(b, "keys_kept", reach.window, key, 2)?;
    let value = keep(b, "values_kept", reach.window, value, 2)?;
    Ok(vec![
        (present_kv_name(layer, "key"), key),
        (present_kv_name(layer, "value"), value),
    ])
}

/// `com.microsoft::GroupQueryAttention`. Its own lengths mean padding on the right; ours is on the
/// left, so every sequence has the full length and the mask goes in as a bias. Windows go in with
/// the mask too: the operator sees the rows that are cached and the new ones, whatever their slots.
fn group_query(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    inputs: [ValueId; 5],
) -> Result<Attended, NodeError> {
    let cfg = cx.cfg;
    let reach = Reach::of(cx, layer);
    let (lengths, total) = lengths(b, cx, reach.window)?;
    let bias = cx.bias(b, reach.window, cx.dtype)?;
    let heads = cfg.num_attention_heads;
    let sinks = reach.sinks(b, heads, &[heads], cx.dtype);
    let op = Op::GroupQueryAttention {
        heads: cfg.num_attention_heads,
        kv_heads: cfg.num_key_value_heads,
        scale: (cfg.head_dim as f64).powf(-0.5) as f32,
    };
    let mut inputs: Vec<_> = inputs
        .into_iter()
        .chain([lengths, total])
        .map(Some)
        .collect();
    if bias.is_some() || sinks.is_some() {
        inputs.extend([None, None, None, bias]);
    }
    if sinks.is_some() {
        inputs.push(sinks);
    }
    let out = b.apply("attention", op, &inputs)?;
    Ok(Attended {
        heads: out[0],
        present: present(b, &reach, layer, out[1], out[2])?,
    })
}

/// What the operator wants to know of lengths: `rows - 1` per sequence, i32 `[batch]`, and `rows`,
/// i32 scalar. Built once per window.
fn lengths(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    window: Option<usize>,
) -> Result<(ValueId, ValueId), NodeError> {
    if let Some(&lengths) = cx.lengths.get(&window) {
        return Ok(lengths);
    }
    let axes = cx.axes.clone();
    let name = match window {
        None => "lengths".to_owned(),
        Some(window) => format!("lengths.window_{window}"),
    };
    let lengths = b.top_level(|b| {
        b.scope(&name, |b| {
            let past = b.dim_scalar(&axes.cached(window))?;
            let seq = b.dim_scalar(&axes.seq)?;
            let total = b.node("total", Op::Binary(Binary::Add), &[past, seq])?;
            let one = b.constant(crate::ir::InlineTensor::i64(&[], &[1]));
            let last = b.sub("last", total, one)?;
            let last = b.cast("last_i32", last, DType::I32)?;
            let batch: [Dim; 1] = [axes.batch.clone()];
            let last = b.expand("per_sequence", last, &batch)?;
            Ok::<_, NodeError>((last, b.cast("total_i32", total, DType::I32)?))
        })
    })?;
    cx.lengths.insert(window, lengths);
    Ok(lengths)
}
