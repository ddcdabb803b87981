//! `--steps`: which steps of the recipe run.

use mlac_converter::Recipe;
use mlac_converter::steps::{
    balance::Balance, basis::Basis, constant::Constant, lowrank::Metric, lowrank::QueryWeights,
    select::Selection, weights::TokenWeights,
};
use mlac_model::Refusal;

use crate::error::Error;

/// The steps that can be switched, with what they are.
pub const STEPS: [(&str, &str); 12] = [
    (
        "allocation",
        "ranks by layer where they lower the model's loss most (with --budget)",
    ),
    ("basis", "complex basis of the heads in the query metric"),
    ("select", "greedy choice of the components that keep RoPE"),
    ("constant", "fitted constant in place of a dropped rotation"),
    (
        "queries",
        "heads weighted by how much their scores move the output",
    ),
    (
        "metric",
        "low rank in a metric of what keys and values do, not of themselves",
    ),
    (
        "gradient",
        "that metric from the gradients of the model's loss, not from one layer's scores and outputs",
    ),
    ("weights", "tokens weighted by the attention they receive"),
    (
        "balance",
        "search for the balance of keys and values, where no gradients tell it",
    ),
    ("sequential", "statistics from the converted layers below"),
    ("refit", "ridge refit of the output projection"),
    (
        "compensation",
        "the refit makes up for the drift of the residual stream",
    ),
];

/// A recipe and whether calibration is sequential.
#[derive(Debug, Clone, PartialEq)]
pub struct Steps {
    /// The recipe with some steps in their plain form.
    pub recipe: Recipe,
    /// Whether statistics come from the converted layers below.
    pub sequential: bool,
    /// Whether the metric is that of the loss's gradients, where they can be taken.
    pub gradient: bool,
    /// Whether a budget is distributed over the layers by measured loss.
    pub allocation: bool,
}

/// Resolves the option: nothing means every step, names mean only these, names with a leading `-`
/// mean all but these.
pub fn resolve(given: &[String]) -> Result<Steps, Error> {
    let minus = given.iter().filter(|s| s.starts_with('-')).count();
    if minus != 0 && minus != given.len() {
        return Err(refuse(
            "either names of steps to run, or names to leave out, each with a leading -",
            given,
        ));
    }
    for name in given {
        let name = name.trim_start_matches('-');
        if !STEPS.iter().any(|(known, _)| *known == name) {
            let known: Vec<&str> = STEPS.iter().map(|(n, _)| *n).collect();
            return Err(refuse(&format!("names among {}", known.join(", ")), given));
        }
    }
    let runs = |name: &str| {
        if given.is_empty() {
            true
        } else if minus > 0 {
            !given.iter().any(|g| &g[1..] == name)
        } else {
            given.iter().any(|g| g == name)
        }
    };
    let mut recipe = Recipe::default();
    if !runs("basis") {
        recipe.basis = Basis::ComplexPlain;
    }
    if !runs("select") {
        recipe.selection = Selection::OnePerFrequency;
    }
    if !runs("constant") {
        recipe.constant = Constant::One;
    }
    if !runs("queries") {
        recipe.query_weights = QueryWeights::Plain;
    }
    if !runs("metric") {
        recipe.metric = Metric::BalancedPlain;
    }
    if !runs("weights") {
        recipe.token_weights = TokenWeights::Uniform;
    }
    if !runs("balance") {
        recipe.balance = Balance::Fixed(1.0);
    }
    if !runs("refit") {
        recipe.refit = None;
    } else if let Some(refit) = &mut recipe.refit {
        refit.compensate = runs("compensation");
    }
    Ok(Steps {
        recipe,
        sequential: runs("sequential"),
        gradient: runs("metric") && runs("gradient"),
        allocation: runs("allocation"),
    })
}

fn refuse(expected: &str, given: &[String]) -> Error {
    Refusal::new(
        "--steps",
        expected,
        given.join(","),
        "for example --steps=-refit,-sequential",
    )
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &[&str]) -> Result<Steps, Error> {
        resolve(&text.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn names_switch_steps_on_or_off() {
        assert_eq!(of(&[]).unwrap().recipe, Recipe::default());
        let without = of(&["-refit", "-sequential"]).unwrap();
        assert!(without.recipe.refit.is_none() && !without.sequential);
        assert_eq!(without.recipe.metric, Recipe::default().metric);
        let only = of(&["refit"]).unwrap();
        assert!(only.recipe.refit.is_some() && only.recipe.metric == Metric::BalancedPlain);
        assert!(of(&["refit", "-basis"]).is_err() && of(&["nonsense"]).is_err());
    }
}
