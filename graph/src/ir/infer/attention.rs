//! Fused operators of attention.

use super::{Args, Inferred, Mismatch, Result, broadcast, same_dtype, same_shape};
use crate::ir::{DType, Dim};

pub(super) fn rotary(heads: usize, args: Args<'_>) -> Result<Inferred> {
    args.count(3..=3)?;
    let (x, cos, sin) = (args.float(0)?, args.float(1)?, args.float(2)?);
    let dtype = same_dtype(&[x, cos, sin])?;
    let heads = Dim::known(heads);
    let takes = || {
        Mismatch::new(
            format!("[batch, seq, {heads}*d] or [batch, {heads}, seq, d], d even"),
            x,
        )
    };
    let (batch, seq, head) = match x.shape.as_slice() {
        [batch, seq, width] => (batch, seq, width.exact_div(&heads).ok_or_else(takes)?),
        [batch, h, seq, head] if *h == heads => (batch, seq, head.clone()),
        _ => return Err(takes()),
    };
    let half = head.exact_div(&Dim::known(2)).ok_or_else(takes)?;
    let table = [batch.clone(), seq.clone(), half];
    same_shape("cosines", &table, cos)?;
    same_shape("sines", &table, sin)?;
    Ok(Inferred::new(dtype, x.shape.clone()))
}

pub(super) fn attention(args: Args<'_>) -> Result<Inferred> {
    args.count(3..=4)?;
    let (q, k, v) = (args.float(0)?, args.float(1)?, args.float(2)?);
    let dtype = same_dtype(&[q, k, v])?;
    let ([batch, heads, seq, d], [_, kv_heads, total, _], [_, _, _, d_v]) =
        (q.shape.as_slice(), k.shape.as_slice(), v.shape.as_slice())
    else {
        return Err(Mismatch::new(
            "q, k and v with 4 axes",
            format!("{q}, {k}, {v}"),
        ));
    };
    let key = [batch.clone(), kv_heads.clone(), total.clone(), d.clone()];
    same_shape("keys", &key, k)?;
    let value = [batch.clone(), kv_heads.clone(), total.clone(), d_v.clone()];
    same_shape("values", &value, v)?;
    if heads.exact_div(kv_heads).is_none() {
        return Err(Mismatch::new(
            "query heads that KV heads divide",
            format!("{q} and {k}"),
        ));
    }
    let scores = [batch.clone(), heads.clone(), seq.clone(), total.clone()];
    if let Some(mask) = args.optional(3) {
        same_dtype(&[q, mask])?;
        if broadcast(&scores, &mask.shape)? != scores {
            return Err(Mismatch::new("a mask that broadcasts to the scores", mask));
        }
    }
    Ok(Inferred::new(
        dtype,
        vec![batch.clone(), heads.clone(), seq.clone(), d_v.clone()],
    ))
}

/// Inputs as [`crate::ir::Op::GroupQueryAttention`] lists them.
pub(super) fn group_query(heads: usize, kv_heads: usize, args: Args<'_>) -> Result<Vec<Inferred>> {
    args.count(7..=12)?;
    let (q, k, v) = (args.float(0)?, args.float(1)?, args.float(2)?);
    let (past_key, past_value) = (args.float(3)?, args.float(4)?);
    let dtype = same_dtype(&[q, k, v, past_key, past_value])?;
    let [batch, seq, width] = q.shape.as_slice() else {
        return Err(Mismatch::new("queries with 3 axes", q));
    };
    let d = width
        .exact_div(&Dim::known(heads))
        .ok_or_else(|| Mismatch::new(format!("queries of {heads} heads"), q))?;
    let groups = Dim::known(kv_heads);
    let key = [batch.clone(), seq.clone(), &groups * &d];
    same_shape("keys", &key, k)?;
    same_shape("values", &key, v)?;
    let [_, _, past, _] = past_key.shape.as_slice() else {
        return Err(Mismatch::new("past keys with 4 axes", past_key));
    };
    let cache = [batch.clone(), groups.clone(), past.clone(), d.clone()];
    same_shape("past keys", &cache, past_key)?;
    same_shape("past values", &cache, past_value)?;
    let total = past + seq;
    for (i, shape) in [(5, vec![batch.clone()]), (6, vec![])] {
        let ty = args.ty(i)?;
        if ty.dtype != DType::I32 || ty.shape != shape {
            return Err(Mismatch::new(
                format!("i32 {} as input {i}", super::show(&shape)),
                ty,
            ));
        }
    }
    if let Some(bias) = args.optional(10) {
        same_dtype(&[q, bias])?;
        let scores = [batch.clone(), Dim::known(heads), seq.clone(), total.clone()];
        if bias.rank() != 4 || broadcast(&scores, &bias.shape)? != scores {
            return Err(Mismatch::new("a bias that broadcasts to the scores", bias));
        }
    }
    if let Some(sinks) = args.optional(11) {
        same_dtype(&[q, sinks])?;
        same_shape("sinks", &[Dim::known(heads)], sinks)?;
    }
    let present = vec![batch.clone(), groups, total, d];
    Ok(vec![
        Inferred::new(dtype, q.shape.clone()),
        Inferred::new(dtype, present.clone()),
        Inferred::new(dtype, present),
    ])
}
