//! How each kind of byte-level BPE splits a text before merging, by the name GGUF gives it in
//! `tokenizer.ggml.pre`.
//!
//! The patterns are those of the models' own `tokenizer.json`; llama.cpp's `llama-vocab.cpp` lists
//! which names share one.

use serde_json::{Value, json};

/// Splitting rules of one kind.
pub(super) struct PreTokenizer {
    /// A `tokenizer.json` normalizer or null.
    pub(super) normalizer: Value,
    /// A `tokenizer.json` pre-tokenizer.
    pub(super) splits: Value,
    /// Whether a piece that is a token needs no merges.
    pub(super) ignore_merges: bool,
    /// Whether a text begins with the bos token when the file does not say.
    pub(super) add_bos: bool,
}

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `o200k_base` of tiktoken, which GPT-OSS has too.
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names with rules, for messages.
pub(super) const KNOWN: &str = "gpt-2, smollm, starcoder, refact, command-r, qwen2, deepseek-r1-qwen, llama-bpe, llama3, \
     llama-v3, tekken, gpt-4o";

impl PreTokenizer {
    /// The rules of a kind, if mlac knows them.
    pub(super) fn named(name: &str) -> Option<Self> {
        let (normalizer, splits, ignore_merges) = match name {
            "gpt-2" => (Value::Null, byte_level(true), false),
            // Every digit apart, then GPT-2's pattern.
            "smollm" | "starcoder" | "refact" | "command-r" => (
                Value::Null,
                json!({
                    "type": "Sequence",
                    "pretokenizers": [
                        { "type": "Digits", "individual_digits": true },
                        byte_level(true),
                    ],
                }),
                false,
            ),
            "qwen2" | "deepseek-r1-qwen" => (json!({ "type": "NFC" }), split(QWEN2), false),
            "llama-bpe" | "llama3" | "llama-v3" => (Value::Null, split(LLAMA3), true),
            "tekken" => (Value::Null, split(TEKKEN), true),
            "gpt-4o" => (Value::Null, split(O200K), false),
            _ => return None,
        };
        // The families that look whole pieces up are also those that begin with a token.
        let add_bos = ignore_merges;
        Some(Self {
            normalizer,
            splits,
            ignore_merges,
            add_bos,
        })
    }
}

/// Bytes to printable characters, with GPT-2's own pattern before it or not.
pub(super) fn byte_level(use_regex: bool) -> Value {
    json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": true,
        "use_regex": use_regex,
    })
}

fn split(pattern: &str) -> Value {
    json!({
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": { "Regex": pattern },
                "behavior": "Isolated",
                "invert": false,
            },
            byte_level(false),
        ],
    })
}
