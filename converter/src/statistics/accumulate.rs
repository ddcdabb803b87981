//! One window into the statistics.

use faer::{MatRef, c64};
use rayon::prelude::*;

use super::block::{BlockContext, BlockSums, WindowGroups};
use super::sample::{WindowSample, split_mix, stack, stratified_positions};
use super::{LayerStatistics, WindowActivations, add_padded};
use crate::attention::{RotationTable, RowBlock, dot, max_abs_finite, row_blocks};
use crate::error::{Error, refuse};
use crate::linalg::{Matrix, Threads, gemm, gram_accumulate};

impl LayerStatistics {
    /// Adds one window.
    ///
    /// For the sampled query rows the causal attention probabilities p are computed exactly; from
    /// them come token weights, distances and sensitivities. Query moments and the unweighted
    /// moment use every token.
    pub fn accumulate(&mut self, window: &WindowActivations<'_>) -> Result<(), Error> {
        self.add(window, None)
    }

    /// Adds one window together with what the layer should put out for it, `[L, D]` (without the
    /// bias of `o_proj`): in sequential calibration the original model's attention output, while
    /// the window comes from the converted layers below. Errors are then measured against it.
    pub fn accumulate_with_target(
        &mut self,
        window: &WindowActivations<'_>,
        target: &[f32],
    ) -> Result<(), Error> {
        self.check_target(window, target)?;
        self.add(window, Some(target))
    }

    /// Refuses targets that do not belong to the window or are not finite.
    pub(crate) fn check_target(
        &self,
        window: &WindowActivations<'_>,
        target: &[f32],
    ) -> Result<(), Error> {
        let expected = window.tokens * self.attention.shape.hidden;
        if target.len() != expected || max_abs_finite(target).is_none() {
            return Err(refuse(
                format!("attention outputs of layer {}", self.layer),
                format!(
                    "{expected} finite numbers ([{}, {}])",
                    window.tokens, self.attention.shape.hidden
                ),
                if target.len() == expected {
                    "NaN or infinity".to_owned()
                } else {
                    target.len().to_string()
                },
                "export the calibration graph again from the same checkpoint",
            ));
        }
        Ok(())
    }

    fn add(&mut self, window: &WindowActivations<'_>, target: Option<&[f32]>) -> Result<(), Error> {
        self.check_window(window)?;
        let shape = self.attention.shape;
        let (tokens, d) = (window.tokens, shape.head_dim);
        if self.table.positions() < tokens {
            self.table = RotationTable::new(&self.attention.rotary.inv_freq, tokens);
        }
        let positions = stratified_positions(
            tokens,
            self.options.sampled_rows,
            split_mix(self.options.seed ^ self.windows as u64),
        );
        let blocks = row_blocks(&positions, &self.attention);

        let groups = WindowGroups::new(window, &shape, &self.table);
        let metrics: Vec<Matrix<f32>> = self.heads.iter().map(|h| h.output_metric.cast()).collect();
        let context = BlockContext {
            attention: &self.attention,
            table: &self.table,
            window,
            positions: &positions,
        };

        // Per head: v^T B v of every token.
        let value_norms: Vec<Vec<f32>> = (0..shape.query_heads)
            .into_par_iter()
            .map(|h| {
                let v = groups.values[shape.group_of(h)];
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
                    .map(|s| dot(mapped.row(s), context.value(h, s)))
                    .collect()
            })
            .collect();

        let tasks: Vec<(usize, &RowBlock)> = (0..shape.query_heads)
            .flat_map(|h| blocks.iter().map(move |b| (h, b)))
            .collect();
        let sums: Vec<BlockSums> = tasks
            .par_iter()
            .map(|&(h, block)| context.sums(block, h, &groups, &metrics[h], &value_norms[h]))
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
            for (l, [energy, re, im]) in part.rotation.iter().enumerate() {
                head.rotation_energy[l] += energy;
                head.rotation[l] += c64::new(*re, *im);
            }
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
            self.samples
                .push(WindowSample::new(window, &shape, chosen, target));
        }
        for (most, data) in self.largest.iter_mut().zip([window.q, window.k, window.v]) {
            *most = most.max(max_abs_finite(data).unwrap_or(f32::INFINITY));
        }
        self.windows += 1;
        self.tokens += tokens;
        self.rows += positions.len();
        Ok(())
    }

    /// Refuses windows whose parts do not fit the attention or are not finite.
    pub(crate) fn check_window(&self, window: &WindowActivations<'_>) -> Result<(), Error> {
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
