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
    /// Of the dense product's rate; none where no product is packed for the GPU.
    pub matmul_fraction: Option<f64>,
    /// Time of our GQA kernel with as many query tokens, over this one's.
    pub over_gqa: Option<f64>,
    /// The same of the fastest GQA kernel of the run, ours or a peer's.
    pub over_best_gqa: Option<f64>,
}

/// A dense product of bf16 matrices, the yardstick of multiplications.
#[derive(Debug, Clone, Serialize)]
pub struct Product {
    /// Whose kernel, and what multiplies.
    pub kernel: String,
    /// Rows of the output.
    pub rows: u32,
    /// Columns of the output.
    pub columns: u32,
    /// Products in a sum.
    pub depth: u32,
    /// Median of the repeats; none when it was only compared.
    pub microseconds: Option<f64>,
    /// Multiplications and additions.
    pub teraflops: Option<f64>,
    /// The first entry of a sample that is not the f64 sum, rounded once.
    pub complaint: Option<String>,
}

impl Product {
    /// One line for people.
    pub fn line(&self) -> String {
        let rate = match (&self.complaint, self.teraflops) {
            (Some(complaint), _) => format!("FAILED: {complaint}"),
            (None, Some(teraflops)) => format!("{teraflops:.0} TFLOP/s"),
            (None, None) => "ok".to_owned(),
        };
        format!(
            "dense product {} x {} x {} bf16 by {}: {rate}",
            self.rows, self.columns, self.depth, self.kernel
        )
    }
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
    /// A dense product; none where none is packed for the GPU.
    pub matmul: Option<Product>,
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

/// A fraction for people, nothing where there is none.
fn percent(fraction: Option<f64>) -> String {
    fraction.map_or_else(String::new, |x| format!("{:.0}%", x * 100.0))
}

/// A factor for people, nothing where there is none.
fn times(factor: Option<f64>) -> String {
    factor.map_or_else(String::new, |x| format!("{x:.2}"))
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
            && self.matmul.as_ref().is_none_or(|m| m.complaint.is_none())
    }

    /// The times for people.
    pub fn table(&self) -> String {
        let mut text = format!("copy {:.0} GB/s\n", self.copy_gigabytes_per_second);
        if let Some(product) = &self.matmul {
            let _ = writeln!(text, "{}", product.line());
        }
        let _ = writeln!(
            text,
            "{:<44} {:>5} {:>7} {:>10} {:>7} {:>8} {:>6} {:>6} {:>6} {:>6}",
            "kernel",
            "batch",
            "context",
            "us",
            "GB/s",
            "TFLOP/s",
            "copy",
            "matmul",
            "x GQA",
            "x best"
        );
        for b in &self.bench {
            let _ = writeln!(
                text,
                "{:<44} {:>5} {:>7} {:>10.1} {:>7.0} {:>8.1} {:>5.0}% {:>6} {:>6} {:>6}",
                b.kernel,
                b.batch,
                b.context,
                b.microseconds,
                b.gigabytes_per_second,
                b.teraflops,
                b.copy_fraction * 100.0,
                percent(b.matmul_fraction),
                times(b.over_gqa),
                times(b.over_best_gqa)
            );
        }
        let most = self.matmul.as_ref().and_then(|product| product.teraflops);
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
                        "{us:>10.1} {:>7.0} {:>8.1} {:>5.0}% {:>6}",
                        p.gigabytes_per_second,
                        p.teraflops,
                        p.gigabytes_per_second / self.copy_gigabytes_per_second * 100.0,
                        percent(most.map(|most| p.teraflops / most))
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

#[cfg(test)]
mod tests {
    use super::super::bench::{Most, Shape, figures};
    use super::*;
    use crate::{Arch, AttentionDesc};

    #[test]
    fn times_stand_beside_the_copy_and_the_dense_product() {
        let desc = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
        let shape = Shape {
            batch: 1,
            context: 1000,
        };
        let most = Most {
            gigabytes_per_second: 1000.0,
            teraflops: Some(500.0),
        };
        // 1000 rows of 512 bytes and 64 queries with their outputs; 64 heads x 448 products of each token.
        let bench = figures(&desc, shape, 1.0, most);
        let bytes = 1000.0 * 512.0 + 64.0 * (256.0 + 192.0) * 2.0;
        assert!((bench.copy_fraction - bytes / 1e3 / 1000.0).abs() < 1e-12);
        let operations = 1000.0 * 2.0 * 64.0 * 448.0;
        let fraction = bench.matmul_fraction.unwrap();
        assert!((fraction - operations / 1e6 / 500.0).abs() < 1e-12);

        let product = Product {
            kernel: "a kernel".to_owned(),
            rows: 1,
            columns: 2,
            depth: 3,
            microseconds: Some(1.0),
            teraflops: Some(500.0),
            complaint: None,
        };
        let mut results = Results {
            device: String::new(),
            multiprocessors: 1,
            seed: 1,
            copy_gigabytes_per_second: 1000.0,
            matmul: Some(product),
            parity: vec![Parity {
                kernel: String::new(),
                lengths: Vec::new(),
                max_abs: 0.0,
                relative: 0.0,
                lse: 0.0,
                same_bits: true,
                complaint: None,
            }],
            sanitized: Vec::new(),
            bench: vec![bench],
            append: Vec::new(),
            splits: Vec::new(),
            peers: Vec::new(),
            skipped: Vec::new(),
        };
        let text = results.table();
        for part in [
            "copy 1000 GB/s",
            "dense product 1 x 2 x 3 bf16 by a kernel: 500 TFLOP/s",
            " 57%    11%",
        ] {
            assert!(text.contains(part), "{part} in:\n{text}");
        }
        assert!(results.passed());
        // A product that is wrong fails the check, and is no yardstick.
        if let Some(product) = &mut results.matmul {
            product.complaint = Some("row 1".to_owned());
        }
        assert!(!results.passed() && results.table().contains("FAILED: row 1"));
    }
}
