//! `mlac::LatentAttention` (`docs/latent-attention.md`), as a node or in standard operators.
//!
//! Both are the same function of the query, the new rows and what is cached; they differ in how the cache comes and goes. A node
//! keeps a cache of fixed capacity in place. Standard operators get the cached rows alone and give them back with the new
//! ones behind them, so that nothing is scored that is not cached.

use mlac_model::MlaLayer;

use super::{Reach, append, keep, past_inputs, softmax};
use crate::{
    builders::{
        context::{Context, Runtime},
        present_latent_name,
    },
    error::NodeError,
    ir::{DType, GraphBuilder, Op, ValueId},
};

/// What one layer gives to the operator.
pub(super) struct Attention {
    /// Number of the layer.
    pub(super) layer: usize,
    /// `[batch, H, seq, w]`.
    pub(super) query: ValueId,
    /// `[batch, seq, w]`.
    pub(super) new_rows: ValueId,
    /// `[batch, capacity, w]` for the node, `[batch, cached, w]` for standard operators; `None` in a graph without cache.
    pub(super) past: Option<ValueId>,
    /// `r`.
    pub(super) kv_lora_rank: usize,
    /// Factor on the scores.
    pub(super) scale: f64,
}

/// What the operator gives.
pub(super) struct Step {
    /// Weighted sums of latents, `[batch, H, seq, r]`.
    pub(super) sums: ValueId,
    /// Name and value of the cache after the step, where there is one.
    pub(super) present: Vec<(String, ValueId)>,
}

/// Attention in the form of the runtime.
pub(super) fn attend(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    attention: &Attention,
) -> Result<Step, NodeError> {
    match attention.past {
        Some(cache) if cx.runtime.has_latent_attention() => node(b, cx, reach, attention, cache),
        past => standard(b, cx, reach, attention, past),
    }
}

/// Attention of a converted layer alone: `query` `[batch, seq, H, w]` and `new_rows` to the outputs of
/// [`crate::builders::latent_attention_graph`].
pub(in crate::builders) fn alone(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    layer: usize,
    shape: MlaLayer,
    query: ValueId,
    new_rows: ValueId,
) -> Result<(), NodeError> {
    let attention = Attention {
        layer,
        query: b.transpose("query_by_head", query, &[0, 2, 1, 3])?,
        new_rows,
        past: past_inputs(b, cx, layer).first().copied(),
        kv_lora_rank: shape.kv_lora_rank,
        scale: cx.cfg.mla.as_ref().map_or(1.0, |m| m.attention_scale),
    };
    let reach = Reach::of(cx, layer);
    let step = b.scope("attn", |b| attend(b, cx, &reach, &attention))?;
    let sums = b.transpose("sums_by_token", step.sums, &[0, 2, 1, 3])?;
    b.output("sums", sums);
    for (name, value) in step.present {
        b.output(&name, value);
    }
    Ok(())
}

/// One node, which keeps the cache.
fn node(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    attention: &Attention,
    cache: ValueId,
) -> Result<Step, NodeError> {
    let query = b.transpose("q_by_token", attention.query, &[0, 2, 1, 3])?;
    let past_lengths = past_lengths(b, cx)?;
    let heads = cx.cfg.num_attention_heads;
    let sinks = reach.sinks(b, heads, &[heads], DType::F32);
    let optional = [None, sinks, None, cx.attention_mask];
    let bits = optional.iter().enumerate();
    let present = bits.fold(0, |all, (i, input)| all | u8::from(input.is_some()) << i);
    let op = Op::LatentAttention {
        kv_lora_rank: attention.kv_lora_rank,
        scale: attention.scale as f32,
        sliding_window: reach.window,
        plugin: (cx.runtime == Runtime::TensorRtPlugin).then_some(present),
        kernels: cx.kernels.get(&attention.layer).cloned(),
    };
    let required = [query, attention.new_rows, cache, past_lengths];
    let mut inputs: Vec<Option<ValueId>> = required.map(Some).to_vec();
    inputs.extend(optional);
    while inputs.last().is_some_and(Option::is_none) {
        inputs.pop();
    }
    let out = b.apply("latent_attention", op, &inputs)?;
    Ok(Step {
        sums: b.transpose("sums_by_head", out[0], &[0, 2, 1, 3])?,
        present: vec![(present_latent_name(attention.layer), out[1])],
    })
}

/// Operators of ONNX's own, the cache being key and value of one shared head.
fn standard(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    attention: &Attention,
    past: Option<ValueId>,
) -> Result<Step, NodeError> {
    let cache = append(b, "cache", past, attention.new_rows, 1)?;
    let width = b.shape(attention.query)[3].as_known().unwrap_or(0);
    let sums = if cx.fuses(width) {
        let cache = b.unsqueeze("cache_head", cache, &[1])?;
        softmax::operator(b, cx, reach, attention.scale, attention.query, cache, cache)?
    } else {
        let query = b.scale("q_scaled", attention.query, attention.scale)?;
        softmax::shared(b, cx, reach, query, cache)?
    };
    // The sums over the rotary keys come along, which is cheaper than copying the latents out of
    // the cache; they are cut off here.
    Ok(Step {
        sums: b.slice("latent_sums", sums, 3, 0..attention.kv_lora_rank)?,
        present: kept(b, reach, attention.layer, past, cache)?,
    })
}

/// What standard operators give back of `cache`, the cached and the new rows; nothing in a graph without cache.
pub(super) fn kept(
    b: &mut GraphBuilder,
    reach: &Reach,
    layer: usize,
    past: Option<ValueId>,
    cache: ValueId,
) -> Result<Vec<(String, ValueId)>, NodeError> {
    if past.is_none() {
        return Ok(vec![]);
    }
    let kept = keep(b, "cache_kept", reach.window, cache, 1)?;
    Ok(vec![(present_latent_name(layer), kept)])
}

/// Tokens seen so far, i32 `[batch]`: columns of the mask less new tokens, the same for all sequences. Built once.
fn past_lengths(b: &mut GraphBuilder, cx: &mut Context<'_>) -> Result<ValueId, NodeError> {
    if let Some(lengths) = cx.past_lengths {
        return Ok(lengths);
    }
    let axes = cx.axes.clone();
    let lengths = b.top_level(|b| {
        b.scope("past_lengths", |b| {
            // No input need have the axis `past` itself: the caches have a capacity.
            let total = b.dim_scalar(&axes.total())?;
            let seq = b.dim_scalar(&axes.seq)?;
            let past = b.sub("past", total, seq)?;
            let past = b.cast("past_i32", past, DType::I32)?;
            b.expand("per_sequence", past, &[axes.batch])
        })
    })?;
    cx.past_lengths = Some(lengths);
    Ok(lengths)
}
