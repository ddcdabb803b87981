//! Operators that sum over an axis.

use super::{Args, Inferred, Mismatch, Result, axis_of, broadcast, same_dtype, same_shape};
use crate::ir::{DType, Dim};

pub(super) fn matmul(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (a, b) = (args.float(0)?, args.float(1)?);
    let dtype = same_dtype(&[a, b])?;
    let ([batch_a @ .., m, k], [batch_b @ .., k2, n]) = (a.shape.as_slice(), b.shape.as_slice())
    else {
        return Err(Mismatch::new(
            "two tensors with at least 2 axes",
            format!("{a} and {b}"),
        ));
    };
    if k != k2 {
        return Err(Mismatch::new("equal inner axes", format!("{a} and {b}")));
    }
    let mut shape = broadcast(batch_a, batch_b)?;
    shape.extend([m.clone(), n.clone()]);
    Ok(Inferred::new(dtype, shape))
}

pub(super) fn gemm(trans_b: bool, args: Args<'_>) -> Result<Inferred> {
    args.count(2..=3)?;
    let (a, b) = (args.float(0)?, args.float(1)?);
    let dtype = same_dtype(&[a, b])?;
    let ([m, k], [b0, b1]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return Err(Mismatch::new(
            "two tensors with 2 axes",
            format!("{a} and {b}"),
        ));
    };
    let (k2, n) = if trans_b { (b1, b0) } else { (b0, b1) };
    if k != k2 {
        return Err(Mismatch::new("equal inner axes", format!("{a} and {b}")));
    }
    let shape = vec![m.clone(), n.clone()];
    if let Some(c) = args.optional(2) {
        same_dtype(&[a, c])?;
        if broadcast(&shape, &c.shape)? != shape {
            return Err(Mismatch::new(
                "a third input that broadcasts to the product",
                c,
            ));
        }
    }
    Ok(Inferred::new(dtype, shape))
}

/// `mlac::Linear16`.
pub(super) fn linear16(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=3)?;
    let (x, weight) = (args.ty(0)?, args.ty(1)?);
    let ([lead @ .., columns], DType::F32) = (x.shape.as_slice(), x.dtype) else {
        return Err(Mismatch::new("x f32[tokens.., in]", x));
    };
    if lead.is_empty() {
        return Err(Mismatch::new("x f32[tokens.., in]", x));
    }
    let ([rows, found], DType::BF16 | DType::F16) = (weight.shape.as_slice(), weight.dtype) else {
        return Err(Mismatch::new("weight [out, in], bf16 or f16", weight));
    };
    if found != columns {
        let expected = format!("weight [out, {columns}], as x is {x}");
        return Err(Mismatch::new(expected, weight));
    }
    if let Some(bias) = args.optional(2)
        && (bias.dtype != DType::F32 || bias.shape != [rows.clone()])
    {
        return Err(Mismatch::new(format!("bias f32[{rows}]"), bias));
    }
    let shape = lead.iter().chain([rows]).cloned().collect();
    Ok(Inferred::new(DType::F32, shape))
}

pub(super) fn softmax(axis: usize, args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.float(0)?;
    axis_of(axis, x)?;
    Ok(Inferred::new(x.dtype, x.shape.clone()))
}

pub(super) fn reduce_sum(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let x = args.float(0)?;
    let mut shape = x.shape.clone();
    for axis in args.axes(1, x.rank())? {
        shape[axis] = Dim::known(1);
    }
    Ok(Inferred::new(x.dtype, shape))
}

pub(super) fn top_k(args: Args<'_>) -> Result<Vec<Inferred>> {
    args.count(2..=2)?;
    let x = args.float(0)?;
    let (Some(last), [k]) = (x.shape.last(), args.content(1)?) else {
        return Err(Mismatch::new("a tensor with an axis and one count", x));
    };
    if let (Some(k), Some(n)) = (k.as_constant(), last.as_constant())
        && !(1..=n).contains(&k)
    {
        return Err(Mismatch::new(format!("1 to {n} of the last axis"), k));
    }
    let mut shape = x.shape.clone();
    if let Some(last) = shape.last_mut() {
        *last = k.clone();
    }
    Ok(vec![
        Inferred::new(x.dtype, shape.clone()),
        Inferred::new(DType::I64, shape),
    ])
}

pub(super) fn rms_norm(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (x, scale) = (args.float(0)?, args.float(1)?);
    let dtype = same_dtype(&[x, scale])?;
    let last: Option<&Dim> = x.shape.last();
    let last = last.ok_or_else(|| Mismatch::new("a tensor with an axis", x))?;
    same_shape("a scale", std::slice::from_ref(last), scale)?;
    Ok(Inferred::new(dtype, x.shape.clone()))
}
