//! What the conversion of a layer found, for `mlac.json` and the report.

use serde::{Deserialize, Serialize};

use crate::layer::RankChoice;
use crate::statistics::LayerStatistics;

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

/// Eigenvalues below this fraction of the largest are not told from 0: the sums of statistics round to
/// f32.
const RANK_NOISE: f64 = 1e-6;

/// What the calibration could not say about a layer, of which `spectrum` are the eigenvalues of the
/// joint moment as fractions of their sum, largest first.
pub(crate) fn gaps(
    statistics: &LayerStatistics,
    ranks: RankChoice,
    spectrum: &[f64],
) -> Vec<String> {
    let mut notes = Vec::new();
    let (tokens, width) = (
        statistics.tokens,
        statistics.attention.shape.stacked_width(),
    );
    if !statistics.samples.is_empty() && tokens < width {
        notes.push(format!(
            "{tokens} calibration tokens are fewer than the {width} numbers of keys and values"
        ));
    }
    let least = RANK_NOISE * spectrum.first().copied().unwrap_or(0.0);
    let rank = spectrum.iter().filter(|&&x| x > least).count();
    if rank < ranks.kv_lora_rank {
        notes.push(format!(
            "what the latent holds has rank {rank} in calibration; of its {} directions the others are \
             filled by the weights alone",
            ranks.kv_lora_rank
        ));
    }
    if statistics.insensitive() {
        notes.push(
            "scores do not move the output in calibration; queries are weighed by their size alone"
                .to_owned(),
        );
    }
    notes
}
