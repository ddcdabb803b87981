//! Query rows of one sequence against a stretch of its positions: online softmax over blocks of rows.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::sequence::{Sequence, Span};
use crate::element::Element;
use crate::products::{BLOCK, Products, Queries, ROW_STEP, Running, Sums};

/// Sums that are not divided yet, and what belongs to them.
pub(crate) struct Partial {
    /// `[heads, stride]`, relative to `running.top`.
    pub(crate) sums: Vec<f32>,
    /// A row of `sums`.
    pub(crate) stride: usize,
    pub(crate) running: Running,
}

/// What stays the same for all blocks of a tile.
pub(crate) struct Tile<'a, T> {
    pub(crate) sequence: Sequence<'a, T>,
    pub(crate) queries: &'a Queries,
    /// New token of every query row of the tile.
    pub(crate) tokens: &'a [usize],
    pub(crate) span: &'a Span,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) products: Products,
}

/// Rows gathered for one block.
struct Block {
    rows: Vec<*const f32>,
    /// Rows in f32, `[BLOCK, width]`, where the cache has another type.
    widened: Vec<f32>,
    scores: Vec<f32>,
    /// Index in `rows` and position of rows that only some tokens see.
    partly: Vec<(usize, usize)>,
}

impl<T: Element> Tile<'_, T> {
    /// Attention over `positions`.
    pub(crate) fn run(&self, positions: Range<usize>) -> Partial {
        let (heads, stride) = (self.queries.heads(), self.rank.next_multiple_of(16));
        let mut partial = Partial {
            sums: vec![0.0; heads * stride],
            stride,
            running: Running::new(self.queries.stride()),
        };
        let width = self.queries.head(0).len();
        let mut block = Block {
            rows: Vec::with_capacity(BLOCK),
            widened: vec![
                0.0;
                if T::as_f32(&[]).is_some() {
                    0
                } else {
                    BLOCK * width
                }
            ],
            scores: vec![0.0; BLOCK * self.queries.stride()],
            partly: Vec::new(),
        };
        let mut next = positions.start;
        while next < positions.end {
            next = self.gather(&mut block, next..positions.end, &mut partial);
            if !block.rows.is_empty() {
                self.step(&mut block, &mut partial);
            }
        }
        partial
    }

    /// Fills a block with visible rows; the first position that is not in it.
    fn gather(&self, block: &mut Block, positions: Range<usize>, partial: &mut Partial) -> usize {
        block.rows.clear();
        block.partly.clear();
        for position in positions.clone() {
            if block.rows.len() == BLOCK {
                return position;
            }
            if !self.sequence.unmasked(position) {
                continue;
            }
            let all = self.span.all.contains(&position) || self.everyone_sees(position);
            if !all && !self.someone_sees(position) {
                continue;
            }
            let row = self.sequence.row(position);
            let row = if let Some(row) = T::as_f32(row) {
                row
            } else {
                let at = block.rows.len() * row.len();
                let to = &mut block.widened[at..at + row.len()];
                T::widen(row, to);
                &*to
            };
            if !all {
                // A weight of 0 times infinity is NaN, so such a row must not meet the heads that do not see it.
                if row.iter().any(|x| !x.is_finite()) {
                    self.alone(row, position, partial);
                    continue;
                }
                block.partly.push((block.rows.len(), position));
            }
            block.rows.push(row.as_ptr());
        }
        positions.end
    }

    fn everyone_sees(&self, position: usize) -> bool {
        let (first, last) = (self.tokens[0], self.tokens[self.tokens.len() - 1]);
        (first..=last).all(|token| self.sequence.sees(token, position))
    }

    fn someone_sees(&self, position: usize) -> bool {
        let (first, last) = (self.tokens[0], self.tokens[self.tokens.len() - 1]);
        (first..=last).any(|token| self.sequence.sees(token, position))
    }

    /// One block: scores, weights, sums.
    fn step(&self, block: &mut Block, partial: &mut Partial) {
        let count = block.rows.len();
        let filler = block.rows[0];
        block.rows.resize(count.next_multiple_of(ROW_STEP), filler);
        let stride = self.queries.stride();
        // SAFETY: `products` is of a width that this CPU has (`Isa::available`), and every pointer is to a whole row
        // of the cache, of the new rows or of `widened`, which outlive the call.
        unsafe { (self.products.scores)(self.queries, &block.rows, &mut block.scores) };
        for &(row, position) in &block.partly {
            let scores = &mut block.scores[row * stride..(row + 1) * stride];
            for (score, &token) in scores.iter_mut().zip(self.tokens) {
                if !self.sequence.sees(token, position) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        let scale = self.scale * LOG2_E;
        // SAFETY: as above.
        unsafe {
            (self.products.weights)(&mut block.scores, count, scale, &mut partial.running);
        }
        let rows = partial.sums.chunks_exact_mut(partial.stride);
        for (sums, &factor) in rows.zip(&partial.running.factor) {
            if factor.to_bits() != 1.0_f32.to_bits() {
                for x in sums {
                    *x *= factor;
                }
            }
        }
        let operands = Sums {
            weights: &block.scores,
            stride,
            rows: &block.rows[..count],
            heads: self.queries.heads(),
            rank: self.rank,
            out_stride: partial.stride,
        };
        // SAFETY: as above.
        unsafe { (self.products.sums)(&operands, &mut partial.sums) };
    }

    /// One row for the heads that see it, one by one.
    fn alone(&self, row: &[f32], position: usize, partial: &mut Partial) {
        let running = &mut partial.running;
        for (lane, &token) in self.tokens.iter().enumerate() {
            if !self.sequence.sees(token, position) {
                continue;
            }
            let dot: f32 = self
                .queries
                .head(lane)
                .iter()
                .zip(row)
                .map(|(q, x)| q * x)
                .sum();
            let score = dot * (self.scale * LOG2_E);
            let top = score.max(running.top[lane]);
            let base = top.max(f32::MIN);
            let factor = (running.top[lane] - base).exp2();
            let weight = (score - base).exp2();
            running.top[lane] = top;
            running.sum[lane] = running.sum[lane] * factor + weight;
            let sums = &mut partial.sums[lane * partial.stride..][..self.rank];
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum = *sum * factor + weight * x;
            }
        }
    }
}
