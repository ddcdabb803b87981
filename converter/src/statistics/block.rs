//! The sums over one head's block of query rows.

use faer::MatRef;
use rayon::prelude::*;

use super::WindowActivations;
use crate::attention::{RotationTable, RowBlock, block_probabilities, dot, sum};
use crate::layer::{Attention, AttentionShape};
use crate::linalg::{Matrix, Threads, gemm};

/// What one head's block of query rows adds.
pub(super) struct BlockSums {
    /// Attention received by each key of the block, `sum_t p^2`.
    pub(super) attended: Vec<f32>,
    /// `sum_t p^2 |v_s - o_t|^2` by key.
    pub(super) sensitive: Vec<f32>,
    pub(super) distance_p: Vec<f32>,
    pub(super) distance_p2: Vec<f32>,
    /// `sum_t u_t q q^T` `[d, d]`.
    pub(super) query: Matrix<f32>,
    /// By frequency: `sum W |q_l|^2 |k_l|^2` times 1, `cos(theta_l D)`, `sin(theta_l D)`.
    pub(super) rotation: Vec<[f64; 3]>,
}

/// What the blocks of one window share per KV head.
pub(super) struct WindowGroups<'a> {
    /// Rotated keys `[L, d]`.
    keys: Vec<Matrix<f32>>,
    /// Values `[L, d]`.
    pub(super) values: Vec<MatRef<'a, f32>>,
    /// `|k_l|^2` times 1, `cos(theta_l s)`, `sin(theta_l s)`: `[L, 3 * d/2]`.
    energies: Vec<Matrix<f32>>,
}

impl<'a> WindowGroups<'a> {
    pub(super) fn new(
        window: &WindowActivations<'a>,
        shape: &AttentionShape,
        table: &RotationTable,
    ) -> Self {
        let (tokens, d, half) = (window.tokens, shape.head_dim, shape.frequencies());
        let (keys, energies) = (0..shape.kv_heads)
            .into_par_iter()
            .map(|g| {
                let mut rotated = Matrix::zeros(tokens, d);
                let mut energies = Matrix::zeros(tokens, 3 * half);
                for s in 0..tokens {
                    let start = s * shape.kv_width() + g * d;
                    let key = &window.k[start..start + d];
                    table.rotate(key, rotated.row_mut(s), s, 1.0);
                    let (cos, sin) = table.at(s);
                    let row = energies.row_mut(s);
                    for l in 0..half {
                        let energy = key[l] * key[l] + key[l + half] * key[l + half];
                        row[l] = energy;
                        row[l + half] = energy * cos[l];
                        row[l + 2 * half] = energy * sin[l];
                    }
                }
                (rotated, energies)
            })
            .unzip();
        let values = (0..shape.kv_heads)
            .map(|g| {
                MatRef::from_row_major_slice_with_stride(
                    &window.v[g * d..],
                    tokens,
                    d,
                    shape.kv_width(),
                )
            })
            .collect();
        Self {
            keys,
            values,
            energies,
        }
    }
}

/// What the blocks of one window share.
pub(super) struct BlockContext<'a> {
    pub(super) attention: &'a Attention,
    pub(super) table: &'a RotationTable,
    pub(super) window: &'a WindowActivations<'a>,
    /// Positions of the sampled query rows.
    pub(super) positions: &'a [usize],
}

impl<'a> BlockContext<'a> {
    /// The value of token `s` that query head `head` reads.
    pub(super) fn value(&self, head: usize, s: usize) -> &'a [f32] {
        let shape = self.attention.shape;
        let start = s * shape.kv_width() + shape.group_of(head) * shape.head_dim;
        &self.window.v[start..start + shape.head_dim]
    }

    fn query(&self, head: usize, t: usize) -> &'a [f32] {
        let shape = self.attention.shape;
        let start = t * shape.query_width() + head * shape.head_dim;
        &self.window.q[start..start + shape.head_dim]
    }

    /// The sums of one head (output metric B, `v^T B v` of every token) over one block of rows.
    pub(super) fn sums(
        &self,
        block: &RowBlock,
        head: usize,
        groups: &WindowGroups<'_>,
        metric: &Matrix<f32>,
        value_norms: &[f32],
    ) -> BlockSums {
        let shape = self.attention.shape;
        let (d, half, g) = (shape.head_dim, shape.frequencies(), shape.group_of(head));
        let (first, n, m) = (block.keys.start, block.keys.len(), block.rows.len());
        let factor = (self.attention.scale * self.attention.rotary.attention_factor.powi(2)) as f32;
        let positions = &self.positions[block.rows.clone()];

        let mut queries = Matrix::zeros(m, d);
        for (i, &t) in positions.iter().enumerate() {
            self.table
                .rotate(self.query(head, t), queries.row_mut(i), t, factor);
        }
        let keys = groups.keys[g].view().subrows(first, n);
        let values = groups.values[g].subrows(first, n);
        let mut p = block_probabilities(
            self.attention,
            head,
            self.positions,
            block,
            queries.view(),
            keys,
        );
        let outputs = product(p.view(), values);
        let mapped = product(outputs.view(), metric.view());
        // v_s B o_t [m, n]
        let mut weights = product(mapped.view(), values.transpose());

        let (mut distance_p, mut distance_p2) =
            (vec![0.0; block.keys.end], vec![0.0; block.keys.end]);
        let (mut attended, mut sensitive) = (vec![0.0; n], vec![0.0; n]);
        let mut weighted_queries = Matrix::zeros(m, d);
        for (i, &t) in positions.iter().enumerate() {
            let visible = self.attention.first_visible(t) - first..t + 1 - first;
            let p = &mut p.row_mut(i)[visible.clone()];
            for (total, x) in distance_p.iter_mut().zip(p.iter().rev()) {
                *total += x;
            }
            for (total, x) in attended[visible.clone()].iter_mut().zip(p.iter_mut()) {
                *x *= *x;
                *total += *x;
            }
            for (total, x) in distance_p2.iter_mut().zip(p.iter().rev()) {
                *total += x;
            }
            // W = p^2 |v - o|^2 = p^2 (v B v - 2 v B o + o B o)
            let output_norm = dot(outputs.row(i), mapped.row(i));
            let row = weights.row_mut(i);
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            let row = &mut row[visible.clone()];
            let norms = &value_norms[first + visible.start..first + visible.end];
            for ((w, p2), norm) in row.iter_mut().zip(p.iter()).zip(norms) {
                *w = (p2 * (norm - 2.0 * *w + output_norm)).max(0.0);
            }
            for (total, w) in sensitive[visible].iter_mut().zip(row.iter()) {
                *total += w;
            }
            let root = sum(row).sqrt();
            for (x, q) in weighted_queries
                .row_mut(i)
                .iter_mut()
                .zip(self.query(head, t))
            {
                *x = q * root;
            }
        }
        let query = product(weighted_queries.view().transpose(), weighted_queries.view());

        // sum_s W |k_l|^2 e^{-i theta_l s} by row, turned by e^{i theta_l t}.
        let turned = product(weights.view(), groups.energies[g].view().subrows(first, n));
        let mut rotation = vec![[0.0; 3]; half];
        for (i, &t) in positions.iter().enumerate() {
            let (row, q, (cos, sin)) = (turned.row(i), self.query(head, t), self.table.at(t));
            for (l, sums) in rotation.iter_mut().enumerate() {
                let energy = q[l] * q[l] + q[l + half] * q[l + half];
                let (one, c, s) = (row[l], row[l + half], row[l + 2 * half]);
                sums[0] += f64::from(energy * one);
                sums[1] += f64::from(energy * (cos[l] * c + sin[l] * s));
                sums[2] += f64::from(energy * (sin[l] * c - cos[l] * s));
            }
        }
        BlockSums {
            attended,
            sensitive,
            distance_p,
            distance_p2,
            query,
            rotation,
        }
    }
}

fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Matrix<f32> {
    let mut out = Matrix::zeros(a.nrows(), b.ncols());
    gemm(out.view_mut(), false, a, b, 1.0, Threads::One);
    out
}
