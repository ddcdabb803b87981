//! The report's decode times: the converted model against both baselines.

use std::fmt::Write as _;

use super::charts::{Chart, Series};
use super::data::{DecodePoint, Report};
use super::html;
use crate::cli::units::show_tokens;

/// Times by context.
pub(super) fn chart(report: &Report) -> Chart {
    let line = |name: &str, ms: fn(&DecodePoint) -> Option<f64>| Series {
        name: name.to_owned(),
        points: report
            .decode
            .iter()
            .filter_map(|d| ms(d).map(|ms| (d.context as f64, ms)))
            .collect(),
    };
    Chart {
        title: "Decode step by context (ONNX Runtime, CPU)".into(),
        x: "context (tokens)".into(),
        y: "milliseconds".into(),
        log_x: true,
        log_y: false,
        series: vec![
            line("GQA", |d| Some(d.gqa_ms)),
            line("GroupQueryAttention", |d| d.gqa_operator_ms),
            line("MLA", |d| Some(d.mla_ms)),
        ]
        .into_iter()
        .filter(|s| !s.points.is_empty())
        .collect(),
    }
}

/// Times by context, with what they were measured on.
pub(super) fn table(out: &mut String, report: &Report) {
    out.push_str("<h2>Decode</h2>");
    let rows: Vec<Vec<String>> = report
        .decode
        .iter()
        .map(|d| {
            let operator = |f: &dyn Fn(f64) -> f64| {
                d.gqa_operator_ms
                    .map_or_else(|| "-".to_owned(), |ms| format!("{:.2}", f(ms)))
            };
            vec![
                show_tokens(d.context),
                format!("{:.2}", d.gqa_ms),
                operator(&|ms| ms),
                format!("{:.2}", d.mla_ms),
                format!("{:.2}", d.gqa_ms / d.mla_ms),
                operator(&|ms| ms / d.mla_ms),
            ]
        })
        .collect();
    let head = [
        "context",
        "GQA ms",
        "GroupQueryAttention ms",
        "MLA ms",
        "GQA / MLA",
        "GroupQueryAttention / MLA",
    ];
    html::table(out, &head, &rows);
    let _ = write!(
        out,
        "<p>GQA: the source in standard operators; GroupQueryAttention: the source with ONNX Runtime's own operator; MLA: the converted \
         model in the form above. {}</p><pre>{}</pre>",
        html::escape(report.operator_left_out.as_deref().unwrap_or("")),
        html::escape(&report.decode_command)
    );
}
