//! Statistics from weights alone (`--calib none`).
//!
//! The layer's input is taken as `x = gamma * z`, z standard normal: what an RMS norm with weight
//! gamma gives for a residual stream without preferred directions. Then for any projection
//! `y = W x + b`: `E[y y^T] = W diag(gamma^2) W^T + b b^T`.
//!
//! With a per-head norm of queries and keys (Qwen3) the head `y` becomes `n * y / rms(y)`; the
//! random rms is replaced by its root mean square, so head moments are scaled to mean square 1
//! and then by `n` on both sides.
//!
//! Attention has no data to look at: all tokens weigh the same, distances follow
//! [`DistancePrior`], and the sensitivity of the output to scores is `tr(B_h E[v v^T])`, the
//! attended value against an average of many.

use rayon::prelude::*;

use super::{HeadStatistics, LayerStatistics, StatisticsOptions};
use crate::error::{Error, refuse};
use crate::layer::{LayerWeights, Projection};
use crate::linalg::Matrix;
use crate::steps::constant::mean_rotation;

/// Assumed distribution of attention over the distance D between query and key:
/// `(1 + D)^-exponent` for D below `length` (and below the layer's window).
///
/// Exponent 1 gives every octave of distances the same attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistancePrior {
    /// Context length in tokens.
    pub length: usize,
    /// Decay.
    pub exponent: f64,
}

impl Default for DistancePrior {
    fn default() -> Self {
        Self {
            length: 2048,
            exponent: 1.0,
        }
    }
}

/// Statistics of a layer from its weights.
pub fn prior_statistics(
    weights: &LayerWeights,
    prior: DistancePrior,
) -> Result<LayerStatistics, Error> {
    weights.check()?;
    let ones = vec![1.0; weights.attention.shape.hidden];
    statistics_from_weights(weights, weights.input_norm.as_ref().unwrap_or(&ones), prior)
}

/// The same with the layer's input scaled by `gamma` `[D]`.
pub(crate) fn statistics_from_weights(
    weights: &LayerWeights,
    gamma: &[f32],
    prior: DistancePrior,
) -> Result<LayerStatistics, Error> {
    if prior.length == 0 || !prior.exponent.is_finite() {
        return Err(refuse(
            "distance prior",
            "a length of at least 1 token and a finite exponent",
            format!("length {}, exponent {}", prior.length, prior.exponent),
            "use the default (2048 tokens, exponent 1)",
        ));
    }
    let attention = &weights.attention;
    let shape = attention.shape;
    let (d, n) = (shape.head_dim, shape.kv_width());

    let stacked = Projection {
        weight: weights.k.weight.stack(&weights.v.weight),
        bias: match (&weights.k.bias, &weights.v.bias) {
            (None, None) => None,
            (k, v) => Some(
                or_zeros(k.as_ref(), n)
                    .chain(or_zeros(v.as_ref(), n))
                    .collect(),
            ),
        },
    };
    let mut moment = projected_moment(&stacked, gamma);
    if let Some(norm) = &weights.k_norm {
        let mut factors = vec![1.0; 2 * n];
        for g in 0..shape.kv_heads {
            head_norm_factors(&moment, g * d, norm, &mut factors[g * d..(g + 1) * d]);
        }
        scale_both_sides(&mut moment, &factors);
    }

    let window = attention
        .sliding_window
        .unwrap_or(usize::MAX)
        .min(prior.length);
    let mut distances: Vec<f64> = (0..window)
        .map(|x| (1.0 + x as f64).powf(-prior.exponent))
        .collect();
    let total: f64 = distances.iter().sum();
    for x in &mut distances {
        *x /= total;
    }

    let rotation = mean_rotation(attention, &distances);
    let mut statistics = LayerStatistics::new(
        weights.layer,
        attention,
        &weights.o.weight,
        StatisticsOptions::default(),
    )?;
    statistics
        .heads
        .par_iter_mut()
        .enumerate()
        .for_each(|(h, head)| {
            let part = Projection {
                weight: weights.q.weight.row_range(h * d, (h + 1) * d),
                bias: weights
                    .q
                    .bias
                    .as_ref()
                    .map(|b| b[h * d..(h + 1) * d].to_vec()),
            };
            let mut query = projected_moment(&part, gamma);
            if let Some(norm) = &weights.q_norm {
                let mut factors = vec![1.0; d];
                head_norm_factors(&query, 0, norm, &mut factors);
                scale_both_sides(&mut query, &factors);
            }
            let start = n + shape.group_of(h) * d;
            let alpha = trace_of_product(&head.output_metric, &moment, start);
            let energy = |m: &Matrix<f64>, start: usize, l: usize| {
                m[(start + l, start + l)] + m[(start + l + d / 2, start + l + d / 2)]
            };
            let key = shape.group_of(h) * d;
            let contribution: Vec<f64> = (0..d / 2)
                .map(|l| alpha * energy(&query, 0, l) * energy(&moment, key, l))
                .collect();
            let mut sensitive = query.clone();
            sensitive.scale(alpha);
            *head = HeadStatistics {
                query,
                query_sensitive: sensitive,
                distance_p: distances.clone(),
                distance_p2: distances.clone(),
                p2: 1.0,
                sensitivity: alpha,
                rotation: rotation
                    .iter()
                    .zip(&contribution)
                    .map(|(m, e)| *m * *e)
                    .collect(),
                rotation_energy: contribution,
                output_metric: head.output_metric.clone(),
            };
        });
    statistics.windows = 1;
    statistics.tokens = 1;
    statistics.rows = 1;
    statistics.attended = 1.0;
    statistics.sensitive = 1.0;
    statistics.moment_attended = moment.clone();
    statistics.moment_sensitive = moment.clone();
    statistics.moment = moment;
    Ok(statistics)
}

fn or_zeros(bias: Option<&Vec<f32>>, n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(move |i| bias.map_or(0.0, |b| b[i]))
}

/// `W diag(gamma^2) W^T + b b^T`.
fn projected_moment(projection: &Projection, gamma: &[f32]) -> Matrix<f64> {
    let mut scaled = projection.weight.cast::<f64>();
    for i in 0..scaled.rows() {
        for (x, g) in scaled.row_mut(i).iter_mut().zip(gamma) {
            *x *= f64::from(*g);
        }
    }
    let mut moment = scaled.times_transposed(&scaled);
    if let Some(bias) = &projection.bias {
        for i in 0..moment.rows() {
            for j in 0..moment.cols() {
                moment[(i, j)] += f64::from(bias[i]) * f64::from(bias[j]);
            }
        }
    }
    moment.symmetrise();
    moment
}

/// `norm / rms` of the head that starts at `start`.
fn head_norm_factors(moment: &Matrix<f64>, start: usize, norm: &[f32], factors: &mut [f64]) {
    let d = factors.len();
    let mean_square = (start..start + d).map(|i| moment[(i, i)]).sum::<f64>() / d as f64;
    let scale = if mean_square > 0.0 {
        mean_square.sqrt().recip()
    } else {
        0.0
    };
    for (factor, n) in factors.iter_mut().zip(norm) {
        *factor = f64::from(*n) * scale;
    }
}

fn scale_both_sides(moment: &mut Matrix<f64>, factors: &[f64]) {
    for i in 0..moment.rows() {
        for (j, x) in moment.row_mut(i).iter_mut().enumerate() {
            *x *= factors[i] * factors[j];
        }
    }
}

/// `tr(B M)` with M the block of `moment` that starts at `start`.
fn trace_of_product(metric: &Matrix<f64>, moment: &Matrix<f64>, start: usize) -> f64 {
    (0..metric.rows())
        .map(|i| {
            (0..metric.cols())
                .map(|j| metric[(i, j)] * moment[(start + j, start + i)])
                .sum::<f64>()
        })
        .sum()
}
