//! Types and shapes of a node's outputs from its inputs; the only place that knows what an operator takes.

mod attention;
mod body;
mod contraction;
mod elementwise;
mod experts;
mod latent;
mod shape;

use super::{DType, Dim, Op, TensorType};

/// What is known about one input.
#[derive(Clone, Copy)]
pub(crate) struct Given<'a> {
    pub(crate) ty: &'a TensorType,
    pub(crate) content: Option<&'a [Dim]>,
}

/// What follows about one output.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inferred {
    pub(crate) ty: TensorType,
    pub(crate) content: Option<Vec<Dim>>,
}

impl Inferred {
    fn new(dtype: DType, shape: Vec<Dim>) -> Self {
        Self {
            ty: TensorType::new(dtype, shape),
            content: None,
        }
    }
}

/// Why an operator does not take its inputs.
#[derive(Debug)]
pub(crate) struct Mismatch {
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl Mismatch {
    fn new(expected: impl Into<String>, found: impl std::fmt::Display) -> Self {
        Self {
            expected: expected.into(),
            found: found.to_string(),
        }
    }
}

type Result<T> = std::result::Result<T, Mismatch>;

/// Types of the outputs of `op` applied to `inputs`.
pub(crate) fn infer(op: &Op, inputs: &[Option<Given<'_>>]) -> Result<Vec<Inferred>> {
    let args = Args(inputs);
    let one = |x: Result<Inferred>| x.map(|x| vec![x]);
    match op {
        Op::Binary(kind) => one(elementwise::binary(*kind, args)),
        Op::Compare(_) => one(elementwise::compare(args)),
        Op::And => one(elementwise::and(args)),
        Op::Unary(_) => one(elementwise::unary(args)),
        Op::Cast { to } => one(elementwise::cast(*to, args)),
        Op::Where => one(elementwise::select(args)),
        Op::MatMul => one(contraction::matmul(args)),
        Op::Gemm { trans_b } => one(contraction::gemm(*trans_b, args)),
        Op::Softmax { axis } => one(contraction::softmax(*axis, args)),
        Op::RmsNormalization { .. } => one(contraction::rms_norm(args)),
        Op::Reshape => one(shape::reshape(args)),
        Op::Transpose { perm } => one(shape::transpose(perm, args)),
        Op::Concat { axis } => one(shape::concat(*axis, args)),
        Op::Slice => one(shape::slice(args)),
        Op::Tail { size } => one(shape::tail(size, args)),
        Op::Split { axis } => shape::split(*axis, args),
        Op::Unsqueeze => one(shape::unsqueeze(args)),
        Op::Squeeze => one(shape::squeeze(args)),
        Op::Expand => one(shape::expand(args)),
        Op::Shape { start, end } => one(shape::shape(*start, *end, args)),
        Op::Gather { axis } => one(shape::gather(*axis, args)),
        Op::GatherNd => one(shape::gather_nd(args)),
        Op::ScatterAdd => one(shape::scatter_add(args)),
        Op::TopK => contraction::top_k(args),
        Op::Unique { size } => one(shape::unique(size, args)),
        Op::NonZero { size } => one(shape::non_zero(size, args)),
        Op::ReduceSum => one(contraction::reduce_sum(args)),
        Op::Identity => one(elementwise::identity(args)),
        Op::Loop { body, carried } => body::repeat(body, *carried, args),
        Op::Range => one(shape::range(args)),
        Op::RotaryEmbedding { heads } => one(attention::rotary(*heads, args)),
        Op::Attention { .. } => one(attention::attention(args)),
        Op::GroupQueryAttention {
            heads, kv_heads, ..
        } => attention::group_query(*heads, *kv_heads, args),
        Op::LatentAttention {
            kv_lora_rank,
            scale,
            sliding_window,
            plugin,
            kernels: _,
        } => latent::latent(*kv_lora_rank, *scale, *sliding_window, *plugin, args),
        Op::Mxfp4Experts {
            swiglu_limit,
            swiglu_alpha,
        } => one(experts::mxfp4(*swiglu_limit, *swiglu_alpha, args)),
        Op::Linear16 => one(contraction::linear16(args)),
    }
}

/// The inputs of one node.
#[derive(Clone, Copy)]
struct Args<'a>(&'a [Option<Given<'a>>]);

impl<'a> Args<'a> {
    /// Refuses another number of inputs than `range` allows.
    fn count(self, range: std::ops::RangeInclusive<usize>) -> Result<()> {
        let n = self.0.len();
        if range.contains(&n) {
            return Ok(());
        }
        let expected = if range.start() == range.end() {
            format!("{} inputs", range.start())
        } else {
            format!("{} to {} inputs", range.start(), range.end())
        };
        Err(Mismatch::new(expected, n))
    }

    fn given(self, i: usize) -> Result<Given<'a>> {
        self.0
            .get(i)
            .copied()
            .flatten()
            .ok_or_else(|| Mismatch::new(format!("an input {i}"), "none"))
    }

    fn ty(self, i: usize) -> Result<&'a TensorType> {
        Ok(self.given(i)?.ty)
    }

    fn optional(self, i: usize) -> Option<&'a TensorType> {
        self.0.get(i).copied().flatten().map(|g| g.ty)
    }

    /// The type of a floating point input.
    fn float(self, i: usize) -> Result<&'a TensorType> {
        let ty = self.ty(i)?;
        if ty.dtype.is_float() {
            return Ok(ty);
        }
        Err(Mismatch::new(format!("a float tensor as input {i}"), ty))
    }

    /// The elements of an i64 input with one axis, which must follow from shapes.
    fn content(self, i: usize) -> Result<&'a [Dim]> {
        let given = self.given(i)?;
        if given.ty.dtype != DType::I64 {
            return Err(Mismatch::new(format!("i64 as input {i}"), given.ty));
        }
        given.content.ok_or_else(|| {
            Mismatch::new(
                format!("an input {i} whose elements follow from constants and shapes"),
                given.ty,
            )
        })
    }

    /// The elements of input `i` as axes of a tensor with `rank` axes.
    fn axes(self, i: usize, rank: usize) -> Result<Vec<usize>> {
        let axes: Option<Vec<usize>> = self
            .content(i)?
            .iter()
            .map(|d| d.as_known().filter(|&a| a < rank))
            .collect();
        axes.ok_or_else(|| {
            let found: Vec<String> = self
                .content(i)
                .unwrap_or_default()
                .iter()
                .map(ToString::to_string)
                .collect();
            Mismatch::new(format!("axes below {rank} as input {i}"), found.join(", "))
        })
    }
}

/// The common type of several inputs.
fn same_dtype(inputs: &[&TensorType]) -> Result<DType> {
    let first = inputs[0].dtype;
    match inputs.iter().find(|t| t.dtype != first) {
        None => Ok(first),
        Some(other) => Err(Mismatch::new(format!("inputs of one type, {first}"), other)),
    }
}

/// Refuses an axis that `ty` does not have.
fn axis_of(axis: usize, ty: &TensorType) -> Result<&Dim> {
    ty.shape
        .get(axis)
        .ok_or_else(|| Mismatch::new(format!("an axis {axis}"), ty))
}

/// Refuses a shape that differs from `expected`.
fn same_shape(what: &str, expected: &[Dim], found: &TensorType) -> Result<()> {
    if found.shape == expected {
        return Ok(());
    }
    Err(Mismatch::new(
        format!("{what} of shape {}", show(expected)),
        found,
    ))
}

/// A shape as text.
fn show(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// The shape of two broadcast shapes: aligned at the last axis, equal or 1.
fn broadcast(a: &[Dim], b: &[Dim]) -> Result<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map(|j| s[j].clone());
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (Some(x), Some(y)) if x == y || y.is_one() => Ok(x),
            (Some(x), Some(y)) if x.is_one() => Ok(y),
            (Some(x), None) | (None, Some(x)) => Ok(x),
            _ => Err(Mismatch::new(
                format!("a shape that broadcasts with {}", show(a)),
                show(b),
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests;
