//! Two models' logits on the same tokens.

use std::path::Path;

use mlac_engines::parity::{Comparer, Failure, Parity, Tolerance};
use mlac_model::Refusal;
use serde::Serialize;

use super::subject::Subject;
use crate::error::Error;
use crate::progress::Progress;
use crate::windows::read_text;

/// Text used when none is given: prose, figures, quotation and code.
const TEXT: &str = include_str!("../../assets/verify.txt");

/// What was compared and how it came out.
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// Tokens compared.
    pub tokens: usize,
    /// Of them decoded one at a time (ONNX folders).
    pub steps: usize,
    /// The figures.
    pub figures: Parity,
    /// What is wrong, empty when everything is within the tolerance.
    pub failures: Vec<Failure>,
}

/// Compares `b` with the reference `a` on the first `tokens` tokens of `text`.
pub fn verify(
    a: &mut Subject,
    b: &mut Subject,
    text: Option<&Path>,
    tokens: usize,
    steps: usize,
    tolerance: &Tolerance,
    threads: usize,
    progress: Progress,
) -> Result<Verification, Error> {
    let text = match text {
        Some(path) => read_text(path)?,
        None => TEXT.to_owned(),
    };
    let mut ids = a.tokenizer()?.encode(&text)?;
    if ids.len() < tokens {
        return Err(Refusal::new(
            "text for the comparison",
            format!("at least {tokens} tokens (--tokens)"),
            ids.len().to_string(),
            "give a longer text with --text or fewer tokens",
        )
        .into());
    }
    ids.truncate(tokens);
    let stage = progress.stage("comparing logits", 2);
    stage.doing("the reference");
    let mut reference: Vec<f32> = Vec::new();
    a.logits(&ids, steps, threads, |_, logits| {
        reference.extend_from_slice(logits);
        Ok(())
    })?;
    stage.step();
    stage.doing("the candidate");
    let vocab = reference.len() / ids.len();
    let mut comparison = Comparer::new();
    b.logits(&ids, steps, threads, |position, logits| {
        comparison.add(&reference[position * vocab..(position + 1) * vocab], logits)?;
        Ok(())
    })?;
    stage.step();
    let figures = comparison.finish()?;
    let failures = figures.check(tolerance);
    Ok(Verification {
        tokens,
        steps: steps.min(tokens - 1),
        figures,
        failures,
    })
}
