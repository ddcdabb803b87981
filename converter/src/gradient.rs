//! Squared error of a converted layer's output on query rows of a window, and its gradient.
//!
//! Forward, per head h and query row t over the keys s of the window (`row = E s`, its last `d_r`
//! numbers turned by the key's position):
//! `x_ts = scale * [q W_uk,h ; turned(R_h q)] . row_s`, `p = softmax(x)`, `c_t = sum_s p row_s[..r]`,
//! `o_h = W_uv,h c_t`, `error = |W_o o - T|^2`.
//! Backward by the chain rule; rotations are undone by turning the other way.

use std::ops::Range;

use faer::MatRef;
use rayon::prelude::*;

use crate::attention::{RotationTable, RowBlock, block_probabilities, dot, row_blocks};
use crate::layer::{Attention, LayerFactors};
use crate::linalg::{Matrix, Threads, gemm};

/// Heads are summed in at most this many groups, whatever the number of threads, so that results do
/// not depend on it.
const HEAD_GROUPS: usize = 8;

/// The matrices of a converted layer in f32, or a gradient with respect to them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parameters {
    /// `[r + d_r, 2*G*d]`
    pub(crate) encoder: Matrix<f32>,
    /// Per head `[d, r]`.
    pub(crate) w_uk: Vec<Matrix<f32>>,
    /// Per head `[d, r]`.
    pub(crate) w_uv: Vec<Matrix<f32>>,
    /// Per head `[d_r, d]`.
    pub(crate) q_rope: Vec<Matrix<f32>>,
}

impl Parameters {
    pub(crate) fn of(factors: &LayerFactors) -> Self {
        let cast = |list: &[Matrix<f64>]| list.iter().map(Matrix::cast).collect();
        Self {
            encoder: factors.encoder.cast(),
            w_uk: cast(&factors.w_uk),
            w_uv: cast(&factors.w_uv),
            q_rope: cast(&factors.q_rope),
        }
    }

    pub(crate) fn write_to(&self, factors: &mut LayerFactors) {
        let cast = |list: &[Matrix<f32>]| list.iter().map(Matrix::cast).collect();
        factors.encoder = self.encoder.cast();
        factors.w_uk = cast(&self.w_uk);
        factors.w_uv = cast(&self.w_uv);
        factors.q_rope = cast(&self.q_rope);
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (x, y) in self.matrices_mut().into_iter().zip(other.matrices()) {
            x.add_scaled(y, 1.0);
        }
    }

    /// Every matrix, in a fixed order.
    pub(crate) fn matrices(&self) -> Vec<&Matrix<f32>> {
        std::iter::once(&self.encoder)
            .chain(&self.w_uk)
            .chain(&self.w_uv)
            .chain(&self.q_rope)
            .collect()
    }

    /// Every matrix, in the same order.
    pub(crate) fn matrices_mut(&mut self) -> Vec<&mut Matrix<f32>> {
        std::iter::once(&mut self.encoder)
            .chain(&mut self.w_uk)
            .chain(&mut self.w_uv)
            .chain(&mut self.q_rope)
            .collect()
    }
}

/// Query rows of a window and what the layer should put out for them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    /// `[k ; v]` of every token of the window: `[L, 2*G*d]`.
    pub(crate) stacked: &'a Matrix<f32>,
    /// Ascending positions of the rows.
    pub(crate) positions: &'a [usize],
    /// Queries before rotation `[rows, H*d]`.
    pub(crate) queries: &'a Matrix<f32>,
    /// Wanted output `[rows, D]`.
    pub(crate) targets: &'a Matrix<f32>,
}

/// A layer whose error is differentiated.
pub(crate) struct Differentiable<'a> {
    pub(crate) attention: &'a Attention,
    /// Output projection `[D, H*d]`.
    pub(crate) o: &'a Matrix<f32>,
    /// Latent numbers, r.
    pub(crate) latent: usize,
    /// Rotation of the shared rotary key.
    pub(crate) table: &'a RotationTable,
}

/// Gradients of one head's `w_uk`, `w_uv` and `q_rope`.
type HeadGradient = [Matrix<f32>; 3];

/// What the forward pass of one head and block of rows leaves.
struct Forward {
    /// Absorbed queries, turned and scaled `[m, r + d_r]`.
    absorbed: Matrix<f32>,
    /// `[m, keys]`
    p: Matrix<f32>,
    /// `[m, r]`
    context: Matrix<f32>,
    /// `[m, d]`
    output: Matrix<f32>,
}

impl Differentiable<'_> {
    /// `sum_t |W_o o_t - T_t|^2` and its gradient.
    pub(crate) fn error_and_gradient(
        &self,
        parameters: &Parameters,
        batch: &Batch<'_>,
    ) -> (f64, Parameters) {
        let shape = self.attention.shape;
        let (d, r, width) = (shape.head_dim, self.latent, parameters.encoder.rows());
        let tokens = batch.positions.last().map_or(0, |t| t + 1);
        let stacked = batch.stacked.view().subrows(0, tokens);
        let blocks = row_blocks(batch.positions, self.attention);

        let mut rows = Matrix::<f32>::zeros(tokens, width);
        gemm(
            rows.view_mut(),
            false,
            stacked,
            parameters.encoder.view().transpose(),
            1.0,
            Threads::All,
        );
        self.turn_rows(&mut rows, 0..tokens, false);

        let tasks: Vec<(usize, &RowBlock)> = (0..shape.query_heads)
            .flat_map(|h| blocks.iter().map(move |b| (h, b)))
            .collect();
        let forward: Vec<Forward> = tasks
            .par_iter()
            .map(|&(h, block)| self.forward(parameters, batch, block, h, &rows))
            .collect();
        let mut heads = Matrix::<f32>::zeros(batch.positions.len(), shape.query_width());
        for ((h, block), part) in tasks.iter().zip(&forward) {
            for (i, row) in block.rows.clone().enumerate() {
                heads.row_mut(row)[h * d..(h + 1) * d].copy_from_slice(part.output.row(i));
            }
        }
        let mut difference = heads.times_transposed(self.o);
        difference.add_scaled(batch.targets, -1.0);
        let error = difference
            .data()
            .iter()
            .map(|&x| f64::from(x) * f64::from(x))
            .sum();
        difference.scale(2.0);
        let heads_gradient = difference.times(self.o);

        // Groups of heads in parallel; within a group one after the other onto the same sums.
        let group = shape.query_heads.div_ceil(HEAD_GROUPS);
        let forward = &forward;
        let parts: Vec<(Matrix<f32>, Vec<HeadGradient>)> = (0..shape.query_heads)
            .collect::<Vec<_>>()
            .par_chunks(group)
            .map(|group| {
                let mut rows_gradient = Matrix::<f32>::zeros(tokens, width);
                let heads = group
                    .iter()
                    .map(|&h| {
                        let mut sums = [
                            Matrix::zeros(d, r),
                            Matrix::zeros(d, r),
                            Matrix::zeros(width - r, d),
                        ];
                        for (b, block) in blocks.iter().enumerate() {
                            let part = &forward[h * blocks.len() + b];
                            let gradient = heads_gradient.view().submatrix(
                                block.rows.start,
                                h * d,
                                block.rows.len(),
                                d,
                            );
                            self.backward(
                                parameters,
                                batch,
                                block,
                                h,
                                &rows,
                                part,
                                gradient,
                                &mut sums,
                                &mut rows_gradient,
                            );
                        }
                        sums
                    })
                    .collect();
                (rows_gradient, heads)
            })
            .collect();

        let mut rows_gradient = Matrix::<f32>::zeros(tokens, width);
        let (mut w_uk, mut w_uv, mut q_rope) = (Vec::new(), Vec::new(), Vec::new());
        for (part, heads) in parts {
            rows_gradient.add_scaled(&part, 1.0);
            for [uk, uv, rope] in heads {
                w_uk.push(uk);
                w_uv.push(uv);
                q_rope.push(rope);
            }
        }
        self.turn_rows(&mut rows_gradient, 0..tokens, true);
        let mut encoder = Matrix::<f32>::zeros(width, stacked.ncols());
        gemm(
            encoder.view_mut(),
            false,
            rows_gradient.view().transpose(),
            stacked,
            1.0,
            Threads::All,
        );
        (
            error,
            Parameters {
                encoder,
                w_uk,
                w_uv,
                q_rope,
            },
        )
    }

    fn forward(
        &self,
        parameters: &Parameters,
        batch: &Batch<'_>,
        block: &RowBlock,
        h: usize,
        rows: &Matrix<f32>,
    ) -> Forward {
        let (d, r, width) = (self.attention.shape.head_dim, self.latent, rows.cols());
        let scale = self.attention.scale;
        let q = batch
            .queries
            .view()
            .submatrix(block.rows.start, h * d, block.rows.len(), d);
        let mut absorbed = Matrix::<f32>::zeros(block.rows.len(), width);
        gemm(
            absorbed.view_mut().subcols_mut(0, r),
            false,
            q,
            parameters.w_uk[h].view(),
            scale,
            Threads::One,
        );
        gemm(
            absorbed.view_mut().subcols_mut(r, width - r),
            false,
            q,
            parameters.q_rope[h].view().transpose(),
            scale,
            Threads::One,
        );
        self.turn_queries(&mut absorbed, &batch.positions[block.rows.clone()], false);
        let keys = rows.view().subrows(block.keys.start, block.keys.len());
        let p = block_probabilities(
            self.attention,
            h,
            batch.positions,
            block,
            absorbed.view(),
            keys,
        );
        let context = product(p.view(), keys.subcols(0, r));
        let output = product(context.view(), parameters.w_uv[h].view().transpose());
        Forward {
            absorbed,
            p,
            context,
            output,
        }
    }

    fn backward(
        &self,
        parameters: &Parameters,
        batch: &Batch<'_>,
        block: &RowBlock,
        h: usize,
        rows: &Matrix<f32>,
        forward: &Forward,
        gradient: MatRef<'_, f32>,
        [w_uk, w_uv, q_rope]: &mut HeadGradient,
        rows_gradient: &mut Matrix<f32>,
    ) {
        let (d, r, width) = (self.attention.shape.head_dim, self.latent, rows.cols());
        let scale = self.attention.scale;
        let keys = rows.view().subrows(block.keys.start, block.keys.len());
        gemm(
            w_uv.view_mut(),
            true,
            gradient.transpose(),
            forward.context.view(),
            1.0,
            Threads::One,
        );
        let context = product(gradient, parameters.w_uv[h].view());
        // Softmax: dx = p (dp - sum p dp).
        let mut scores = product(context.view(), keys.subcols(0, r).transpose());
        for i in 0..scores.rows() {
            let (p, row) = (forward.p.row(i), scores.row_mut(i));
            let mean = dot(p, row);
            for (x, p) in row.iter_mut().zip(p) {
                *x = p * (*x - mean);
            }
        }
        let mut target = rows_gradient
            .view_mut()
            .subrows_mut(block.keys.start, block.keys.len());
        gemm(
            target.as_mut(),
            true,
            scores.view().transpose(),
            forward.absorbed.view(),
            1.0,
            Threads::One,
        );
        gemm(
            target.subcols_mut(0, r),
            true,
            forward.p.view().transpose(),
            context.view(),
            1.0,
            Threads::One,
        );

        let mut absorbed = product(scores.view(), keys);
        self.turn_queries(&mut absorbed, &batch.positions[block.rows.clone()], true);
        let q = batch
            .queries
            .view()
            .submatrix(block.rows.start, h * d, block.rows.len(), d);
        gemm(
            w_uk.view_mut(),
            true,
            q.transpose(),
            absorbed.view().subcols(0, r),
            scale,
            Threads::One,
        );
        gemm(
            q_rope.view_mut(),
            true,
            absorbed.view().subcols(r, width - r).transpose(),
            q,
            scale,
            Threads::One,
        );
    }

    /// Turns the rotary part of cached rows (or turns it back).
    fn turn_rows(&self, rows: &mut Matrix<f32>, positions: Range<usize>, back: bool) {
        let (r, width) = (self.latent, rows.cols());
        rows.data_mut()
            .par_chunks_mut(width)
            .zip(positions)
            .for_each(|(row, s)| self.table.turn(&mut row[r..], s, back));
    }

    /// Turns the rotary part of absorbed queries (or turns it back).
    fn turn_queries(&self, queries: &mut Matrix<f32>, positions: &[usize], back: bool) {
        for (i, &t) in positions.iter().enumerate() {
            self.table
                .turn(&mut queries.row_mut(i)[self.latent..], t, back);
        }
    }
}

fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Matrix<f32> {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    gemm(out.view_mut(), false, a, b, 1.0, Threads::One);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{AttentionShape, Rotary};
    use crate::statistics::split_mix;

    fn random(rows: usize, cols: usize, seed: u64, size: f32) -> Matrix<f32> {
        let mut n = seed << 32;
        Matrix::from_fn(rows, cols, |_, _| {
            n += 1;
            ((split_mix(n) >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size
        })
    }

    /// Every kind of matrix, against central differences.
    #[test]
    fn gradient_matches_differences() {
        let shape = AttentionShape {
            hidden: 12,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 6,
        };
        for (sliding_window, sinks) in [(None, None), (Some(9), Some(vec![0.5, -1.0, 2.0, 1.0]))] {
            let attention = Attention {
                shape,
                rotary: Rotary {
                    inv_freq: vec![1.0, 0.3, 0.05],
                    attention_factor: 1.0,
                },
                scale: 0.5,
                sliding_window,
                sinks,
            };
            let (r, d_r, tokens) = (7, 4, 40);
            let (o, stacked) = (random(12, 24, 1, 0.5), random(tokens, 24, 2, 1.0));
            let positions: Vec<usize> = (0..tokens).step_by(2).collect();
            let (queries, targets) = (
                random(positions.len(), 24, 3, 1.5),
                random(positions.len(), 12, 4, 1.0),
            );
            let table = RotationTable::new(&[0.7, 0.1], tokens);
            let layer = Differentiable {
                attention: &attention,
                o: &o,
                latent: r,
                table: &table,
            };
            let batch = Batch {
                stacked: &stacked,
                positions: &positions,
                queries: &queries,
                targets: &targets,
            };
            let list = |rows: usize, cols: usize, seed: u64| {
                (0..4).map(|h| random(rows, cols, seed + h, 0.6)).collect()
            };
            let parameters = Parameters {
                encoder: random(r + d_r, 24, 5, 0.5),
                w_uk: list(6, r, 10),
                w_uv: list(6, r, 20),
                q_rope: list(d_r, 6, 30),
            };
            let (_, gradient) = layer.error_and_gradient(&parameters, &batch);
            for (i, g) in gradient.matrices().into_iter().enumerate() {
                let direction = random(g.rows(), g.cols(), 50 + i as u64, 1.0);
                let moved = |by: f32| {
                    let mut moved = parameters.clone();
                    moved.matrices_mut()[i].add_scaled(&direction, by);
                    layer.error_and_gradient(&moved, &batch).0
                };
                let measured = (moved(2e-3) - moved(-2e-3)) / 4e-3;
                let expected: f64 = g
                    .data()
                    .iter()
                    .zip(direction.data())
                    .map(|(a, b)| f64::from(a * b))
                    .sum();
                assert!(
                    (measured - expected).abs() < 0.01 * (1.0 + expected.abs()),
                    "matrix {i}: differences {measured}, gradient {expected}"
                );
            }
        }
    }
}
