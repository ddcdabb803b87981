//! Rows as they lie, times few tokens: a lane takes a number of a row, which several tokens share.

use std::ops::Range;

use super::width::{Stored, load_first};
use super::{Out, Step};
use crate::simd::Simd;

/// How far ahead of what is read the next is fetched, in bytes.
const AHEAD: usize = 8192;
/// Tokens that share a number of a row at most.
const TOKENS: usize = 6;

/// # Safety
/// As for [`super::width::Products`].
#[inline(always)]
pub(super) unsafe fn all<S: Simd, W: Stored>(step: &Step<'_>, rows: Range<usize>, out: &Out<'_>) {
    // Groups of nearly one size: five and five cost less than six and four.
    let tokens = step.shape.tokens;
    let groups = tokens.div_ceil(TOKENS);
    let at = |group: usize| tokens * group / groups;
    // SAFETY: as the caller promises.
    unsafe {
        for group in 0..groups {
            let (first, rows) = (at(group), rows.clone());
            match at(group + 1) - first {
                1 => some::<S, W, 4, 1, 2>(step, rows, first, out),
                2 => some::<S, W, 4, 2, 1>(step, rows, first, out),
                3 => some::<S, W, 2, 3, 1>(step, rows, first, out),
                4 => some::<S, W, 2, 4, 1>(step, rows, first, out),
                5 => some::<S, W, 2, 5, 1>(step, rows, first, out),
                _ => some::<S, W, 2, TOKENS, 1>(step, rows, first, out),
            }
        }
    }
}

/// `T` tokens from `first` on, `R` rows at a time, in `U` sums each.
#[inline(always)]
unsafe fn some<S: Simd, W: Stored, const R: usize, const T: usize, const U: usize>(
    step: &Step<'_>,
    rows: Range<usize>,
    first: usize,
    out: &Out<'_>,
) {
    let whole = rows.end - rows.len() % R;
    // SAFETY: as the caller promises.
    unsafe {
        for row in (rows.start..whole).step_by(R) {
            tile::<S, W, R, T, U>(step, row, first, out);
        }
        for row in whole..rows.end {
            tile::<S, W, 1, T, U>(step, row, first, out);
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, W: Stored, const R: usize, const T: usize, const U: usize>(
    step: &Step<'_>,
    row: usize,
    first: usize,
    out: &Out<'_>,
) {
    let columns = step.shape.columns;
    // SAFETY: rows, tokens and columns exist, as the caller promises.
    unsafe {
        let weights = step.inputs.weight.bits().add(row * columns);
        let x = step.inputs.x.as_ptr().add(first * columns);
        let mut sums = [[[S::splat(0.0); U]; R]; T];
        let mut at = 0;
        while at + U * S::LANES <= columns {
            for u in 0..U {
                let at = at + u * S::LANES;
                let mut w = [S::splat(0.0); R];
                for (r, w) in w.iter_mut().enumerate() {
                    let from = weights.add(r * columns + at);
                    // One hint for each line of 64 bytes, where a line is two vectors.
                    if u == 0 {
                        S::prefetch(from.cast::<u8>().wrapping_add(AHEAD));
                    }
                    *w = W::load::<S>(from);
                }
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = S::load(x.add(t * columns + at));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        sum[u] = S::fma(w, x, sum[u]);
                    }
                }
            }
            at += U * S::LANES;
        }
        while at < columns {
            let left = (columns - at).min(S::LANES);
            for r in 0..R {
                let from = weights.add(r * columns + at);
                let w = if left == S::LANES {
                    W::load::<S>(from)
                } else {
                    load_first::<S, W>(from, left)
                };
                for (t, sums) in sums.iter_mut().enumerate() {
                    let from = x.add(t * columns + at);
                    let x = if left == S::LANES {
                        S::load(from)
                    } else {
                        S::load_first(from, left)
                    };
                    sums[r][0] = S::fma(w, x, sums[r][0]);
                }
            }
            at += left;
        }
        for (t, sums) in sums.iter().enumerate() {
            let mut numbers = [0.0; R];
            for (r, (number, sums)) in numbers.iter_mut().zip(sums).enumerate() {
                let mut sum = sums[0];
                for other in &sums[1..] {
                    sum = S::add(sum, *other);
                }
                let bias = step.inputs.bias.map_or(0.0, |bias| bias[row + r]);
                *number = S::sum(sum) + bias;
            }
            out.put(first + t, row, &numbers);
        }
    }
}
