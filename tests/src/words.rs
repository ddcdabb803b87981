//! A tokenizer and texts for the tiny models: token `n` is the word `w<n>`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::{Outcome, text};

/// Copies a model's files to `target` and puts a tokenizer of `vocab` words beside them.
pub fn with_tokenizer(model: &Path, target: &Path, vocab: usize) -> Outcome {
    fs::create_dir_all(target).map_err(text)?;
    for entry in fs::read_dir(model).map_err(text)? {
        let path = entry.map_err(text)?.path();
        fs::copy(&path, target.join(path.file_name().unwrap_or_default())).map_err(text)?;
    }
    let words: serde_json::Map<String, serde_json::Value> = (0..vocab)
        .map(|token| (format!("w{token}"), json!(token)))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    fs::write(target.join("tokenizer.json"), tokenizer.to_string()).map_err(text)
}

/// A text of `tokens` words drawn by a fixed rule.
pub fn words(tokens: usize, vocab: usize) -> String {
    let mut state = 12_345_u64;
    let mut found = String::new();
    for _ in 0..tokens {
        // Knuth's MMIX generator; its high bits.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let _ = write!(found, "w{} ", (state >> 33) as usize % vocab);
    }
    found
}
