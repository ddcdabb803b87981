//! A table of cases: all of them run, all failures are reported.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Outcome;

/// Outcomes of named cases.
#[derive(Debug, Default)]
pub struct Cases {
    passed: usize,
    failed: Vec<(String, String)>,
}

impl Cases {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs one case; a panic inside it is a failure of that case.
    pub fn run(&mut self, name: impl Into<String>, case: impl FnOnce() -> Outcome) {
        let outcome = catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|panic| {
            let message = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(format!(
                "panicked: {}",
                message.as_deref().unwrap_or("(no message)")
            ))
        });
        match outcome {
            Ok(()) => self.passed += 1,
            Err(why) => self.failed.push((name.into(), why)),
        }
    }

    /// Fails the test with every failure, or when fewer than `least` cases ran at all.
    ///
    /// # Panics
    /// On any failure.
    pub fn finish(self, least: usize) {
        let total = self.passed + self.failed.len();
        assert!(
            total >= least,
            "only {total} cases ran, at least {least} exist: check the list of cases"
        );
        let lines: String = self
            .failed
            .iter()
            .map(|(name, why)| format!("\n  {name}: {why}"))
            .collect();
        assert!(
            self.failed.is_empty(),
            "{} of {total} cases failed:{lines}",
            self.failed.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::Cases;

    #[test]
    #[should_panic(expected = "2 of 3 cases failed:\n  a: wrong\n  c: panicked: loud")]
    fn every_failure_is_reported() {
        let mut cases = Cases::new();
        cases.run("a", || Err("wrong".into()));
        cases.run("b", || Ok(()));
        cases.run("c", || panic!("loud"));
        cases.finish(3);
    }

    #[test]
    #[should_panic(expected = "only 1 cases ran")]
    fn an_empty_table_does_not_pass() {
        let mut cases = Cases::new();
        cases.run("a", || Ok(()));
        cases.finish(2);
    }
}
