//! The core of attention, scores to weighted sums, in its forms.

use super::{Reach, SOFTMAX_DTYPE};
use crate::{
    builders::context::{CacheProduct, Context},
    error::NodeError,
    ir::{Dim, GraphBuilder, Op, ValueId},
};

/// Attention of `q [batch, H, seq, n]`, already scaled, over `k [batch, G, rows, n]` and
/// `v [batch, G, rows, m]`, H a multiple of G, to `[batch, H, seq, m]`.
///
/// The heads of one group are rows of one product, so that a cached key is read once per group.
pub(super) fn grouped(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    q: ValueId,
    k: ValueId,
    v: ValueId,
) -> Result<ValueId, NodeError> {
    let keys = b.transpose("keys_t", k, &[0, 1, 3, 2])?;
    keys_transposed(b, cx, reach, q, keys, v)
}

/// [`grouped`] with keys that come as `[batch, G, n, rows]`.
pub(super) fn keys_transposed(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    q: ValueId,
    keys: ValueId,
    v: ValueId,
) -> Result<ValueId, NodeError> {
    let (batch, seq) = (cx.axes.batch.clone(), cx.axes.seq.clone());
    let (heads, n) = (b.shape(q)[1].clone(), b.shape(q)[3].clone());
    let (groups, m) = (b.shape(v)[1].clone(), b.shape(v)[3].clone());
    let rows = &heads.exact_div(&groups).unwrap_or(Dim::known(1)) * &seq;
    let q = b.reshape(
        "q_rows",
        q,
        &[batch.clone(), groups.clone(), rows.clone(), n],
    )?;
    let scores = b.matmul("scores", q, keys)?;
    let weights = weights(b, cx, reach, scores, &heads)?;
    let shape = [batch.clone(), groups, rows, reach.rows.clone()];
    let weights = b.reshape("weight_rows", weights, &shape)?;
    let sums = b.matmul("sums", weights, v)?;
    b.reshape("sums_by_head", sums, &[batch, heads, seq, m])
}

/// Attention of all heads over one shared sequence of rows: `q [batch, H, seq, w]`, already
/// scaled, over `cache [batch, rows, w]`, which is key and value, to `[batch, H, seq, w]`.
///
/// All heads are rows of one product, so that the cache is read once for the scores and once for
/// the sums.
pub(super) fn shared(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    q: ValueId,
    cache: ValueId,
) -> Result<ValueId, NodeError> {
    let (batch, seq) = (cx.axes.batch.clone(), cx.axes.seq.clone());
    let total = reach.rows.clone();
    let (heads, width) = (b.shape(q)[1].clone(), b.shape(q)[3].clone());
    let rows = &heads * &seq;
    let q = b.reshape("q_rows", q, &[batch.clone(), rows.clone(), width.clone()])?;
    let scores = match cx.product {
        CacheProduct::QueryRows => {
            let cache = b.transpose("cache_t", cache, &[0, 2, 1])?;
            b.matmul("scores", q, cache)?
        }
        CacheProduct::CacheRows => {
            let q = b.transpose("q_t", q, &[0, 2, 1])?;
            let scores = b.matmul("scores_t", cache, q)?;
            b.transpose("scores", scores, &[0, 2, 1])?
        }
    };
    let weights = weights(b, cx, reach, scores, &heads)?;
    let weights = b.reshape("weight_rows", weights, &[batch.clone(), rows, total])?;
    let sums = b.matmul("sums", weights, cache)?;
    b.reshape("sums_by_head", sums, &[batch, heads, seq, width])
}

/// Masked softmax of scores whose rows are heads and new tokens: `[batch, H, seq, rows]`, or the
/// shape of `scores` when there is nothing to mask and no sink.
fn weights(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    scores: ValueId,
    heads: &Dim,
) -> Result<ValueId, NodeError> {
    let (batch, seq) = (cx.axes.batch.clone(), cx.axes.seq.clone());
    let mut scores = b.cast("scores_f32", scores, SOFTMAX_DTYPE)?;
    let bias = cx.bias(b, reach.window, SOFTMAX_DTYPE)?;
    if bias.is_some() || reach.sinks.is_some() {
        let shape = [
            batch.clone(),
            heads.clone(),
            seq.clone(),
            reach.rows.clone(),
        ];
        scores = b.reshape("scores_by_head", scores, &shape)?;
    }
    if let Some(bias) = bias {
        scores = b.add("masked", scores, bias)?;
    }
    let count = cx.cfg.num_attention_heads;
    let sinks = reach.sinks(b, count, &[1, count, 1, 1], SOFTMAX_DTYPE);
    let weights = match sinks {
        None => b.softmax("weights", scores)?,
        Some(sinks) => {
            let column = [batch, heads.clone(), seq, Dim::known(1)];
            let column = b.expand("sink_column", sinks, &column)?;
            let scores = b.concat("scores_and_sink", &[column, scores], 3)?;
            let weights = b.softmax("weights_and_sink", scores)?;
            let first = b.ints(&[1]);
            b.slice_from("weights", weights, 3, first)?
        }
    };
    b.cast("weights_cast", weights, cx.dtype)
}

/// Attention through ONNX's `Attention` operator, which has no sinks: `q [batch, H, seq, n]`, not scaled,
/// `k [batch, G, rows, n]`, `v [batch, G, rows, m]` to `[batch, H, seq, m]`.
pub(super) fn operator(
    b: &mut GraphBuilder,
    cx: &mut Context<'_>,
    reach: &Reach,
    scale: f64,
    q: ValueId,
    k: ValueId,
    v: ValueId,
) -> Result<ValueId, NodeError> {
    let op = Op::Attention {
        scale: scale as f32,
    };
    let mut inputs = vec![Some(q), Some(k), Some(v)];
    inputs.extend(cx.bias(b, reach.window, cx.dtype)?.map(Some));
    Ok(b.apply("attention", op, &inputs)?[0])
}
