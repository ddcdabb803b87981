//! Plain truncated SVD of the weights: the simplest thing that could work, for comparison.
//!
//! One component of every frequency in turn keeps its rotation (the strongest by weight), the
//! others are used as if their frequency were 0, and `[W_plain ; W_v]` is cut to rank r by its
//! singular values. No activations, no metric, no balance.

use super::recipe::check;
use crate::error::Error;
use crate::layer::{LayerFactors, LayerWeights, RankChoice};
use crate::report::{LayerReport, gaps, normalised};
use crate::statistics::{DistancePrior, statistics_from_weights};
use crate::steps::absorb::split;
use crate::steps::basis::{Basis, components};
use crate::steps::constant::{Constant, constants};
use crate::steps::lowrank::{JointProblem, Metric};
use crate::steps::select::{Selection, select};
use crate::steps::weights::{TokenWeights, token_moment};

/// Converts one layer by the SVD of its weights.
pub fn convert_layer_svd(
    weights: &LayerWeights,
    ranks: RankChoice,
) -> Result<(LayerFactors, LayerReport), Error> {
    weights.check()?;
    let attention = &weights.attention;
    let shape = attention.shape;
    let statistics =
        statistics_from_weights(weights, &vec![1.0; shape.hidden], DistancePrior::default())?;
    check(weights, &statistics, ranks)?;

    let moment = token_moment(&statistics, TokenWeights::Uniform);
    let components = components(&shape, Basis::ComplexPlain, &moment, &[])?;
    let constants = constants(&statistics, Constant::One);
    let energies: Vec<f64> = components.iter().map(|c| c.energy).collect();
    let kept = select(
        &shape,
        &components,
        &energies,
        ranks.qk_rope_head_dim / 2,
        Selection::OnePerFrequency,
    );
    let split = split(attention, &components, &kept, &constants);
    let problem = JointProblem::new(&statistics, &split, &moment, &[], Metric::Plain)?;
    let (factors, spectrum) = problem.solve(&shape, &split, ranks, 1.0)?;

    let mut kept_by_frequency = vec![0; shape.frequencies()];
    for &c in &kept {
        kept_by_frequency[components[c].frequency] += 1;
    }
    let total: f64 = energies.iter().sum();
    let spectrum = normalised(&spectrum);
    let notes = gaps(&statistics, ranks, &spectrum);
    let report = LayerReport {
        layer: weights.layer,
        method: "svd".into(),
        ranks,
        gqa_width: shape.stacked_width(),
        calibration_tokens: 0,
        energy_kept: spectrum[..ranks.kv_lora_rank].iter().sum(),
        spectrum,
        kept_by_frequency,
        importance_kept: if total > 0.0 {
            kept.iter().map(|&c| energies[c]).sum::<f64>() / total
        } else {
            1.0
        },
        beta: 1.0,
        beta_errors: Vec::new(),
        error: None,
        refit_error_before: None,
        refit_error_after: None,
        notes,
    };
    Ok((factors, report))
}
