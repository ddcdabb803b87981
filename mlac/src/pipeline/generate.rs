//! Greedy continuation of a prompt.

use serde::Serialize;

use super::subject::{Subject, refuse_empty};
use crate::error::Error;

/// A continuation.
#[derive(Debug, Clone, Serialize)]
pub struct Generation {
    /// The prompt.
    pub prompt: String,
    /// What was added.
    pub text: String,
    /// Tokens added.
    pub tokens: usize,
    /// Seconds for the prompt.
    pub prefill_seconds: f64,
    /// Tokens a second after it.
    pub tokens_per_second: f64,
    /// Bytes of cache per token, measured from the tensors that the graph returned.
    pub cache_bytes_per_token: f64,
    /// Tokens in the cache at the end.
    pub cached_tokens: usize,
    /// Bytes they take.
    pub cache_bytes: usize,
}

/// Continues `prompt` by at most `max_tokens` of the most likely tokens; stops at an end token.
pub fn generate(
    subject: &mut Subject,
    prompt: &str,
    max_tokens: usize,
) -> Result<Generation, Error> {
    let tokenizer = subject.tokenizer()?;
    let ids = tokenizer.encode(prompt)?;
    refuse_empty(&ids, "prompt")?;
    let eos = subject.config().eos_token_ids.clone();
    let Subject::Folder { decoder, .. } = subject else {
        return Err(mlac_model::Refusal::new(
            "model to generate with",
            "an ONNX folder or engines",
            "a checkpoint",
            "run `mlac export` first and give its folder",
        )
        .into());
    };
    decoder.reset();
    let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
    let started = std::time::Instant::now();
    let mut logits = decoder.prefill(&ids)?;
    let prefill_seconds = started.elapsed().as_secs_f64();
    let started = std::time::Instant::now();
    // Rows of the embedding beyond the tokenizer's vocabulary are padding and no tokens.
    let vocabulary = tokenizer.vocab_size();
    let mut added: Vec<u32> = Vec::new();
    while added.len() < max_tokens {
        let last = logits.last(0);
        let next = most_likely(&last[..last.len().min(vocabulary)]);
        if eos.contains(&next) {
            break;
        }
        added.push(next);
        logits = decoder.step(i64::from(next))?;
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Generation {
        prompt: prompt.to_owned(),
        text: tokenizer.decode(&added)?,
        tokens: added.len(),
        prefill_seconds,
        tokens_per_second: if added.is_empty() {
            0.0
        } else {
            added.len() as f64 / seconds
        },
        cache_bytes_per_token: decoder.cache_bytes_per_token().unwrap_or(0.0),
        cached_tokens: decoder.past(),
        cache_bytes: decoder.cache_bytes(),
    })
}

/// Index of the largest logit; the first of equals.
pub fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::most_likely;

    #[test]
    fn the_first_of_equal_logits_wins() {
        assert_eq!(most_likely(&[0.0, 2.0, 2.0, 1.0]), 1);
    }
}
