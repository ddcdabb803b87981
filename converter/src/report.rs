//! What the conversion of a layer found, for `mlac.json` and the report.

use serde::{Deserialize, Serialize};

use crate::layer::RankChoice;

/// The conversion of one layer in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerReport {
    /// Index of the layer.
    pub layer: usize,
    /// `recipe`, `transmla` or `svd`.
    pub method: String,
    /// r and `d_r`.
    pub ranks: RankChoice,
    /// Numbers cached per token before, 2 * G * d.
    pub gqa_width: usize,
    /// Calibration tokens the statistics saw (0: weights alone).
    pub calibration_tokens: usize,
    /// Eigenvalues of the joint moment of plain keys and values, largest first, as fractions of
    /// their sum; the first r are kept.
    pub spectrum: Vec<f64>,
    /// Share of the joint moment's energy that the latent keeps, from 0 to 1.
    pub energy_kept: f64,
    /// How many components of each frequency keep their rotation, by frequency, `[d/2]`.
    pub kept_by_frequency: Vec<usize>,
    /// Share of the components' importance that is kept, from 0 to 1.
    pub importance_kept: f64,
    /// K/V balance.
    pub beta: f64,
    /// Relative squared error of the layer's output at every tried beta.
    pub beta_errors: Vec<(f64, f64)>,
    /// Relative squared error of the layer's output on the kept windows, with the original
    /// `o_proj`; absent without kept windows.
    pub error: Option<f64>,
    /// The same as `error` on the calibration tokens of the refit, before it.
    pub refit_error_before: Option<f64>,
    /// And after it.
    pub refit_error_after: Option<f64>,
    /// What had to be regularised, in words.
    pub notes: Vec<String>,
}

/// `values` as fractions of their sum, negatives (rounding) as 0.
pub(crate) fn normalised(values: &[f64]) -> Vec<f64> {
    let total: f64 = values.iter().map(|x| x.max(0.0)).sum();
    values
        .iter()
        .map(|x| if total > 0.0 { x.max(0.0) / total } else { 0.0 })
        .collect()
}
