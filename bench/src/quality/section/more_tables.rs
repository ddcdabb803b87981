//! Seeds, window lengths, left-out steps, failures, cost, commands.

use super::figures::{cell, dash, mean_and_deviation, paired_error, percent, show};
use super::{Figure, Results};
use crate::quality::harness::Entry;
use crate::quality::jobs::{Conversion, Windows, ablation};
use crate::quality::mlac::{Runner, shell_line};
use crate::quality::request::{Method, Size};
use crate::results::table;

impl<R: Runner> Results<'_, R> {
    /// Mean and spread where several seeds were asked for.
    pub(super) fn seeds_table(&self) -> Option<String> {
        let mut rows = Vec::new();
        let places: Vec<(Method, Size)> = if self.request.all_seeds {
            let sizes = self.request.sizes.iter();
            sizes
                .flat_map(|&s| self.methods().iter().map(move |&m| (m, s)))
                .filter(|(m, _)| *m != Method::Svd)
                .collect()
        } else {
            vec![(Method::Recipe, self.request.middle)]
        };
        if self.request.seeds.len() < 2 {
            return None;
        }
        for (method, size) in places {
            let figures: Vec<Figure> = self
                .request
                .seeds
                .iter()
                .map(|&seed| {
                    let plain = Conversion::plain(self.request, method, size);
                    self.main_ratio(&Conversion { seed, ..plain })
                })
                .collect();
            let known: Vec<f64> = figures.iter().filter_map(|f| f.clone().ok()).collect();
            let mut row = vec![method.name().to_owned(), size.to_string()];
            row.push(figures.iter().map(cell).collect::<Vec<_>>().join(", "));
            // A seed that failed is in its cell and in the list of failures; a mean without it would
            // pass for one of all seeds.
            let (mean, deviation) = if known.len() == figures.len() {
                mean_and_deviation(&known)
            } else {
                (None, None)
            };
            row.push(mean.map_or_else(dash, show));
            row.push(deviation.map_or_else(dash, |d| format!("{d:.4}")));
            rows.push(row);
        }
        let seeds: Vec<String> = self.request.seeds.iter().map(u64::to_string).collect();
        let list = format!("seeds {}", seeds.join(", "));
        Some(format!(
            "### By calibration windows\n\nA seed chooses other windows of the calibration text.\n\n{}",
            table(
                &["method", "r + d_r", &list, "mean", "standard deviation"],
                &rows
            )
        ))
    }

    pub(super) fn windows_table(&self) -> Option<String> {
        if self.request.windows_list.is_empty() {
            return None;
        }
        let middle = self.request.middle;
        let mut head = vec!["window", "windows", "original"];
        head.extend(self.methods().iter().map(|m| m.name()));
        let rows: Vec<Vec<String>> = self
            .request
            .windows_list
            .iter()
            .map(|&length| {
                let windows = Windows::of_length(self.request, length);
                let original = self.original(windows);
                let (count, perplexity) = match &original {
                    Ok(m) => (m.losses.len(), m.perplexity.ok_or_else(String::new)),
                    Err(why) => (windows.count, Err(why.clone())),
                };
                let mut row = vec![length.to_string(), count.to_string(), cell(&perplexity)];
                row.extend(self.methods().iter().map(|&method| {
                    cell(&self.ratio(&Conversion::plain(self.request, method, middle), windows))
                }));
                row
            })
            .collect();
        Some(format!(
            "### By evaluation window\n\nAt {middle} ({}), on as many tokens.\n\n{}",
            percent(self.share(middle)),
            table(&head, &rows)
        ))
    }

    pub(super) fn ablation_table(&self) -> Option<String> {
        let size = self.request.ablation?;
        let names: Vec<&str> = self.steps.iter().map(|(name, _)| *name).collect();
        let windows = Windows::main(self.request);
        let all = ablation(self.request, size, &names);
        let full = &all[0];
        let full_ratio = self.main_ratio(full);
        let rows: Vec<Vec<String>> = all
            .iter()
            .map(|conversion| {
                let (name, about) = match (conversion.without.as_slice(), conversion.method) {
                    ([.., step], _) => {
                        let about = self.steps.iter().find(|(name, _)| name == step);
                        let names = conversion.without.join("`, `");
                        (format!("`{names}`"), about.map_or("", |(_, about)| *about))
                    }
                    ([], Method::Recipe) => (
                        "nothing".to_owned(),
                        "budget distributed over the layers (`--budget`)",
                    ),
                    ([], _) => ("nothing".to_owned(), "the same ranks in every layer"),
                };
                let ratio = self.main_ratio(conversion);
                let mut row = vec![name, about.to_owned(), cell(&ratio)];
                match (&ratio, &full_ratio) {
                    (Ok(ratio), Ok(full_ratio)) if conversion != full => {
                        row.push(format!("{:+.3}", ratio - full_ratio));
                        let error = self
                            .converted(conversion, windows.length)
                            .and_then(|a| Ok((a, self.converted(full, windows.length)?)))
                            .ok()
                            .and_then(|(a, b)| paired_error(&a.losses, &b.losses));
                        row.push(error.map_or_else(dash, |e| format!("{:.3}", e * ratio)));
                    }
                    _ => row.extend([dash(), dash()]),
                }
                row
            })
            .collect();
        let head = [
            "left out",
            "what it is",
            "ratio",
            "difference",
            "standard error",
        ];
        Some(format!(
            "### Without each step\n\nThe recipe at {size} ({}), one step left out at a time. The difference is to the first row, its \
             standard error that of the windows' losses, in pairs.\n\n{}",
            percent(self.share(size)),
            table(&head, &rows)
        ))
    }

    /// Every run that failed or is missing, with its reason.
    pub(super) fn failures(&self) -> Option<String> {
        let rows: Vec<Vec<String>> = self
            .entries
            .iter()
            .flat_map(|entry| {
                let steps = entry.convert.iter();
                let steps = steps.chain(entry.measured.iter().map(|m| &m.step));
                steps.filter_map(move |s| Some((entry, s.failure.as_ref()?)))
            })
            .map(|(entry, failure)| {
                let why = self.harness.shown_failure(failure).replace('|', r"\|");
                vec![entry.job.label(), why]
            })
            .collect();
        (!rows.is_empty())
            .then(|| format!("### What failed\n\n{}", table(&["run", "reason"], &rows)))
    }

    /// Time and memory by method.
    pub(super) fn cost(&self) -> String {
        let mut rows = Vec::new();
        for &method in self.methods() {
            let of_method = |e: &&Entry| {
                let conversion = e.job.conversion.as_ref();
                let converted = e.convert.as_ref().is_some_and(|s| s.failure.is_none());
                conversion.is_some_and(|c| c.method == method) && converted
            };
            let entries: Vec<&Entry> = self.entries.iter().filter(of_method).collect();
            let steps = || entries.iter().filter_map(|e| e.convert.as_ref());
            let mut seconds: Vec<f64> = steps().map(|s| s.seconds).collect();
            seconds.sort_by(f64::total_cmp);
            let Some(median) = seconds.get(seconds.len() / 2) else {
                continue;
            };
            let peak = steps().filter_map(|s| s.peak_bytes).max();
            rows.push(vec![
                method.name().to_owned(),
                seconds.len().to_string(),
                format!("{median:.0} s"),
                peak.map_or_else(dash, |b| {
                    format!("{:.2} GiB", b as f64 / f64::from(1 << 30))
                }),
            ]);
        }
        let memory = if self.measures_memory {
            "Gradients are taken once a seed, in its first conversion, and read by the others. Peak memory is the maximum \
             resident set size of GNU time."
        } else {
            "Gradients are taken once a seed, in its first conversion, and read by the others. GNU time is not installed: \
             no peak memory."
        };
        let head = ["method", "conversions", "median time", "peak memory"];
        let head = &head[..];
        format!("### Cost\n\n{memory}\n\n{}", table(head, &rows))
    }

    pub(super) fn commands(&self) -> String {
        let (mut converts, mut evals, mut originals) = (Vec::new(), Vec::new(), Vec::new());
        for entry in self.entries {
            let mut commands = self
                .harness
                .commands(&entry.job, &self.harness.shown)
                .into_iter()
                .map(|args| shell_line(&args));
            let rest = if entry.job.conversion.is_some() {
                converts.extend(commands.next());
                &mut evals
            } else {
                &mut originals
            };
            for line in commands {
                if !rest.contains(&line) {
                    rest.push(line);
                }
            }
        }
        let lines = [originals, evals, converts].concat().join("\n");
        let commits: Vec<&str> = self.entries.iter().fold(Vec::new(), |mut seen, e| {
            if !seen.contains(&e.commit.as_str()) {
                seen.push(&e.commit);
            }
            seen
        });
        format!(
            "### Commands\n\nRun at commit {}: the original, what measures a converted folder, the conversions.\n\n```\n{lines}\n```",
            commits.join(", ")
        )
    }
}
