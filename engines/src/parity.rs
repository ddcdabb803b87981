//! Comparing the logits of two models, position by position.
//!
//! All sums are in f64. The comparer takes one position at a time, so nothing of the size
//! tokens x vocab is ever held here.
//!
//! For logits a (reference) and b of one position, with vocab entries:
//! - absolute error: |a - b|
//! - relative error: |a - b| / max(|a|, rms(a)), where rms(a) = sqrt(mean(a^2)) over the position.
//!   The floor is the logits' own scale there: an entry that happens to be near zero does not make
//!   a harmless difference look infinite.
//! - KL(A || B) = sum of p (ln p - ln q), p = softmax(a), q = softmax(b), in nats
//! - cosine of the two vectors over all positions together
//! - top-1 agreement: the share of positions whose greatest entry (the first of equals) is the same
//!
//! NaN and infinities are a gate of their own: they must be at the same places, with the same sign.
//! Such entries take no part in the other figures; a position with any takes no part in KL.

use mlac_model::Refusal;
use serde::Serialize;

/// One entry of both tensors.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Coordinate {
    /// Position: the row of the logits.
    pub token: usize,
    /// Index in the vocabulary.
    pub vocab: usize,
    /// The reference's logit there.
    pub a: f32,
    /// The other's.
    pub b: f32,
}

/// The figures of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Parity {
    /// Positions compared.
    pub tokens: usize,
    /// Entries per position.
    pub vocab: usize,
    /// Entries where one is NaN or infinite and the other is not the same.
    pub non_finite_mismatches: u64,
    /// The first of them.
    pub first_non_finite: Option<Coordinate>,
    /// Greatest absolute error.
    pub max_abs: f64,
    /// Greatest relative error; see the module for the denominator.
    pub max_rel: f64,
    /// rms of the reference's finite logits: the scale that absolute errors are to be seen against.
    pub scale: f64,
    /// Cosine over all finite entries; 1 when both are zero.
    pub cosine: f64,
    /// Mean over positions of KL(A || B), nats.
    pub mean_kl: f64,
    /// Greatest KL(A || B) of one position, nats.
    pub max_kl: f64,
    /// Share of positions with the same greatest entry, 0 to 1.
    pub top1: f64,
    /// Where the absolute error is greatest.
    pub worst: Option<Coordinate>,
}

/// What a comparison must keep to. A figure equal to its limit passes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Tolerance {
    /// Greatest absolute error.
    pub max_abs: f64,
    /// Greatest relative error.
    pub max_rel: f64,
    /// Least cosine.
    pub min_cosine: f64,
    /// Greatest mean KL, nats.
    pub max_mean_kl: f64,
    /// Least top-1 agreement, 0 to 1.
    pub min_top1: f64,
}

impl Tolerance {
    /// Two forms of the same function in f32: absolute error up to 1e-3, every greatest entry the same.
    pub const EXACT: Self = Self {
        max_abs: 1e-3,
        max_rel: f64::INFINITY,
        min_cosine: 0.999_999,
        max_mean_kl: 1e-6,
        min_top1: 1.0,
    };
}

/// One gate that a comparison did not pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Failure {
    /// The figure's name.
    pub gate: &'static str,
    /// What it may be at most (or at least, for cosine and top-1).
    pub limit: f64,
    /// What it is.
    pub found: f64,
}

impl Parity {
    /// Every gate that fails; none means the tensors agree. NaN in a figure fails its gate.
    pub fn check(&self, tolerance: &Tolerance) -> Vec<Failure> {
        let at_most = |gate, found: f64, limit: f64| {
            (found > limit || found.is_nan()).then_some(Failure { gate, limit, found })
        };
        let at_least = |gate, found: f64, limit: f64| {
            (found < limit || found.is_nan()).then_some(Failure { gate, limit, found })
        };
        [
            at_most(
                "positions of NaN and infinity",
                self.non_finite_mismatches as f64,
                0.0,
            ),
            at_most("max abs", self.max_abs, tolerance.max_abs),
            at_most("max rel", self.max_rel, tolerance.max_rel),
            at_least("cosine", self.cosine, tolerance.min_cosine),
            at_most("mean KL", self.mean_kl, tolerance.max_mean_kl),
            at_least("top-1 agreement", self.top1, tolerance.min_top1),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Collects a comparison, one position at a time.
#[derive(Debug, Default)]
pub struct Comparer {
    tokens: usize,
    vocab: usize,
    non_finite_mismatches: u64,
    first_non_finite: Option<Coordinate>,
    max_abs: f64,
    max_rel: f64,
    worst: Option<Coordinate>,
    aa: f64,
    bb: f64,
    ab: f64,
    finite: u64,
    kl_sum: f64,
    kl_tokens: usize,
    max_kl: f64,
    agreed: usize,
}

impl Comparer {
    /// A comparison without positions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one position: the logits of both, `[vocab]`.
    ///
    /// # Errors
    /// When the lengths differ, from each other or from earlier positions, or are zero.
    pub fn add(&mut self, a: &[f32], b: &[f32]) -> Result<(), Refusal> {
        let expected = if self.tokens == 0 {
            a.len()
        } else {
            self.vocab
        };
        if a.len() != expected || b.len() != expected || expected == 0 {
            return Err(Refusal::new(
                format!("logits of position {}", self.tokens),
                format!(
                    "{} in both",
                    if expected == 0 {
                        "some".into()
                    } else {
                        expected.to_string()
                    }
                ),
                format!("{} and {}", a.len(), b.len()),
                "compare two forms of the same model (the same vocabulary)",
            ));
        }
        self.vocab = expected;
        let token = self.tokens;
        self.tokens += 1;

        let mut squares = 0.0;
        let mut finite = 0_u64;
        for value in a.iter().filter(|value| value.is_finite()) {
            squares += f64::from(*value).powi(2);
            finite += 1;
        }
        let rms = if finite == 0 {
            0.0
        } else {
            (squares / finite as f64).sqrt()
        };

        let mut all_finite = true;
        for (vocab, (&x, &y)) in a.iter().zip(b).enumerate() {
            let here = Coordinate {
                token,
                vocab,
                a: x,
                b: y,
            };
            if !(x.is_finite() && y.is_finite()) {
                all_finite = false;
                let same =
                    (x.is_nan() && y.is_nan()) || (x.is_infinite() && x.total_cmp(&y).is_eq());
                if !same {
                    self.non_finite_mismatches += 1;
                    self.first_non_finite.get_or_insert(here);
                }
                continue;
            }
            let (x, y) = (f64::from(x), f64::from(y));
            let error = (x - y).abs();
            if self.worst.is_none() || error > self.max_abs {
                self.max_abs = error;
                self.worst = Some(here);
            }
            if error > 0.0 {
                // The floor is zero only when every finite reference logit is: then any error is infinite.
                self.max_rel = self.max_rel.max(error / x.abs().max(rms));
            }
            self.aa += x * x;
            self.bb += y * y;
            self.ab += x * y;
            self.finite += 1;
        }
        if top(a) == top(b) {
            self.agreed += 1;
        }
        if all_finite {
            let kl = divergence(a, b);
            self.kl_sum += kl;
            self.kl_tokens += 1;
            self.max_kl = self.max_kl.max(kl);
        }
        Ok(())
    }

    /// The figures so far.
    ///
    /// # Errors
    /// When no position was added: nothing was compared, so nothing agreed.
    pub fn finish(&self) -> Result<Parity, Refusal> {
        if self.tokens == 0 {
            return Err(Refusal::new(
                "comparison",
                "at least one position",
                "none",
                "pass a text with tokens",
            ));
        }
        let cosine = if self.aa == 0.0 && self.bb == 0.0 {
            1.0
        } else if self.aa == 0.0 || self.bb == 0.0 {
            0.0
        } else {
            // Rounding can carry the quotient past its bounds.
            (self.ab / (self.aa.sqrt() * self.bb.sqrt())).clamp(-1.0, 1.0)
        };
        Ok(Parity {
            tokens: self.tokens,
            vocab: self.vocab,
            non_finite_mismatches: self.non_finite_mismatches,
            first_non_finite: self.first_non_finite,
            max_abs: self.max_abs,
            max_rel: self.max_rel,
            scale: if self.finite == 0 {
                0.0
            } else {
                (self.aa / self.finite as f64).sqrt()
            },
            cosine,
            mean_kl: if self.kl_tokens == 0 {
                0.0
            } else {
                self.kl_sum / self.kl_tokens as f64
            },
            max_kl: self.max_kl,
            top1: self.agreed as f64 / self.tokens as f64,
            worst: self.worst,
        })
    }
}

/// Index of the greatest entry, the first of equals; NaN is never the greatest.
fn top(logits: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (index, &value) in logits.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, greatest)| value > greatest) {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}

/// ln(sum of exp) with the greatest entry taken out first.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let greatest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    greatest
        + logits
            .iter()
            .map(|value| (f64::from(*value) - greatest).exp())
            .sum::<f64>()
            .ln()
}

/// KL(softmax(a) || softmax(b)) in nats; rounding below zero is zero.
pub fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let (za, zb) = (log_sum_exp(a), log_sum_exp(b));
    let sum: f64 = a
        .iter()
        .zip(b)
        .map(|(&x, &y)| {
            let (ln_p, ln_q) = (f64::from(x) - za, f64::from(y) - zb);
            ln_p.exp() * (ln_p - ln_q)
        })
        .sum();
    sum.max(0.0)
}

#[cfg(test)]
mod tests;
