//! The operators a graph may hold, each with its attributes in Rust types.
//!
//! Only what the builders use is here; semantics are ONNX's, opset 23, unless a domain is given.

use super::DType;

/// An operator with its attributes.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `a op b` with broadcasting; integers or floats.
    Binary(Binary),
    /// `a op b` with broadcasting; bool result.
    Compare(Compare),
    /// `a and b` with broadcasting; bool.
    And,
    /// Elementwise function of one float tensor.
    Unary(Unary),
    /// Change of element type.
    Cast {
        /// New type.
        to: DType,
    },
    /// `condition ? a : b` with broadcasting.
    Where,
    /// Matrix product over the last two axes, the others broadcast.
    MatMul,
    /// `a [m, k] x b` (`[k, n]`, or `[n, k]` when `trans_b`), plus an optional `c` that broadcasts.
    Gemm {
        /// Whether `b` is stored `[n, k]`.
        trans_b: bool,
    },
    /// New shape, given as a second input (i64, one axis); 0 copies an axis, -1 is inferred.
    Reshape,
    /// Permutation of axes.
    Transpose {
        /// Axis of the input for each axis of the output.
        perm: Vec<usize>,
    },
    /// Joins along an axis.
    Concat {
        /// The axis.
        axis: usize,
    },
    /// `data, starts, ends, axes`: a range along each listed axis, step 1.
    Slice,
    /// `data, sizes`: parts along an axis.
    Split {
        /// The axis.
        axis: usize,
    },
    /// `data, axes`: inserts axes of size 1.
    Unsqueeze,
    /// `data, axes`: removes axes of size 1.
    Squeeze,
    /// `data, shape`: broadcasts.
    Expand,
    /// Sizes of the axes `start..end`, i64.
    Shape {
        /// First axis.
        start: usize,
        /// One past the last axis.
        end: usize,
    },
    /// `data, indices`: slices along an axis.
    Gather {
        /// The axis.
        axis: usize,
    },
    /// `start, limit, delta` (i64 scalars): an arithmetic series.
    Range,
    /// Softmax over one axis.
    Softmax {
        /// The axis.
        axis: usize,
    },
    /// `x, scale`: `x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, computed in f32.
    RmsNormalization {
        /// Added to the mean square.
        epsilon: f32,
    },
    /// `x, cos, sin`: half-split rotation of the last axis. `x` is `[batch, seq, heads*d]` or
    /// `[batch, heads, seq, d]`; `cos` and `sin` are `[batch, seq, d/2]`.
    RotaryEmbedding {
        /// Heads; needed when `x` has 3 axes.
        heads: usize,
    },
    /// `q [batch, H, seq, d], k [batch, G, total, d], v [batch, G, total, d_v], mask`: softmax
    /// attention; `mask` (optional, float, added to scores) broadcasts to `[batch, H, seq, total]`.
    Attention {
        /// Factor on the scores.
        scale: f32,
    },
    /// `com.microsoft::GroupQueryAttention`: `q [batch, seq, H*d], k, v [batch, seq, G*d], past_key,
    /// past_value [batch, G, past, d], seqlens_k [batch] i32, total [] i32, -, -, -, bias
    /// [batch, 1, seq, total]` gives `[batch, seq, H*d]` and the present keys and values.
    GroupQueryAttention {
        /// Query heads, H.
        heads: usize,
        /// KV heads, G.
        kv_heads: usize,
        /// Factor on the scores.
        scale: f32,
    },
}

/// Arithmetic of two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// Sum.
    Add,
    /// Difference.
    Sub,
    /// Product.
    Mul,
}

/// Comparison of two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// `a <= b`.
    LessOrEqual,
    /// `a > b`.
    Greater,
}

/// Function of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unary {
    /// Negation.
    Neg,
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
    /// Logistic function.
    Sigmoid,
}

/// Microsoft's operator domain, known to ONNX Runtime only.
pub const MICROSOFT_DOMAIN: &str = "com.microsoft";

impl Op {
    /// ONNX's name of the operator.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Binary(Binary::Add) => "Add",
            Self::Binary(Binary::Sub) => "Sub",
            Self::Binary(Binary::Mul) => "Mul",
            Self::Compare(Compare::LessOrEqual) => "LessOrEqual",
            Self::Compare(Compare::Greater) => "Greater",
            Self::And => "And",
            Self::Unary(Unary::Neg) => "Neg",
            Self::Unary(Unary::Cos) => "Cos",
            Self::Unary(Unary::Sin) => "Sin",
            Self::Unary(Unary::Sigmoid) => "Sigmoid",
            Self::Cast { .. } => "Cast",
            Self::Where => "Where",
            Self::MatMul => "MatMul",
            Self::Gemm { .. } => "Gemm",
            Self::Reshape => "Reshape",
            Self::Transpose { .. } => "Transpose",
            Self::Concat { .. } => "Concat",
            Self::Slice => "Slice",
            Self::Split { .. } => "Split",
            Self::Unsqueeze => "Unsqueeze",
            Self::Squeeze => "Squeeze",
            Self::Expand => "Expand",
            Self::Shape { .. } => "Shape",
            Self::Gather { .. } => "Gather",
            Self::Range => "Range",
            Self::Softmax { .. } => "Softmax",
            Self::RmsNormalization { .. } => "RMSNormalization",
            Self::RotaryEmbedding { .. } => "RotaryEmbedding",
            Self::Attention { .. } => "Attention",
            Self::GroupQueryAttention { .. } => "GroupQueryAttention",
        }
    }

    /// The operator's domain; empty for ONNX's own.
    pub fn domain(&self) -> &'static str {
        match self {
            Self::GroupQueryAttention { .. } => MICROSOFT_DOMAIN,
            _ => "",
        }
    }

    /// Attributes as name and value, in a fixed order.
    pub fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let int = |n: usize| Attribute::Int(n as i64);
        match self {
            Self::Cast { to } => vec![("to", Attribute::DType(*to))],
            Self::Gemm { trans_b } => vec![("transB", int(usize::from(*trans_b)))],
            Self::Transpose { perm } => {
                vec![(
                    "perm",
                    Attribute::Ints(perm.iter().map(|&p| p as i64).collect()),
                )]
            }
            Self::Concat { axis }
            | Self::Split { axis }
            | Self::Gather { axis }
            | Self::Softmax { axis } => vec![("axis", int(*axis))],
            Self::Shape { start, end } => vec![("start", int(*start)), ("end", int(*end))],
            Self::RmsNormalization { epsilon } => {
                vec![
                    ("axis", Attribute::Int(-1)),
                    ("epsilon", Attribute::Float(*epsilon)),
                ]
            }
            Self::RotaryEmbedding { heads } => {
                vec![("interleaved", int(0)), ("num_heads", int(*heads))]
            }
            Self::Attention { scale } => vec![("scale", Attribute::Float(*scale))],
            Self::GroupQueryAttention {
                heads,
                kv_heads,
                scale,
            } => vec![
                ("num_heads", int(*heads)),
                ("kv_num_heads", int(*kv_heads)),
                ("scale", Attribute::Float(*scale)),
            ],
            _ => vec![],
        }
    }
}

/// The value of an attribute as ONNX has it.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// One integer.
    Int(i64),
    /// One float.
    Float(f32),
    /// A list of integers.
    Ints(Vec<i64>),
    /// An element type.
    DType(DType),
}
