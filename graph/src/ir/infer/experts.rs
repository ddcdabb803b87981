//! `mlac::Mxfp4Experts`.

use mlac_model::mxfp4::{BLOCK, BLOCK_BYTES};

use super::{Args, Inferred, Mismatch, Result, show};
use crate::ir::{DType, Dim};

/// Inputs as [`crate::ir::Op::Mxfp4Experts`] lists them.
pub(super) fn mxfp4(swiglu_limit: f32, swiglu_alpha: f32, args: Args<'_>) -> Result<Inferred> {
    args.count(9..=9)?;
    if swiglu_limit.is_nan() || swiglu_limit <= 0.0 {
        return Err(Mismatch::new("a positive swiglu_limit", swiglu_limit));
    }
    if !swiglu_alpha.is_finite() {
        return Err(Mismatch::new("a finite swiglu_alpha", swiglu_alpha));
    }
    let exact = |i: usize, what: &str, dtype: DType, shape: &[Dim]| {
        let found = args.ty(i)?;
        if found.dtype == dtype && found.shape == shape {
            return Ok(());
        }
        let expected = format!("{what} {dtype}{}", show(shape));
        Err(Mismatch::new(expected, found))
    };
    // Rows of whole blocks, of a known size.
    let size = |i: usize, axis: usize, what: &str| {
        let found = args.ty(i)?;
        let dim = found.shape.get(axis).and_then(Dim::as_known);
        dim.filter(|&n| n > 0 && n.is_multiple_of(BLOCK))
            .ok_or_else(|| {
                let expected = format!("{what}, a multiple of {BLOCK}, as axis {axis}");
                Mismatch::new(expected, found)
            })
    };
    let (hidden, chosen, down) = (args.ty(0)?, args.ty(1)?, args.ty(6)?);
    let last = hidden.rank().saturating_sub(1);
    let hidden_size = size(0, last, "hidden_size")?;
    let both = size(3, 1, "2 * intermediate_size")?;
    let inner = both / 2;
    let lead = &hidden.shape[..last];
    let Some(count) = down.shape.first() else {
        return Err(Mismatch::new("blocks [E, D, I / 32, 16]", down));
    };
    let (Some(k), true) = (chosen.shape.last(), last > 0) else {
        return Err(Mismatch::new("tokens with choices", hidden));
    };
    let choices: Vec<Dim> = lead.iter().chain([k]).cloned().collect();
    exact(0, "hidden states", DType::F32, &hidden.shape)?;
    exact(1, "chosen experts", DType::I64, &choices)?;
    exact(2, "weights", DType::F32, &choices)?;
    for (first, what, out, input) in [
        (3, "gate_up", both, hidden_size),
        (6, "down", hidden_size, inner),
    ] {
        let of = |rest: &[usize]| -> Vec<Dim> {
            let rest = rest.iter().map(|&n| Dim::known(n));
            std::iter::once(count.clone()).chain(rest).collect()
        };
        let blocks = input / BLOCK;
        let part = |part: &str| format!("{what}_{part}");
        exact(
            first,
            &part("blocks"),
            DType::U8,
            &of(&[out, blocks, BLOCK_BYTES]),
        )?;
        exact(first + 1, &part("scales"), DType::U8, &of(&[out, blocks]))?;
        exact(first + 2, &part("bias"), DType::F32, &of(&[out]))?;
    }
    // Two projections of `inner` in `both` are pairs, and down's rows are blocks too.
    if !inner.is_multiple_of(BLOCK) {
        let expected = format!("an intermediate_size that is a multiple of {BLOCK}");
        return Err(Mismatch::new(expected, inner));
    }
    Ok(Inferred::new(DType::F32, hidden.shape.clone()))
}
