//! `TransMLA`'s steps (Meng et al. 2025, `partial_rope.py` and `lora_qkv.py` of their repository), as
//! the baseline people know.
//!
//! `RoRoPE`: for every group of `freqfold` neighbouring frequencies a REAL orthogonal basis of the
//! `G * freqfold` (head, frequency) pairs, from the sum of the second moments of real and imaginary
//! parts (uncentred, all tokens alike). The first `freqfold / collapse` components of a group keep
//! a rotation, component j that of the group's frequency `j * collapse`, with
//! `collapse = d / d_r`; all others are used as if their frequency were 0. Balanced KV: the
//! plain keys are scaled so that their mean column norm is that of the values; then a joint
//! principal component analysis to rank r.
//!
//! Not copied: their statistics for the second half come from the model with partial rotation, ours
//! from the activations we are given; their value norm leaves out the first `d_r` columns, ours uses
//! all; the damping of their moments does not change eigenvectors and is left out.

use crate::error::{Error, refuse};
use crate::error_eval::LayerEvaluator;
use crate::layer::{Attention, LayerFactors, LayerWeights, RankChoice};
use crate::linalg::{Matrix, symmetric_eigen};
use crate::methods::recipe::check;
use crate::report::{LayerReport, gaps, normalised};
use crate::statistics::LayerStatistics;
use crate::steps::absorb::Split;
use crate::steps::lowrank::{JointProblem, Metric};
use crate::steps::weights::{TokenWeights, token_moment};

/// Options of the method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct TransMla {
    /// Neighbouring frequencies merged into one group; a divisor of d/2 and a multiple of
    /// d / `d_r`; `None`: d / `d_r`, the least.
    pub freqfold: Option<usize>,
}

/// Converts one layer with `TransMLA`'s steps.
pub fn convert_layer_transmla(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    ranks: RankChoice,
    options: TransMla,
) -> Result<(LayerFactors, LayerReport), Error> {
    check(weights, statistics, ranks)?;
    let attention = &weights.attention;
    let shape = attention.shape;
    let d_r = ranks.qk_rope_head_dim;
    if !shape.head_dim.is_multiple_of(d_r) {
        return Err(refuse(
            "qk_rope_head_dim with --method transmla",
            format!("a divisor of head_dim {}", shape.head_dim),
            d_r.to_string(),
            "choose another --rope-dim, or --method recipe, which takes any",
        ));
    }
    let collapse = shape.head_dim / d_r;
    let fold = options.freqfold.unwrap_or(collapse);
    if fold == 0 || !fold.is_multiple_of(collapse) || !shape.frequencies().is_multiple_of(fold) {
        return Err(refuse(
            "freqfold",
            format!(
                "a multiple of {collapse} (head_dim / qk_rope_head_dim) that divides {} (head_dim / 2)",
                shape.frequencies()
            ),
            fold.to_string(),
            "choose another --freqfold",
        ));
    }

    let moment = token_moment(statistics, TokenWeights::Uniform);
    let split = fold_split(attention, &moment, fold, collapse)?;
    let problem = JointProblem::new(statistics, &split, &moment, &[], Metric::BalancedPlain)?;
    let (factors, spectrum) = problem.solve(&shape, &split, ranks, 1.0)?;
    let error = LayerEvaluator::new(statistics, &weights.o.weight).map(|e| e.error(&factors));

    let spectrum = normalised(&spectrum);
    let mut notes = vec![format!("freqfold {fold}, collapse {collapse}")];
    notes.extend(gaps(statistics, ranks, &spectrum));
    let mut kept_by_frequency = vec![0; shape.frequencies()];
    for l in (0..shape.frequencies()).step_by(collapse) {
        kept_by_frequency[l] = 1;
    }
    let report = LayerReport {
        layer: weights.layer,
        method: "transmla".into(),
        ranks,
        gqa_width: shape.stacked_width(),
        calibration_tokens: if statistics.samples.is_empty() {
            0
        } else {
            statistics.tokens
        },
        energy_kept: spectrum[..ranks.kv_lora_rank].iter().sum(),
        spectrum,
        kept_by_frequency,
        importance_kept: kept_energy(&split, &moment),
        beta: 1.0,
        beta_errors: Vec::new(),
        error,
        refit_error_before: None,
        refit_error_after: None,
        notes,
    };
    Ok((factors, report))
}

/// Share of the keys' energy in the rotary rows.
fn kept_energy(split: &Split, moment: &Matrix<f64>) -> f64 {
    let kept = split.rotary.congruence(moment).trace();
    let dropped = split.plain.congruence(moment).trace();
    if kept + dropped > 0.0 {
        kept / (kept + dropped)
    } else {
        1.0
    }
}

/// The split of a layer into the first components of every group and the rest.
fn fold_split(
    attention: &Attention,
    moment: &Matrix<f64>,
    fold: usize,
    collapse: usize,
) -> Result<Split, Error> {
    let shape = attention.shape;
    let (d, half, groups) = (shape.head_dim, shape.frequencies(), shape.kv_heads);
    let (kept_per_group, size) = (fold / collapse, groups * fold);
    let factor = attention.rotary.attention_factor.powi(2);

    // (group of frequencies, eigenvector) of kept and dropped components; an eigenvector is over
    // (head, frequency of the group).
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    for i in 0..half / fold {
        let column = |a: usize| (a / fold) * d + i * fold + a % fold;
        let joint = Matrix::from_fn(size, size, |a, b| {
            moment[(column(a), column(b))] + moment[(column(a) + half, column(b) + half)]
        });
        let eigen = symmetric_eigen(
            &joint,
            "second moment of the keys of one group of frequencies",
        )?;
        for c in 0..size {
            let vector: Vec<f64> = (0..size).map(|a| eigen.vectors[(a, c)]).collect();
            if c < kept_per_group {
                kept.push((i, c, vector));
            } else {
                dropped.push((i, c, vector));
            }
        }
    }
    let encoder = |chosen: &[(usize, usize, Vec<f64>)]| {
        let pairs = chosen.len();
        let mut rows = Matrix::zeros(2 * pairs, shape.stacked_width());
        for (p, (i, _, vector)) in chosen.iter().enumerate() {
            for (a, u) in vector.iter().enumerate() {
                let column = (a / fold) * d + i * fold + a % fold;
                rows[(p, column)] = *u;
                rows[(p + pairs, column + half)] = *u;
            }
        }
        rows
    };
    let query = |chosen: &[(usize, usize, Vec<f64>)], h: usize| {
        let (pairs, g) = (chosen.len(), shape.group_of(h));
        let mut rows = Matrix::zeros(2 * pairs, d);
        for (p, (i, _, vector)) in chosen.iter().enumerate() {
            for (j, u) in vector[g * fold..(g + 1) * fold].iter().enumerate() {
                rows[(p, i * fold + j)] = *u * factor;
                rows[(p + pairs, i * fold + j + half)] = *u * factor;
            }
        }
        rows
    };
    let heads = 0..shape.query_heads;
    Ok(Split {
        rotary: encoder(&kept),
        rotary_query: heads.clone().map(|h| query(&kept, h)).collect(),
        inv_freq: kept
            .iter()
            .map(|(i, c, _)| attention.rotary.inv_freq[i * fold + c * collapse])
            .collect(),
        plain: encoder(&dropped),
        plain_query: heads.map(|h| query(&dropped, h)).collect(),
    })
}
