//! Element types, tensor descriptions, and conversion of stored bytes to and from f32.
//!
//! Stored data is little-endian and row-major, as safetensors has it.

use std::fmt;

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::{Error, Refusal};

/// Half-precision numbers converted at once.
const BLOCK: usize = 1024;

/// Type of one stored element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE 754 double.
    F64,
    /// IEEE 754 single.
    F32,
    /// IEEE 754 half.
    F16,
    /// Upper half of an IEEE 754 single.
    BF16,
    /// 8-bit float, 4 exponent bits.
    F8E4M3,
    /// 8-bit float, 5 exponent bits.
    F8E5M2,
    /// 8-bit power of two.
    F8E8M0,
    /// Signed, 64 bits.
    I64,
    /// Signed, 32 bits.
    I32,
    /// Signed, 16 bits.
    I16,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 64 bits.
    U64,
    /// Unsigned, 32 bits.
    U32,
    /// Unsigned, 16 bits.
    U16,
    /// Unsigned, 8 bits.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    /// Every type, with the name safetensors gives it.
    const NAMES: [(Dtype, &'static str); 16] = [
        (Dtype::F64, "F64"),
        (Dtype::F32, "F32"),
        (Dtype::F16, "F16"),
        (Dtype::BF16, "BF16"),
        (Dtype::F8E4M3, "F8_E4M3"),
        (Dtype::F8E5M2, "F8_E5M2"),
        (Dtype::F8E8M0, "F8_E8M0"),
        (Dtype::I64, "I64"),
        (Dtype::I32, "I32"),
        (Dtype::I16, "I16"),
        (Dtype::I8, "I8"),
        (Dtype::U64, "U64"),
        (Dtype::U32, "U32"),
        (Dtype::U16, "U16"),
        (Dtype::U8, "U8"),
        (Dtype::Bool, "BOOL"),
    ];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Whether elements are floating-point numbers.
    pub fn is_float(self) -> bool {
        matches!(
            self,
            Self::F64
                | Self::F32
                | Self::F16
                | Self::BF16
                | Self::F8E4M3
                | Self::F8E5M2
                | Self::F8E8M0
        )
    }

    /// Whether [`f32_from_bytes`] reads the type: F32, F16 and BF16.
    pub fn is_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name safetensors gives the type.
    pub fn safetensors_name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(dtype, _)| *dtype == self)
            .map_or("", |(_, name)| name)
    }

    /// The type safetensors gives this name, if mlac knows it.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(dtype, _)| *dtype)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.safetensors_name())
    }
}

/// Name, element type and shape of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, as Hugging Face has it.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each axis, slowest first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// A description from its parts.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// Number of elements, `None` when it does not fit in `usize`.
    pub fn element_count(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
    }

    /// Bytes of the stored tensor; refused when the number does not fit in `usize`.
    pub fn byte_len(&self) -> Result<usize, Error> {
        self.element_count()
            .and_then(|count| count.checked_mul(self.dtype.size()))
            .ok_or_else(|| {
                Error::refusal(
                    format!("tensor {}", self.name),
                    "a shape whose bytes can be counted",
                    format!("{} {}", self.dtype, shape_text(&self.shape)),
                    "the file is damaged: get it again",
                )
            })
    }
}

/// A shape as it is written in messages: `[2, 3]`.
pub fn shape_text(shape: &[usize]) -> String {
    let extents: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("[{}]", extents.join(", "))
}

/// Numbers from stored little-endian bytes of an F32, F16 or BF16 tensor; `None` for other types
/// and for a length that is not a whole number of elements.
pub fn f32_from_bytes(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    if !dtype.is_weight() || !bytes.len().is_multiple_of(dtype.size()) {
        return None;
    }
    let mut numbers = vec![0.0; bytes.len() / dtype.size()];
    f32_into(dtype, bytes, &mut numbers);
    Some(numbers)
}

/// [`f32_from_bytes`] into numbers that are there already, as many as the bytes hold; does nothing
/// for other types.
pub(crate) fn f32_into(dtype: Dtype, bytes: &[u8], numbers: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (number, &stored) in numbers.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *number = f32::from_le_bytes(stored);
            }
        }
        Dtype::F16 => {
            // In blocks: half looks for the processor's conversion instructions once a call.
            let mut block = [f16::ZERO; BLOCK];
            for (numbers, bytes) in numbers.chunks_mut(BLOCK).zip(bytes.chunks(2 * BLOCK)) {
                let halves = &mut block[..numbers.len()];
                for (half, &stored) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *half = f16::from_le_bytes(stored);
                }
                halves.convert_to_f32_slice(numbers);
            }
        }
        Dtype::BF16 => {
            for (number, &stored) in numbers.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *number = bf16::from_le_bytes(stored).to_f32();
            }
        }
        _ => {}
    }
}

/// Stored little-endian bytes of numbers as F32, F16 or BF16 (round to nearest even); `None` for
/// other types.
pub fn bytes_from_f32(dtype: Dtype, numbers: &[f32]) -> Option<Vec<u8>> {
    match dtype {
        Dtype::F32 => Some(stored(numbers, |x| x.to_le_bytes())),
        Dtype::F16 => {
            let mut bytes = Vec::with_capacity(2 * numbers.len());
            let mut block = [f16::ZERO; BLOCK];
            for numbers in numbers.chunks(BLOCK) {
                let halves = &mut block[..numbers.len()];
                halves.convert_from_f32_slice(numbers);
                bytes.extend(stored(halves, |half| half.to_le_bytes()));
            }
            Some(bytes)
        }
        Dtype::BF16 => Some(stored(numbers, |&x| bf16::from_f32(x).to_le_bytes())),
        _ => None,
    }
}

fn stored<T, const N: usize>(numbers: &[T], bytes_of: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; N * numbers.len()];
    for (place, number) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(numbers) {
        *place = bytes_of(number);
    }
    bytes
}

/// Refuses a tensor with a NaN or an infinity, naming the first one's coordinates.
pub fn check_finite(subject: &str, shape: &[usize], numbers: &[f32]) -> Result<(), Refusal> {
    check_finite_from(subject, shape, 0, numbers)
}

/// [`check_finite`] for a part of a tensor that begins at the element `first`.
pub(crate) fn check_finite_from(
    subject: &str,
    shape: &[usize],
    first: usize,
    numbers: &[f32],
) -> Result<(), Refusal> {
    // Summing `x * 0` is NaN exactly when some x is NaN or infinite, and it vectorises.
    let suspicious = numbers.chunks(4096).position(|block| {
        let mut lanes = [0.0_f32; 16];
        let (wide, rest) = block.as_chunks::<16>();
        for values in wide {
            for (lane, x) in lanes.iter_mut().zip(values) {
                *lane += x * 0.0;
            }
        }
        lanes.iter().chain(rest).any(|x| !x.is_finite())
    });
    let Some(block) = suspicious else {
        return Ok(());
    };
    let found = numbers
        .iter()
        .copied()
        .enumerate()
        .skip(block * 4096)
        .find(|(_, x)| !x.is_finite());
    match found {
        Some((at, value)) => Err(not_finite(subject, shape, first + at, value)),
        None => Ok(()),
    }
}

/// Refuses stored F32, F16 or BF16 elements that are NaN or infinite; other types are not looked
/// into. `bytes` is a part of the tensor `info` that begins at the element `first`.
pub fn check_finite_bytes(
    subject: &str,
    info: &TensorInfo,
    first: usize,
    bytes: &[u8],
) -> Result<(), Refusal> {
    let size = info.dtype.size();
    for (at, block) in bytes.chunks(4096).enumerate() {
        if !suspicious_bytes(info.dtype, block) {
            continue;
        }
        for (in_block, element) in block.chunks_exact(size).enumerate() {
            let mut value = [0.0];
            f32_into(info.dtype, element, &mut value);
            if !value[0].is_finite() {
                let flat = first + at * 4096 / size + in_block;
                return Err(not_finite(subject, &info.shape, flat, value[0]));
            }
        }
    }
    Ok(())
}

/// Whether the exponent of some element is all ones. Whole numbers that grow vectorise.
fn suspicious_bytes(dtype: Dtype, bytes: &[u8]) -> bool {
    let halves = |mask: i16| {
        let elements = bytes.as_chunks::<2>().0.iter();
        elements.fold(0, |most, &b| most.max(i16::from_le_bytes(b) & mask)) == mask
    };
    match dtype {
        Dtype::F16 => halves(0x7c00),
        Dtype::BF16 => halves(0x7f80),
        Dtype::F32 => {
            let elements = bytes.as_chunks::<4>().0.iter();
            let mask = 0x7f80_0000;
            elements.fold(0, |most, &b| most.max(i32::from_le_bytes(b) & mask)) == mask
        }
        _ => false,
    }
}

fn not_finite(subject: &str, shape: &[usize], mut flat: usize, value: f32) -> Refusal {
    let mut index = vec![0; shape.len()];
    for (coordinate, &extent) in index.iter_mut().zip(shape).rev() {
        *coordinate = flat % extent;
        flat /= extent;
    }
    Refusal::new(
        subject,
        "finite numbers",
        format!("{value} at {}", shape_text(&index)),
        "the weights are damaged: get the checkpoint again or retrain from the last good one",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for (dtype, name) in Dtype::NAMES {
            assert_eq!(dtype.safetensors_name(), name);
            assert_eq!(Dtype::from_safetensors_name(name), Some(dtype));
        }
        assert_eq!(Dtype::from_safetensors_name("F4"), None);
    }

    #[test]
    fn byte_len_refuses_overflow() {
        let info = TensorInfo::new("w", Dtype::F32, [usize::MAX / 2, 3]);
        let message = info.byte_len().unwrap_err().to_string();
        assert!(message.contains("tensor w"), "{message}");
        assert_eq!(
            TensorInfo::new("w", Dtype::BF16, [3, 5])
                .byte_len()
                .unwrap(),
            30
        );
        assert_eq!(TensorInfo::new("w", Dtype::BF16, []).byte_len().unwrap(), 2);
    }

    #[test]
    fn every_half_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            for dtype in [Dtype::F16, Dtype::BF16] {
                let wide = f32_from_bytes(dtype, &bits.to_le_bytes()).unwrap();
                if wide[0].is_nan() {
                    continue;
                }
                assert_eq!(bytes_from_f32(dtype, &wide).unwrap(), bits.to_le_bytes());
            }
        }
    }

    #[test]
    fn blocks_join_without_a_seam() {
        // Whole numbers below 256 are exact in all three types.
        let numbers: Vec<f32> = (0..2500).map(|at| (at % 251) as f32).collect();
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let bytes = bytes_from_f32(dtype, &numbers).unwrap();
            assert_eq!(bytes.len(), 2500 * dtype.size());
            assert!(f32_from_bytes(dtype, &bytes).unwrap() == numbers, "{dtype}");
        }
    }

    #[test]
    fn odd_lengths_and_other_types_are_not_numbers() {
        assert_eq!(f32_from_bytes(Dtype::F32, &[0; 6]), None);
        assert_eq!(f32_from_bytes(Dtype::I32, &[0; 8]), None);
        assert_eq!(bytes_from_f32(Dtype::U8, &[1.0]), None);
    }

    #[test]
    fn first_bad_number_is_named_by_its_coordinates() {
        let shape = [100, 123];
        for (at, bad) in [
            (0, f32::NAN),
            (8191, f32::INFINITY),
            (12299, f32::NEG_INFINITY),
        ] {
            let mut numbers = vec![1.5_f32; 12300];
            assert_eq!(check_finite("t", &shape, &numbers), Ok(()));
            numbers[at] = bad;
            let refusal = check_finite("t", &shape, &numbers).unwrap_err();
            assert_eq!(
                refusal.found,
                format!("{bad} at [{}, {}]", at / 123, at % 123)
            );
        }
    }

    #[test]
    fn stored_bad_numbers_are_found_wherever_they_are() {
        let bad: [(Dtype, &[u8]); 6] = [
            (Dtype::F32, &[0, 0, 0x80, 0x7f]),
            (Dtype::F32, &[1, 0, 0x80, 0xff]),
            (Dtype::F16, &[0, 0x7c]),
            (Dtype::F16, &[0xff, 0xff]),
            (Dtype::BF16, &[0x80, 0xff]),
            (Dtype::BF16, &[0x81, 0x7f]),
        ];
        for (dtype, bits) in bad {
            // The largest finite numbers all around.
            let largest: &[u8] = match dtype {
                Dtype::F32 => &[0xff, 0xff, 0x7f, 0x7f],
                Dtype::F16 => &[0xff, 0xfb],
                _ => &[0x7f, 0xff],
            };
            let info = TensorInfo::new("t", dtype, [100, 123]);
            let part = largest.repeat(6000);
            assert_eq!(check_finite_bytes("t", &info, 0, &part), Ok(()));
            for at in [0, 1023, 1024, 2048, 5999] {
                let mut part = part.clone();
                part[at * bits.len()..][..bits.len()].copy_from_slice(bits);
                let refusal = check_finite_bytes("t", &info, 246, &part).unwrap_err();
                let place = format!(" at [{}, {}]", 2 + at / 123, at % 123);
                assert!(refusal.found.ends_with(&place), "{} {place}", refusal.found);
            }
        }
        let bytes = TensorInfo::new("t", Dtype::U8, [4]);
        assert_eq!(check_finite_bytes("t", &bytes, 0, &[0xff; 4]), Ok(()));
    }
}
