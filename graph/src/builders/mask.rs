//! What is added to attention scores so that hidden positions get no weight.
//!
//! A new token in slot `past + t` sees the slots up to its own, of these the last `window` when the
//! layer has a window, and never padding. Slots, not positions, are compared: with padding on the left
//! both differ by a constant, so differences agree. A layer with a window has cached the last
//! `cached = min(past, window)` slots only, so slots count from the first of these.

use super::context::Axes;
use crate::{
    error::NodeError,
    ir::{Compare, DType, GraphBuilder, InlineTensor, Op, ValueId},
};

/// Added to hidden scores. Finite, so that a row that sees nothing (padding) stays finite; far below
/// any score; small enough that f16 holds it with a score added.
fn hidden(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => -3.0e4,
        _ => -1.0e9,
    }
}

/// `[batch or 1, 1, seq, rows]` of `dtype`, `rows` what the layer has cached and the new tokens: 0 where a query sees a key, very negative elsewhere.
pub(super) fn bias(
    b: &mut GraphBuilder,
    axes: &Axes,
    attention_mask: Option<ValueId>,
    window: Option<usize>,
    dtype: DType,
) -> Result<ValueId, NodeError> {
    let name = match window {
        None => "mask".to_owned(),
        Some(window) => format!("mask.window_{window}"),
    };
    b.top_level(|b| {
        b.scope(&name, |b| {
            let zero = b.constant(InlineTensor::i64(&[], &[0]));
            let one = b.constant(InlineTensor::i64(&[], &[1]));
            let cached = b.dim_scalar(&axes.cached(window))?;
            let rows = b.dim_scalar(&axes.rows(window))?;
            let keys = b.node("keys", Op::Range, &[zero, rows, one])?;
            let queries = b.node("queries", Op::Range, &[cached, rows, one])?;
            let queries = b.unsqueeze("query_rows", queries, &[1])?;
            let mut seen = b.compare("causal", Compare::LessOrEqual, keys, queries)?;
            if let Some(window) = window {
                let window = b.constant(InlineTensor::i64(&[], &[window as i64]));
                let oldest = b.sub("oldest", queries, window)?;
                let near = b.compare("near", Compare::Greater, keys, oldest)?;
                seen = b.node("causal_near", Op::And, &[seen, near])?;
            }
            seen = b.unsqueeze("causal_4d", seen, &[0, 1])?;
            if let Some(mask) = attention_mask {
                let mask = last_slots(b, axes, mask, window)?;
                let real = b.compare("real", Compare::Greater, mask, zero)?;
                let real = b.unsqueeze("real_4d", real, &[1, 2])?;
                seen = b.node("seen", Op::And, &[seen, real])?;
            }
            let nothing = b.constant(InlineTensor::float(dtype, &[], &[0.0]));
            let hidden = b.constant(InlineTensor::float(dtype, &[], &[hidden(dtype)]));
            b.node("bias", Op::Where, &[seen, nothing, hidden])
        })
    })
}

/// Of `mask [batch, total]` the slots that a layer has cached and the new ones.
fn last_slots(
    b: &mut GraphBuilder,
    axes: &Axes,
    mask: ValueId,
    window: Option<usize>,
) -> Result<ValueId, NodeError> {
    let (total, rows) = (axes.total(), axes.rows(window));
    if total == rows {
        return Ok(mask);
    }
    let total = b.dim_value(&total)?;
    let rows = b.dim_value(&rows)?;
    let first = b.sub("first_slot", total, rows)?;
    b.slice_from("last_slots", mask, 1, first)
}
