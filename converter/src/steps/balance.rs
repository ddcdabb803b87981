//! The balance beta between keys and values in the joint low rank, by a line search on the error
//! of the layer's output.
//!
//! beta = 1 is what the two metrics say when errors of different tokens are independent; errors of
//! values add up over attended tokens more than that, so larger values usually win. The best value
//! differs between layers.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::absorb::Split;
use super::lowrank::JointProblem;
use crate::error::{Error, refuse};
use crate::error_eval::LayerEvaluator;
use crate::layer::{AttentionShape, LayerFactors, RankChoice};

/// How beta is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Balance {
    /// One value.
    Fixed(f64),
    /// The value with the smallest error on the kept windows; `fallback` when there are none.
    Search {
        /// Candidates.
        values: Vec<f64>,
        /// Used without kept windows.
        fallback: f64,
    },
}

/// What the search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Balanced {
    /// The factorisation at the chosen beta.
    pub factors: LayerFactors,
    /// Eigenvalues of the joint moment at the chosen beta.
    pub spectrum: Vec<f64>,
    /// The chosen beta.
    pub beta: f64,
    /// Relative squared error of the layer's output at the chosen beta, with kept windows.
    pub error: Option<f64>,
    /// Error of the layer's output at every tried beta.
    pub errors: Vec<(f64, f64)>,
}

/// Solves the joint problem at the best beta.
pub fn balance(
    shape: &AttentionShape,
    problem: &JointProblem,
    split: &Split,
    ranks: RankChoice,
    choice: &Balance,
    evaluator: Option<&LayerEvaluator<'_>>,
) -> Result<Balanced, Error> {
    let (candidates, evaluator) = match (choice, evaluator) {
        (Balance::Fixed(beta), e) => (vec![*beta], e),
        (Balance::Search { values, .. }, Some(e)) => (values.clone(), Some(e)),
        (Balance::Search { fallback, .. }, None) => (vec![*fallback], None),
    };
    if candidates.is_empty() || candidates.iter().any(|b| !b.is_finite() || *b <= 0.0) {
        return Err(refuse(
            "K/V balance",
            "positive finite numbers, at least one",
            format!("{candidates:?}"),
            "use the default list",
        ));
    }
    let mut errors = Vec::new();
    let mut best: Option<(f64, Balanced)> = None;
    // Decompositions run on one thread each, so the candidates run side by side.
    let solved: Vec<_> = candidates
        .par_iter()
        .map(|&beta| problem.solve(shape, split, ranks, beta))
        .collect();
    for (beta, solved) in candidates.into_iter().zip(solved) {
        let (factors, spectrum) = solved?;
        let error = evaluator.map(|e| e.error(&factors));
        errors.extend(error.map(|e| (beta, e)));
        let rank = error.unwrap_or(0.0);
        if best.as_ref().is_none_or(|(least, _)| rank < *least) {
            best = Some((
                rank,
                Balanced {
                    factors,
                    spectrum,
                    beta,
                    error,
                    errors: Vec::new(),
                },
            ));
        }
    }
    let Some((_, mut best)) = best else {
        return Err(refuse(
            "K/V balance",
            "a candidate with a finite error",
            "none",
            "check the calibration activations",
        ));
    };
    best.errors = errors;
    Ok(best)
}
