//! `mlac::LatentAttention`.

use super::{Args, Inferred, Mismatch, Result, same_dtype, same_shape, show};
use crate::ir::{DType, Dim};

/// Names and types of the inputs after the cache.
const AFTER_CACHE: [(&str, DType); 5] = [
    ("past lengths", DType::I32),
    ("page table", DType::I32),
    ("sinks", DType::F32),
    ("tree mask", DType::I64),
    ("key mask", DType::I64),
];

/// Inputs as [`crate::ir::Op::LatentAttention`] lists them.
pub(super) fn latent(
    kv_lora_rank: usize,
    scale: f32,
    sliding_window: Option<usize>,
    plugin: Option<u8>,
    args: Args<'_>,
) -> Result<Vec<Inferred>> {
    args.count(4..=8)?;
    let (query, rows, cache) = (args.float(0)?, args.float(1)?, args.float(2)?);
    let dtype = same_dtype(&[query, rows, cache])?;
    let [batch, seq, heads, width] = query.shape.as_slice() else {
        return Err(Mismatch::new("a query with 4 axes", query));
    };
    let wide_enough = width
        .as_known()
        .is_some_and(|w| (1..=w).contains(&kv_lora_rank));
    if !wide_enough {
        return Err(Mismatch::new(
            format!("a query of {kv_lora_rank} (at least 1) and more numbers a head"),
            query,
        ));
    }
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Mismatch::new("a positive scale", scale));
    }
    if sliding_window == Some(0) {
        return Err(Mismatch::new("a window of 1 token or more, or none", 0));
    }
    same_shape(
        "new rows",
        &[batch.clone(), seq.clone(), width.clone()],
        rows,
    )?;
    let [_, capacity, _] = cache.shape.as_slice() else {
        return Err(Mismatch::new("a cache with 3 axes", cache));
    };
    same_shape(
        "a cache",
        &[batch.clone(), capacity.clone(), width.clone()],
        cache,
    )?;
    args.ty(3)?;
    let mut present = 0;
    for (i, (what, dtype)) in AFTER_CACHE.into_iter().enumerate() {
        let Some(ty) = args.optional(3 + i) else {
            continue;
        };
        present |= 1_u8 << i >> 1;
        let shape = match (i, ty.shape.as_slice()) {
            (0, _) => vec![batch.clone()],
            (2, _) => vec![heads.clone()],
            (4, [_, slots]) => vec![batch.clone(), slots.clone()],
            (4, _) => return Err(Mismatch::new("a key mask with 2 axes", ty)),
            _ => return Err(Mismatch::new(format!("no {what} in a graph of mlac"), ty)),
        };
        if ty.dtype != dtype || ty.shape != shape {
            return Err(Mismatch::new(format!("{what} {dtype}{}", show(&shape)), ty));
        }
    }
    if plugin.is_some_and(|declared| declared != present) {
        return Err(Mismatch::new(
            format!("optional inputs {present} declared for the plugin"),
            plugin.unwrap_or(0),
        ));
    }
    let sums = vec![
        batch.clone(),
        seq.clone(),
        heads.clone(),
        Dim::known(kv_lora_rank),
    ];
    Ok(vec![
        Inferred::new(dtype, sums),
        Inferred::new(dtype, cache.shape.clone()),
    ])
}
