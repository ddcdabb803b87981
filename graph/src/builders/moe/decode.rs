//! MXFP4 in standard operators: by tables of numbers, or by arithmetic on words where there are no tables of bytes.

use mlac_model::mxfp4::{self, BLOCK, FP4};

use super::{Matrix, SUM_DTYPE, gather};
use crate::{
    error::NodeError,
    ir::{Binary, Compare, DType, Dim, GraphBuilder, InlineTensor, Op, Unary, ValueId},
};

/// Constant tables of the decoders, built once.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    /// f32 `[65536, 4]`: the numbers of two bytes.
    pub(super) quads: ValueId,
    /// f32 `[256]`: what a scale byte means.
    pub(super) scales: ValueId,
}

impl Tables {
    /// `built` is the large one, once it is built.
    pub(super) fn of(b: &mut GraphBuilder, built: &mut Option<ValueId>) -> Result<Self, NodeError> {
        let quads = match *built {
            Some(quads) => quads,
            None => b.top_level(|b| b.scope("fp4", quads))?,
        };
        *built = Some(quads);
        // A scale that is NaN is refused when the checkpoint's bytes are written.
        let scales: Vec<f32> = (0..=255)
            .map(|byte| mxfp4::scale(byte).unwrap_or(f32::NAN))
            .collect();
        let scales = b.constant(InlineTensor::float(DType::F32, &[256], &scales));
        Ok(Self { quads, scales })
    }
}

/// f32 `[65536, 4]`, from the table of one byte: a lookup costs the same for two numbers as for four.
pub(super) fn quads(b: &mut GraphBuilder) -> Result<ValueId, NodeError> {
    let pairs: Vec<f32> = (0..256)
        .flat_map(|byte| [FP4[byte % 16], FP4[byte / 16]])
        .collect();
    let pairs = b.constant(InlineTensor::float(DType::F32, &[256, 2], &pairs));
    let all = [256.into(), 256.into(), 2.into()];
    let low = b.unsqueeze("low_byte", pairs, &[0])?;
    let low = b.expand("low_bytes", low, &all)?;
    let high = b.unsqueeze("high_byte", pairs, &[1])?;
    let high = b.expand("high_bytes", high, &all)?;
    let quads = b.concat("both_bytes", &[low, high], 2)?;
    b.reshape("quads", quads, &[65536.into(), 4.into()])
}

/// One expert's matrix `[out, in]` in f32, from blocks u16 `[out, in/4]` and scales u8 `[out, in/32]`.
///
/// One lookup for two bytes. To decode 16.6 M numbers and multiply them by one token, ONNX Runtime 1.31 takes on
/// one core 51 ms so, 82 ms with a lookup for each byte, 71 ms with int8 lookups and `DequantizeLinear`, and 42 ms
/// with u8 arithmetic on both halves of a byte: 40 nodes that few other runtimes have kernels for.
pub(super) fn decode_by_table(
    b: &mut GraphBuilder,
    tables: Tables,
    size: &Matrix,
    blocks: ValueId,
    scales: ValueId,
) -> Result<ValueId, NodeError> {
    let (out, count) = (size.out.into(), (size.input / BLOCK).into());
    let codes = b.cast("codes", blocks, DType::I32)?;
    let numbers = gather(b, "numbers", tables.quads, codes)?;
    let numbers = b.reshape("blocks", numbers, &[out, count, BLOCK.into()])?;
    let scales = b.cast("scale_codes", scales, DType::I32)?;
    let scales = gather(b, "scales", tables.scales, scales)?;
    let scales = b.unsqueeze("scale_columns", scales, &[2])?;
    let numbers = b.mul("scaled", numbers, scales)?;
    b.reshape("matrix", numbers, &[size.out.into(), size.input.into()])
}

/// Matrices `[lead.., out, in]` of `dtype`, from blocks i32 `[lead.., out, in/8]` and scales i32
/// `[lead.., out*in/128]`, by arithmetic on words.
pub(super) fn decode_words(
    b: &mut GraphBuilder,
    table: ValueId,
    lead: &[Dim],
    size: &Matrix,
    blocks: ValueId,
    scales: ValueId,
    dtype: DType,
) -> Result<ValueId, NodeError> {
    let blocks_of = |last: usize| {
        let mut shape = lead.to_vec();
        shape.extend([size.out.into(), (size.input / BLOCK).into(), last.into()]);
        shape
    };
    let codes = b.scope("blocks", |b| digits(b, blocks, 8))?;
    let numbers = b.scope("numbers", |b| fp4(b, codes))?;
    let numbers = b.reshape("blocks", numbers, &blocks_of(BLOCK))?;
    let codes = b.scope("scales", |b| digits(b, scales, 4))?;
    let scales = gather(b, "scales", table, codes)?;
    let scales = b.reshape("scale_columns", scales, &blocks_of(1))?;
    let numbers = b.mul("scaled", numbers, scales)?;
    let numbers = b.cast("scaled_cast", numbers, dtype)?;
    let mut shape = lead.to_vec();
    shape.extend([size.out.into(), size.input.into()]);
    b.reshape("matrix", numbers, &shape)
}

/// The `count` digits of every word of `words [..]`, lowest first: i32 `[.., count]`. The word's sign is
/// the top bit of its last digit; with that cleared, quotients and remainders are of numbers that
/// are not negative, on whose rounding all runtimes agree.
fn digits(b: &mut GraphBuilder, words: ValueId, count: usize) -> Result<ValueId, NodeError> {
    let bits = 32 / count;
    let int = |b: &mut GraphBuilder, x: i32| b.constant(InlineTensor::i32(&[], &[x]));
    let rank = b.ty(words).rank() as i64;
    let words = b.unsqueeze("words", words, &[rank])?;
    let zero = int(b, 0);
    let lowest = int(b, i32::MIN);
    let negative = b.compare("negative", Compare::Greater, zero, words)?;
    let cleared = b.sub("cleared", words, lowest)?;
    let words = b.node("positive", Op::Where, &[negative, cleared, words])?;
    let steps: Vec<i32> = (0..count).map(|i| 1 << (i * bits)).collect();
    let steps = b.constant(InlineTensor::i32(&[count], &steps));
    let quotients = b.node("quotients", Op::Binary(Binary::Div), &[words, steps])?;
    let base = int(b, 1 << bits);
    let digits = b.node("remainders", Op::Binary(Binary::Mod), &[quotients, base])?;
    let mut top = vec![0; count];
    top[count - 1] = 1 << (bits - 1);
    let top = b.constant(InlineTensor::i32(&[count], &top));
    let top = b.node("top_bit", Op::Where, &[negative, top, zero])?;
    b.add("digits", digits, top)
}

/// FP4 numbers of codes 0 to 15 in f32. With `n` the low 3 bits, the magnitude is `max(n/2, n - 2, 2n - 8)`.
fn fp4(b: &mut GraphBuilder, codes: ValueId) -> Result<ValueId, NodeError> {
    let eight = b.constant(InlineTensor::i32(&[], &[8]));
    let seven = b.constant(InlineTensor::i32(&[], &[7]));
    let negative = b.compare("negative", Compare::Greater, codes, seven)?;
    let low = b.node("low", Op::Binary(Binary::Mod), &[codes, eight])?;
    let n = b.cast("n", low, SUM_DTYPE)?;
    let scalar =
        |b: &mut GraphBuilder, x: f32| b.constant(InlineTensor::float(SUM_DTYPE, &[], &[x]));
    let (two, eight) = (scalar(b, 2.0), scalar(b, 8.0));
    let half = b.scale("half", n, 0.5)?;
    let less = b.sub("less", n, two)?;
    let twice = b.mul("twice", n, two)?;
    let twice = b.sub("twice_less", twice, eight)?;
    let size = b.node("larger", Op::Binary(Binary::Max), &[half, less])?;
    let size = b.node("largest", Op::Binary(Binary::Max), &[size, twice])?;
    let minus = b.unary("minus", Unary::Neg, size)?;
    b.node("number", Op::Where, &[negative, minus, size])
}
