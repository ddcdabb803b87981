//! From the checkpoint's layout and type to the graph's, a few rows at a time.

use std::io;

use half::{f16, slice::HalfFloatSliceExt};
use mlac_model::{Dtype, Refusal, mxfp4::SCALE_NAN, tensor::f32_from_bytes};
use rayon::prelude::*;

use super::StoredTensor;
use crate::ir::{DType, Transform, WeightRef};

/// Elements of one piece that is laid out, converted and handed on.
const PIECE: usize = 2 << 20;
/// Rows of the output that one task fills: a cache line of the source when it is transposed.
const TASK_ROWS: usize = 16;
/// Columns that one task fills before it returns to the first row.
const TASK_COLS: usize = 128;

/// `out[b, i, j] = source[start + b * matrix + i * row + j * col]`, `b < matrices`, `i < rows`, `j < cols`.
struct Layout {
    matrices: usize,
    rows: usize,
    cols: usize,
    start: usize,
    matrix: usize,
    row: usize,
    col: usize,
}

impl Layout {
    fn of(weight: &WeightRef) -> Self {
        let count: usize = weight.source_shape.iter().product();
        let last = weight.source_shape.last().copied().unwrap_or(1);
        let rows = count.checked_div(last).unwrap_or(0);
        match weight.transform {
            // Long rows would make long pieces, so a contiguous tensor is cut where it suits us.
            Transform::AsIs | Transform::Bytes | Transform::Scales => {
                let cols = if last > PIECE { 1 } else { last };
                let rows = count.checked_div(cols).unwrap_or(0);
                Self {
                    matrices: 1,
                    rows,
                    cols,
                    start: 0,
                    matrix: 0,
                    row: cols,
                    col: 1,
                }
            }
            Transform::Transpose2D => Self {
                matrices: 1,
                rows: last,
                cols: rows,
                start: 0,
                matrix: 0,
                row: 1,
                col: last,
            },
            Transform::KvBKey { heads, d_nope, d_v } => Self {
                matrices: heads,
                rows: d_nope,
                cols: last,
                start: 0,
                matrix: (d_nope + d_v) * last,
                row: last,
                col: 1,
            },
            Transform::KvBValue { heads, d_nope, d_v } => Self {
                matrices: heads,
                rows: last,
                cols: d_v,
                start: d_nope * last,
                matrix: (d_nope + d_v) * last,
                row: 1,
                col: last,
            },
            Transform::HeadTranspose { heads } => Self {
                matrices: heads,
                rows: last,
                cols: rows / heads.max(1),
                start: 0,
                matrix: count / heads.max(1),
                row: 1,
                col: last,
            },
        }
    }

    /// Fills output rows `first..`, counted over all matrices, as many as fit into `out`.
    fn fill<T: Copy + Send + Sync>(&self, source: &[T], first: usize, out: &mut [T]) {
        let cols = self.cols;
        out.par_chunks_mut(TASK_ROWS * cols)
            .enumerate()
            .for_each(|(task, out)| {
                let first = first + task * TASK_ROWS;
                let offset = |r: usize| {
                    let at = first + r;
                    self.start + at / self.rows * self.matrix + at % self.rows * self.row
                };
                if self.col == 1 {
                    for (r, row) in out.chunks_mut(cols).enumerate() {
                        row.copy_from_slice(&source[offset(r)..offset(r) + cols]);
                    }
                    return;
                }
                let offsets: Vec<usize> = (0..out.len() / cols).map(offset).collect();
                for from in (0..cols).step_by(TASK_COLS) {
                    let to = (from + TASK_COLS).min(cols);
                    for j in from..to {
                        for (r, offset) in offsets.iter().enumerate() {
                            out[r * cols + j] = source[offset + j * self.col];
                        }
                    }
                }
            });
    }
}

/// Why a tensor could not be handed on.
pub(super) enum LayoutError {
    Refused(Refusal),
    Source(Box<dyn std::error::Error + Send + Sync>),
    Io(io::Error),
}

/// Bytes of a tensor that are read, checked and handed on at once when they stay as they are.
const CHUNK: usize = 8 << 20;

/// Hands the bytes of `weight` to `sink` piece by piece without a change of type; `stored` has the
/// weight's source shape. Tensors that keep their order are never in memory as a whole.
///
/// Refuses another type than the weight's, NaN, infinities and scales that stand for NaN.
pub(super) fn write_stored(
    weight: &WeightRef,
    stored: &StoredTensor<'_>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), LayoutError> {
    let refuse = |expected: String, found: String| {
        Err(LayoutError::Refused(Refusal::new(
            format!("tensor {}", weight.name),
            expected,
            found,
            "use the checkpoint as its publisher has it",
        )))
    };
    let Some(wanted) = stored_type(weight) else {
        return refuse(
            "a type that can be stored".to_owned(),
            weight.dtype.to_string(),
        );
    };
    if stored.dtype() != wanted {
        return refuse(
            format!("dtype {wanted}"),
            format!("dtype {}", stored.dtype()),
        );
    }
    let needed = weight.source_shape.iter().product::<usize>() * wanted.size();
    if stored.len() != needed {
        return refuse(format!("{needed} bytes"), format!("{} bytes", stored.len()));
    }
    match weight.transform {
        Transform::AsIs | Transform::Bytes | Transform::Scales => {
            let mut buffer = vec![0u32; CHUNK.min(needed).div_ceil(4)];
            for offset in (0..needed).step_by(CHUNK) {
                let size = CHUNK.min(needed - offset);
                let bytes = &mut bytemuck::cast_slice_mut(&mut buffer)[..size];
                stored.read_at(offset, bytes).map_err(LayoutError::Source)?;
                check_stored(weight, wanted, bytes).map_err(LayoutError::Refused)?;
                sink(bytes).map_err(LayoutError::Io)?;
            }
            Ok(())
        }
        _ if wanted.size() == 2 => relay::<u16>(weight, wanted, stored, sink),
        _ => relay::<u32>(weight, wanted, stored, sink),
    }
}

/// The type that a weight's bytes must be stored in so that only their order changes.
pub(super) fn stored_type(weight: &WeightRef) -> Option<Dtype> {
    match (weight.transform, weight.dtype) {
        (Transform::Bytes | Transform::Scales, _) => Some(Dtype::U8),
        (_, DType::F32) => Some(Dtype::F32),
        (_, DType::F16) => Some(Dtype::F16),
        (_, DType::BF16) => Some(Dtype::BF16),
        _ => None,
    }
}

/// [`write_stored`] with a change of order of elements that are as large as `T`.
fn relay<T: Copy + Send + Sync + bytemuck::Pod>(
    weight: &WeightRef,
    dtype: Dtype,
    stored: &StoredTensor<'_>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), LayoutError> {
    let layout = Layout::of(weight);
    let rows = layout.matrices * layout.rows;
    if rows * layout.cols == 0 {
        return Ok(());
    }
    let mut source = vec![T::zeroed(); stored.len() / size_of::<T>()];
    stored
        .read_at(0, bytemuck::cast_slice_mut(&mut source))
        .map_err(LayoutError::Source)?;
    check_stored(weight, dtype, bytemuck::cast_slice(&source)).map_err(LayoutError::Refused)?;
    let rows_per_piece = (PIECE / layout.cols).clamp(1, rows);
    let mut piece = vec![T::zeroed(); rows_per_piece * layout.cols];
    for first in (0..rows).step_by(rows_per_piece) {
        let count = rows_per_piece.min(rows - first) * layout.cols;
        layout.fill(&source, first, &mut piece[..count]);
        sink(bytemuck::cast_slice(&piece[..count])).map_err(LayoutError::Io)?;
    }
    Ok(())
}

/// Refuses NaN and infinities: floats whose exponent is all ones, told by integers.
fn check_stored(weight: &WeightRef, dtype: Dtype, bytes: &[u8]) -> Result<(), Refusal> {
    const TASK: usize = 1 << 18;
    // Counts, so that the compiler makes wide instructions of it.
    let bad: usize = match dtype {
        Dtype::U8 if weight.transform == Transform::Scales => bytes
            .par_chunks(TASK)
            .filter(|c| c.contains(&SCALE_NAN))
            .count(),
        Dtype::F16 | Dtype::BF16 => {
            let exponent = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
            bytemuck::cast_slice::<u8, u16>(bytes)
                .par_chunks(TASK)
                .map(|c| c.iter().filter(|&&x| x & exponent == exponent).count())
                .sum()
        }
        Dtype::F32 => {
            let exponent = 0x7f80_0000;
            bytemuck::cast_slice::<u8, u32>(bytes)
                .par_chunks(TASK)
                .map(|c| c.iter().filter(|&&x| x & exponent == exponent).count())
                .sum()
        }
        _ => 0,
    };
    if bad == 0 {
        return Ok(());
    }
    let (expected, found) = if dtype == Dtype::U8 {
        ("scales that are not NaN", "the byte 255")
    } else {
        ("finite numbers", "NaN or infinity")
    };
    Err(Refusal::new(
        format!("tensor {}", weight.name),
        expected,
        found,
        "check that the file was downloaded and saved completely",
    ))
}

/// Hands the bytes of `weight` to `sink` piece by piece; `source` has the weight's source shape.
///
/// Refuses NaN, infinities and numbers that f16 cannot hold.
pub(super) fn write_weight(
    weight: &WeightRef,
    source: &[f32],
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), LayoutError> {
    let layout = Layout::of(weight);
    let rows = layout.matrices * layout.rows;
    if rows * layout.cols == 0 {
        return Ok(());
    }
    let as_is = weight.transform == Transform::AsIs;
    let rows_per_piece = (PIECE / layout.cols).clamp(1, rows);
    let mut numbers = vec![
        0.0f32;
        if as_is {
            0
        } else {
            rows_per_piece * layout.cols
        }
    ];
    let mut halves: Vec<f16> = vec![];
    for first in (0..rows).step_by(rows_per_piece) {
        let count = rows_per_piece.min(rows - first) * layout.cols;
        let piece = if as_is {
            &source[first * layout.cols..][..count]
        } else {
            layout.fill(source, first, &mut numbers[..count]);
            &numbers[..count]
        };
        hand_on(weight, piece, &mut halves, sink)?;
    }
    Ok(())
}

/// [`write_weight`] of a tensor that keeps its order, from the bytes of `stored`, which is never in
/// memory as a whole.
pub(super) fn write_in_order(
    weight: &WeightRef,
    stored: &StoredTensor<'_>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), LayoutError> {
    let needed = weight.source_shape.iter().product::<usize>() * stored.dtype().size();
    let refuse = |expected: String, found: String| {
        LayoutError::Refused(Refusal::new(
            format!("tensor {}", weight.name),
            expected,
            found,
            "check that the source belongs to this configuration",
        ))
    };
    if stored.len() != needed {
        let (expected, found) = (format!("{needed} bytes"), format!("{} bytes", stored.len()));
        return Err(refuse(expected, found));
    }
    let mut buffer = vec![0; CHUNK.min(needed)];
    let mut halves = vec![];
    for offset in (0..needed).step_by(CHUNK) {
        let bytes = &mut buffer[..CHUNK.min(needed - offset)];
        stored.read_at(offset, bytes).map_err(LayoutError::Source)?;
        let numbers = f32_from_bytes(stored.dtype(), bytes)
            .ok_or_else(|| refuse("numbers".to_owned(), stored.dtype().to_string()))?;
        hand_on(weight, &numbers, &mut halves, sink)?;
    }
    Ok(())
}

/// Checks a piece, gives it the weight's type and hands it to `sink`.
fn hand_on(
    weight: &WeightRef,
    piece: &[f32],
    halves: &mut Vec<f16>,
    sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), LayoutError> {
    check_finite(weight, piece).map_err(LayoutError::Refused)?;
    let bytes: &[u8] = if weight.dtype == DType::F16 {
        halves.resize(piece.len(), f16::ZERO);
        halves
            .par_chunks_mut(1 << 16)
            .zip(piece.par_chunks(1 << 16))
            .for_each(|(out, x)| out.convert_from_f32_slice(x));
        check_half(weight, piece, halves).map_err(LayoutError::Refused)?;
        bytemuck::cast_slice(halves)
    } else {
        bytemuck::cast_slice(piece)
    };
    sink(bytes).map_err(LayoutError::Io)
}

fn check_finite(weight: &WeightRef, piece: &[f32]) -> Result<(), Refusal> {
    match piece
        .par_chunks(1 << 16)
        .find_map_any(|c| c.iter().find(|x| !x.is_finite()))
    {
        None => Ok(()),
        Some(x) => Err(Refusal::new(
            format!("tensor {}", weight.name),
            "finite numbers",
            x.to_string(),
            "check that the file was downloaded and saved completely",
        )),
    }
}

fn check_half(weight: &WeightRef, piece: &[f32], halves: &[f16]) -> Result<(), Refusal> {
    let overflow = halves
        .par_iter()
        .zip(piece)
        .find_any(|(h, _)| !h.is_finite());
    match overflow {
        None => Ok(()),
        Some((_, x)) => Err(Refusal::new(
            format!("tensor {}", weight.name),
            format!("numbers that f16 holds, at most {}", f16::MAX),
            x.to_string(),
            "export in f32",
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(weight: &WeightRef, source: &[f32]) -> Vec<u8> {
        let mut out = vec![];
        let mut sink = |b: &[u8]| {
            out.extend_from_slice(b);
            Ok(())
        };
        assert!(write_weight(weight, source, &mut sink).is_ok());
        out
    }

    fn weight(shape: [usize; 2], transform: Transform, out: &[usize]) -> WeightRef {
        WeightRef {
            name: "w".to_owned(),
            source_shape: shape.to_vec(),
            transform,
            dtype: DType::F32,
            shape: out.to_vec(),
        }
    }

    /// Numbers k/8, all different.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|k| k as f32 / 8.0).collect()
    }

    #[test]
    fn transposes_what_is_larger_than_a_piece() {
        let (out, input) = (2051, 1033);
        let source = numbers(out * input);
        let w = weight([out, input], Transform::Transpose2D, &[input, out]);
        assert!(out * input > PIECE);
        let bytes = written(&w, &source);
        let found: &[f32] = bytemuck::cast_slice(&bytes);
        for i in 0..input {
            for o in 0..out {
                assert_eq!(
                    found[i * out + o].to_bits(),
                    source[o * input + i].to_bits()
                );
            }
        }
    }

    #[test]
    fn refuses_nan_and_what_f16_cannot_hold() {
        let mut w = weight([1, 2], Transform::AsIs, &[1, 2]);
        let mut sink = |_: &[u8]| Ok(());
        let Err(LayoutError::Refused(nan)) = write_weight(&w, &[1.0, f32::NAN], &mut sink) else {
            panic!("NaN passed");
        };
        assert_eq!(nan.found, "NaN");
        w.dtype = DType::F16;
        let Err(LayoutError::Refused(large)) = write_weight(&w, &[1.0, 70000.0], &mut sink) else {
            panic!("70000 passed as f16");
        };
        assert_eq!(large.found, "70000");
    }

    proptest! {
        /// Every transform against its definition, element by element; small sizes around the size
        /// of a task.
        #[test]
        fn layouts_follow_their_definition(
            heads in 1usize..4, a in 1usize..40, b in 1usize..40, cols in 1usize..40,
        ) {
            let rows = heads * (a + b);
            let source = numbers(rows * cols);
            let check = |transform, out: &[usize], at: &dyn Fn(usize) -> usize| {
                let bytes = written(&weight([rows, cols], transform, out), &source);
                let found: &[f32] = bytemuck::cast_slice(&bytes);
                let expected: Vec<f32> = (0..out.iter().product()).map(|i| source[at(i)]).collect();
                prop_assert_eq!(found, &expected[..]);
                Ok(())
            };
            check(Transform::AsIs, &[rows, cols], &|i| i)?;
            check(Transform::Transpose2D, &[cols, rows], &|i| i % rows * cols + i / rows)?;
            let (d_nope, d_v) = (a, b);
            check(Transform::KvBKey { heads, d_nope, d_v }, &[heads, a, cols], &|i| {
                (i / (a * cols) * (a + b) + i / cols % a) * cols + i % cols
            })?;
            check(Transform::KvBValue { heads, d_nope, d_v }, &[heads, cols, b], &|i| {
                (i / (b * cols) * (a + b) + a + i % b) * cols + i / b % cols
            })?;
            let per_head = a + b;
            check(Transform::HeadTranspose { heads }, &[heads, cols, per_head], &|i| {
                (i / (per_head * cols) * per_head + i % per_head) * cols + i / per_head % cols
            })?;
        }
    }
}
