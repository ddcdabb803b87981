//! The report as one self-contained HTML page.

use std::fmt::Write as _;

use super::charts::{Chart, Series};
use super::data::Report;
use super::decode;
use crate::cli::units::{show_bytes, show_tokens};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1340px;margin:2em auto;padding:0 1em;color:#222}\
h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em}table{border-collapse:collapse;margin:.6em 0}\
td,th{border-bottom:1px solid #ddd;padding:.25em .8em;text-align:right}td:first-child,th:first-child{text-align:left}\
.grid{display:flex;flex-wrap:wrap;gap:1em}.big{font-size:1.3em}.bad{color:#b00020;font-weight:600}.good{color:#00704a;font-weight:600}\
code,pre{background:#f4f4f4;padding:.1em .3em}pre{padding:.8em;overflow-x:auto;white-space:pre-wrap}svg{max-width:100%;height:auto}";

/// The cache in one sentence.
fn cache_line(report: &Report) -> String {
    report.headline().map_or_else(String::new, |point| {
        format!(
            "Cache at {} tokens: {} instead of {} ({:.1} %).",
            show_tokens(point.context),
            show_bytes(point.mla_bytes),
            show_bytes(point.gqa_bytes),
            report.cache_share() * 100.0
        )
    })
}

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    let title = escape(&format!("mlac report: {}", report.source));
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head><body>\
         <h1>{title}</h1><p>{}<br>Graphs: {}.</p><p class=\"big\">{}",
        escape(&report.shape),
        escape(report.form.words()),
        escape(&cache_line(report)),
    );
    match &report.perplexity {
        Some(p) => {
            let _ = write!(
                out,
                " Perplexity: {:.3} instead of {:.3} (x {:.3}).</p>",
                p.converted, p.original, p.ratio
            );
        }
        None => out.push_str(" <span class=\"bad\">Quality was not measured.</span></p>"),
    }
    let _ = write!(out, "<pre>{}</pre>", escape(&report.command));
    charts(&mut out, report);
    tables(&mut out, report);
    let _ = write!(
        out,
        "<h2>Continuation by the converted model</h2><pre>{}<b>{}</b></pre>",
        escape(&report.prompt),
        escape(&report.generated)
    );
    out.push_str("<h2>Time</h2>");
    let rows: Vec<Vec<String>> = report
        .times
        .iter()
        .map(|t| vec![escape(&t.stage), format!("{:.1}", t.seconds)])
        .collect();
    table(&mut out, &["stage", "seconds"], &rows);
    let _ = writeln!(
        out,
        "<p>Peak memory {}. mlac {}.</p></body></html>",
        show_bytes(report.peak_memory),
        escape(&report.version)
    );
    out
}

fn charts(out: &mut String, report: &Report) {
    out.push_str("<div class=\"grid\">");
    for chart in report_charts(report) {
        if let Some(svg) = chart.svg() {
            out.push_str(&svg);
        }
    }
    out.push_str("</div>");
}

/// The report's charts.
pub fn report_charts(report: &Report) -> Vec<Chart> {
    let line = |name: &str, points: Vec<(f64, f64)>| Series {
        name: name.to_owned(),
        points,
    };
    let mib = |b: u64| b as f64 / f64::from(1 << 20);
    let layers: Vec<f64> = report.layers.iter().map(|l| l.layer as f64).collect();
    let by_layer = |f: &dyn Fn(&super::data::LayerRow) -> Option<f64>| -> Vec<(f64, f64)> {
        layers
            .iter()
            .zip(&report.layers)
            .filter_map(|(x, l)| f(l).map(|y| (*x, y)))
            .collect()
    };
    let mut charts = vec![
        Chart {
            title: "Cache by context".into(),
            x: "context (tokens)".into(),
            y: "cache (MiB)".into(),
            log_x: true,
            log_y: true,
            series: vec![
                line(
                    "GQA",
                    report
                        .cache
                        .iter()
                        .map(|c| (c.context as f64, mib(c.gqa_bytes)))
                        .collect(),
                ),
                line(
                    "MLA",
                    report
                        .cache
                        .iter()
                        .map(|c| (c.context as f64, mib(c.mla_bytes)))
                        .collect(),
                ),
            ],
        },
        Chart {
            title: "Relative error by layer".into(),
            x: "layer".into(),
            y: "relative error".into(),
            log_x: false,
            log_y: true,
            series: vec![
                line("attention output", by_layer(&|l| l.output_error)),
                line("after refit", by_layer(&|l| l.refit_error)),
                line(
                    "held out, before refinement",
                    by_layer(&|l| l.refined.as_ref().map(|r| r.error_before)),
                ),
                line(
                    "held out, after refinement",
                    by_layer(&|l| l.refined.as_ref().map(|r| r.error_after)),
                ),
                line("residual stream", by_layer(&|l| l.stream_error)),
            ]
            .into_iter()
            .filter(|s: &Series| !s.points.is_empty())
            .collect(),
        },
    ];
    let picked = spectra_of(report);
    charts.push(Chart {
        title: "Spectrum of keys and values (share of energy)".into(),
        x: "component".into(),
        y: "share".into(),
        log_x: false,
        log_y: true,
        series: picked
            .into_iter()
            .map(|l| {
                let points = l
                    .spectrum
                    .iter()
                    .enumerate()
                    .map(|(i, e)| ((i + 1) as f64, e.max(1e-12)))
                    .collect();
                line(&format!("layer {}", l.layer), points)
            })
            .collect(),
    });
    if let Some(p) = &report.perplexity {
        charts.push(Chart {
            title: "Perplexity by cache".into(),
            x: "share of the GQA cache".into(),
            y: "perplexity".into(),
            log_x: false,
            log_y: false,
            series: vec![
                line("original", vec![(1.0, p.original)]),
                line("converted", vec![(report.cache_share(), p.converted)]),
            ],
        });
    }
    charts.push(decode::chart(report));
    charts
}

/// At most five layers, evenly spread: more lines cannot be told apart.
fn spectra_of(report: &Report) -> Vec<&super::data::LayerRow> {
    let with: Vec<_> = report
        .layers
        .iter()
        .filter(|l| !l.spectrum.is_empty())
        .collect();
    let n = with.len().min(5);
    (0..n)
        .map(|i| {
            with[if n == 1 {
                0
            } else {
                i * (with.len() - 1) / (n - 1)
            }]
        })
        .collect()
}

fn tables(out: &mut String, report: &Report) {
    out.push_str("<h2>Parity</h2>");
    let rows: Vec<Vec<String>> = report
        .parity
        .iter()
        .map(|p| {
            let f = &p.figures;
            vec![
                escape(&p.what),
                format!("{:.2e}", f.max_abs),
                format!("{:.2e}", f.max_rel),
                format!("{:.6}", f.cosine),
                format!("{:.2e}", f.mean_kl),
                format!("{:.2} %", f.top1 * 100.0),
                f.worst.map_or_else(
                    || "-".to_owned(),
                    |w| format!("token {}, id {}", w.token, w.vocab),
                ),
                match p.passed {
                    Some(true) => "<span class=\"good\">passed</span>".into(),
                    Some(false) => "<span class=\"bad\">failed</span>".into(),
                    None => "lossy: no tolerance".into(),
                },
                format!("<code>{}</code>", escape(&p.command)),
            ]
        })
        .collect();
    let head = [
        "comparison",
        "max abs",
        "max rel",
        "cosine",
        "mean KL",
        "top-1",
        "worst",
        "result",
        "command",
    ];
    table(out, &head, &rows);
    out.push_str("<h2>Cache</h2>");
    let rows: Vec<Vec<String>> = report
        .cache
        .iter()
        .map(|c| {
            vec![
                show_tokens(c.context),
                show_bytes(c.gqa_bytes),
                show_bytes(c.mla_bytes),
                format!(
                    "{:.1} %",
                    100.0 * c.mla_bytes as f64 / c.gqa_bytes.max(1) as f64
                ),
            ]
        })
        .collect();
    table(out, &["context", "GQA", "MLA", "share"], &rows);
    let _ = write!(
        out,
        "<p>{} bytes a number, batch 1.</p>",
        report.cache_dtype_bytes
    );
    if let Some(p) = &report.perplexity {
        let _ = write!(
            out,
            "<h2>Perplexity</h2><p>{}, first {} windows of {} tokens: original {:.4}, converted {:.4}, ratio {:.4}.</p>\
             <pre>{}\n{}</pre>",
            escape(&p.text),
            p.windows,
            p.window,
            p.original,
            p.converted,
            p.ratio,
            escape(&p.command_original),
            escape(&p.command_converted)
        );
    }
    decode::table(out, report);
    out.push_str("<h2>Engines</h2>");
    let rows: Vec<Vec<String>> = report
        .engines
        .iter()
        .map(|e| {
            vec![
                escape(&e.file),
                e.target.clone(),
                show_bytes(e.bytes),
                format!("{:.0}", e.seconds),
                escape(&e.attention),
                escape(&e.ran),
            ]
        })
        .collect();
    if rows.is_empty() {
        out.push_str("<p>No TensorRT engine was asked for.</p>");
    } else {
        table(
            out,
            &[
                "file",
                "target",
                "size",
                "build seconds",
                "attention",
                "ran",
            ],
            &rows,
        );
    }
    out.push_str("<h2>Layers</h2>");
    let number = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    let rows: Vec<Vec<String>> = report
        .layers
        .iter()
        .map(|l| {
            vec![
                l.layer.to_string(),
                l.kv_lora_rank.to_string(),
                l.qk_rope_head_dim.to_string(),
                number(Some(l.beta)),
                number(l.output_error),
                number(l.refit_error),
                number(l.stream_error),
                escape(&l.notes.join("; ")),
            ]
        })
        .collect();
    let head = [
        "layer",
        "r",
        "d_r",
        "balance",
        "output error",
        "after refit",
        "stream error",
        "notes",
    ];
    table(out, &head, &rows);
}

pub(super) fn table(out: &mut String, head: &[&str], rows: &[Vec<String>]) {
    out.push_str("<table><tr>");
    for h in head {
        let _ = write!(out, "<th>{h}</th>");
    }
    out.push_str("</tr>");
    for row in rows {
        out.push_str("<tr>");
        for cell in row {
            let _ = write!(out, "<td>{cell}</td>");
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
