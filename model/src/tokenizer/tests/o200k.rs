//! A `tokenizer.json` built as that of GPT-OSS is (`o200k_harmony`), with a small vocabulary.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::super::{Tokenizer, pretokenizer};

/// The two parts of each token of several bytes, earlier tokens both; ids go on from 256.
const MERGES: [(&[u8], &[u8]); 16] = [
    (b" ", b"t"),
    (b"h", b"e"),
    (b" t", b"he"),
    (b"e", b"r"),
    (b"L", b"L"),
    (b"'", b"LL"),
    (b"I", b"'LL"),
    (b"1", b"2"),
    (b"12", b"3"),
    (b")", b"\n"),
    (b"\n", b"\n"),
    (b"a", b"f"),
    (b"\xc3", b"\xa9"),
    (b"af", b"\xc3\xa9"),
    (b"/", b"/"),
    (b" ", b" "),
];

/// The special tokens of GPT-OSS, in a row after the vocabulary.
const SPECIALS: [&str; 21] = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|reserved_200000|>",
    "<|reserved_200001|>",
    "<|return|>",
    "<|constrain|>",
    "<|reserved_200004|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|reserved_200009|>",
    "<|reserved_200010|>",
    "<|reserved_200011|>",
    "<|call|>",
    "<|reserved_200013|>",
    "<|reserved_200014|>",
    "<|reserved_200015|>",
    "<|reserved_200016|>",
    "<|reserved_200017|>",
    "<|endofprompt|>",
];

/// Texts and their pieces, as the `regex` module of Python splits them by tiktoken's pattern.
const TEXTS: [(&str, &[&str]); 5] = [
    (
        "I'LL say caféX 1234² (ok)\n\n  go",
        &[
            "I'LL", " say", " café", "X", " ", "123", "4²", " (", "ok", ")\n\n", " ", " go",
        ],
    ),
    (
        "HTTPServer's path/to//\n Ünï",
        &["HTTPServer's", " path", "/to", "//\n", " Ünï"],
    ),
    (
        "don'T  \r\n\t x\u{301}y \u{1c5}a \u{a0}z",
        &[
            "don'T",
            "  \r\n",
            "\t",
            " x\u{301}y",
            " \u{1c5}a",
            " ",
            "\u{a0}z",
        ],
    ),
    ("你好 Ⅷ½ 🙂👍!/\n", &["你好", " ", "Ⅷ½", " 🙂👍!/\n"]),
    ("", &[]),
];

/// Token bytes to id.
fn ranks() -> HashMap<Vec<u8>, u32> {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let longer = MERGES.iter().map(|(left, right)| [*left, *right].concat());
    bytes.chain(longer).zip(0..).collect()
}

/// tiktoken's rule: join the neighbours whose token has the lowest id, as long as there are any.
fn naive(piece: &str, ranks: &HashMap<Vec<u8>, u32>) -> Vec<u32> {
    let mut parts: Vec<Vec<u8>> = piece.bytes().map(|byte| vec![byte]).collect();
    loop {
        let joined = |at: usize| ranks.get(&parts[at..at + 2].concat());
        let pairs = 0..parts.len().saturating_sub(1);
        let Some(at) = pairs
            .filter(|&at| joined(at).is_some())
            .min_by_key(|&at| joined(at))
        else {
            return parts.iter().map(|part| ranks[part]).collect();
        };
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
}

/// Bytes in GPT-2's printable alphabet.
fn spelled(bytes: &[u8]) -> String {
    let plain = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others: Vec<u8> = (0..=u8::MAX).filter(|&byte| !plain(byte)).collect();
    let letter = |byte: u8| match others.iter().position(|&other| other == byte) {
        Some(at) => char::from_u32(256 + at as u32).unwrap(),
        None => char::from(byte),
    };
    bytes.iter().map(|&byte| letter(byte)).collect()
}

fn first_special() -> u32 {
    256 + MERGES.len() as u32
}

fn tokenizer(ignore_merges: bool) -> Tokenizer {
    let vocabulary: Map<String, Value> = ranks()
        .iter()
        .map(|(bytes, id)| (spelled(bytes), json!(id)))
        .collect();
    let merges: Vec<[String; 2]> = MERGES
        .iter()
        .map(|(left, right)| [spelled(left), spelled(right)])
        .collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .zip(first_special()..)
        .map(|(content, id)| {
            json!({
                "id": id,
                "content": content,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": true,
            })
        })
        .collect();
    let byte_level = |trim_offsets: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": true,
            "trim_offsets": trim_offsets,
            "use_regex": true,
        })
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": pretokenizer::PreTokenizer::named("gpt-4o").unwrap().splits,
        "post_processor": byte_level(false),
        "decoder": byte_level(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    });
    Tokenizer::from_json(json.to_string().as_bytes(), "tokenizer.json").unwrap()
}

#[test]
fn texts_encode_as_tiktoken_does() {
    let ranks = ranks();
    for tokenizer in [tokenizer(false), tokenizer(true)] {
        for (text, pieces) in TEXTS {
            assert_eq!(pieces.concat(), text);
            let expected: Vec<u32> = pieces
                .iter()
                .flat_map(|piece| naive(piece, &ranks))
                .collect();
            assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
            let with = tokenizer.encode_with_special_tokens(text).unwrap();
            assert_eq!(with, expected, "{text:?}");
            assert_eq!(tokenizer.decode(&expected).unwrap(), text);
        }
    }
    // Merges do happen: I'LL is one token, "123" another.
    let tokenizer = tokenizer(false);
    assert_eq!(tokenizer.encode("I'LL").unwrap(), [262]);
    assert_eq!(tokenizer.encode("1234 the").unwrap(), [264, 52, 258]);
}

#[test]
fn special_tokens_are_single_ids() {
    let tokenizer = tokenizer(false);
    let id = |name: &str| tokenizer.token_id(name).unwrap();
    for (special, expected) in SPECIALS.iter().zip(first_special()..) {
        assert_eq!(id(special), expected);
        assert_eq!(tokenizer.encode(special).unwrap(), [expected]);
    }
    assert_eq!(tokenizer.vocab_size(), first_special() as usize + 21);
    let text = "<|start|>u<|message|> the<|end|><|start|>er<|call|>";
    let ids = [
        id("<|start|>"),
        117,
        id("<|message|>"),
        258,
        id("<|end|>"),
        id("<|start|>"),
        259,
        id("<|call|>"),
    ];
    assert_eq!(tokenizer.encode(text).unwrap(), ids);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(
        tokenizer.decode_without_special_tokens(&ids).unwrap(),
        "u theer"
    );
    // What only looks like one is text.
    let ids = tokenizer.encode("<|other|>").unwrap();
    assert!(ids.iter().all(|&id| id < first_special()));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "<|other|>");
}
