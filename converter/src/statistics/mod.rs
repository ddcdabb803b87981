//! What the conversion of a layer needs to know about its activations.
//!
//! Statistics are sums over windows of tokens; each window is one sequence from position 0. They
//! are bounded: moments, histograms of distances, and a small sample of windows on which the
//! error of a converted layer is measured.

mod accumulate;
mod block;
mod prior;
mod sample;

pub(crate) use prior::statistics_from_weights;
pub use prior::{DistancePrior, prior_statistics};
pub use sample::WindowSample;
pub(crate) use sample::{split_mix, stratified_positions};

use faer::c64;

use crate::attention::RotationTable;
use crate::error::{Error, refuse};
use crate::layer::Attention;
use crate::linalg::Matrix;

/// Activations of one window (ONE sequence, position 0 first) at one layer.
#[derive(Debug, Clone, Copy)]
pub struct WindowActivations<'a> {
    /// Tokens in the window, L.
    pub tokens: usize,
    /// Queries after bias and query norm, before rotation: `[L, H, d]`.
    pub q: &'a [f32],
    /// Keys after bias and key norm, before rotation: `[L, G, d]`.
    pub k: &'a [f32],
    /// Values after bias: `[L, G, d]`.
    pub v: &'a [f32],
}

/// How much of a window is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatisticsOptions {
    /// Query rows per window for which attention is computed, spread evenly over the window.
    pub sampled_rows: usize,
    /// Windows kept for measuring the error of a converted layer (the first ones).
    pub kept_windows: usize,
    /// Query rows of each kept window on which the error is measured.
    pub evaluated_rows: usize,
    /// Seed of the places of the sampled rows within their strata.
    pub seed: u64,
}

impl Default for StatisticsOptions {
    fn default() -> Self {
        Self {
            sampled_rows: 256,
            kept_windows: 2,
            evaluated_rows: 64,
            seed: 0,
        }
    }
}

/// Sensitivity below this fraction of what it could be is rounding of f32.
const SENSITIVITY_NOISE: f64 = 1e-6;

/// Statistics of one query head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadStatistics {
    /// `sum_t q q^T` over all tokens `[d, d]`.
    pub query: Matrix<f64>,
    /// `sum_t u_t q q^T` over sampled rows `[d, d]`, `u_t = sum_s p^2 |v_s - o_t|^2` in the `W_o`
    /// metric: how much an error of this row's scores moves the output.
    pub query_sensitive: Matrix<f64>,
    /// `sum p` by distance `t - s`.
    pub distance_p: Vec<f64>,
    /// `sum p^2` by distance `t - s`.
    pub distance_p2: Vec<f64>,
    /// `sum p^2` over sampled rows and keys.
    pub p2: f64,
    /// `sum p^2 |v_s - o_t|^2` in the `W_o` metric over sampled rows and keys.
    pub sensitivity: f64,
    /// `sum W |q[h,l]|^2 |k[g,l]|^2` by frequency `[d/2]`, `W = p^2 |v_s - o_t|^2`: how much of the
    /// output's squared change an error of this frequency's scores makes.
    pub rotation_energy: Vec<f64>,
    /// `sum W |q[h,l]|^2 |k[g,l]|^2 e^{i theta_l (t - s)}` by frequency `[d/2]`.
    pub rotation: Vec<c64>,
    /// `W_o,h^T W_o,h` `[d, d]`.
    pub output_metric: Matrix<f64>,
}

impl HeadStatistics {
    /// How much a squared error of a score moves the squared output, in units of the attention
    /// that token weights count: `alpha_h = E[p^2 |v - o|^2] / E[p^2]`.
    pub fn alpha(&self) -> f64 {
        if self.p2 > 0.0 {
            self.sensitivity / self.p2
        } else {
            0.0
        }
    }
}

/// Statistics of one layer.
#[derive(Debug, Clone)]
pub struct LayerStatistics {
    /// Index of the layer, for messages.
    pub layer: usize,
    /// How the layer attends.
    pub attention: Attention,
    /// Windows seen.
    pub windows: usize,
    /// Tokens seen.
    pub tokens: usize,
    /// Sampled query rows seen.
    pub rows: usize,
    /// `sum_s s s^T` over all tokens, s = `[k ; v]`: `[2*G*d, 2*G*d]`.
    pub moment: Matrix<f64>,
    /// `sum_s w_s s s^T`, `w_s = sum_h sum_t p^2`: attention received by the token.
    pub moment_attended: Matrix<f64>,
    /// `sum_s w_s`.
    pub attended: f64,
    /// `sum_s b_s s s^T`, `b_s = sum_h sum_t p^2 |v_s - o_t|^2` in the `W_o` metric.
    pub moment_sensitive: Matrix<f64>,
    /// `sum_s b_s`.
    pub sensitive: f64,
    /// Per query head `[H]`.
    pub heads: Vec<HeadStatistics>,
    /// Metric `[2*G*d, 2*G*d]` in which the model's loss sees errors of s ([`crate::gradient`]), where
    /// gradients were taken.
    pub gradient: Option<Matrix<f64>>,
    /// Windows on which errors are measured; empty when statistics come from weights alone.
    pub samples: Vec<WindowSample>,
    /// Largest magnitudes of queries, keys and values.
    largest: [f32; 3],
    options: StatisticsOptions,
    table: RotationTable,
}

impl LayerStatistics {
    /// Empty statistics of a layer whose output projection is `o` `[D, H*d]`.
    pub fn new(
        layer: usize,
        attention: &Attention,
        o: &Matrix<f32>,
        options: StatisticsOptions,
    ) -> Result<Self, Error> {
        attention.check()?;
        let shape = attention.shape;
        if (o.rows(), o.cols()) != (shape.hidden, shape.query_width()) {
            return Err(refuse(
                format!("layer {layer} o_proj.weight"),
                format!("shape [{}, {}]", shape.hidden, shape.query_width()),
                format!("[{}, {}]", o.rows(), o.cols()),
                "make config.json and the checkpoint agree",
            ));
        }
        if !o.is_finite() {
            return Err(refuse(
                format!("layer {layer} o_proj.weight"),
                "finite numbers",
                "NaN or infinity",
                "repair or download the checkpoint again",
            ));
        }
        if options.sampled_rows == 0 {
            return Err(refuse(
                "sampled query rows",
                "at least 1 per window",
                "0",
                "use the default of 256",
            ));
        }
        let (d, width) = (shape.head_dim, shape.stacked_width());
        let heads = (0..shape.query_heads)
            .map(|h| {
                let w = o.col_range(h * d, (h + 1) * d);
                HeadStatistics {
                    query: Matrix::zeros(d, d),
                    query_sensitive: Matrix::zeros(d, d),
                    distance_p: Vec::new(),
                    distance_p2: Vec::new(),
                    p2: 0.0,
                    sensitivity: 0.0,
                    rotation_energy: vec![0.0; d / 2],
                    rotation: vec![c64::new(0.0, 0.0); d / 2],
                    output_metric: w.transposed_times(&w).cast(),
                }
            })
            .collect();
        Ok(Self {
            layer,
            attention: attention.clone(),
            windows: 0,
            tokens: 0,
            rows: 0,
            moment: Matrix::zeros(width, width),
            moment_attended: Matrix::zeros(width, width),
            attended: 0.0,
            moment_sensitive: Matrix::zeros(width, width),
            sensitive: 0.0,
            heads,
            gradient: None,
            samples: Vec::new(),
            largest: [0.0; 3],
            options,
            table: RotationTable::new(&attention.rotary.inv_freq, 0),
        })
    }

    /// The options the statistics are gathered with.
    pub fn options(&self) -> &StatisticsOptions {
        &self.options
    }

    /// Adds the statistics of other windows of the same layer.
    pub fn merge(&mut self, other: Self) -> Result<(), Error> {
        if self.layer != other.layer || self.attention != other.attention {
            return Err(refuse(
                format!("statistics of layer {}", self.layer),
                "statistics of the same layer and attention",
                format!("those of layer {}", other.layer),
                "merge only statistics gathered for one layer of one model",
            ));
        }
        self.windows += other.windows;
        self.tokens += other.tokens;
        self.rows += other.rows;
        for (most, x) in self.largest.iter_mut().zip(other.largest) {
            *most = most.max(x);
        }
        self.moment.add_scaled(&other.moment, 1.0);
        self.moment_attended.add_scaled(&other.moment_attended, 1.0);
        self.attended += other.attended;
        self.moment_sensitive
            .add_scaled(&other.moment_sensitive, 1.0);
        self.sensitive += other.sensitive;
        for (head, more) in self.heads.iter_mut().zip(other.heads) {
            head.query.add_scaled(&more.query, 1.0);
            head.query_sensitive.add_scaled(&more.query_sensitive, 1.0);
            add_padded(&mut head.distance_p, &more.distance_p);
            add_padded(&mut head.distance_p2, &more.distance_p2);
            add_padded(&mut head.rotation_energy, &more.rotation_energy);
            for (x, y) in head.rotation.iter_mut().zip(&more.rotation) {
                *x += y;
            }
            head.p2 += more.p2;
            head.sensitivity += more.sensitivity;
        }
        let room = self.options.kept_windows.saturating_sub(self.samples.len());
        self.samples.extend(other.samples.into_iter().take(room));
        Ok(())
    }

    /// Whether scores do not move the output here: every query attends to values that are all alike, or
    /// to one token only. The weights that sensitivity gives are then rounding noise.
    pub fn insensitive(&self) -> bool {
        let (mut found, mut possible) = (0.0, 0.0);
        for (h, head) in self.heads.iter().enumerate() {
            found += head.sensitivity;
            possible += head.p2 * self.value_size(h);
        }
        found <= SENSITIVITY_NOISE * possible
    }

    /// The mean of `v^T B v` of the values head `head` attends to, B its output metric: what
    /// an attended value moves the output against an average of many.
    pub(crate) fn value_size(&self, head: usize) -> f64 {
        let shape = self.attention.shape;
        let start = shape.kv_width() + shape.group_of(head) * shape.head_dim;
        let metric = &self.heads[head].output_metric;
        let mut sum = 0.0;
        for i in 0..metric.rows() {
            for j in 0..metric.cols() {
                sum += metric[(i, j)] * self.moment_attended[(start + j, start + i)];
            }
        }
        if self.attended > 0.0 {
            sum / self.attended
        } else {
            0.0
        }
    }

    fn is_finite(&self) -> bool {
        let moments = [&self.moment, &self.moment_attended, &self.moment_sensitive];
        let head = |h: &HeadStatistics| {
            let sums = [h.p2, h.sensitivity].into_iter();
            let rotation = h.rotation.iter().flat_map(|z| [z.re, z.im]);
            h.query.is_finite()
                && h.query_sensitive.is_finite()
                && h.output_metric.is_finite()
                && sums
                    .chain(rotation)
                    .chain(h.rotation_energy.iter().copied())
                    .all(f64::is_finite)
        };
        moments.iter().all(|m| m.is_finite())
            && self.attended.is_finite()
            && self.sensitive.is_finite()
            && self.heads.iter().all(head)
    }

    /// Refuses statistics nothing was added to, or whose sums overflowed.
    pub fn check(&self) -> Result<(), Error> {
        if self.tokens == 0 {
            return Err(refuse(
                format!("calibration statistics of layer {}", self.layer),
                "at least one token",
                "none",
                "give a longer calibration text, or --calib none",
            ));
        }
        if !self.is_finite() {
            let names = ["queries", "keys", "values"];
            let (name, most) = names
                .into_iter()
                .zip(self.largest)
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .unwrap_or(("activations", 0.0));
            return Err(refuse(
                format!("{name} of layer {}", self.layer),
                "activations whose second moments are finite in f32",
                format!("magnitudes up to {most:e}"),
                "check the checkpoint for broken weights",
            ));
        }
        Ok(())
    }
}

fn add_padded(total: &mut Vec<f64>, more: &[f64]) {
    if total.len() < more.len() {
        total.resize(more.len(), 0.0);
    }
    for (x, y) in total.iter_mut().zip(more) {
        *x += y;
    }
}
