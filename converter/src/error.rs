//! The errors of a conversion.

use mlac_model::Refusal;

/// Why a layer could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input is not what the conversion needs.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Weights could not be read.
    #[error(transparent)]
    Weights(#[from] mlac_model::Error),
    /// candle could not compute a gradient step.
    #[error("gradient steps of the refinement failed")]
    Gradient(#[from] candle_core::Error),
}

/// A refusal for numbers that a decomposition cannot take.
pub(crate) fn numeric(what: &str, expected: &str) -> Error {
    Error::Refused(Refusal::new(
        what,
        expected,
        "a matrix it fails on",
        "check the layer's weights and calibration activations for huge or non-finite values",
    ))
}

/// A refusal from its four parts, as this crate's error.
pub(crate) fn refuse(
    subject: impl Into<String>,
    expected: impl Into<String>,
    found: impl Into<String>,
    fix: impl Into<String>,
) -> Error {
    Error::Refused(Refusal::new(subject, expected, found, fix))
}
