//! Element types of GGUF tensors and their conversion to f32.

use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file::qtensor_from_ggml},
};

use crate::{Dtype, Error, tensor::bytes_from_f32};

/// Numbers dequantised at once; bounds what candle allocates beside the result.
const CHUNK: usize = 1 << 20;

/// A GGUF element type that mlac reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q6K,
}

impl BlockType {
    pub(super) const KNOWN: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K";

    /// The type of a number in the file, or how the type that is not supported is called.
    pub(super) fn from_number(number: u32) -> Result<Self, String> {
        let name = match number {
            0 => return Ok(Self::F32),
            1 => return Ok(Self::F16),
            2 => return Ok(Self::Q4_0),
            3 => return Ok(Self::Q4_1),
            8 => return Ok(Self::Q8_0),
            12 => return Ok(Self::Q4K),
            14 => return Ok(Self::Q6K),
            30 => return Ok(Self::BF16),
            6 => "Q5_0",
            7 => "Q5_1",
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            13 => "Q5_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => "unknown",
        };
        Err(format!("type {number} ({name})"))
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// The dtype under which the tensor is handed out: its own, or F32 when it is quantised.
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    /// Whether the bytes in the file are not those of [`BlockType::dtype`].
    pub(super) fn is_quantised(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    fn candle(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::BF16 => GgmlDType::BF16,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Numbers in one block.
    pub(super) fn elements(self) -> usize {
        self.candle().block_size()
    }

    /// Bytes of one block.
    pub(super) fn bytes(self) -> usize {
        self.candle().type_size()
    }
}

/// The little-endian f32 bytes of whole quantised blocks; `subject` names the tensor in messages.
pub(super) fn dequantise(block: BlockType, stored: &[u8], subject: &str) -> Result<Vec<u8>, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::refusal(
            subject,
            format!("whole blocks of {}", block.name()),
            error.to_string(),
            "get the file again",
        )
    };
    let elements = stored.len() / block.bytes() * block.elements();
    let mut numbers = Vec::with_capacity(elements * Dtype::F32.size());
    for chunk in stored.chunks(CHUNK / block.elements() * block.bytes()) {
        let count = chunk.len() / block.bytes() * block.elements();
        let values = qtensor_from_ggml(block.candle(), chunk, vec![count], &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .and_then(|tensor| tensor.to_vec1::<f32>())
            .map_err(|error| failed(&error))?;
        numbers.extend(bytes_from_f32(Dtype::F32, &values).unwrap_or_default());
    }
    Ok(numbers)
}
