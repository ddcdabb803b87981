//! The one shape every refusal has: what was looked at, what was expected, what was found, what to do.

use std::fmt;

/// A refusal of an input: names the subject, what was expected, what was found and the way out.
///
/// Every crate's error enum wraps this type for bad input, so a user always reads the four parts
/// in the same order, and the command line maps it to exit code 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What was looked at: a file, a tensor in a file, a configuration key, an option.
    pub subject: String,
    /// What mlac expected there.
    pub expected: String,
    /// What it found instead.
    pub found: String,
    /// What the user can do about it.
    pub fix: String,
}

impl Refusal {
    /// A refusal from its four parts.
    pub fn new(
        subject: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.into(),
            expected: expected.into(),
            found: found.into(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: expected {}, found {}; fix: {}",
            self.subject, self.expected, self.found, self.fix
        )
    }
}

impl std::error::Error for Refusal {}
