//! `mlac::LatentAttention` as a node (`docs/latent-attention.md`).

use super::Reach;
use crate::{
    builders::context::{Context, Runtime},
    error::NodeError,
    ir::{DType, GraphBuilder, Op, ValueId},
};

/// What one layer gives to the operator.
pub(super) struct Attention {
    /// `[batch, seq, H, r + d_r]`.
    pub(super) query: ValueId,
    /// `[batch, seq, r + d_r]`.
    pub(super) new_rows: ValueId,
    /// `[batch, capacity, r + d_r]`.
    pub(super) cache: ValueId,
    /// `r`.
    pub(super) kv_lora_rank: usize,
    /// Factor on the scores.
    pub(super) scale: f64,
}

/// Sums of latents `[batch, seq, H, r]`, and the cache with the new rows.
pub(super) fn attend(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    heads: usize,
    attention: &Attention,
) -> Result<(ValueId, ValueId), NodeError> {
    let past_lengths = past_lengths(b, cx)?;
    let sinks = reach.sinks(b, heads, &[heads], DType::F32);
    let optional = [None, sinks, None, cx.attention_mask];
    let bits = optional.iter().enumerate();
    let present = bits.fold(0, |all, (i, input)| all | u8::from(input.is_some()) << i);
    let op = Op::LatentAttention {
        kv_lora_rank: attention.kv_lora_rank,
        scale: attention.scale as f32,
        sliding_window: reach.window,
        plugin: (cx.runtime == Runtime::TensorRtPlugin).then_some(present),
    };
    let required = [
        attention.query,
        attention.new_rows,
        attention.cache,
        past_lengths,
    ];
    let mut inputs: Vec<Option<ValueId>> = required.map(Some).to_vec();
    inputs.extend(optional);
    while inputs.last().is_some_and(Option::is_none) {
        inputs.pop();
    }
    let out = b.apply("latent_attention", op, &inputs)?;
    Ok((out[0], out[1]))
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
