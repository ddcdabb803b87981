//! The section of `RESULTS.md` and the chart, from the entries of all jobs.

mod chart;
mod figures;
mod main_table;
mod more_tables;

use crate::quality::harness::{Entry, Harness, Measured};
use crate::quality::jobs::{Conversion, Job, Windows};
use crate::quality::mlac::Runner;
use crate::quality::request::{Method, Request};

/// Entries by job, and what they are shown with.
pub struct Results<'a, R> {
    request: &'a Request,
    harness: &'a Harness<'a, R>,
    entries: &'a [Entry],
    steps: &'a [(&'a str, &'a str)],
    measures_memory: bool,
}

/// A figure, or why there is none.
type Figure<T = f64> = Result<T, String>;

impl<'a, R: Runner> Results<'a, R> {
    /// Of `entries`; `steps` are the recipe's with what they are.
    pub fn new(
        request: &'a Request,
        harness: &'a Harness<'a, R>,
        entries: &'a [Entry],
        steps: &'a [(&'a str, &'a str)],
        measures_memory: bool,
    ) -> Self {
        Self {
            request,
            harness,
            entries,
            steps,
            measures_memory,
        }
    }

    /// The section's name.
    pub fn title(&self) -> String {
        format!(
            "Quality at equal cache: {} on {}",
            self.model(),
            self.harness.shown.eval
        )
    }

    fn model(&self) -> &str {
        let name = &self.harness.shown.model;
        name.strip_suffix(".gguf").unwrap_or(name)
    }

    fn entry(&self, job: &Job) -> Option<&Entry> {
        self.entries.iter().find(|e| e.job == *job)
    }

    fn original(&self, windows: Windows) -> Figure<&Measured> {
        self.entry(&Job::original(windows))
            .ok_or("not run")?
            .on(windows.length)
            .map_err(str::to_owned)
    }

    fn converted(&self, conversion: &Conversion, length: usize) -> Figure<&Measured> {
        self.entry(&Job::of(self.request, conversion.clone()))
            .ok_or("not run")?
            .on(length)
            .map_err(str::to_owned)
    }

    /// Perplexity over the original's.
    fn ratio(&self, conversion: &Conversion, windows: Windows) -> Figure {
        let converted = self.converted(conversion, windows.length)?;
        let original = self.original(windows)?;
        match (converted.perplexity, original.perplexity) {
            (Some(a), Some(b)) => Ok(a / b),
            _ => Err("not measured".to_owned()),
        }
    }

    fn main_ratio(&self, conversion: &Conversion) -> Figure {
        self.ratio(conversion, Windows::main(self.request))
    }

    /// The section, with the chart at `chart`, if there is one.
    pub fn body(&self, chart: Option<&str>) -> String {
        let mut parts = vec![self.protocol(), self.main_table()];
        parts.extend(chart.map(|chart| format!("![Perplexity by cache]({chart})")));
        parts.extend(self.ranks_table());
        parts.extend(self.seeds_table());
        parts.extend(self.windows_table());
        parts.extend(self.ablation_table());
        parts.extend(self.failures());
        parts.push(self.cost());
        parts.push(self.commands());
        parts
            .iter()
            .map(|p| p.trim_end())
            .collect::<Vec<_>>()
            .join("\n\n")
            + "\n"
    }

    fn protocol(&self) -> String {
        let windows = Windows::main(self.request);
        let original = self.original(windows);
        let perplexity = original.as_ref().ok().and_then(|m| m.perplexity);
        let shown = perplexity.map_or_else(|| "?".to_owned(), |p| format!("{p:.4}"));
        let count = original.map_or(windows.count, |m| m.losses.len());
        let names = &self.harness.shown;
        let refined = if self.methods().contains(&Method::RecipeRefined) {
            format!(
                " `recipe-refined` does the same and then {} gradient steps on every layer: it is not free of training.",
                self.request.refine
            )
        } else {
            String::new()
        };
        format!(
            "Figures are the converted model's perplexity over the original's {shown}, by `mlac eval` on the first {count} \
             windows of {} tokens of {} (no overlap, empty cache, all targets but the first). All methods are calibrated on {} \
             (svd needs no text) and may cache as many numbers a token as the row says: `recipe` gets their share of the cache as its budget and \
             divides it itself, all others give every layer the r + d_r of the row.{refined}",
            windows.length, names.eval, names.calib
        )
    }

    fn methods(&self) -> &[Method] {
        &self.request.methods
    }
}

#[cfg(test)]
mod tests;
