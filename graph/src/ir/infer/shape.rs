//! Operators that move elements or work on shapes.

use super::{Args, Inferred, Mismatch, Result, axis_of, broadcast, same_dtype, same_shape, show};
use crate::ir::{DType, Dim, TensorType};

pub(super) fn reshape(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let data = args.given(0)?;
    let target = args.content(1)?;
    let total = Dim::product(&data.ty.shape);
    let mut shape = Vec::with_capacity(target.len());
    let mut open = None;
    for (i, size) in target.iter().enumerate() {
        match size.as_constant() {
            Some(0) => shape.push(axis_of(i, data.ty)?.clone()),
            Some(-1) if open.is_none() => {
                open = Some(i);
                shape.push(Dim::known(1));
            }
            Some(n) if n < 0 => {
                return Err(Mismatch::new("sizes with at most one -1", show(target)));
            }
            _ => shape.push(size.clone()),
        }
    }
    let fits = || format!("a shape with the elements of {}", data.ty);
    let product = Dim::product(&shape);
    if let Some(i) = open {
        shape[i] = total
            .exact_div(&product)
            .ok_or_else(|| Mismatch::new(fits(), show(target)))?;
    } else if product != total {
        return Err(Mismatch::new(fits(), show(target)));
    }
    let mut out = Inferred::new(data.ty.dtype, shape);
    if out.ty.rank() <= 1 {
        out.content = data.content.map(<[Dim]>::to_vec);
    }
    Ok(out)
}

pub(super) fn transpose(perm: &[usize], args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.ty(0)?;
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..x.rank()) {
        return Err(Mismatch::new(
            format!("a permutation of {} axes", x.rank()),
            show_axes(perm),
        ));
    }
    Ok(Inferred::new(
        x.dtype,
        perm.iter().map(|&p| x.shape[p].clone()).collect(),
    ))
}

pub(super) fn concat(axis: usize, args: Args<'_>) -> Result<Inferred> {
    let types = (0..args.0.len())
        .map(|i| args.ty(i))
        .collect::<Result<Vec<_>>>()?;
    let first = *types
        .first()
        .ok_or_else(|| Mismatch::new("at least one input", 0))?;
    let dtype = same_dtype(&types)?;
    let mut size = axis_of(axis, first)?.clone();
    for other in &types[1..] {
        let agree = other.rank() == first.rank()
            && (0..first.rank()).all(|i| i == axis || other.shape[i] == first.shape[i]);
        if !agree {
            return Err(Mismatch::new(
                format!("{first} in all axes but {axis}"),
                other,
            ));
        }
        size = &size + &other.shape[axis];
    }
    let mut shape = first.shape.clone();
    shape[axis] = size;
    let mut out = Inferred::new(dtype, shape);
    let parts: Option<Vec<&[Dim]>> = args
        .0
        .iter()
        .map(|g| g.as_ref().and_then(|g| g.content))
        .collect();
    out.content = parts.map(|p| p.concat());
    Ok(out)
}

pub(super) fn slice(args: Args<'_>) -> Result<Inferred> {
    args.count(4..=4)?;
    let x = args.ty(0)?;
    let (starts, ends) = (args.content(1)?, args.content(2)?);
    let axes = args.axes(3, x.rank())?;
    if starts.len() != axes.len() || ends.len() != axes.len() {
        return Err(Mismatch::new(
            format!("{} starts and ends", axes.len()),
            format!("{} and {}", starts.len(), ends.len()),
        ));
    }
    let mut shape = x.shape.clone();
    for ((axis, start), end) in axes.into_iter().zip(starts).zip(ends) {
        let size = &x.shape[axis];
        if let (Some(n), Some(from), Some(to)) =
            (size.as_constant(), start.as_constant(), end.as_constant())
            && !(0 <= from && from < to && to <= n)
        {
            return Err(Mismatch::new(
                format!("a range of axis {axis} of {x}"),
                format!("{from}..{to}"),
            ));
        }
        let end = if end.as_constant() == Some(i64::MAX) {
            size
        } else {
            end
        };
        shape[axis] = end - start;
    }
    Ok(Inferred::new(x.dtype, shape))
}

pub(super) fn tail(size: &str, args: Args<'_>) -> Result<Inferred> {
    args.count(4..=4)?;
    let x = args.ty(0)?;
    let axes = args.axes(3, x.rank())?;
    let (starts, ends) = (args.content(1)?, args.content(2)?);
    let constant = |all: &[Dim]| match all {
        [one] => one.as_constant(),
        _ => None,
    };
    match (constant(starts), constant(ends), axes.as_slice()) {
        (Some(..0), Some(i64::MAX), &[axis]) => {
            let mut shape = x.shape.clone();
            shape[axis] = Dim::symbol(size);
            Ok(Inferred::new(x.dtype, shape))
        }
        _ => Err(Mismatch::new(
            "a negative start, no end and one axis",
            format!("{} to {}", show(starts), show(ends)),
        )),
    }
}

pub(super) fn split(axis: usize, args: Args<'_>) -> Result<Vec<Inferred>> {
    args.count(2..=2)?;
    let x = args.ty(0)?;
    let sizes = args.content(1)?;
    let whole = axis_of(axis, x)?;
    let sum = sizes.iter().fold(Dim::known(0), |acc, d| &acc + d);
    if sum != *whole {
        return Err(Mismatch::new(
            format!("sizes that sum to {whole}"),
            show(sizes),
        ));
    }
    let part = |size: &Dim| {
        let mut shape = x.shape.clone();
        shape[axis] = size.clone();
        Inferred::new(x.dtype, shape)
    };
    Ok(sizes.iter().map(part).collect())
}

pub(super) fn unsqueeze(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let x = args.given(0)?;
    let rank = x.ty.rank() + args.content(1)?.len();
    let axes = args.axes(1, rank)?;
    let mut rest = x.ty.shape.iter();
    let shape: Option<Vec<Dim>> = (0..rank)
        .map(|i| {
            if axes.contains(&i) {
                Some(Dim::known(1))
            } else {
                rest.next().cloned()
            }
        })
        .collect();
    let shape = shape
        .filter(|_| rest.next().is_none())
        .ok_or_else(|| Mismatch::new("distinct axes", show_axes(&axes)))?;
    let mut out = Inferred::new(x.ty.dtype, shape);
    if out.ty.rank() <= 1 {
        out.content = x.content.map(<[Dim]>::to_vec);
    }
    Ok(out)
}

pub(super) fn squeeze(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let x = args.given(0)?;
    let axes = args.axes(1, x.ty.rank())?;
    if let Some(&axis) = axes.iter().find(|&&a| !x.ty.shape[a].is_one()) {
        return Err(Mismatch::new(format!("size 1 in axis {axis}"), x.ty));
    }
    let kept = (0..x.ty.rank()).filter(|i| !axes.contains(i));
    let mut out = Inferred::new(x.ty.dtype, kept.map(|i| x.ty.shape[i].clone()).collect());
    out.content = x.content.map(<[Dim]>::to_vec);
    Ok(out)
}

pub(super) fn expand(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let x = args.ty(0)?;
    let target = args.content(1)?;
    Ok(Inferred::new(x.dtype, broadcast(&x.shape, target)?))
}

pub(super) fn shape(start: usize, end: usize, args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.ty(0)?;
    if start >= end || end > x.rank() {
        return Err(Mismatch::new(format!("axes {start}..{end}"), x));
    }
    let mut out = Inferred::new(DType::I64, vec![Dim::known(end - start)]);
    out.content = Some(x.shape[start..end].to_vec());
    Ok(out)
}

pub(super) fn gather(axis: usize, args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let (data, indices) = (args.ty(0)?, args.ty(1)?);
    axis_of(axis, data)?;
    if !indices.dtype.is_integer() {
        return Err(Mismatch::new("integer indices", indices));
    }
    let mut shape = data.shape[..axis].to_vec();
    shape.extend_from_slice(&indices.shape);
    shape.extend_from_slice(&data.shape[axis + 1..]);
    Ok(Inferred::new(data.dtype, shape))
}

/// The leading size and the width of `indices [n, q]`.
fn index_rows<'a>(data: &TensorType, indices: &'a TensorType) -> Result<(&'a Dim, usize)> {
    let takes = || {
        let rank = data.rank();
        Mismatch::new(format!("i64 [n, q], q from 1 to {rank}"), indices)
    };
    let [n, q] = indices.shape.as_slice() else {
        return Err(takes());
    };
    let q = q
        .as_known()
        .filter(|q| (1..=data.rank()).contains(q) && indices.dtype == DType::I64);
    Ok((n, q.ok_or_else(takes)?))
}

pub(super) fn gather_nd(args: Args<'_>) -> Result<Inferred> {
    args.count(2..=2)?;
    let data = args.ty(0)?;
    let (n, q) = index_rows(data, args.ty(1)?)?;
    let mut shape = vec![n.clone()];
    shape.extend_from_slice(&data.shape[q..]);
    Ok(Inferred::new(data.dtype, shape))
}

pub(super) fn scatter_add(args: Args<'_>) -> Result<Inferred> {
    args.count(3..=3)?;
    let data = args.float(0)?;
    let (n, q) = index_rows(data, args.ty(1)?)?;
    let mut shape = vec![n.clone()];
    shape.extend_from_slice(&data.shape[q..]);
    let updates = args.float(2)?;
    same_shape("updates", &shape, updates)?;
    Ok(Inferred::new(
        same_dtype(&[data, updates])?,
        data.shape.clone(),
    ))
}

pub(super) fn unique(size: &str, args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let x = args.ty(0)?;
    if !x.dtype.is_integer() {
        return Err(Mismatch::new("integers", x));
    }
    Ok(Inferred::new(x.dtype, vec![Dim::symbol(size)]))
}

pub(super) fn non_zero(size: &str, args: Args<'_>) -> Result<Inferred> {
    args.count(1..=1)?;
    let rank = args.ty(0)?.rank();
    let shape = vec![Dim::known(rank), Dim::symbol(size)];
    Ok(Inferred::new(DType::I64, shape))
}

pub(super) fn range(args: Args<'_>) -> Result<Inferred> {
    args.count(3..=3)?;
    let scalar = |i: usize| match args.content(i)? {
        [one] if args.ty(i)?.rank() == 0 => Ok(one.clone()),
        _ => Err(Mismatch::new(format!("a scalar as input {i}"), args.ty(i)?)),
    };
    let (start, limit, delta) = (scalar(0)?, scalar(1)?, scalar(2)?);
    if !delta.is_one() {
        return Err(Mismatch::new("a step of 1", delta));
    }
    Ok(Inferred::new(DType::I64, vec![&limit - &start]))
}

fn show_axes(axes: &[usize]) -> String {
    let axes: Vec<String> = axes.iter().map(ToString::to_string).collect();
    format!("[{}]", axes.join(", "))
}
