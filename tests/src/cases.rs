//! A table of cases: all of them run, all failures are reported.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Outcome;
use crate::compare::Difference;

/// Outcomes of named cases.
#[derive(Debug, Default)]
pub struct Cases {
    passed: usize,
    failed: Vec<(String, String)>,
    /// The case with the largest measured difference.
    worst: Option<(String, f64)>,
}

impl Cases {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs one case; a panic inside it is a failure of that case.
    pub fn run(&mut self, name: impl Into<String>, case: impl FnOnce() -> Outcome) {
        self.take(name.into(), case);
    }

    /// Runs one case that measures a difference; the largest one is printed at the end.
    pub fn measure(&mut self, name: impl Into<String>, case: impl FnOnce() -> Outcome<Difference>) {
        let name = name.into();
        if let Some(found) = self.take(name.clone(), case)
            && self
                .worst
                .as_ref()
                .is_none_or(|(_, most)| found.of_scale > *most)
        {
            self.worst = Some((name, found.of_scale));
        }
    }

    fn take<T>(&mut self, name: String, case: impl FnOnce() -> Outcome<T>) -> Option<T> {
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
            Ok(found) => {
                self.passed += 1;
                Some(found)
            }
            Err(why) => {
                self.failed.push((name, why));
                None
            }
        }
    }

    /// Fails the test with every failure, or when fewer than `least` cases ran at all.
    ///
    /// # Panics
    /// On any failure.
    #[expect(
        clippy::print_stdout,
        reason = "a measured figure, shown with --nocapture"
    )]
    pub fn finish(self, least: usize) {
        let total = self.passed + self.failed.len();
        if let Some((name, most)) = &self.worst {
            println!("{total} cases, largest difference {most:.1e} of the scale in {name}");
        }
        let lines: Vec<String> = self
            .failed
            .iter()
            .map(|(name, why)| format!("\n  {name}: {why}"))
            .collect();
        assert!(
            self.failed.is_empty(),
            "{} of {total} cases failed:{}",
            self.failed.len(),
            lines.concat()
        );
        assert!(
            total >= least,
            "only {total} cases ran, at least {least} exist: check the list of cases"
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
