//! What a compilation measures on the graphs that it wrote: logits at every arrow, perplexity, decode times.

use std::path::{Path, PathBuf};

use mlac_engines::parity::Tolerance;
use mlac_graph::builders::GqaForm;

use super::compile::{CompileRequest, GQA, GQA_OPERATOR, ONNX};
use super::subject::Subject;
use super::{bench, evaluate, verify};
use crate::error::Error;
use crate::progress::Progress;
use crate::report::data::{DecodePoint, Form, ParityRow, PerplexityRow};

/// Tokens compared between the checkpoint and its graphs, the last of them decoded one at a time.
const PARITY_TOKENS: usize = 256;
const PARITY_STEPS: usize = 32;
const BENCH_REPEATS: usize = 5;

/// Compares logits at every arrow.
pub(super) fn verify_all(
    request: &CompileRequest<'_>,
    progress: Progress,
) -> Result<Vec<ParityRow>, Error> {
    let threads = request.convert.threads;
    let staged = |name: &str| request.staging.join(name);
    let shown = |name: &str| request.output.join(name).display().to_string();
    let source = request.source.display().to_string();
    let converted = match request.form {
        Form::Standard => "converted: layers against ONNX, prefill and decode",
        Form::Ort => "converted: layers against ONNX with mlac's operators, prefill and decode",
    };
    let of_source = |what, onnx, exact| {
        let path = request.source.to_path_buf();
        (what, path, source.clone(), onnx, exact)
    };
    let mut pairs = vec![of_source("source: layers against ONNX", GQA, true)];
    if has_operator(request) {
        let what = "source: layers against ONNX with GroupQueryAttention";
        pairs.push(of_source(what, GQA_OPERATOR, true));
    }
    let checkpoint = (staged("checkpoint"), shown("checkpoint"));
    pairs.push((converted, checkpoint.0, checkpoint.1, ONNX, true));
    pairs.push(of_source("source against converted", ONNX, false));
    let mut rows = Vec::new();
    for (what, a, a_shown, b, exact) in pairs {
        let mut reference = Subject::open(&a, threads)?;
        let mut candidate = Subject::open(&staged(b), threads)?;
        let result = verify::verify(
            &mut reference,
            &mut candidate,
            None,
            PARITY_TOKENS,
            PARITY_STEPS,
            &Tolerance::EXACT,
            threads,
            progress,
        )?;
        rows.push(ParityRow {
            what: what.to_owned(),
            passed: exact.then_some(result.failures.is_empty()),
            figures: result.figures,
            command: format!("mlac verify {a_shown} {}", shown(b)),
        });
    }
    Ok(rows)
}

/// Perplexity of the source and of the converted model, where there is a text.
pub(super) fn measure_quality(
    request: &CompileRequest<'_>,
    progress: Progress,
) -> Result<Option<PerplexityRow>, Error> {
    let Some(text) = request.evaluation else {
        return Ok(None);
    };
    let measure = |folder: &str| {
        let mut subject = Subject::open(&request.staging.join(folder), request.convert.threads)?;
        evaluate::evaluate(
            &mut subject,
            text,
            request.eval_window,
            Some(request.eval_windows),
            request.convert.threads,
            progress,
        )
    };
    let original = measure(GQA)?;
    let converted = measure(ONNX)?;
    let command = |folder: &str| {
        format!(
            "mlac eval {} --text {} --window {} --windows {}",
            request.output.join(folder).display(),
            text.display(),
            request.eval_window,
            original.losses.len()
        )
    };
    Ok(Some(PerplexityRow {
        text: text.display().to_string(),
        window: request.eval_window,
        windows: original.losses.len(),
        original: original.perplexity,
        converted: converted.perplexity,
        ratio: converted.perplexity / original.perplexity,
        command_original: command(GQA),
        command_converted: command(ONNX),
    }))
}

/// Times decode steps of the converted model and of both baselines.
pub(super) fn time_decode(
    request: &CompileRequest<'_>,
    progress: Progress,
) -> Result<Vec<DecodePoint>, Error> {
    let folders: Vec<PathBuf> = timed(request)
        .iter()
        .map(|name| request.staging.join(name))
        .collect();
    let folders: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    let results = bench::bench(
        &folders,
        request.contexts,
        BENCH_REPEATS,
        request.convert.threads,
        progress,
    )?;
    Ok(results
        .into_iter()
        .map(|r| DecodePoint {
            context: r.context,
            gqa_ms: r.milliseconds[0],
            gqa_operator_ms: (folders.len() == 3).then(|| r.milliseconds[1]),
            mla_ms: r.milliseconds[folders.len() - 1],
        })
        .collect())
}

/// What is timed, the converted model last.
fn timed(request: &CompileRequest<'_>) -> Vec<&'static str> {
    let mut folders = vec![GQA, ONNX];
    if has_operator(request) {
        folders.insert(1, GQA_OPERATOR);
    }
    folders
}

/// Whether the source has a folder with ONNX Runtime's own operator.
fn has_operator(request: &CompileRequest<'_>) -> bool {
    GqaForm::GroupQueryAttention.takes(request.convert.checkpoint.config())
}

/// Why there is none.
pub(super) fn operator_left_out(request: &CompileRequest<'_>) -> Option<String> {
    let head = request.convert.checkpoint.config().head_dim;
    (!has_operator(request)).then(|| {
        format!("GroupQueryAttention was not timed: it takes heads of a multiple of 8 numbers, these have {head}")
    })
}

/// What gives the decode times again.
pub(super) fn decode_command(request: &CompileRequest<'_>) -> String {
    let contexts: Vec<String> = request.contexts.iter().map(usize::to_string).collect();
    let folders: Vec<String> = timed(request)
        .iter()
        .map(|name| request.output.join(name).display().to_string())
        .collect();
    format!(
        "mlac bench {} --contexts {} --repeats {BENCH_REPEATS}",
        folders.join(" "),
        contexts.join(",")
    )
}
