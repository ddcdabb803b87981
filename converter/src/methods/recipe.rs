//! The recipe: the steps of a conversion in order.

use serde::{Deserialize, Serialize};

use crate::error::{Error, refuse};
use crate::error_eval::LayerEvaluator;
use crate::layer::{AttentionShape, Component, LayerFactors, LayerWeights, RankChoice};
use crate::report::{LayerReport, gaps, normalised};
use crate::statistics::LayerStatistics;
use crate::steps::absorb::{Split, split};
use crate::steps::balance::{Balance, balance};
use crate::steps::basis::{Basis, components};
use crate::steps::constant::{Constant, constants};
use crate::steps::lowrank::{
    Decomposed, JointProblem, Metric, QueryWeights, query_energy, query_moments,
};
use crate::steps::refit::RefitOptions;
use crate::steps::select::{Selection, importance, select};
use crate::steps::weights::{TokenWeights, token_moment};

/// Every choice of the conversion; each step can be switched to its plain form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// How much tokens count.
    pub token_weights: TokenWeights,
    /// How much queries count.
    pub query_weights: QueryWeights,
    /// Basis of the KV heads at a frequency.
    pub basis: Basis,
    /// What replaces a dropped rotation.
    pub constant: Constant,
    /// Which components keep their rotation.
    pub selection: Selection,
    /// Metric of the joint low rank.
    pub metric: Metric,
    /// K/V balance.
    pub balance: Balance,
    /// Refit of `o_proj`, done by the caller with [`crate::OutputRefit`] on the converted layer's
    /// activations; `None`: keep the original.
    pub refit: Option<RefitOptions>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            token_weights: TokenWeights::Attention {
                uniform_share: 0.05,
            },
            query_weights: QueryWeights::Sensitivity,
            basis: Basis::ComplexQueryMetric,
            constant: Constant::MeanByContribution,
            selection: Selection::Greedy,
            metric: Metric::Output,
            balance: Balance::Search {
                values: vec![0.25, 0.5, 1.0, 2.0],
                fallback: 4.0,
            },
            refit: Some(RefitOptions::default()),
        }
    }
}

impl Recipe {
    /// The same in the metric of the model's loss, for statistics that have gradients. It knows how keys weigh
    /// against values, so that there is no balance to search.
    #[must_use]
    pub fn with_gradients(self) -> Self {
        Self {
            metric: Metric::Gradient,
            balance: Balance::Fixed(1.0),
            ..self
        }
    }
}

/// Everything of a conversion that depends on `d_r` but not on r.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    shape: AttentionShape,
    components: Vec<Component>,
    importance: Vec<f64>,
    kept: Vec<usize>,
    split: Split,
    problem: JointProblem,
}

impl Prepared {
    /// The joint problem's principal components at one balance.
    pub(crate) fn decompose(&self, beta: f64) -> Result<Decomposed, Error> {
        self.problem.decompose(beta)
    }
}

impl Decomposed {
    /// The factors at `ranks`, whose `d_r` is that of `prepared`.
    pub(crate) fn cut(&self, prepared: &Prepared, ranks: RankChoice) -> LayerFactors {
        prepared
            .problem
            .cut(&prepared.shape, &prepared.split, ranks, self)
    }
}

/// The steps up to the joint low rank.
pub(crate) fn prepare(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    ranks: RankChoice,
    recipe: &Recipe,
) -> Result<Prepared, Error> {
    check(weights, statistics, ranks)?;
    recipe.token_weights.check()?;
    let attention = &weights.attention;
    let shape = attention.shape;

    let moment = token_moment(statistics, recipe.token_weights);
    let queries = query_moments(statistics, recipe.query_weights);
    let energies = query_energy(&shape, &queries);
    let components = components(&shape, recipe.basis, &moment, &energies)?;
    let constants = constants(statistics, recipe.constant);
    let contribution: Vec<Vec<f64>> = statistics
        .heads
        .iter()
        .map(|h| h.rotation_energy.clone())
        .collect();
    let importance = importance(&shape, &components, &contribution, &constants);
    let kept = select(
        &shape,
        &components,
        &importance,
        ranks.qk_rope_head_dim / 2,
        recipe.selection,
    );
    let split = split(attention, &components, &kept, &constants);
    let problem = JointProblem::new(statistics, &split, &moment, &queries, recipe.metric)?;
    Ok(Prepared {
        shape,
        components,
        importance,
        kept,
        split,
        problem,
    })
}

/// Converts one layer.
pub fn convert_layer(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    ranks: RankChoice,
    recipe: &Recipe,
) -> Result<(LayerFactors, LayerReport), Error> {
    let Prepared {
        shape,
        components,
        importance,
        kept,
        split,
        problem,
    } = prepare(weights, statistics, ranks, recipe)?;
    let evaluator = LayerEvaluator::new(statistics, &weights.o.weight);
    let balanced = balance(
        &shape,
        &problem,
        &split,
        ranks,
        &recipe.balance,
        evaluator.as_ref(),
    )?;

    let mut kept_by_frequency = vec![0; shape.frequencies()];
    for &c in &kept {
        kept_by_frequency[components[c].frequency] += 1;
    }
    let total: f64 = importance.iter().sum();
    let spectrum = normalised(&balanced.spectrum);
    let mut notes = gaps(statistics, ranks, &spectrum);
    if problem.floored() > 0 {
        notes.push(format!(
            "{} directions of the metric carry next to nothing and were floored",
            problem.floored()
        ));
    }
    let report = LayerReport {
        layer: weights.layer,
        method: "recipe".into(),
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
        importance_kept: if total > 0.0 {
            kept.iter().map(|&c| importance[c]).sum::<f64>() / total
        } else {
            1.0
        },
        beta: balanced.beta,
        error: balanced.error,
        beta_errors: balanced.errors,
        refit_error_before: None,
        refit_error_after: None,
        notes,
    };
    Ok((balanced.factors, report))
}

/// Refuses inputs that do not belong together.
pub(super) fn check(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    ranks: RankChoice,
) -> Result<(), Error> {
    weights.check()?;
    statistics.check()?;
    ranks.check(&weights.attention.shape)?;
    if statistics.attention != weights.attention {
        return Err(refuse(
            format!("calibration statistics of layer {}", weights.layer),
            "the same heads, rotation and scale as the weights",
            "different ones",
            "gather the statistics again with this checkpoint",
        ));
    }
    Ok(())
}
