//! Panels of rows times many tokens: a lane takes a row, so sums need no adding up across lanes. A piece of the panel is widened and
//! transposed into the nearest cache, and read from there for every token.

use std::ops::Range;
use std::slice;

use super::width::{Stored, load_first};
use super::{Out, Step};
use crate::simd::Simd;

/// Numbers of a row in a piece.
const DEPTH: usize = 128;
/// Tokens that share a number of a piece at most.
const TOKENS: usize = 6;
/// Numbers of a cache line.
const LINE: usize = 16;

/// Numbers that lie on whole cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "used through pointers to f32")] [f32; LINE]);

/// Rows of a panel.
pub(super) const fn rows<S: Simd>() -> usize {
    S::WIDE * S::LANES
}

/// # Safety
/// As for [`super::width::Products`]; the rows are one panel's.
#[inline(always)]
pub(super) unsafe fn one<S: Simd, W: Stored>(
    step: &Step<'_>,
    rows: Range<usize>,
    tokens: Range<usize>,
    out: &Out<'_>,
) {
    let (width, columns) = (self::rows::<S>(), step.shape.columns);
    let lines = |numbers: usize| vec![Line([0.0; LINE]); numbers.div_ceil(LINE)];
    // `[DEPTH, width]` and `[tokens, width]`.
    let mut piece = lines(DEPTH * width);
    let mut sums = lines(tokens.len() * width);
    let (piece, sums) = (
        piece.as_mut_ptr().cast::<f32>(),
        sums.as_mut_ptr().cast::<f32>(),
    );
    let groups = tokens.len().div_ceil(TOKENS);
    let at = |group: usize| tokens.len() * group / groups;
    // SAFETY: rows, tokens and columns exist, as the caller promises; pieces and sums are as long as said.
    unsafe {
        if let Some(bias) = step.inputs.bias {
            for token in 0..tokens.len() {
                let to = sums.add(token * width);
                to.copy_from_nonoverlapping(bias[rows.clone()].as_ptr(), rows.len());
            }
        }
        for column in (0..columns).step_by(DEPTH) {
            let depth = DEPTH.min(columns - column);
            widen::<S, W>(step, &rows, column, depth, piece);
            let x = step.inputs.x.as_ptr().add(tokens.start * columns + column);
            for group in 0..groups {
                let (first, count) = (at(group), at(group + 1) - at(group));
                let (x, sums) = (x.add(first * columns), sums.add(first * width));
                match S::WIDE {
                    4 => add::<S, 4>(depth, piece, x, columns, count, sums),
                    2 => add::<S, 2>(depth, piece, x, columns, count, sums),
                    _ => add::<S, 1>(depth, piece, x, columns, count, sums),
                }
            }
        }
        for token in 0..tokens.len() {
            let numbers = slice::from_raw_parts(sums.add(token * width), rows.len());
            out.put(tokens.start + token, rows.start, numbers);
        }
    }
}

/// Columns `column..column + depth` of the rows, in f32: `[depth, width]`, zeros where the panel has no row.
#[inline(always)]
unsafe fn widen<S: Simd, W: Stored>(
    step: &Step<'_>,
    rows: &Range<usize>,
    column: usize,
    depth: usize,
    piece: *mut f32,
) {
    let (width, columns) = (self::rows::<S>(), step.shape.columns);
    let weights = step.inputs.weight.bits();
    // SAFETY: as in `one`; a tile's last rows are zeros of `piece`, which has room for whole vectors of columns.
    unsafe {
        for lane in (0..width).step_by(S::LANES) {
            for at in (0..depth).step_by(S::LANES) {
                let left = (depth - at).min(S::LANES);
                let mut tile = [S::splat(0.0); LINE];
                for (r, to) in tile.iter_mut().take(S::LANES).enumerate() {
                    let row = rows.start + lane + r;
                    if row >= rows.end {
                        continue;
                    }
                    let from = weights.add(row * columns + column + at);
                    *to = if left == S::LANES {
                        W::load::<S>(from)
                    } else {
                        load_first::<S, W>(from, left)
                    };
                }
                let tile = transposed::<S>(tile);
                for (k, numbers) in tile.iter().take(left).enumerate() {
                    S::store(piece.add((at + k) * width + lane), *numbers);
                }
            }
        }
    }
}

/// The first `S::LANES` vectors as a matrix, transposed: every round moves one bit of an element's row to its column.
#[inline(always)]
unsafe fn transposed<S: Simd>(mut tile: [S::V; LINE]) -> [S::V; LINE] {
    let half = S::LANES / 2;
    // SAFETY: the caller's promise.
    unsafe {
        for _ in 0..S::LANES.ilog2() {
            let before = tile;
            for i in 0..half {
                (tile[2 * i], tile[2 * i + 1]) = S::zip(before[i], before[i + half]);
            }
        }
    }
    tile
}

/// `sums [count, width] += x [count, depth] piece [depth, width]`.
#[inline(always)]
unsafe fn add<S: Simd, const V: usize>(
    depth: usize,
    piece: *const f32,
    x: *const f32,
    stride: usize,
    count: usize,
    sums: *mut f32,
) {
    // SAFETY: as in `one`.
    unsafe {
        match count {
            1 => tile::<S, 1, V>(depth, piece, x, stride, sums),
            2 => tile::<S, 2, V>(depth, piece, x, stride, sums),
            3 => tile::<S, 3, V>(depth, piece, x, stride, sums),
            4 => tile::<S, 4, V>(depth, piece, x, stride, sums),
            5 => tile::<S, 5, V>(depth, piece, x, stride, sums),
            _ => tile::<S, TOKENS, V>(depth, piece, x, stride, sums),
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const T: usize, const V: usize>(
    depth: usize,
    piece: *const f32,
    x: *const f32,
    stride: usize,
    sums: *mut f32,
) {
    let width = V * S::LANES;
    // SAFETY: as in `one`.
    unsafe {
        let mut acc = [[S::splat(0.0); V]; T];
        for (t, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.add(t * width + v * S::LANES));
            }
        }
        for k in 0..depth {
            let mut w = [S::splat(0.0); V];
            for (v, w) in w.iter_mut().enumerate() {
                *w = S::load(piece.add(k * width + v * S::LANES));
            }
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(x.add(t * stride + k).read());
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = S::fma(x, w, *acc);
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                S::store(sums.add(t * width + v * S::LANES), *acc);
            }
        }
    }
}
