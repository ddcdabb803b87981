//! Ratios by size and method, and how budgets were divided.

use super::Results;
use super::figures::{cell, percent};
use crate::quality::jobs::{Conversion, Job, Windows};
use crate::quality::mlac::Runner;
use crate::quality::request::{Method, Size};
use crate::results::table;
use std::fmt::Write as _;

/// What TransMLA's own code gave on SmolLM2-135M-Instruct: r + `d_r`, and the perplexity's ratio on the
/// first 8 windows of 2048 tokens of WikiText-2's test text, calibrated its way.
const TRANSMLA: [((usize, usize), &str); 5] = [
    ((224, 64), "1.38"),
    ((128, 64), "1.89"),
    ((80, 64), "2.75"),
    ((64, 32), "5.27"),
    ((32, 16), "17.6"),
];
const TRANSMLA_MODEL: &str = "SmolLM2-135M-Instruct";
/// The original's perplexity there, by which the text is known.
const TRANSMLA_ORIGINAL: f64 = 19.134;

impl<R: Runner> Results<'_, R> {
    pub(super) fn main_table(&self) -> String {
        let theirs: Vec<Option<String>> = self
            .request
            .sizes
            .iter()
            .map(|&size| self.transmla_itself(size))
            .collect();
        let show_theirs = theirs.iter().any(Option::is_some);
        let mut head = vec!["cache", "r + d_r"];
        head.extend(self.methods().iter().map(|m| m.name()));
        if show_theirs {
            head.push("TransMLA's own code");
        }
        let mut rows = Vec::new();
        for (&size, theirs) in self.request.sizes.iter().zip(theirs) {
            let mut row = vec![percent(self.share(size)), size.to_string()];
            row.extend(self.methods().iter().map(|&method| {
                cell(&self.main_ratio(&Conversion::plain(self.request, method, size)))
            }));
            if show_theirs {
                row.push(theirs.unwrap_or_else(|| "-".to_owned()));
            }
            rows.push(row);
        }
        let mut text = table(&head, &rows);
        if show_theirs {
            text += "\nThe last column is a constant: TransMLA's own code on this model and text, with its own calibration.\n";
        }
        for note in self.unequal() {
            let _ = writeln!(text, "\n{note}");
        }
        text
    }

    /// Share of the GQA cache of a converted layer.
    pub(super) fn share(&self, size: Size) -> f64 {
        size.width() as f64 / self.harness.width as f64
    }

    /// The published figure, where model, text and size are those it was measured on; at the same cache
    /// divided in another way the division is named.
    pub(super) fn transmla_itself(&self, size: Size) -> Option<String> {
        let windows = Windows::main(self.request);
        let original = self.original(windows).ok()?.perplexity?;
        let same = self.model().starts_with(TRANSMLA_MODEL)
            && (windows.length, windows.count) == (2048, 8)
            && (original / TRANSMLA_ORIGINAL - 1.0).abs() < 0.01;
        let ((r, d), ratio) = TRANSMLA
            .into_iter()
            .find(|((r, d), _)| same && r + d == size.width())?;
        Some(if (r, d) == (size.latent, size.rotary) {
            ratio.to_owned()
        } else {
            format!("{ratio} (at {r} + {d})")
        })
    }

    /// Conversions that do not cache what the table says.
    pub(super) fn unequal(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for &size in &self.request.sizes {
            let cached: Vec<(Method, u64)> = self
                .methods()
                .iter()
                .filter_map(|&method| {
                    let conversion = Conversion::plain(self.request, method, size);
                    let entry = self.entry(&Job::of(self.request, conversion))?;
                    (!entry.ranks.is_empty()).then(|| (method, entry.cached()))
                })
                .collect();
            if cached.iter().any(|(_, n)| *n != cached[0].1) {
                let list: Vec<String> = cached
                    .iter()
                    .map(|(m, n)| format!("{} {n}", m.name()))
                    .collect();
                notes.push(format!(
                    "Numbers that the converted layers cache of a token at {size} differ: {}.",
                    list.join(", ")
                ));
            }
        }
        notes
    }

    /// What the recipe made of each budget.
    pub(super) fn ranks_table(&self) -> Option<String> {
        let range = |values: Vec<u64>| {
            let (low, high) = (values.iter().min()?, values.iter().max()?);
            Some(if low == high {
                low.to_string()
            } else {
                format!("{low} to {high}")
            })
        };
        let rows: Vec<Vec<String>> = self
            .request
            .sizes
            .iter()
            .filter_map(|&size| {
                let conversion = Conversion::plain(self.request, Method::Recipe, size);
                let entry = self.entry(&Job::of(self.request, conversion))?;
                let ranks = &entry.ranks;
                Some(vec![
                    percent(self.share(size)),
                    range(ranks.iter().map(|(r, _)| *r).collect())?,
                    range(ranks.iter().map(|(_, d)| *d).collect())?,
                    format!("{:.1}", entry.cached() as f64 / ranks.len() as f64),
                    size.width().to_string(),
                ])
            })
            .collect();
        let head = ["cache", "r", "d_r", "mean r + d_r", "the others' r + d_r"];
        (!rows.is_empty()).then(|| {
            format!(
                "### How `recipe` divided the budget\n\n{}",
                table(&head, &rows)
            )
        })
    }
}
