//! What was expected, found, and to be done: mlac's one shape of refusals, here without the rest of mlac, so that the library of
//! operators builds in seconds and carries nothing else.

use std::fmt;

/// An input that an operator does not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The input or attribute.
    pub subject: String,
    /// What the specification says.
    pub expected: String,
    /// What was given.
    pub found: String,
    /// What to do.
    pub fix: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            subject,
            expected,
            found,
            fix,
        } = self;
        write!(
            f,
            "{subject}: expected {expected}, found {found}; fix: {fix}"
        )
    }
}

impl std::error::Error for Refusal {}

/// A refusal of an input.
pub(crate) fn refuse(
    subject: &str,
    expected: impl Into<String>,
    found: impl Into<String>,
    fix: &'static str,
) -> Refusal {
    Refusal {
        subject: subject.to_owned(),
        expected: expected.into(),
        found: found.into(),
        fix,
    }
}
