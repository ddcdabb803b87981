//! Where the numbers of an initializer come from.

use std::fmt;

use super::DType;

/// The numbers of an initializer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Initializer {
    /// A small constant kept inside the graph.
    Inline(InlineTensor),
    /// A tensor of a checkpoint, read when the graph is written.
    Weight(WeightRef),
}

/// A constant kept inside the graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InlineTensor {
    /// Element type.
    pub dtype: DType,
    /// Axis sizes; empty for a scalar.
    pub shape: Vec<usize>,
    /// Elements, row-major, little endian.
    pub bytes: Vec<u8>,
}

impl InlineTensor {
    /// A tensor of i64.
    pub fn i64(shape: &[usize], values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: DType::I64,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// A tensor of i32.
    pub fn i32(shape: &[usize], values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self {
            dtype: DType::I32,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// A scalar of [`DType::Bool`].
    pub fn bool(value: bool) -> Self {
        Self {
            dtype: DType::Bool,
            shape: vec![],
            bytes: vec![u8::from(value)],
        }
    }

    /// A tensor of `dtype`, which must be floating point, rounded from f32.
    pub fn float(dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        let bytes = match dtype {
            DType::F16 => values
                .iter()
                .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
                .collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// The elements, when they are i64.
    pub fn as_i64(&self) -> Option<Vec<i64>> {
        if self.dtype != DType::I64 {
            return None;
        }
        let word = |c: &[u8]| <[u8; 8]>::try_from(c).map(i64::from_le_bytes).ok();
        self.bytes.chunks(8).map(word).collect()
    }
}

/// A tensor of a checkpoint in the layout that the graph wants.
///
/// Two initializers with the same `name`, `source_shape`, `transform` and `dtype` share their bytes
/// in a written file even when `shape` views them differently.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightRef {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint, row-major.
    pub source_shape: Vec<usize>,
    /// How the checkpoint's elements are laid out in the graph.
    pub transform: Transform,
    /// Element type in the graph.
    pub dtype: DType,
    /// Shape in the graph, row-major; as many elements as the transform leaves.
    pub shape: Vec<usize>,
}

/// Layout change from the checkpoint to the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transform {
    /// The checkpoint's elements in their order.
    AsIs,
    /// The checkpoint's bytes (type U8) as elements of the graph's type, little endian.
    Bytes,
    /// [`Transform::Bytes`] that are exponents, of which 255 stands for NaN and is refused.
    Scales,
    /// `[out, in]` to `[in, out]`.
    Transpose2D,
    /// `kv_b_proj` `[H*(d_nope+d_v), r]` to the key half `W_UK` `[H, d_nope, r]`.
    KvBKey {
        /// Query heads, H.
        heads: usize,
        /// Rows of one head that make the key.
        d_nope: usize,
        /// Rows of one head that make the value.
        d_v: usize,
    },
    /// `kv_b_proj` `[H*(d_nope+d_v), r]` to the transposed value half `W_UV^T` `[H, r, d_v]`.
    KvBValue {
        /// Query heads, H.
        heads: usize,
        /// Rows of one head that make the key.
        d_nope: usize,
        /// Rows of one head that make the value.
        d_v: usize,
    },
    /// `q_rope_proj` `[H*d_r, d]` to `[H, d, d_r]`: one transposed matrix per head.
    HeadTranspose {
        /// Query heads, H.
        heads: usize,
    },
}

impl WeightRef {
    /// Elements after the transform, or why the transform does not apply to the source shape.
    pub fn elements(&self) -> Result<usize, String> {
        let source = &self.source_shape;
        let count = source.iter().product::<usize>();
        let two = |what: &str| match source.as_slice() {
            [rows, cols] => Ok((*rows, *cols)),
            _ => Err(format!(
                "{what} takes 2 axes, the tensor has shape {source:?}"
            )),
        };
        match self.transform {
            Transform::AsIs => Ok(count),
            Transform::Bytes | Transform::Scales => {
                let size = self.dtype.size();
                if count % size == 0 {
                    Ok(count / size)
                } else {
                    Err(format!("{count} bytes do not fill elements of {size}"))
                }
            }
            Transform::Transpose2D => two("a transpose").map(|_| count),
            Transform::KvBKey { heads, d_nope, d_v }
            | Transform::KvBValue { heads, d_nope, d_v } => {
                let (rows, rank) = two("the split of kv_b_proj")?;
                if rows != heads * (d_nope + d_v) {
                    return Err(format!(
                        "kv_b_proj has {rows} rows, {heads} heads of {d_nope} + {d_v} need {}",
                        heads * (d_nope + d_v)
                    ));
                }
                let is_key = matches!(self.transform, Transform::KvBKey { .. });
                Ok(heads * rank * if is_key { d_nope } else { d_v })
            }
            Transform::HeadTranspose { heads } => {
                let (rows, _) = two("a transpose per head")?;
                if heads == 0 || rows % heads != 0 {
                    return Err(format!("{rows} rows do not split into {heads} heads"));
                }
                Ok(count)
            }
        }
    }

    /// Bytes in a file.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }

    /// What the bytes in a file depend on.
    pub fn content_key(&self) -> (&str, &[usize], Transform, DType) {
        (&self.name, &self.source_shape, self.transform, self.dtype)
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AsIs => f.write_str("as is"),
            Self::Bytes => f.write_str("bytes"),
            Self::Scales => f.write_str("scale bytes"),
            Self::Transpose2D => f.write_str("transposed"),
            Self::KvBKey { heads, d_nope, d_v } => {
                write!(f, "key rows of {heads} x ({d_nope} + {d_v})")
            }
            Self::KvBValue { heads, d_nope, d_v } => {
                write!(f, "transposed value rows of {heads} x ({d_nope} + {d_v})")
            }
            Self::HeadTranspose { heads } => write!(f, "transposed in each of {heads} heads"),
        }
    }
}
