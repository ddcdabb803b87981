//! Operators that work element by element.

use super::{Args, Inferred, Mismatch, Result, broadcast, same_dtype};
use crate::ir::{Binary, DType, Dim};

pub(super) fn binary(kind: Binary, args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (a, b) = (args.given(0)?, args.given(1)?);
    let dtype = same_dtype(&[a.ty, b.ty])?;
    if !dtype.is_float() && !dtype.is_integer() {
        return Err(Mismatch::new("numbers", a.ty));
    }
    if kind == Binary::Mod && !dtype.is_integer() {
        return Err(Mismatch::new("integers", a.ty));
    }
    let mut out = Inferred::new(dtype, broadcast(&a.ty.shape, &b.ty.shape)?);
    if let (Some(x), Some(y)) = (a.content, b.content)
        && (x.len() == y.len() || x.len() == 1 || y.len() == 1)
    {
        let n = x.len().max(y.len());
        let pick = |s: &[Dim], i: usize| {
            if s.len() == 1 {
                s[0].clone()
            } else {
                s[i].clone()
            }
        };
        let combine = |i| {
            let (x, y) = (pick(x, i), pick(y, i));
            match kind {
                Binary::Add => Some(&x + &y),
                Binary::Sub => Some(&x - &y),
                Binary::Mul => Some(&x * &y),
                Binary::Div | Binary::Mod | Binary::Min | Binary::Max => None,
            }
        };
        out.content = (0..n).map(combine).collect();
    }
    Ok(out)
}

pub(super) fn compare(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (a, b) = (args.ty(0)?, args.ty(1)?);
    same_dtype(&[a, b])?;
    Ok(Inferred::new(DType::Bool, broadcast(&a.shape, &b.shape)?))
}

pub(super) fn and(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (a, b) = (args.ty(0)?, args.ty(1)?);
    if same_dtype(&[a, b])? != DType::Bool {
        return Err(Mismatch::new("bool tensors", a));
    }
    Ok(Inferred::new(DType::Bool, broadcast(&a.shape, &b.shape)?))
}

pub(super) fn unary(args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.float(0)?;
    Ok(Inferred::new(x.dtype, x.shape.clone()))
}

pub(super) fn identity(args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.given(0)?;
    let mut out = Inferred::new(x.ty.dtype, x.ty.shape.clone());
    out.content = x.content.map(<[Dim]>::to_vec);
    Ok(out)
}

pub(super) fn cast(to: DType, args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    Ok(Inferred::new(to, args.ty(0)?.shape.clone()))
}

pub(super) fn select(args: Args<'_>) -> Result<Inferred> {
    args.count(3..=3)?;
    let condition = args.ty(0)?;
    if condition.dtype != DType::Bool {
        return Err(Mismatch::new("a bool condition", condition));
    }
    let (a, b) = (args.ty(1)?, args.ty(2)?);
    let dtype = same_dtype(&[a, b])?;
    let shape = broadcast(&broadcast(&condition.shape, &a.shape)?, &b.shape)?;
    Ok(Inferred::new(dtype, shape))
}
