//! A `SentencePiece` BPE vocabulary (Llama 1 and 2, Mistral) as a byte-fallback BPE model.
//!
//! `SentencePiece` stores scores, not merges. A merge exists for every way to write a token as two
//! others, and a merge that gives a token of a higher score comes first; this is how transformers
//! converts such vocabularies.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::vocabulary::{TokenKind, Vocabulary};
use crate::Refusal;

/// What `SentencePiece` writes for a space.
const SPACE: &str = "\u{2581}";

/// Longest token, in bytes: merges cost its square.
const LONGEST_TOKEN: usize = 1024;

/// The normalizer, decoder and model parts of a `tokenizer.json`.
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
}

pub(super) fn parts(vocabulary: &Vocabulary<'_>, file: &str) -> Result<Parts, Refusal> {
    let Some(scores) = &vocabulary.scores else {
        return Err(vocabulary.missing(file, "tokenizer.ggml.scores", "one score for each token"));
    };
    let ids: HashMap<&str, u32> = vocabulary
        .tokens
        .iter()
        .enumerate()
        .map(|(id, token)| (*token, id as u32))
        .collect();
    if let Some(long) = vocabulary
        .tokens
        .iter()
        .find(|token| token.len() > LONGEST_TOKEN)
    {
        return Err(Refusal::new(
            format!("{file}: tokenizer.ggml.tokens"),
            format!("tokens of at most {LONGEST_TOKEN} bytes"),
            format!("one of {}", long.len()),
            "get the file again",
        ));
    }
    for byte in 0..=u8::MAX {
        let token = format!("<0x{byte:02X}>");
        if !ids.contains_key(token.as_str()) {
            return Err(Refusal::new(
                format!("{file}: tokenizer.ggml.tokens"),
                "a token for every byte, <0x00> to <0xFF>",
                format!("no {token}"),
                "use a model with byte fallback",
            ));
        }
    }
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    // llama.cpp's default for this kind of vocabulary is to begin a text with a space.
    if vocabulary.add_space_prefix.unwrap_or(true) {
        normalizers.push(json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    normalizers.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE }));
    let unknown = vocabulary.kind_of_first(TokenKind::Unknown);
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocabulary.ids_json(),
            "merges": merges(vocabulary, scores, &ids),
        }),
    })
}

/// All merges, best first: by score, then by the length of the left and of the right part.
fn merges<'a>(
    vocabulary: &Vocabulary<'a>,
    scores: &[f64],
    ids: &HashMap<&'a str, u32>,
) -> Vec<[&'a str; 2]> {
    let mergeable = |id: u32| {
        matches!(
            vocabulary.kinds[id as usize],
            TokenKind::Normal | TokenKind::UserDefined
        )
    };
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if !mergeable(id as u32) {
            continue;
        }
        let mut own: Vec<_> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                let (&l, &r) = (ids.get(left)?, ids.get(right)?);
                (mergeable(l) && mergeable(r)).then_some((l, r, left, right))
            })
            .collect();
        own.sort_unstable_by_key(|&(l, r, ..)| (l, r));
        merges.extend(
            own.into_iter()
                .map(|(_, _, left, right)| (scores[id], [left, right])),
        );
    }
    let chars = |text: &str| text.chars().count();
    merges.sort_by(|(a, [al, ar]), (b, [bl, br])| {
        b.total_cmp(a)
            .then(chars(bl).cmp(&chars(al)))
            .then(chars(br).cmp(&chars(ar)))
    });
    merges.into_iter().map(|(_, pair)| pair).collect()
}
