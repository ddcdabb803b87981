//! Rows of an MXFP4 matrix times the numbers of some tokens, for each width of vectors.
//!
//! A lane takes a word of 32 bits, eight numbers of a row, and a table lookup in a register makes f32 of the same number of
//! every lane's word: nothing is decoded to memory. The tokens' numbers are arranged once so that they meet the lanes.
//! Four lanes hold a block; its scale, a power of two, is multiplied into the block's sum, which is exact.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};
use crate::{
    products::Isa,
    refusal::{Refusal, refuse},
};

/// Numbers that share a scale.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a block.
pub(crate) const BLOCK_BYTES: usize = BLOCK / 2;
/// Numbers in a word, the first in its lowest bits.
const PER_WORD: usize = 8;
/// Words, and so lanes, of a block.
const BLOCK_WORDS: usize = BLOCK / PER_WORD;
/// Rows of a task and of a matrix are multiples of this.
pub(crate) const ROW_STEP: usize = 4;
/// How far ahead of the rows that are read others are fetched, in bytes.
const AHEAD: usize = 12288;
/// Tokens that share a lookup at most.
const TOKENS: usize = 6;

/// One expert's matrix `[rows, columns]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    /// `[rows, columns / 32, 16]`.
    pub(crate) blocks: &'a [u8],
    /// `[rows, columns / 32]`.
    pub(crate) scales: &'a [u8],
    pub(crate) columns: usize,
}

/// Numbers of tokens as the lanes meet them: `[chunks, tokens, 8, lanes]`, where number `l * 8 + j` of a chunk is at
/// `[j, l]`, and what is missing in the last chunk is zero.
pub(crate) struct Operand {
    pub(crate) numbers: Vec<f32>,
    pub(crate) tokens: usize,
    lanes: usize,
}

impl Operand {
    /// Zeros for `columns` numbers of each token.
    pub(crate) fn zeros(tokens: usize, columns: usize, lanes: usize) -> Self {
        let chunks = columns.div_ceil(PER_WORD * lanes);
        Self {
            numbers: vec![0.0; chunks * tokens * PER_WORD * lanes],
            tokens,
            lanes,
        }
    }

    /// Numbers of one token in a chunk.
    pub(crate) fn chunk(&self) -> usize {
        PER_WORD * self.lanes
    }

    /// The numbers of each token, side by side.
    pub(crate) fn of<'a>(
        tokens: impl ExactSizeIterator<Item = &'a [f32]>,
        columns: usize,
        lanes: usize,
    ) -> Self {
        let mut operand = Self::zeros(tokens.len(), columns, lanes);
        let (count, chunk) = (operand.tokens, operand.chunk());
        for (token, numbers) in tokens.enumerate() {
            for (c, part) in numbers.chunks(chunk).enumerate() {
                let to = &mut operand.numbers[(c * count + token) * chunk..][..chunk];
                for (at, &x) in part.iter().enumerate() {
                    to[place(at, lanes)] = x;
                }
            }
        }
        operand
    }
}

/// Where number `at` of a chunk is.
pub(crate) fn place(at: usize, lanes: usize) -> usize {
    at % PER_WORD * lanes + at / PER_WORD
}

/// The product for one width of vectors.
#[derive(Clone, Copy)]
pub(crate) struct RowProducts {
    /// Numbers in a vector, as the operand has them.
    pub(crate) lanes: usize,
    rows: unsafe fn(&Matrix<'_>, Range<usize>, &Operand, &mut [f32]),
}

impl RowProducts {
    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::PRODUCTS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::PRODUCTS,
            _ => portable::PRODUCTS,
        }
    }

    /// `out [tokens, rows] = ` rows of the matrix times every token's numbers.
    pub(crate) fn rows(
        &self,
        matrix: &Matrix<'_>,
        rows: Range<usize>,
        operand: &Operand,
        out: &mut [f32],
    ) {
        let blocks = matrix.columns / BLOCK;
        let chunks = matrix.columns.div_ceil(operand.chunk());
        assert!(
            rows.start <= rows.end
                && rows.len().is_multiple_of(ROW_STEP)
                && matrix.columns.is_multiple_of(BLOCK)
                && matrix.scales.len() >= rows.end * blocks
                && matrix.blocks.len() >= rows.end * blocks * BLOCK_BYTES
                && operand.lanes == self.lanes
                && operand.numbers.len() == chunks * operand.tokens * operand.chunk()
                && out.len() == operand.tokens * rows.len(),
            "operands of a product"
        );
        // SAFETY: the lengths were checked, and the width is of this CPU (`Isa::available`).
        unsafe { (self.rows)(matrix, rows, operand, out) }
    }
}

/// Refuses sizes that do not fill blocks.
pub(crate) fn whole_blocks(name: &str, size: usize) -> Result<(), Refusal> {
    if size > 0 && size.is_multiple_of(BLOCK) {
        return Ok(());
    }
    Err(refuse(
        name,
        "rows of whole blocks of 32 numbers, at least one",
        format!("{size} numbers"),
        "MXFP4 stores blocks of 32: check the shapes",
    ))
}

/// One module per width, whose functions enable the CPU's features for everything inlined into them.
macro_rules! width {
    ($name:ident, $simd:ty $(, $feature:literal)?) => {
        mod $name {
            use super::*;

            pub(super) const PRODUCTS: RowProducts = RowProducts {
                lanes: <$simd as Simd>::LANES,
                rows,
            };

            $(#[target_feature(enable = $feature)])?
            unsafe fn rows(
                matrix: &Matrix<'_>,
                rows: Range<usize>,
                operand: &Operand,
                out: &mut [f32],
            ) {
                // SAFETY: the caller's promise.
                unsafe { all_rows::<$simd>(matrix, rows, operand, out) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
width!(avx512, Avx512, "avx512f,avx512vl,avx2,fma");
#[cfg(target_arch = "x86_64")]
width!(avx2, Avx2, "avx2,fma");
width!(portable, Portable);

/// # Safety
/// The lengths are those that [`RowProducts::rows`] checks, the CPU has the features of `S`.
#[inline(always)]
unsafe fn all_rows<S: Simd>(
    matrix: &Matrix<'_>,
    rows: Range<usize>,
    operand: &Operand,
    out: &mut [f32],
) {
    // Groups of nearly one size: five and five cost less than six and four.
    let groups = operand.tokens.div_ceil(TOKENS).max(1);
    let at = |group: usize| operand.tokens * group / groups;
    // SAFETY: as the caller promises.
    unsafe {
        for group in 0..groups {
            let first = at(group);
            match at(group + 1) - first {
                0 => {}
                1 => group_rows::<S, 4, 1>(matrix, &rows, operand, first, out),
                2 => group_rows::<S, 4, 2>(matrix, &rows, operand, first, out),
                3 => group_rows::<S, 2, 3>(matrix, &rows, operand, first, out),
                4 => group_rows::<S, 2, 4>(matrix, &rows, operand, first, out),

                5 => group_rows::<S, 2, 5>(matrix, &rows, operand, first, out),
                _ => group_rows::<S, 2, TOKENS>(matrix, &rows, operand, first, out),
            }
        }
    }
}

/// `T` tokens from `first` on, `R` rows at a time.
///
/// # Safety
/// As for [`all_rows`].
#[inline(always)]
unsafe fn group_rows<S: Simd, const R: usize, const T: usize>(
    matrix: &Matrix<'_>,
    rows: &Range<usize>,
    operand: &Operand,
    first: usize,
    out: &mut [f32],
) {
    let blocks = matrix.columns / BLOCK;
    let per_vector = S::LANES / BLOCK_WORDS;
    let whole = blocks / per_vector;
    let rest = blocks % per_vector;
    for row in rows.clone().step_by(R) {
        // SAFETY: rows, blocks and chunks exist, as the caller promises.
        unsafe {
            let mut sums = Sums::<S, R, T>::new();
            let block = |r: usize, c: usize| (row + r) * blocks + c * per_vector;
            let numbers = |c: usize| {
                let at = (c * operand.tokens + first) * PER_WORD * S::LANES;
                operand.numbers.as_ptr().add(at)
            };
            for c in 0..whole {
                let mut words = [S::words(matrix.blocks.as_ptr()); R];
                let mut scales = [0_u32; R];
                for r in 0..R {
                    let at = block(r, c);
                    let from = matrix.blocks.as_ptr().add(at * BLOCK_BYTES);
                    // Rows are too short for the CPU to foresee the next ones.
                    S::prefetch(from.wrapping_add(AHEAD));
                    words[r] = S::words(from);
                    scales[r] = few_bytes(matrix.scales.as_ptr().add(at), per_vector);
                }
                sums.add(words, scales, numbers(c));
            }
            if rest > 0 {
                let mut words = [S::first_words(matrix.blocks.as_ptr(), 0); R];
                let mut scales = [0_u32; R];
                for r in 0..R {
                    let at = block(r, whole);
                    let from = matrix.blocks.as_ptr().add(at * BLOCK_BYTES);
                    words[r] = S::first_words(from, rest * BLOCK_WORDS);
                    for i in 0..rest {
                        let byte = matrix.scales.as_ptr().add(at + i).read();
                        scales[r] |= u32::from(byte) << (8 * i);
                    }
                }
                sums.add(words, scales, numbers(whole));
            }
            for (t, totals) in sums.totals.iter().enumerate() {
                for (r, &total) in totals.iter().enumerate() {
                    out[(first + t) * rows.len() + row - rows.start + r] = S::sum(total);
                }
            }
        }
    }
}

/// The `count` (2 or 4) bytes at `from` as a number.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn few_bytes(from: *const u8, count: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe {
        if count == 4 {
            u32::from_le_bytes(from.cast::<[u8; 4]>().read())
        } else {
            u32::from(u16::from_le_bytes(from.cast::<[u8; 2]>().read()))
        }
    }
}

/// Running sums of `R` rows with `T` tokens.
struct Sums<S: Simd, const R: usize, const T: usize> {
    totals: [[S::V; R]; T],
}

impl<S: Simd, const R: usize, const T: usize> Sums<S, R, T> {
    /// # Safety
    /// The CPU has the features of `S`, here and below.
    #[inline(always)]
    unsafe fn new() -> Self {
        // SAFETY: the caller's promise.
        let totals = unsafe { [[S::splat(0.0); R]; T] };
        Self { totals }
    }

    /// Adds a vector of words of each row times the chunk of numbers at `numbers`, `[T, 8, lanes]`.
    ///
    /// # Safety
    /// The numbers are there.
    #[inline(always)]
    unsafe fn add(&mut self, mut words: [S::Words; R], bytes: [u32; R], numbers: *const f32) {
        // SAFETY: the caller's promise.
        unsafe {
            let zero = S::splat(0.0);
            let mut sums = [[zero; R]; T];
            for j in 0..PER_WORD {
                let mut weights = [zero; R];
                for (weight, words) in weights.iter_mut().zip(&mut words) {
                    *weight = S::fp4(*words);
                    *words = S::next_fp4(*words);
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = S::load(numbers.add((t * PER_WORD + j) * S::LANES));
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        *sum = S::fma(weight, x, *sum);
                    }
                }
            }
            let mut scales = [zero; R];
            for (scale, bytes) in scales.iter_mut().zip(bytes) {
                *scale = S::block_scales(bytes);
            }
            for (totals, sums) in self.totals.iter_mut().zip(sums) {
                for ((total, sum), scale) in totals.iter_mut().zip(sums).zip(scales) {
                    *total = S::fma(sum, scale, *total);
                }
            }
        }
    }
}
