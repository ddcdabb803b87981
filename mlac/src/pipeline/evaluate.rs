//! Perplexity of a model on a text.
//!
//! Protocol: the whole text is tokenised once without special tokens and cut into non-overlapping
//! windows of L tokens from the start; each window starts with an empty cache; the loss is the mean
//! negative log likelihood over the L - 1 shifted targets; perplexity = exp(mean over windows).

use std::path::Path;

use mlac_engines::ort::SessionOptions;
use serde::Serialize;

use super::streams::HiddenStates;
use super::subject::{Head, Subject};
use crate::error::Error;
use crate::progress::Progress;
use crate::windows::Windows;

/// A perplexity and what it was measured on.
#[derive(Debug, Clone, Serialize)]
pub struct Perplexity {
    /// exp(mean loss).
    pub perplexity: f64,
    /// Mean loss of each window, in nats per token.
    pub losses: Vec<f64>,
    /// Tokens in a window.
    pub window: usize,
    /// Seconds it took.
    pub seconds: f64,
}

/// Measures `subject` on the first `limit` windows of `text`.
pub fn evaluate(
    subject: &mut Subject,
    text: &Path,
    window: usize,
    limit: Option<usize>,
    threads: usize,
    progress: Progress,
) -> Result<Perplexity, Error> {
    let windows = Windows::read(text, &subject.tokenizer()?, window)?;
    let windows = windows.first(limit);
    let stage = progress.stage("evaluating", windows.len() as u64);
    let mut losses = Vec::with_capacity(windows.len());
    if let Subject::Checkpoint(checkpoint) = subject {
        let options = SessionOptions::default().with_threads(threads);
        let config = checkpoint.config();
        let mut states = HiddenStates::embed(config, &**checkpoint, &windows, &options)?;
        for layer in 0..config.num_hidden_layers {
            stage.doing(format!("layer {layer}"));
            states.advance(config, &**checkpoint, layer, &options)?;
        }
        let mut head = Head::open(checkpoint, &options)?;
        for (i, ids) in windows.iter().enumerate() {
            let mut loss = Loss::new(ids);
            head.run(&states, i, |position, logits| {
                loss.add(position, logits);
                Ok(())
            })?;
            losses.push(loss.mean());
            stage.step();
        }
    } else {
        for ids in &windows {
            let mut loss = Loss::new(ids);
            subject.logits(ids, 0, threads, |position, logits| {
                loss.add(position, logits);
                Ok(())
            })?;
            losses.push(loss.mean());
            stage.step();
        }
    }
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    Ok(Perplexity {
        perplexity: mean.exp(),
        losses,
        window,
        seconds: stage.seconds(),
    })
}

/// Negative log likelihood of a window's own tokens.
struct Loss<'a> {
    ids: &'a [u32],
    sum: f64,
}

impl<'a> Loss<'a> {
    fn new(ids: &'a [u32]) -> Self {
        Self { ids, sum: 0.0 }
    }

    /// Adds the logits at `position`, which predict the next token; the last position predicts nothing.
    fn add(&mut self, position: usize, logits: &[f32]) {
        if let Some(&next) = self.ids.get(position + 1) {
            self.sum += log_sum_exp(logits) - f64::from(logits[next as usize]);
        }
    }

    fn mean(&self) -> f64 {
        self.sum / (self.ids.len() - 1) as f64
    }
}

/// `ln sum exp(x)`, stable.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .chunks(4096)
        .map(|c| c.iter().map(|&x| f64::from((x - max).exp())).sum::<f64>())
        .sum();
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_logits_lose_the_logarithm_of_the_vocabulary() {
        let ids = [1_u32, 2, 3];
        let mut loss = Loss::new(&ids);
        for position in 0..3 {
            loss.add(position, &[0.5; 16]);
        }
        assert!((loss.mean() - 16.0_f64.ln()).abs() < 1e-9);
        assert!((log_sum_exp(&[1000.0, 1000.0]) - (1000.0 + 2.0_f64.ln())).abs() < 1e-9);
    }
}
