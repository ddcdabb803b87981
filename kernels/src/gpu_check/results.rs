//! What was seen on a GPU.

use std::fmt::Write as _;

use serde::Serialize;

use super::peers::Peer;
use super::sanitize::Sanitized;
use crate::config::MIN_SPLIT_TOKENS;

/// Comparison of one kernel on one problem.
#[derive(Debug, Clone, Serialize)]
pub struct Parity {
    /// The request.
    pub kernel: String,
    /// Lengths of the requests in the batch.
    pub lengths: Vec<u32>,
    /// Largest absolute difference from the f64 reference.
    pub max_abs: f32,
    /// Norm of the difference over the norm of the reference.
    pub relative: f64,
    /// Largest relative difference of log-sum-exps.
    pub lse: f32,
    /// Whether three runs had the same bits.
    pub same_bits: bool,
    /// What is beyond tolerance.
    pub complaint: Option<String>,
}

/// Time of one kernel on one shape.
#[derive(Debug, Clone, Serialize)]
pub struct Bench {
    /// The request.
    pub kernel: String,
    /// Requests.
    pub batch: u32,
    /// Cached tokens of each.
    pub context: u32,
    /// Median of the repeats.
    pub microseconds: f64,
    /// Cache, queries and outputs, once each.
    pub gigabytes_per_second: f64,
    /// Multiplications and additions of scores and outputs.
    pub teraflops: f64,
    /// Of the copy's bandwidth.
    pub copy_fraction: f64,
    /// Time of our GQA kernel with as many query tokens, over this one's.
    pub over_gqa: Option<f64>,
}

/// What append wrote, compared with f64.
#[derive(Debug, Clone, Serialize)]
pub struct AppendParity {
    /// The request.
    pub kernel: String,
    /// Rows.
    pub tokens: usize,
    /// Whether three runs had the same bits.
    pub same_bits: bool,
    /// What is not as it must be.
    pub complaint: Option<String>,
}

/// Time of a kernel with another smallest piece of a divided cache.
#[derive(Debug, Clone, Serialize)]
pub struct Split {
    /// The request.
    pub kernel: String,
    /// Requests.
    pub batch: u32,
    /// Cached tokens of each.
    pub context: u32,
    /// Fewest tokens of a piece.
    pub tokens: u32,
    /// Median of the repeats.
    pub microseconds: f64,
}

/// Everything that was seen.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The GPU.
    pub device: String,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Seed of the inputs.
    pub seed: u64,
    /// Bandwidth of a copy, reading and writing counted.
    pub copy_gigabytes_per_second: f64,
    /// Comparisons.
    pub parity: Vec<Parity>,
    /// What compute-sanitizer's tools said of the comparison.
    pub sanitized: Vec<Sanitized>,
    /// Times.
    pub bench: Vec<Bench>,
    /// Rows that append wrote.
    pub append: Vec<AppendParity>,
    /// Times by the smallest piece of a divided cache.
    pub splits: Vec<Split>,
    /// Other people's kernels on the same problems and shapes.
    pub peers: Vec<Peer>,
    /// What was not done, and why.
    pub skipped: Vec<String>,
}

impl Results {
    /// Whether every comparison of our kernels passed.
    pub fn passed(&self) -> bool {
        !self.parity.is_empty()
            && self
                .parity
                .iter()
                .all(|p| p.complaint.is_none() && p.same_bits)
            && self
                .append
                .iter()
                .all(|p| p.complaint.is_none() && p.same_bits)
            && self.sanitized.iter().all(|s| s.complaint.is_none())
    }

    /// The times for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<44} {:>5} {:>7} {:>10} {:>7} {:>8} {:>6} {:>6}\n",
            "kernel", "batch", "context", "us", "GB/s", "TFLOP/s", "copy", "x GQA"
        );
        for b in &self.bench {
            let _ = writeln!(
                text,
                "{:<44} {:>5} {:>7} {:>10.1} {:>7.0} {:>8.1} {:>5.0}% {:>6}",
                b.kernel,
                b.batch,
                b.context,
                b.microseconds,
                b.gigabytes_per_second,
                b.teraflops,
                b.copy_fraction * 100.0,
                b.over_gqa.map_or_else(String::new, |x| format!("{x:.2}"))
            );
        }
        for p in &self.peers {
            let _ = writeln!(
                text,
                "{:<44} {:>5} {:>7} {}",
                p.name,
                p.batch,
                p.context,
                match (p.microseconds, &p.complaint) {
                    (_, Some(complaint)) => format!("FAILED: {complaint}"),
                    (Some(us), None) => format!(
                        "{us:>10.1} {:>7.0} {:>8.1}",
                        p.gigabytes_per_second, p.teraflops
                    ),
                    (None, None) => "parity ok".to_owned(),
                }
            );
        }
        text.push_str(&self.best_splits());
        for skipped in &self.skipped {
            let _ = writeln!(text, "not done: {skipped}");
        }
        text
    }

    /// Which smallest piece of a divided cache was the fastest, shape by shape.
    fn best_splits(&self) -> String {
        let mut text = String::new();
        let mut shapes: Vec<(&str, u32, u32)> = self
            .splits
            .iter()
            .map(|s| (s.kernel.as_str(), s.batch, s.context))
            .collect();
        shapes.sort_unstable();
        shapes.dedup();
        for shape in shapes {
            let times: Vec<&Split> = self
                .splits
                .iter()
                .filter(|s| (s.kernel.as_str(), s.batch, s.context) == shape)
                .collect();
            let Some(best) = times
                .iter()
                .min_by(|a, b| a.microseconds.total_cmp(&b.microseconds))
            else {
                continue;
            };
            let list: Vec<String> = times
                .iter()
                .map(|s| format!("{} tokens {:.1} us", s.tokens, s.microseconds))
                .collect();
            let _ = writeln!(
                text,
                "smallest piece, {} at {} x {}: {}; fastest {} tokens, the choice is {}",
                shape.0,
                shape.1,
                shape.2,
                list.join(", "),
                best.tokens,
                MIN_SPLIT_TOKENS
            );
        }
        text
    }
}
