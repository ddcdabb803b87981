//! The section of `RESULTS.md` and the chart, from the entries of all jobs.

use std::fmt::Write as _;

use mlac::report::charts::{Chart, Series};

use super::harness::{Entry, Harness, Measured, Runner, shell_line};
use super::jobs::{Conversion, Job, Windows, ablation};
use super::request::{Method, Request, Size};
use crate::results::table;

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
        format!("Quality at equal cache: {}", self.model())
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

    /// The section, with the chart at `chart`.
    pub fn body(&self, chart: &str) -> String {
        let mut parts = vec![
            self.protocol(),
            self.main_table(),
            format!("![Perplexity by cache]({chart})"),
        ];
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
        format!(
            "Figures are the converted model's perplexity over the original's {shown}, by `mlac eval` on the first {count} \
             windows of {} tokens of {} (no overlap, empty cache, all targets but the first). All methods are calibrated on {} \
             (svd needs no text) and may cache as many numbers a token as the row says: `recipe` gets their share of the cache as its budget and \
             divides it itself, all others give every layer the r + d_r of the row.",
            windows.length, names.eval, names.calib
        )
    }

    fn methods(&self) -> &[Method] {
        &self.request.methods
    }

    fn main_table(&self) -> String {
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
    fn share(&self, size: Size) -> f64 {
        size.width() as f64 / self.harness.width as f64
    }

    /// The published figure, where model, text and size are those it was measured on; at the same cache
    /// divided in another way the division is named.
    fn transmla_itself(&self, size: Size) -> Option<String> {
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
    fn unequal(&self) -> Vec<String> {
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
    fn ranks_table(&self) -> Option<String> {
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

    /// Mean and spread where several seeds were asked for.
    fn seeds_table(&self) -> Option<String> {
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
            let (mean, deviation) = mean_and_deviation(&known);
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

    fn windows_table(&self) -> Option<String> {
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

    fn ablation_table(&self) -> Option<String> {
        let size = self.request.ablation?;
        let names: Vec<&str> = self.steps.iter().map(|(name, _)| *name).collect();
        let windows = Windows::main(self.request);
        let all = ablation(self.request, size, &names);
        let full = &all[0];
        let full_ratio = self.main_ratio(full);
        let rows: Vec<Vec<String>> = all
            .iter()
            .map(|conversion| {
                let (name, about) = match (&conversion.without, conversion.method) {
                    (Some(step), _) => {
                        let about = self.steps.iter().find(|(name, _)| name == step);
                        (format!("`{step}`"), about.map_or("", |(_, about)| *about))
                    }
                    (None, Method::Recipe) => (
                        "nothing".to_owned(),
                        "budget distributed over the layers (`--budget`)",
                    ),
                    (None, _) => ("nothing".to_owned(), "the same ranks in every layer"),
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
    fn failures(&self) -> Option<String> {
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
    fn cost(&self) -> String {
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
            "Peak memory is the maximum resident set size of GNU time."
        } else {
            "GNU time is not installed: no peak memory."
        };
        let head = ["method", "conversions", "median time", "peak memory"];
        let head = &head[..];
        format!("### Cost\n\n{memory}\n\n{}", table(head, &rows))
    }

    fn commands(&self) -> String {
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

    /// Ratio by cache, a line for each method.
    pub fn chart(&self) -> Option<String> {
        let mut series: Vec<Series> = self
            .methods()
            .iter()
            .map(|&method| {
                let mut points: Vec<(f64, f64)> = self
                    .request
                    .sizes
                    .iter()
                    .filter_map(|&size| {
                        let conversion = Conversion::plain(self.request, method, size);
                        Some((self.share(size), self.main_ratio(&conversion).ok()?))
                    })
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                Series {
                    name: method.name().to_owned(),
                    points,
                }
            })
            .collect();
        let mut theirs: Vec<(f64, f64)> = self
            .request
            .sizes
            .iter()
            .filter_map(|&size| {
                let text = self.transmla_itself(size)?;
                Some((self.share(size), text.split(' ').next()?.parse().ok()?))
            })
            .collect();
        theirs.sort_by(|a, b| a.0.total_cmp(&b.0));
        series.push(Series {
            name: "TransMLA's own code".to_owned(),
            points: theirs,
        });
        series.retain(|s| !s.points.is_empty());
        Chart {
            title: format!("Perplexity at equal cache: {}", self.model()),
            x: "cache, share of GQA's".to_owned(),
            y: "perplexity / original's".to_owned(),
            log_x: false,
            log_y: true,
            series,
        }
        .svg()
    }
}

fn dash() -> String {
    "-".to_owned()
}

fn percent(share: f64) -> String {
    let text = format!("{:.1}", 100.0 * share);
    format!("{} %", text.strip_suffix(".0").unwrap_or(&text))
}

/// A ratio or a perplexity with what can be told apart of it.
fn show(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.3}")
    } else if value < 100.0 {
        format!("{value:.2}")
    } else if value < 1e4 {
        format!("{value:.0}")
    } else {
        format!("{value:.1e}")
    }
}

/// A figure's cell; reasons are long and stand in their own table.
fn cell(figure: &Figure) -> String {
    match figure {
        Ok(value) => show(*value),
        Err(why) if why == "not run" => why.clone(),
        Err(_) => "failed".to_owned(),
    }
}

/// Mean, and standard deviation of the sample where it has one.
fn mean_and_deviation(values: &[f64]) -> (Option<f64>, Option<f64>) {
    let n = values.len() as f64;
    if values.is_empty() {
        return (None, None);
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (
        Some(mean),
        (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
    )
}

/// Standard error of the mean difference of losses of the same windows.
fn paired_error(a: &[f64], b: &[f64]) -> Option<f64> {
    if a.len() != b.len() {
        return None;
    }
    let differences: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    let (_, deviation) = mean_and_deviation(&differences);
    Some(deviation? / (a.len() as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::super::harness::tests::{Fake, harness, request};
    use super::super::jobs::jobs;
    use super::*;

    const STEPS: [(&str, &str); 3] = [
        ("allocation", "ranks by layer"),
        ("basis", "a basis"),
        ("refit", "a refit"),
    ];

    fn body(extra: &str, refuses: Option<&'static str>, skip: usize) -> (String, Option<String>) {
        let work = tempfile::tempdir().unwrap();
        let request = request(work.path(), extra);
        let harness = harness(&request, Fake::new(refuses));
        let all = jobs(&request, &STEPS.map(|(name, _)| name));
        let entries: Vec<Entry> = all[..all.len() - skip]
            .iter()
            .map(|job| harness.run(job).unwrap())
            .collect();
        let results = Results::new(&request, &harness, &entries, &STEPS, true);
        (results.body("quality.svg"), results.chart())
    }

    fn line<'a>(text: &'a str, start: &str) -> &'a str {
        text.lines()
            .find(|l| l.starts_with(start))
            .unwrap_or_else(|| panic!("no {start:?} in:\n{text}"))
    }

    #[test]
    fn every_table_has_its_rows() {
        let (text, chart) = body("", None, 0);
        assert!(text.starts_with(
            "Figures are the converted model's perplexity over the original's 20.0000, by `mlac eval` on the first 2 windows of 2048"
        ));
        assert_eq!(
            line(&text, "| cache"),
            "| cache | r + d_r | recipe | recipe-uniform | transmla | svd |"
        );
        assert_eq!(
            line(&text, "| 37.5 %"),
            "| 37.5 % | 80 + 64 | 1.100 | 1.100 | 1.100 | 1.100 |"
        );
        assert_eq!(
            line(&text, "| 25 % | 96 to"),
            "| 25 % | 96 to 160 | 64 | 192.0 | 96 |"
        );
        assert_eq!(
            line(&text, "| recipe | 80 + 64"),
            "| recipe | 80 + 64 | 1.100, 1.100, 1.100 | 1.100 | 0.0000 |"
        );
        assert!(line(&text, "| 8192 ").starts_with("| 8192 | 2 | 20.00 | 1.100"));
        assert_eq!(
            line(&text, "| `refit`"),
            "| `refit` | a refit | 1.100 | +0.000 | 0.000 |"
        );
        assert_eq!(text.matches("| nothing |").count(), 2);
        assert!(!text.contains("`allocation`") && !text.contains("failed"));
        assert!(
            text.contains(
                "mlac convert SmolLM2.gguf -o mla --calib train.txt --budget 0.75 --json\n"
            )
        );
        assert!(!text.contains("/models") && !text.contains("converted-"));
        let chart = chart.unwrap();
        assert_eq!(chart.matches("<circle").count(), 4 * 5);
    }

    #[test]
    fn what_failed_or_is_missing_is_said() {
        let (text, chart) = body("", Some("transmla"), 0);
        assert!(line(&text, "| 50 %").ends_with("| 1.100 | 1.100 | failed | 1.100 |"));
        assert_eq!(
            line(&text, "| transmla 128 + 64"),
            r"| transmla 128 + 64, seed 0 | SmolLM2.gguf: no \| thanks |"
        );
        assert_eq!(chart.unwrap().matches("<circle").count(), 3 * 5);
        let (text, _) = body("--ablation 128+64", None, 1);
        assert_eq!(
            line(&text, "| `refit`"),
            "| `refit` | a refit | not run | - | - |"
        );
    }

    #[test]
    fn tables_not_asked_for_are_left_out() {
        let few = "--sizes 64+32 --seeds 4 --windows-list none --ablation none --methods recipe";
        let (text, _) = body(few, None, 0);
        assert!(!text.contains("### By") && !text.contains("### Without"));
        assert!(text.contains("--calib-seed 4"));
    }

    #[test]
    fn figures_of_transmla_stand_only_where_they_were_measured() {
        let work = tempfile::tempdir().unwrap();
        let mut request = request(work.path(), "--sizes 128+64,16+32,100+20");
        let theirs = |request: &Request, perplexity: f64| {
            let harness = harness(request, Fake::new(None));
            let mut entry = harness.run(&Job::original(Windows::main(request))).unwrap();
            entry.measured[0].perplexity = Some(perplexity);
            let entries = [entry];
            let results = Results::new(request, &harness, &entries, &STEPS, true);
            let all: Vec<_> = request
                .sizes
                .iter()
                .map(|&s| results.transmla_itself(s))
                .collect();
            all
        };
        assert_eq!(
            theirs(&request, 19.1341),
            [None, None, None],
            "another model"
        );
        request.model = "/models/SmolLM2-135M-Instruct.Q4_1.gguf".into();
        assert_eq!(
            theirs(&request, 19.1341),
            [
                Some("1.89".to_owned()),
                Some("17.6 (at 32 + 16)".to_owned()),
                None
            ]
        );
        assert_eq!(theirs(&request, 21.4), [None, None, None], "another text");
        request.eval_windows = 4;
        assert_eq!(theirs(&request, 19.1341), [None, None, None]);
    }

    #[test]
    fn spreads_and_errors() {
        assert_eq!(mean_and_deviation(&[]), (None, None));
        assert_eq!(mean_and_deviation(&[2.0]), (Some(2.0), None));
        let (mean, deviation) = mean_and_deviation(&[1.0, 3.0]);
        assert_eq!(mean, Some(2.0));
        assert!((deviation.unwrap() - 2.0_f64.sqrt()).abs() < 1e-12);
        assert_eq!(paired_error(&[1.0], &[1.0, 2.0]), None);
        assert!((paired_error(&[1.0, 3.0], &[0.0, 0.0]).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(
            [1.2345, 12.345, 123.45, 12345.0].map(show),
            ["1.234", "12.35", "123", "1.2e4"]
        );
        assert_eq!(percent(0.125), "12.5 %");
    }
}
