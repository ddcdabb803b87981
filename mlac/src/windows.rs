//! Text to token windows, for calibration and for evaluation.

use std::fs;
use std::path::Path;

use mlac_model::{Refusal, tokenizer::Tokenizer};

use crate::error::Error;

/// Reads a UTF-8 text file that is not empty.
pub fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        Refusal::new(
            format!("text {}", path.display()),
            "UTF-8",
            format!("an invalid byte at offset {}", e.utf8_error().valid_up_to()),
            "convert the file to UTF-8",
        )
    })?;
    if text.trim().is_empty() {
        return Err(Refusal::new(
            format!("text {}", path.display()),
            "a text that is not empty",
            format!("{} bytes of white space", text.len()),
            "give a file with text",
        )
        .into());
    }
    Ok(text)
}

/// The whole text as tokens, no special tokens added, cut into non-overlapping windows of `length`
/// tokens from the start; an incomplete last window is left out.
#[derive(Debug, Clone)]
pub struct Windows {
    tokens: Vec<u32>,
    length: usize,
}

impl Windows {
    /// Reads and cuts `path`; refuses a text shorter than one window.
    pub fn read(path: &Path, tokenizer: &Tokenizer, length: usize) -> Result<Self, Error> {
        let tokens = tokenizer.encode(&read_text(path)?)?;
        if length < 2 {
            return Err(Refusal::new(
                "window length",
                "at least 2 tokens",
                length.to_string(),
                "give a longer window",
            )
            .into());
        }
        if tokens.len() < length {
            return Err(Refusal::new(
                format!("text {}", path.display()),
                format!("at least one window of {length} tokens"),
                format!("{} tokens", tokens.len()),
                "give a longer text or a shorter window",
            )
            .into());
        }
        Ok(Self { tokens, length })
    }

    /// Windows there are.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// Tokens in a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Window `i`.
    pub fn get(&self, i: usize) -> &[u32] {
        &self.tokens[i * self.length..(i + 1) * self.length]
    }

    /// The first `limit` windows, as evaluation uses them.
    pub fn first(&self, limit: Option<usize>) -> Vec<&[u32]> {
        (0..self.count().min(limit.unwrap_or(usize::MAX)))
            .map(|i| self.get(i))
            .collect()
    }

    /// Indices of `wanted` windows spread evenly over the text, as calibration uses them; `seed` moves
    /// each inside its share of the text (0: to its start). Refuses too short a text.
    pub fn spread(&self, wanted: usize, seed: u64, path: &Path) -> Result<Vec<usize>, Error> {
        let have = self.count();
        if wanted == 0 || wanted > have {
            return Err(Refusal::new(
                format!("text {}", path.display()),
                format!("between 1 and {have} calibration windows of {} tokens", self.length),
                wanted.to_string(),
                "give a longer text, fewer windows (--calib-windows) or shorter ones (--calib-window)",
            )
            .into());
        }
        // Fibonacci hashing: consecutive seeds land far from each other.
        let moved = |i: usize, share: usize| {
            let hash = seed
                .wrapping_mul(i as u64 + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (hash >> 32) as usize % share
        };
        Ok((0..wanted)
            .map(|i| {
                let (start, end) = (i * have / wanted, (i + 1) * have / wanted);
                start + moved(i, end - start)
            })
            .collect())
    }
}
