//! The operators a graph may hold, each with its attributes in Rust types.
//!
//! Only what the builders use is here; semantics are ONNX's, opset 23, unless a domain is given.

use std::sync::Arc;

use super::{DType, Graph};

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
    /// `data, starts, ends, axes`: a range along each listed axis, step 1; an end of `i64::MAX` is
    /// the end of the axis.
    Slice,
    /// ONNX's `Slice` with `data, [-n], [i64::MAX], [axis]`: the last `n` rows along an axis, all when
    /// there are fewer.
    Tail {
        /// Symbol of how many there are, `min(n, size)`.
        size: Arc<str>,
    },
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
    /// `data, indices [n, q]` (i64): the slices `data[indices[i, 0], .., indices[i, q-1]]`.
    GatherNd,
    /// `data, indices [n, 1]` (i64), `updates [n, ..]`: `data` with each update added to its slice.
    ScatterAdd,
    /// `x, [k]`: the `k` largest along the last axis, in falling order, and their indices.
    TopK,
    /// The distinct elements of an integer tensor, rising, with one axis.
    Unique {
        /// Symbol of how many there are; no other node's.
        size: Arc<str>,
    },
    /// Indices of what is not zero, `[rank, size]`, i64; the first axis varies slowest.
    NonZero {
        /// Symbol of how many there are; no other node's.
        size: Arc<str>,
    },
    /// Sum over the axes of a second input, which stay with size 1.
    ReduceSum,
    /// The input.
    Identity,
    /// `trips (i64 scalar), -, carried.., captured..`: runs `body` `trips` times, feeds what one run gives
    /// to the next and gives what the last one gave.
    ///
    /// The body's inputs are the run's number (i64 scalar), a bool scalar, the carried and the captured
    /// values; its outputs a bool scalar (go on) and the carried values. A body has no weights
    /// of its own: they are captured. In ONNX a body sees outer values by name; here every one is listed.
    Loop {
        /// What is run.
        body: Arc<Graph>,
        /// How many values are carried.
        carried: usize,
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
    /// [batch, 1, seq, total], sinks [H]` (the last two optional) gives `[batch, seq, H*d]` and the present keys and values.
    GroupQueryAttention {
        /// Query heads, H.
        heads: usize,
        /// KV heads, G.
        kv_heads: usize,
        /// Factor on the scores.
        scale: f32,
    },
    /// `mlac::LatentAttention`, as `docs/latent-attention.md` specifies it: `query [batch, seq, H, r + d_r], new_rows
    /// [batch, seq, r + d_r], cache [batch, capacity, r + d_r], past_lengths [batch] i32, -, sinks [H] f32, -, key_mask
    /// [batch, slots] i64` (the last four optional; paged caches and tree masks are not built here) gives the sums
    /// `[batch, seq, H, r]` and the cache with the new rows, in place where the caller binds it so.
    LatentAttention {
        /// `r`.
        kv_lora_rank: usize,
        /// Factor on the scores.
        scale: f32,
        /// How many positions a token sees, itself counted.
        sliding_window: Option<usize>,
        /// For `TensorRT`'s parser: a plugin, whose optional inputs are packed; bit `i` says that input `4 + i` is there.
        plugin: Option<u8>,
        /// For ONNX Runtime's CUDA execution provider: cubins with their recipes.
        kernels: Option<Arc<[u8]>>,
    },
    /// `mlac::Mxfp4Experts`, as `docs/mxfp4-experts.md` specifies it: `hidden [tokens.., D] f32, experts [tokens.., K] i64,
    /// weights [tokens.., K] f32`, then blocks, scales (u8) and bias (f32) of gate and up `[E, 2 I, D]` and of down
    /// `[E, D, I]`, gives the weighted sums of the chosen experts, `[tokens.., D] f32`.
    Mxfp4Experts {
        /// Limit of gate and up.
        swiglu_limit: f32,
        /// Steepness of the gate's sigmoid.
        swiglu_alpha: f32,
    },
    /// `mlac::Linear16`, as `docs/linear16.md` specifies it: `x [tokens.., in] f32, weight [out, in]` (bf16 or f16), `bias [out]
    /// f32` (optional) gives `[tokens.., out] f32`.
    Linear16,
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
    /// Quotient; of integers, rounded to zero.
    Div,
    /// Remainder of integers that are not negative.
    Mod,
    /// The smaller one.
    Min,
    /// The larger one.
    Max,
}

/// Comparison of two tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// `a <= b`.
    LessOrEqual,
    /// `a > b`.
    Greater,
    /// `a == b`.
    Equal,
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

/// mlac's own operator domain, `docs/latent-attention.md`, `docs/mxfp4-experts.md` and `docs/linear16.md`.
pub const MLAC_DOMAIN: &str = "mlac";

impl Op {
    /// ONNX's name of the operator.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Binary(Binary::Add) => "Add",
            Self::Binary(Binary::Sub) => "Sub",
            Self::Binary(Binary::Mul) => "Mul",
            Self::Binary(Binary::Div) => "Div",
            Self::Binary(Binary::Mod) => "Mod",
            Self::Binary(Binary::Min) => "Min",
            Self::Binary(Binary::Max) => "Max",
            Self::Compare(Compare::Equal) => "Equal",
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
            Self::Slice | Self::Tail { .. } => "Slice",
            Self::Split { .. } => "Split",
            Self::Unsqueeze => "Unsqueeze",
            Self::Squeeze => "Squeeze",
            Self::Expand => "Expand",
            Self::Shape { .. } => "Shape",
            Self::Gather { .. } => "Gather",
            Self::GatherNd => "GatherND",
            Self::ScatterAdd => "ScatterND",
            Self::TopK => "TopK",
            Self::Unique { .. } => "Unique",
            Self::NonZero { .. } => "NonZero",
            Self::ReduceSum => "ReduceSum",
            Self::Identity => "Identity",
            Self::Loop { .. } => "Loop",
            Self::Range => "Range",
            Self::Softmax { .. } => "Softmax",
            Self::RmsNormalization { .. } => "RMSNormalization",
            Self::RotaryEmbedding { .. } => "RotaryEmbedding",
            Self::Attention { .. } => "Attention",
            Self::GroupQueryAttention { .. } => "GroupQueryAttention",
            Self::LatentAttention { .. } => "LatentAttention",
            Self::Mxfp4Experts { .. } => "Mxfp4Experts",
            Self::Linear16 => "Linear16",
        }
    }

    /// The operator's domain; empty for ONNX's own.
    pub fn domain(&self) -> &'static str {
        match self {
            Self::GroupQueryAttention { .. } => MICROSOFT_DOMAIN,
            Self::LatentAttention { .. } | Self::Mxfp4Experts { .. } | Self::Linear16 => {
                MLAC_DOMAIN
            }
            _ => "",
        }
    }

    /// The symbol that the operator brings into the shapes that follow.
    pub fn introduces(&self) -> Option<&str> {
        match self {
            Self::Tail { size } | Self::Unique { size } | Self::NonZero { size } => Some(size),
            _ => None,
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
            Self::ScatterAdd => vec![("reduction", Attribute::Text("add"))],
            Self::TopK => vec![
                ("axis", Attribute::Int(-1)),
                ("largest", int(1)),
                ("sorted", int(1)),
            ],
            Self::Unique { .. } => vec![("sorted", int(1))],
            Self::ReduceSum => vec![("keepdims", int(1))],
            Self::Loop { body, .. } => vec![("body", Attribute::Graph(body.clone()))],
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
            Self::LatentAttention {
                kv_lora_rank,
                scale,
                sliding_window,
                plugin,
                kernels,
            } => {
                let mut attributes = vec![
                    ("kv_lora_rank", int(*kv_lora_rank)),
                    ("scale", Attribute::Float(*scale)),
                    ("sliding_window", int(sliding_window.unwrap_or(0))),
                ];
                if let Some(optional) = plugin {
                    attributes.extend([
                        ("plugin_version", Attribute::Text("1")),
                        ("plugin_namespace", Attribute::Text(MLAC_DOMAIN)),
                        ("optional_inputs", Attribute::Int(i64::from(*optional))),
                        ("with_lse", int(0)),
                    ]);
                }
                if let Some(kernels) = kernels {
                    attributes.push(("kernels", Attribute::Bytes(kernels.clone())));
                }
                attributes
            }
            Self::Mxfp4Experts {
                swiglu_limit,
                swiglu_alpha,
            } => vec![
                ("swiglu_limit", Attribute::Float(*swiglu_limit)),
                ("swiglu_alpha", Attribute::Float(*swiglu_alpha)),
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
    /// A word.
    Text(&'static str),
    /// Bytes, which ONNX takes for a string.
    Bytes(Arc<[u8]>),
    /// A graph.
    Graph(Arc<Graph>),
}
