//! Polish: descent on the error of the layer's output.
//!
//! The closed form is optimal for errors that are small and independent between tokens. From there
//! a few steps of Adam (Kingma and Ba 2015) on `sum_t |W_o o_t - T_t|^2`, over sampled query rows of
//! the kept windows, fit encoder, decoders and rotary queries to the softmax as it is. Coordinates
//! are whitened first (stacked vectors and queries to unit second moment, latent to orthonormal
//! encoder rows), so that one step size fits all. The first kept window is not trained on: the
//! result is taken only if it is better there.

use serde::{Deserialize, Serialize};

use crate::attention::RotationTable;
use crate::error::{Error, refuse};
use crate::error_eval::LayerEvaluator;
use crate::gradient::{Batch, Differentiable, Parameters};
use crate::layer::LayerFactors;
use crate::linalg::{Matrix, PsdRoots, orthonormal_rows, psd_roots};
use crate::statistics::{LayerStatistics, split_mix};

/// How the factors are polished.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PolishOptions {
    /// Steps of descent.
    pub steps: usize,
    /// Windows per step.
    pub windows: usize,
    /// Query rows of each of them.
    pub rows: usize,
    /// First step relative to the root mean square of each matrix; falls to 0 as a half cosine.
    pub rate: f64,
}

impl Default for PolishOptions {
    fn default() -> Self {
        Self {
            steps: 60,
            windows: 1,
            rows: 64,
            rate: 0.002,
        }
    }
}

/// What polishing gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Polished {
    /// The better of the polished and the given factors.
    pub factors: LayerFactors,
    /// Relative squared error of the given factors on the window that is not trained on.
    pub error_before: f64,
    /// The same of the returned ones.
    pub error_after: f64,
}

/// Eigenvalues of the whitened moments below this fraction of the largest are raised to it.
const WHITENING_FLOOR: f64 = 1e-6;

/// Below this error there is nothing to gain.
const SMALLEST_ERROR: f64 = 1e-7;

/// Polishes `factors`; `None` when fewer than two windows were kept or the error is already at
/// rounding.
pub fn polish(
    statistics: &LayerStatistics,
    o: &Matrix<f32>,
    factors: &LayerFactors,
    moment: &Matrix<f64>,
    queries: &[Matrix<f64>],
    options: PolishOptions,
) -> Result<Option<Polished>, Error> {
    if options.rows == 0 || options.windows == 0 || !(options.rate > 0.0 && options.rate < 1.0) {
        return Err(refuse(
            "polish",
            "rows above 0 and a rate between 0 and 1",
            format!("{options:?}"),
            "use the defaults",
        ));
    }
    let Some(evaluator) = LayerEvaluator::new(statistics, o) else {
        return Ok(None);
    };
    if statistics.samples.len() < 2 || options.steps == 0 {
        return Ok(None);
    }
    let error_before = evaluator.window_error(0, factors);
    if error_before < SMALLEST_ERROR {
        return Ok(None);
    }
    let whitened = Whitening::new(moment, queries)?;
    let mut parameters = Parameters::of(&whitened.forward(factors));
    let windows: Vec<Window> = (1..statistics.samples.len())
        .map(|w| {
            let sample = &statistics.samples[w];
            Window {
                stacked: sample.stacked.times(&whitened.stacked.inverse_root.cast()),
                positions: sample.positions.clone(),
                queries: whitened.queries(&sample.queries),
                targets: evaluator.targets(w).clone(),
            }
        })
        .collect();
    let longest = windows.iter().map(|w| w.stacked.rows()).max().unwrap_or(0);
    let table = RotationTable::new(&factors.inv_freq, longest);
    let layer = Differentiable {
        attention: &statistics.attention,
        o,
        latent: factors.ranks.kv_lora_rank,
        table: &table,
    };

    let mut adam = Adam::new(&parameters);
    'descent: for step in 0..options.steps {
        let mut sum: Option<Parameters> = None;
        for i in 0..options.windows {
            let number = step * options.windows + i;
            let rows = windows[number % windows.len()].pick(options.rows, split_mix(number as u64));
            let (error, gradient) = layer.error_and_gradient(&parameters, &rows.view());
            if !error.is_finite() {
                break 'descent;
            }
            match &mut sum {
                None => sum = Some(gradient),
                Some(sum) => sum.add(&gradient),
            }
        }
        let Some(gradient) = sum else { break };
        let rate = options.rate
            * 0.5
            * (1.0 + (std::f64::consts::PI * step as f64 / options.steps as f64).cos());
        adam.step(&mut parameters, &gradient, rate);
    }

    let mut polished = factors.clone();
    parameters.write_to(&mut polished);
    let polished = whitened.back(&polished);
    let error_after = evaluator.window_error(0, &polished);
    // A comparison that a NaN fails.
    Ok(Some(if error_after < error_before {
        Polished {
            factors: polished,
            error_before,
            error_after,
        }
    } else {
        Polished {
            factors: factors.clone(),
            error_before,
            error_after: error_before,
        }
    }))
}

/// Coordinates in which moments are the identity.
struct Whitening {
    stacked: PsdRoots,
    queries: Vec<PsdRoots>,
}

impl Whitening {
    fn new(moment: &Matrix<f64>, queries: &[Matrix<f64>]) -> Result<Self, Error> {
        Ok(Self {
            stacked: psd_roots(moment, WHITENING_FLOOR, "second moment of keys and values")?,
            queries: queries
                .iter()
                .map(|q| psd_roots(q, WHITENING_FLOOR, "second moment of queries"))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The factors for whitened inputs, with orthonormal latent rows and rotary pairs of unit norm.
    fn forward(&self, factors: &LayerFactors) -> LayerFactors {
        let (r, d_r) = (factors.ranks.kv_lora_rank, factors.ranks.qk_rope_head_dim);
        let encoder = factors.encoder.times(&self.stacked.root);
        let (lower, latent) = orthonormal_rows(&encoder.row_range(0, r));
        let mut rotary = encoder.row_range(r, r + d_r);
        let mut result = factors.clone();
        for (h, q) in self.queries.iter().enumerate() {
            result.w_uk[h] = q.root.times(&factors.w_uk[h]).times(&lower);
            result.w_uv[h] = factors.w_uv[h].times(&lower);
            result.q_rope[h] = factors.q_rope[h].times(&q.root);
        }
        let half = d_r / 2;
        for pair in 0..half {
            let square: f64 = [pair, pair + half]
                .iter()
                .flat_map(|&i| rotary.row(i))
                .map(|x| x * x)
                .sum();
            let norm = (square / 2.0).sqrt().max(f64::MIN_POSITIVE);
            for i in [pair, pair + half] {
                rotary.row_mut(i).iter_mut().for_each(|x| *x /= norm);
                for q_rope in &mut result.q_rope {
                    q_rope.row_mut(i).iter_mut().for_each(|x| *x *= norm);
                }
            }
        }
        result.encoder = latent.stack(&rotary);
        result
    }

    /// Factors for the inputs as they are; the latent has orthonormal rows again.
    fn back(&self, factors: &LayerFactors) -> LayerFactors {
        let (r, d_r) = (factors.ranks.kv_lora_rank, factors.ranks.qk_rope_head_dim);
        let encoder = factors.encoder.times(&self.stacked.inverse_root);
        let (lower, latent) = orthonormal_rows(&encoder.row_range(0, r));
        let mut result = factors.clone();
        for (h, q) in self.queries.iter().enumerate() {
            result.w_uk[h] = q.inverse_root.times(&factors.w_uk[h]).times(&lower);
            result.w_uv[h] = factors.w_uv[h].times(&lower);
            result.q_rope[h] = factors.q_rope[h].times(&q.inverse_root);
        }
        result.encoder = latent.stack(&encoder.row_range(r, r + d_r));
        result
    }

    /// Queries `[rows, H*d]` times the inverse roots, head by head.
    fn queries(&self, queries: &Matrix<f32>) -> Matrix<f32> {
        let mut result = queries.clone();
        for (h, q) in self.queries.iter().enumerate() {
            let d = q.root.rows();
            let part = queries
                .col_range(h * d, (h + 1) * d)
                .times(&q.inverse_root.cast());
            for t in 0..queries.rows() {
                result.row_mut(t)[h * d..(h + 1) * d].copy_from_slice(part.row(t));
            }
        }
        result
    }
}

/// A window in whitened coordinates.
struct Window {
    stacked: Matrix<f32>,
    positions: Vec<usize>,
    queries: Matrix<f32>,
    targets: Matrix<f32>,
}

/// Some of a window's query rows.
struct Rows<'a> {
    stacked: &'a Matrix<f32>,
    positions: Vec<usize>,
    queries: Matrix<f32>,
    targets: Matrix<f32>,
}

impl Window {
    /// About `count` evenly spread rows, at an offset chosen by `seed`.
    fn pick(&self, count: usize, seed: u64) -> Rows<'_> {
        let stride = (self.positions.len() / count).max(1);
        let offset = (seed % stride as u64) as usize;
        let chosen: Vec<usize> = (offset..self.positions.len()).step_by(stride).collect();
        let rows = |m: &Matrix<f32>| {
            Matrix::from_vec(
                chosen.len(),
                m.cols(),
                chosen.iter().flat_map(|&i| m.row(i)).copied().collect(),
            )
        };
        Rows {
            stacked: &self.stacked,
            positions: chosen.iter().map(|&i| self.positions[i]).collect(),
            queries: rows(&self.queries),
            targets: rows(&self.targets),
        }
    }
}

impl Rows<'_> {
    fn view(&self) -> Batch<'_> {
        Batch {
            stacked: self.stacked,
            positions: &self.positions,
            queries: &self.queries,
            targets: &self.targets,
        }
    }
}

/// Adam with steps relative to the root mean square of each matrix.
struct Adam {
    first: Parameters,
    second: Parameters,
    sizes: Vec<f64>,
    steps: i32,
}

const MEAN_DECAY: f64 = 0.9;
const SQUARE_DECAY: f64 = 0.97;

impl Adam {
    fn new(parameters: &Parameters) -> Self {
        let mut zero = parameters.clone();
        for m in zero.matrices_mut() {
            m.data_mut().fill(0.0);
        }
        let rms = |m: &&Matrix<f32>| {
            (m.data()
                .iter()
                .map(|&x| f64::from(x) * f64::from(x))
                .sum::<f64>()
                / m.data().len().max(1) as f64)
                .sqrt()
        };
        Self {
            first: zero.clone(),
            second: zero,
            sizes: parameters.matrices().iter().map(rms).collect(),
            steps: 0,
        }
    }

    fn step(&mut self, parameters: &mut Parameters, gradient: &Parameters, rate: f64) {
        self.steps += 1;
        let (keep1, keep2) = (MEAN_DECAY as f32, SQUARE_DECAY as f32);
        let correct1 = 1.0 - MEAN_DECAY.powi(self.steps);
        let correct2 = (1.0 - SQUARE_DECAY.powi(self.steps)).sqrt();
        let all = parameters
            .matrices_mut()
            .into_iter()
            .zip(gradient.matrices());
        let moments = self
            .first
            .matrices_mut()
            .into_iter()
            .zip(self.second.matrices_mut());
        for (((x, g), (m, v)), size) in all.zip(moments).zip(&self.sizes) {
            let step = (rate * size * correct2 / correct1) as f32;
            for (((x, g), m), v) in x
                .data_mut()
                .iter_mut()
                .zip(g.data())
                .zip(m.data_mut())
                .zip(v.data_mut())
            {
                *m = keep1 * *m + (1.0 - keep1) * g;
                *v = keep2 * *v + (1.0 - keep2) * g * g;
                if *v > 0.0 {
                    *x -= step * *m / v.sqrt();
                }
            }
        }
    }
}
