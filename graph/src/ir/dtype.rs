//! Element types.

use std::fmt;

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// One byte, 0 or 1.
    Bool,
    /// The upper half of IEEE single precision; stored and cast; only `mlac::Linear16` computes with it.
    BF16,
    /// One byte without a sign.
    U8,
    /// Two bytes without a sign.
    U16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::U16 => 2,
            Self::I64 => 8,
            Self::Bool | Self::U8 => 1,
        }
    }

    /// Whether the type is floating point and operators compute in it.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16)
    }

    /// Whether the type is an integer that operators compute with (not [`DType::Bool`]).
    pub fn is_integer(self) -> bool {
        matches!(self, Self::I64 | Self::I32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::Bool => "bool",
            Self::BF16 => "bf16",
            Self::U8 => "u8",
            Self::U16 => "u16",
        })
    }
}
