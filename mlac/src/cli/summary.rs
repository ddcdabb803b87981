//! What `mlac compile` says at the end.

use std::fmt::Write as _;
use std::path::Path;

use super::units::{show_bytes, show_tokens};
use crate::report::data::{HEADLINE_CONTEXT, Report};

/// The summary.
pub fn text(report: &Report, output: &Path) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", report.shape);
    let _ = writeln!(out, "form        {}", report.form.words());
    let _ = writeln!(
        out,
        "cache       {:.1} % at {} tokens",
        100.0 * report.cache_share(),
        show_tokens(HEADLINE_CONTEXT)
    );
    for point in &report.cache {
        if matches!(point.context, 4096 | 32768) {
            let _ = writeln!(
                out,
                "            {} at {} instead of {}",
                show_bytes(point.mla_bytes),
                show_tokens(point.context),
                show_bytes(point.gqa_bytes)
            );
        }
    }
    match &report.perplexity {
        Some(p) => {
            let _ = writeln!(
                out,
                "perplexity  {:.3} instead of {:.3} (x {:.3}), {} windows of {}",
                p.converted, p.original, p.ratio, p.windows, p.window
            );
        }
        None => out.push_str("perplexity  not measured (no --eval text)\n"),
    }
    for row in &report.parity {
        let verdict = match row.passed {
            Some(true) => "passed",
            Some(false) => "FAILED",
            None => "lossy, for information",
        };
        let f = &row.figures;
        let _ = writeln!(
            out,
            "parity      {}: max abs {:.2e}, mean KL {:.2e}, top-1 {:.1} % ({verdict})",
            row.what,
            f.max_abs,
            f.mean_kl,
            f.top1 * 100.0
        );
    }
    for d in &report.decode {
        let operator = d.gqa_operator_ms.map_or_else(String::new, |ms| {
            format!(" and {ms:.2} ms with GroupQueryAttention")
        });
        let _ = writeln!(
            out,
            "decode      {:.2} ms at {} instead of {:.2} ms in standard operators{operator} (ONNX Runtime, CPU)",
            d.mla_ms,
            show_tokens(d.context),
            d.gqa_ms
        );
    }
    if let Some(why) = &report.operator_left_out {
        let _ = writeln!(out, "            {why}");
    }
    for e in &report.engines {
        let _ = writeln!(
            out,
            "engine      {} for {} ({}), {}; {}",
            e.file,
            e.target,
            show_bytes(e.bytes),
            e.attention,
            e.ran
        );
    }
    let _ = writeln!(
        out,
        "says        {}{}",
        report.prompt,
        report.generated.replace('\n', " ")
    );
    let total: f64 = report.times.iter().map(|t| t.seconds).sum();
    let stages: Vec<String> = report
        .times
        .iter()
        .map(|t| format!("{} {:.0} s", t.stage, t.seconds))
        .collect();
    let _ = writeln!(out, "time        {total:.0} s: {}", stages.join(", "));
    let _ = writeln!(
        out,
        "memory      {} at most",
        show_bytes(report.peak_memory)
    );
    let _ = writeln!(out, "report      {}", output.join("report.html").display());
    out
}
