//! The three steps of a block of cached rows, for each width of vectors: scores, weights, sums.
//!
//! All query heads of a tile share the rows, so both products are small matrix products. For the scores the
//! lanes of a vector are heads and a number of a row is broadcast: the rows are read as they lie in the cache. For the sums the
//! lanes are numbers of the latent and a weight is broadcast. Nothing of the cache is transposed or packed.

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Portable, Simd};

/// Rows of a block. With the weights and a slice of the latents it stays in the first-level cache.
pub(crate) const BLOCK: usize = 48;
/// Heads (times query tokens) of a tile at most.
pub(crate) const TILE: usize = 64;
/// Rows are taken in multiples of this; what is missing is filled with a row that is there.
pub(crate) const ROW_STEP: usize = 12;
/// Numbers of a cache line.
const LINE: usize = 16;
/// Heads left over after whole vectors, up to which each gets a dot product instead of a lane.
const DOTS: usize = 4;

/// The queries of a tile in the layout that the scores want.
pub(crate) struct Queries {
    /// `[w, stride]`: number `k` of all heads side by side.
    by_number: Vec<f32>,
    /// `[heads, w]`.
    by_head: Vec<f32>,
    width: usize,
    heads: usize,
    stride: usize,
}

impl Queries {
    /// From `[heads, width]`.
    pub(crate) fn new(rows: Vec<f32>, width: usize) -> Self {
        let heads = rows.len() / width;
        let stride = heads.next_multiple_of(16);
        let mut by_number = vec![0.0; width * stride];
        for (k, numbers) in by_number.chunks_exact_mut(stride).enumerate() {
            for (head, x) in numbers.iter_mut().take(heads).enumerate() {
                *x = rows[head * width + k];
            }
        }
        Self {
            by_number,
            by_head: rows,
            width,
            heads,
            stride,
        }
    }

    /// Distance of the scores of two rows.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Query of one head, `[width]`.
    pub(crate) fn head(&self, head: usize) -> &[f32] {
        &self.by_head[head * self.width..(head + 1) * self.width]
    }

    pub(crate) fn heads(&self) -> usize {
        self.heads
    }
}

/// Running state of the softmax, one number per lane: `[stride]` each.
pub(crate) struct Running {
    /// Largest score so far, in powers of two.
    pub(crate) top: Vec<f32>,
    /// Sum of weights relative to `top`.
    pub(crate) sum: Vec<f32>,
    /// What the sums so far must be multiplied by.
    pub(crate) factor: Vec<f32>,
}

impl Running {
    pub(crate) fn new(stride: usize) -> Self {
        Self {
            top: vec![f32::NEG_INFINITY; stride],
            sum: vec![0.0; stride],
            factor: vec![1.0; stride],
        }
    }
}

/// The steps for one width of vectors.
///
/// # Safety
/// All three: a CPU with the features of the width. `rows` holds pointers to at least `width` numbers each.
#[derive(Clone, Copy)]
pub(crate) struct Products {
    /// `scores [rows, stride]` of rows whose count is a multiple of [`ROW_STEP`].
    pub(crate) scores: unsafe fn(&Queries, &[*const f32], &mut [f32]),
    /// Scores (`count` rows) become weights, in place; the running state moves on. The factor makes scores powers of two.
    pub(crate) weights: unsafe fn(&mut [f32], usize, f32, &mut Running),
    /// `out [heads, out_stride] +=` weights `[rows, stride]` times the first `rank` numbers of every row.
    pub(crate) sums: unsafe fn(&Sums<'_>, &mut [f32]),
}

/// Operands of [`Products::sums`].
pub(crate) struct Sums<'a> {
    pub(crate) weights: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) rows: &'a [*const f32],
    pub(crate) heads: usize,
    pub(crate) rank: usize,
    pub(crate) out_stride: usize,
}

/// Kinds of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// avx512f, avx512vl, avx2, fma, f16c.
    Avx512,
    /// avx2, fma, f16c.
    Avx2,
    /// Any.
    Portable,
}

impl Isa {
    /// What this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
                && std::arch::is_x86_feature_detected!("f16c");
            if avx2
                && std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512vl")
            {
                found.push(Self::Avx512);
            }
            if avx2 {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    pub(crate) fn products(self) -> Products {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::PRODUCTS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::PRODUCTS,
            _ => portable::PRODUCTS,
        }
    }
}

/// One module per width, whose functions enable the CPU's features for everything inlined into them.
macro_rules! width {
    ($name:ident, $simd:ty $(, $feature:literal)?) => {
        mod $name {
            use super::*;

            pub(super) const PRODUCTS: Products = Products { scores, weights, sums };

            $(#[target_feature(enable = $feature)])?
            unsafe fn scores(queries: &Queries, rows: &[*const f32], out: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe { all_scores::<$simd>(queries, rows, out) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn weights(scores: &mut [f32], count: usize, scale: f32, running: &mut Running) {
                // SAFETY: the caller's promise.
                unsafe { all_weights::<$simd>(scores, count, scale, running) }
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn sums(operands: &Sums<'_>, out: &mut [f32]) {
                // SAFETY: the caller's promise.
                unsafe { all_sums::<$simd>(operands, out) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
width!(avx512, Avx512, "avx512f,avx512vl,avx2,fma");
#[cfg(target_arch = "x86_64")]
width!(avx2, Avx2, "avx2,fma");
width!(portable, Portable);

#[inline(always)]
unsafe fn all_scores<S: Simd>(queries: &Queries, rows: &[*const f32], out: &mut [f32]) {
    let stride = queries.stride;
    assert!(
        rows.len().is_multiple_of(ROW_STEP) && out.len() >= rows.len() * stride,
        "a block of scores"
    );
    let mut lane = 0;
    // SAFETY: lanes up to `stride` exist in every row of `out` and of the queries; the rows are the caller's promise.
    unsafe {
        while queries.heads - lane > DOTS {
            let left = queries.heads - lane;
            // What a half vector and dot products can do is not worth a vector.
            let narrow = if S::Half::LANES < S::LANES {
                S::Half::LANES + DOTS
            } else {
                DOTS
            };
            let vectors = left / S::LANES + usize::from(left % S::LANES > narrow);
            lane += match vectors.min(S::WIDE) {
                4 => lanes::<S, 6, 4>(queries, rows, lane, out),
                3 => lanes::<S, 6, 3>(queries, rows, lane, out),
                2 => lanes::<S, 6, 2>(queries, rows, lane, out),
                1 => lanes::<S, ROW_STEP, 1>(queries, rows, lane, out),
                _ => lanes::<S::Half, ROW_STEP, 1>(queries, rows, lane, out),
            };
            if lane >= queries.heads {
                return;
            }
        }
        for lane in lane..queries.heads {
            dots::<S>(queries, rows, lane, out);
        }
    }
}

/// Scores of `V` vectors of heads from `lane` on, `R` rows at a time; how many lanes that is.
#[inline(always)]
unsafe fn lanes<S: Simd, const R: usize, const V: usize>(
    queries: &Queries,
    rows: &[*const f32],
    lane: usize,
    out: &mut [f32],
) -> usize {
    let stride = queries.stride;
    // Where the row of the next block lies when the cache is contiguous; elsewhere the hint is in vain.
    let ahead = BLOCK * queries.width;
    // SAFETY: as in `all_scores`.
    unsafe {
        let first = queries.by_number.as_ptr().add(lane);
        for (group, rows) in rows.chunks_exact(R).enumerate() {
            let mut acc = [[S::splat(0.0); V]; R];
            for line in (0..queries.width).step_by(LINE) {
                // Among few heads a row is done sooner than a hint is of use.
                if lane == 0 && V > 1 {
                    for row in rows {
                        S::prefetch(row.wrapping_add(line + ahead).cast());
                    }
                }
                for k in line..(line + LINE).min(queries.width) {
                    let mut q = [S::splat(0.0); V];
                    for (v, q) in q.iter_mut().enumerate() {
                        *q = S::load(first.add(k * stride + v * S::LANES));
                    }
                    for (acc, row) in acc.iter_mut().zip(rows) {
                        let x = S::splat(row.add(k).read());
                        for (acc, q) in acc.iter_mut().zip(q) {
                            *acc = S::fma(x, q, *acc);
                        }
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                let to = out.as_mut_ptr().add((group * R + r) * stride + lane);
                for (v, acc) in acc.iter().enumerate() {
                    S::store(to.add(v * S::LANES), *acc);
                }
            }
        }
    }
    V * S::LANES
}

/// Scores of one head: the lanes are numbers of the row.
#[inline(always)]
unsafe fn dots<S: Simd>(queries: &Queries, rows: &[*const f32], head: usize, out: &mut [f32]) {
    const R: usize = 6;
    let (width, query) = (queries.width, queries.head(head).as_ptr());
    let whole = width - width % S::LANES;
    // SAFETY: as in `all_scores`.
    unsafe {
        for (group, rows) in rows.chunks_exact(R).enumerate() {
            let mut acc = [S::splat(0.0); R];
            for k in (0..whole).step_by(S::LANES) {
                let q = S::load(query.add(k));
                for (acc, row) in acc.iter_mut().zip(rows) {
                    *acc = S::fma(S::load(row.add(k)), q, *acc);
                }
            }
            if whole < width {
                let q = S::load_first(query.add(whole), width - whole);
                for (acc, row) in acc.iter_mut().zip(rows) {
                    let x = S::load_first(row.add(whole), width - whole);
                    *acc = S::fma(x, q, *acc);
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                out[(group * R + r) * queries.stride + head] = S::sum(*acc);
            }
        }
    }
}

#[inline(always)]
unsafe fn all_weights<S: Simd>(
    scores: &mut [f32],
    count: usize,
    scale: f32,
    running: &mut Running,
) {
    let stride = running.top.len();
    assert!(
        stride.is_multiple_of(S::LANES) && scores.len() >= count * stride,
        "a block of scores"
    );
    for lane in (0..stride).step_by(S::LANES) {
        // SAFETY: the lanes exist in every row of `scores` and in the running state.
        unsafe {
            let first = scores.as_mut_ptr().add(lane);
            let scale = S::splat(scale);
            let before = S::load(running.top.as_ptr().add(lane));
            let mut top = before;
            for row in 0..count {
                top = S::max(S::mul(S::load(first.add(row * stride)), scale), top);
            }
            // Minus infinity less minus infinity is NaN; from a finite base it stays minus infinity, whose weight is 0.
            let base = S::mul(S::max(top, S::splat(f32::MIN)), S::splat(-1.0));
            let factor = S::exp2(S::add(before, base));
            let mut sum = S::mul(S::load(running.sum.as_ptr().add(lane)), factor);
            for row in 0..count {
                let at = first.add(row * stride);
                let weight = S::exp2(S::fma(S::load(at), scale, base));
                S::store(at, weight);
                sum = S::add(sum, weight);
            }
            S::store(running.top.as_mut_ptr().add(lane), top);
            S::store(running.sum.as_mut_ptr().add(lane), sum);
            S::store(running.factor.as_mut_ptr().add(lane), factor);
        }
    }
}

#[inline(always)]
unsafe fn all_sums<S: Simd>(x: &Sums<'_>, out: &mut [f32]) {
    assert!(
        x.out_stride.is_multiple_of(16)
            && x.out_stride >= x.rank
            && out.len() >= x.heads * x.out_stride
            && x.weights.len() >= x.rows.len() * x.stride
            && x.stride >= x.heads,
        "operands of a block of sums"
    );
    let mut column = 0;
    // SAFETY: columns below `rank` exist in every row, those below `out_stride` in `out`.
    unsafe {
        while column < x.rank {
            let left = x.rank - column;
            if left < S::LANES {
                columns::<S, 1>(x, column, left, out);
                return;
            }
            column += S::LANES
                * match (left / S::LANES).min(S::WIDE) {
                    4 => columns::<S, 4>(x, column, S::LANES, out),
                    3 => columns::<S, 3>(x, column, S::LANES, out),
                    2 => columns::<S, 2>(x, column, S::LANES, out),
                    _ => columns::<S, 1>(x, column, S::LANES, out),
                };
        }
    }
}

/// `V` vectors of columns of all heads; `filled` numbers of the last vector are columns.
#[inline(always)]
unsafe fn columns<S: Simd, const V: usize>(
    x: &Sums<'_>,
    column: usize,
    filled: usize,
    out: &mut [f32],
) -> usize {
    let mut head = 0;
    // SAFETY: as in `all_sums`.
    unsafe {
        while head < x.heads {
            head += match x.heads - head {
                1 => some_heads::<S, 1, V>(x, head, column, filled, out),
                2 => some_heads::<S, 2, V>(x, head, column, filled, out),
                3 | 9 => some_heads::<S, 3, V>(x, head, column, filled, out),
                4 | 8 => some_heads::<S, 4, V>(x, head, column, filled, out),
                5 | 10 => some_heads::<S, 5, V>(x, head, column, filled, out),
                _ => some_heads::<S, 6, V>(x, head, column, filled, out),
            };
        }
    }
    V
}

#[inline(always)]
unsafe fn some_heads<S: Simd, const H: usize, const V: usize>(
    x: &Sums<'_>,
    head: usize,
    column: usize,
    filled: usize,
    out: &mut [f32],
) -> usize {
    // SAFETY: as in `all_sums`.
    unsafe {
        let to = out.as_mut_ptr().add(head * x.out_stride + column);
        let weights = x.weights.as_ptr().add(head);
        let mut acc = [[S::splat(0.0); V]; H];
        for (h, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(to.add(h * x.out_stride + v * S::LANES));
            }
        }
        for (i, row) in x.rows.iter().enumerate() {
            let mut c = [S::splat(0.0); V];
            for (v, c) in c.iter_mut().enumerate() {
                let from = row.add(column + v * S::LANES);
                *c = if filled < S::LANES {
                    S::load_first(from, filled)
                } else {
                    S::load(from)
                };
            }
            for (h, acc) in acc.iter_mut().enumerate() {
                let weight = S::splat(weights.add(i * x.stride + h).read());
                for (acc, c) in acc.iter_mut().zip(c) {
                    *acc = S::fma(weight, c, *acc);
                }
            }
        }
        for (h, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                S::store(to.add(h * x.out_stride + v * S::LANES), *acc);
            }
        }
    }
    H
}
