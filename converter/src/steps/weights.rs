//! How much each calibration token counts.
//!
//! A few tokens (the first one above all) are attended by everyone and lie far from the rest.
//! Weighting the second moment by the attention a token receives, `w_s = sum_h sum_t p_h(t,s)^2`,
//! keeps them; the square is how an error of one attended value enters the squared output. A
//! small uniform share keeps the moment from ignoring tokens no sampled row looked at.

use serde::{Deserialize, Serialize};

use crate::error::{Error, refuse};
use crate::linalg::Matrix;
use crate::statistics::LayerStatistics;

/// Weights of the tokens in the second moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum TokenWeights {
    /// All the same.
    Uniform,
    /// Attention received.
    Attention {
        /// Share of the total weight that is spread uniformly, from 0 to 1.
        uniform_share: f64,
    },
    /// Attention received times how much an error of the token's score moves the output:
    /// `sum p^2 |v_s - o_t|^2`, mixed with plain attention received.
    Sensitivity {
        /// Share of the total weight that goes by sensitivity, from 0 to 1.
        sensitive_share: f64,
        /// Share of the total weight that is spread uniformly, from 0 to 1.
        uniform_share: f64,
    },
}

impl TokenWeights {
    /// Refuses shares that are not fractions of one whole.
    pub fn check(self) -> Result<(), Error> {
        let (sensitive, uniform) = match self {
            Self::Uniform => (0.0, 1.0),
            Self::Attention { uniform_share } => (0.0, uniform_share),
            Self::Sensitivity {
                sensitive_share,
                uniform_share,
            } => (sensitive_share, uniform_share),
        };
        if sensitive >= 0.0 && uniform >= 0.0 && sensitive + uniform <= 1.0 {
            return Ok(());
        }
        Err(refuse(
            "token weights",
            "shares of at least 0 that sum to at most 1",
            format!("{sensitive} and {uniform}"),
            "use the default",
        ))
    }
}

/// The weighted second moment `E_w[s s^T]` `[2*G*d, 2*G*d]` of the stacked vector, uncentred (the
/// encoder is affine, its mean direction lies in the span), weights summing to 1.
pub fn token_moment(statistics: &LayerStatistics, weights: TokenWeights) -> Matrix<f64> {
    let mut parts = Vec::new();
    let (attended, uniform, sensitive) = match weights {
        TokenWeights::Uniform => (0.0, 1.0, 0.0),
        TokenWeights::Attention { uniform_share } => (1.0 - uniform_share, uniform_share, 0.0),
        TokenWeights::Sensitivity {
            sensitive_share,
            uniform_share,
        } => (
            1.0 - uniform_share - sensitive_share,
            uniform_share,
            sensitive_share,
        ),
    };
    parts.push((
        &statistics.moment,
        uniform / (statistics.tokens.max(1) as f64),
    ));
    if statistics.attended > 0.0 {
        parts.push((&statistics.moment_attended, attended / statistics.attended));
    }
    if statistics.sensitive > 0.0 {
        parts.push((
            &statistics.moment_sensitive,
            sensitive / statistics.sensitive,
        ));
    }
    let mut total = Matrix::zeros(statistics.moment.rows(), statistics.moment.cols());
    for (moment, share) in parts {
        if share != 0.0 {
            total.add_scaled(moment, share);
        }
    }
    total
}
