//! A small tokenizer of GPT-OSS's construction: byte-level BPE behind the o200k pattern, with the
//! special tokens of the harmony format.

use serde_json::{Map, Value, json};

/// How o200k splits a text before merging (tiktoken's `o200k_base`).
const PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Merges of frequent English letters, in order; `Ġ` is the space.
const MERGES: [[&str; 2]; 12] = [
    ["Ġ", "t"],
    ["h", "e"],
    ["i", "n"],
    ["Ġ", "a"],
    ["r", "e"],
    ["o", "n"],
    ["Ġt", "he"],
    ["e", "r"],
    ["a", "t"],
    ["n", "d"],
    ["Ġa", "nd"],
    ["in", "g"],
];

/// The named special tokens by their distance from `<|startoftext|>`.
const NAMED: [(usize, &str); 10] = [
    (0, "startoftext"),
    (1, "endoftext"),
    (4, "return"),
    (5, "constrain"),
    (7, "channel"),
    (8, "start"),
    (9, "end"),
    (10, "message"),
    (14, "call"),
    (20, "endofprompt"),
];

/// Special tokens, named or reserved.
const SPECIALS: usize = 21;

/// Ids below the first special token that this vocabulary needs.
#[cfg(test)]
pub(crate) const ORDINARY: usize = 256 + MERGES.len();

/// The content of `tokenizer.json`.
pub(crate) fn tokenizer_json(first_special: usize) -> Value {
    let mut vocabulary = Map::new();
    for byte in 0..=u8::MAX {
        vocabulary.insert(character(byte).into(), json!(byte));
    }
    for (at, [left, right]) in MERGES.into_iter().enumerate() {
        vocabulary.insert(format!("{left}{right}"), json!(256 + at));
    }
    let mut added = Vec::new();
    for at in 0..SPECIALS {
        let content = match NAMED.iter().find(|(named, _)| *named == at) {
            Some((_, name)) => format!("<|{name}|>"),
            None => format!("<|reserved_{}|>", first_special + at),
        };
        added.push(json!({
            "id": first_special + at,
            "content": content,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        }));
        // Ids between are free here, so the library has to find the special ones' in the vocabulary.
        vocabulary.insert(content, json!(first_special + at));
    }
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": { "Regex": PATTERN },
                    "behavior": "Isolated",
                    "invert": false,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": false,
                    "trim_offsets": true,
                    "use_regex": false,
                },
            ],
        },
        "post_processor": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": false,
            "use_regex": true,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": true,
            "use_regex": true,
        },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary,
            "merges": MERGES,
        },
    })
}

/// The printable character that stands for a byte (GPT-2's table).
fn character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let others = (0..byte).filter(|&other| !printable(other)).count();
    char::from_u32(256 + others as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// `tokenizer_config.json`.
pub(crate) fn config_json() -> Value {
    json!({
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

/// `chat_template.jinja`: messages in the harmony format, without tools.
pub(crate) const CHAT_TEMPLATE: &str = "\
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
";
