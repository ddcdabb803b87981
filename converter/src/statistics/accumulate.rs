//! One window into the statistics.

use faer::MatRef;
use rayon::prelude::*;

use super::sample::{WindowSample, split_mix, stack, stratified_positions};
use super::{LayerStatistics, WindowActivations, add_padded};
use crate::attention::{
    RotationTable, RowBlock, block_probabilities, dot, max_abs_finite, row_blocks, sum,
};
use crate::error::{Error, refuse};
use crate::linalg::{Matrix, Threads, gemm, gram_accumulate};

/// What one head's block of query rows adds.
struct BlockSums {
    /// Attention received by each key of the block, `sum_t p^2`.
    attended: Vec<f32>,
    /// `sum_t p^2 |v_s - o_t|^2` by key.
    sensitive: Vec<f32>,
    distance_p: Vec<f32>,
    distance_p2: Vec<f32>,
    /// `sum_t u_t q q^T` `[d, d]`.
    query: Matrix<f32>,
}

impl LayerStatistics {
    /// Adds one window.
    ///
    /// For the sampled query rows the causal attention probabilities p are computed exactly; from
    /// them come token weights, distances and sensitivities. Query moments and the unweighted
    /// moment use every token.
    pub fn accumulate(&mut self, window: &WindowActivations<'_>) -> Result<(), Error> {
        self.check_window(window)?;
        let shape = self.attention.shape;
        let (tokens, d, groups) = (window.tokens, shape.head_dim, shape.kv_heads);
        if self.table.positions() < tokens {
            self.table = RotationTable::new(&self.attention.rotary.inv_freq, tokens);
        }
        let positions = stratified_positions(
            tokens,
            self.options.sampled_rows,
            split_mix(self.options.seed ^ self.windows as u64),
        );
        let blocks = row_blocks(&positions, &self.attention);

        // Rotated keys [G][L, d] and values as views.
        let keys: Vec<Matrix<f32>> = (0..groups)
            .into_par_iter()
            .map(|g| {
                let mut rotated = Matrix::zeros(tokens, d);
                for s in 0..tokens {
                    let start = s * groups * d + g * d;
                    self.table
                        .rotate(&window.k[start..start + d], rotated.row_mut(s), s, 1.0);
                }
                rotated
            })
            .collect();
        let values: Vec<MatRef<'_, f32>> = (0..groups)
            .map(|g| {
                MatRef::from_row_major_slice_with_stride(&window.v[g * d..], tokens, d, groups * d)
            })
            .collect();

        // Per head: v^T B v of every token.
        let metrics: Vec<Matrix<f32>> = self.heads.iter().map(|h| h.output_metric.cast()).collect();
        let value_norms: Vec<Vec<f32>> = (0..shape.query_heads)
            .into_par_iter()
            .map(|h| {
                let v = values[shape.group_of(h)];
                let mut mapped = Matrix::zeros(tokens, d);
                gemm(
                    mapped.view_mut(),
                    false,
                    v,
                    metrics[h].view(),
                    1.0,
                    Threads::One,
                );
                (0..tokens)
                    .map(|s| {
                        dot(
                            mapped.row(s),
                            value_row(window, groups, d, shape.group_of(h), s),
                        )
                    })
                    .collect()
            })
            .collect();

        let tasks: Vec<(usize, &RowBlock)> = (0..shape.query_heads)
            .flat_map(|h| blocks.iter().map(move |b| (h, b)))
            .collect();
        let sums: Vec<BlockSums> = tasks
            .par_iter()
            .map(|&(h, block)| {
                let g = shape.group_of(h);
                self.block_sums(
                    window,
                    &positions,
                    block,
                    h,
                    &keys[g],
                    values[g],
                    &metrics[h],
                    &value_norms[h],
                )
            })
            .collect();

        let (mut attended, mut sensitive) = (vec![0.0f32; tokens], vec![0.0f32; tokens]);
        for (&(h, block), part) in tasks.iter().zip(&sums) {
            let head = &mut self.heads[h];
            for (i, s) in block.keys.clone().enumerate() {
                attended[s] += part.attended[i];
                sensitive[s] += part.sensitive[i];
            }
            head.p2 += part.attended.iter().map(|&x| f64::from(x)).sum::<f64>();
            head.sensitivity += part.sensitive.iter().map(|&x| f64::from(x)).sum::<f64>();
            add_padded(&mut head.distance_p, &widen(&part.distance_p));
            add_padded(&mut head.distance_p2, &widen(&part.distance_p2));
            head.query_sensitive.add_scaled(&part.query.cast(), 1.0);
        }
        self.heads.par_iter_mut().enumerate().for_each(|(h, head)| {
            let q = MatRef::from_row_major_slice_with_stride(
                &window.q[h * d..],
                tokens,
                d,
                shape.query_width(),
            );
            gram_accumulate(&mut head.query, q, Threads::One);
        });

        let stacked = stack(window, &shape);
        gram_accumulate(&mut self.moment, stacked.view(), Threads::All);
        gram_accumulate(
            &mut self.moment_attended,
            weighted(&stacked, &attended).view(),
            Threads::All,
        );
        gram_accumulate(
            &mut self.moment_sensitive,
            weighted(&stacked, &sensitive).view(),
            Threads::All,
        );
        self.attended += attended.iter().map(|&x| f64::from(x)).sum::<f64>();
        self.sensitive += sensitive.iter().map(|&x| f64::from(x)).sum::<f64>();

        if self.samples.len() < self.options.kept_windows {
            let chosen = stratified_positions(
                positions.len(),
                self.options.evaluated_rows,
                split_mix(!self.options.seed),
            );
            let chosen = chosen.into_iter().map(|i| positions[i]).collect();
            self.samples.push(WindowSample::new(window, &shape, chosen));
        }
        self.windows += 1;
        self.tokens += tokens;
        self.rows += positions.len();
        Ok(())
    }

    fn block_sums(
        &self,
        window: &WindowActivations<'_>,
        positions: &[usize],
        block: &RowBlock,
        head: usize,
        keys: &Matrix<f32>,
        values: MatRef<'_, f32>,
        metric: &Matrix<f32>,
        value_norms: &[f32],
    ) -> BlockSums {
        let shape = self.attention.shape;
        let (d, n, m) = (shape.head_dim, block.keys.len(), block.rows.len());
        let factor = (self.attention.scale * self.attention.rotary.attention_factor.powi(2)) as f32;
        let mut queries = Matrix::zeros(m, d);
        for (i, &t) in positions[block.rows.clone()].iter().enumerate() {
            self.table.rotate(
                query_row(window, &shape, head, t),
                queries.row_mut(i),
                t,
                factor,
            );
        }
        let keys = keys.view().subrows(block.keys.start, n);
        let values = values.subrows(block.keys.start, n);
        let mut p = block_probabilities(&self.attention, positions, block, queries.view(), keys);

        let mut outputs = Matrix::zeros(m, d);
        gemm(
            outputs.view_mut(),
            false,
            p.view(),
            values,
            1.0,
            Threads::One,
        );
        let mut mapped = Matrix::zeros(m, d);
        gemm(
            mapped.view_mut(),
            false,
            outputs.view(),
            metric.view(),
            1.0,
            Threads::One,
        );

        let (mut distance_p, mut distance_p2) =
            (vec![0.0; block.keys.end], vec![0.0; block.keys.end]);
        let mut attended = vec![0.0; n];
        let mut own = vec![0.0; n];
        let mut weighted_queries = Matrix::zeros(m, d);
        for (i, &t) in positions[block.rows.clone()].iter().enumerate() {
            let visible =
                self.attention.first_visible(t) - block.keys.start..t + 1 - block.keys.start;
            let p = &mut p.row_mut(i)[visible.clone()];
            for (h, x) in distance_p.iter_mut().zip(p.iter().rev()) {
                *h += x;
            }
            for x in p.iter_mut() {
                *x *= *x;
            }
            for (h, x) in distance_p2.iter_mut().zip(p.iter().rev()) {
                *h += x;
            }
            let output_norm = dot(outputs.row(i), mapped.row(i));
            for ((a, o), x) in attended[visible.clone()]
                .iter_mut()
                .zip(&mut own[visible.clone()])
                .zip(p.iter())
            {
                *a += x;
                *o += x * output_norm;
            }
            // u_t = sum_s p^2 (v B v - 2 v B o + o B o); the middle term needs sum_s p^2 v_s and is
            // formed below for all rows at once.
            let start = block.keys.start;
            let norms = &value_norms[start + visible.start..start + visible.end];
            let u = dot(p, norms) + sum(p) * output_norm;
            weighted_queries.row_mut(i)[0] = u;
        }
        // sum_s p^2 v_s [m, d]
        let mut squared_outputs = Matrix::zeros(m, d);
        gemm(
            squared_outputs.view_mut(),
            false,
            p.view(),
            values,
            1.0,
            Threads::One,
        );
        for (i, &t) in positions[block.rows.clone()].iter().enumerate() {
            let u = weighted_queries[(i, 0)] - 2.0 * dot(squared_outputs.row(i), mapped.row(i));
            let root = u.max(0.0).sqrt();
            for (x, q) in weighted_queries
                .row_mut(i)
                .iter_mut()
                .zip(query_row(window, &shape, head, t))
            {
                *x = q * root;
            }
        }
        let mut query = Matrix::zeros(d, d);
        gemm(
            query.view_mut(),
            false,
            weighted_queries.view().transpose(),
            weighted_queries.view(),
            1.0,
            Threads::One,
        );

        // sum_t p^2 B o_t by key [n, d]
        let mut pulled = Matrix::zeros(n, d);
        gemm(
            pulled.view_mut(),
            false,
            p.view().transpose(),
            mapped.view(),
            1.0,
            Threads::One,
        );
        let group = shape.group_of(head);
        let sensitive = (0..n)
            .map(|i| {
                let s = block.keys.start + i;
                let cross = dot(
                    pulled.row(i),
                    value_row(window, shape.kv_heads, d, group, s),
                );
                (attended[i] * value_norms[s] - 2.0 * cross + own[i]).max(0.0)
            })
            .collect();
        BlockSums {
            attended,
            sensitive,
            distance_p,
            distance_p2,
            query,
        }
    }

    fn check_window(&self, window: &WindowActivations<'_>) -> Result<(), Error> {
        let shape = self.attention.shape;
        if window.tokens == 0 {
            return Err(refuse(
                format!("calibration window of layer {}", self.layer),
                "at least one token",
                "none",
                "give a longer calibration text",
            ));
        }
        let parts = [
            ("queries", window.q, shape.query_heads),
            ("keys", window.k, shape.kv_heads),
            ("values", window.v, shape.kv_heads),
        ];
        for (name, data, heads) in parts {
            let expected = window.tokens * heads * shape.head_dim;
            if data.len() != expected {
                return Err(refuse(
                    format!("{name} of layer {}", self.layer),
                    format!(
                        "{expected} numbers ([{}, {heads}, {}])",
                        window.tokens, shape.head_dim
                    ),
                    data.len().to_string(),
                    "export the calibration graph again from the same checkpoint",
                ));
            }
            if max_abs_finite(data).is_none() {
                let at = data.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(refuse(
                    format!("{name} of layer {}", self.layer),
                    "finite activations",
                    format!("{} at token {}", data[at], at / (heads * shape.head_dim)),
                    "check the checkpoint for broken weights, or calibrate in f32",
                ));
            }
        }
        Ok(())
    }
}

fn value_row<'a>(
    window: &WindowActivations<'a>,
    groups: usize,
    d: usize,
    g: usize,
    s: usize,
) -> &'a [f32] {
    &window.v[(s * groups + g) * d..(s * groups + g + 1) * d]
}

fn query_row<'a>(
    window: &WindowActivations<'a>,
    shape: &crate::layer::AttentionShape,
    h: usize,
    t: usize,
) -> &'a [f32] {
    let start = (t * shape.query_heads + h) * shape.head_dim;
    &window.q[start..start + shape.head_dim]
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Rows of `stacked` times the square roots of their weights.
fn weighted(stacked: &Matrix<f32>, weights: &[f32]) -> Matrix<f32> {
    let mut result = stacked.clone();
    for (s, w) in weights.iter().enumerate() {
        let root = w.sqrt();
        for x in result.row_mut(s) {
            *x *= root;
        }
    }
    result
}
