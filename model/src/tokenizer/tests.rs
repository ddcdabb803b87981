mod o200k;

use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::{
    Tokenizer,
    pretokenizer::PreTokenizer,
    vocabulary::{TokenKind, Vocabulary},
};
use crate::Error;

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Refusal(refusal)) => refusal.to_string(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

/// A byte-level vocabulary of a few letters.
fn byte_level(pre: &'static str) -> Vocabulary<'static> {
    let tokens = vec![
        "<s>", "a", "b", "c", "1", "2", "\u{120}", "ab", "abc", "12", "<tool>",
    ];
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[0] = TokenKind::Control;
    kinds[10] = TokenKind::UserDefined;
    Vocabulary {
        model: "gpt2",
        pre: Some(pre),
        tokens,
        kinds,
        scores: None,
        merges: Some(vec!["a b", "1 2"]),
        add_space_prefix: None,
        bos: (Some(0), None),
        eos: (Some(0), Some(false)),
        chat_template: None,
    }
}

#[test]
fn each_kind_splits_as_its_model_does() {
    let sample = "I'LL say caféX 1234\u{b2} (ok)\n\n  go";
    let spaces = |pieces: &[&str]| -> Vec<String> {
        pieces
            .iter()
            .map(|piece| piece.replace(' ', "\u{120}").replace('\n', "\u{10a}"))
            .collect()
    };
    let cases = [
        (
            "gpt-2",
            spaces(&[
                "I", "'", "LL", " say", " caféX", " 1234²", " (", "ok", ")", "\n\n ", " go",
            ]),
        ),
        (
            "smollm",
            spaces(&[
                "I", "'", "LL", " say", " caféX", " ", "1", "2", "3", "4", "²", " (", "ok", ")",
                "\n\n ", " go",
            ]),
        ),
        (
            "qwen2",
            spaces(&[
                "I", "'LL", " say", " caféX", " ", "1", "2", "3", "4", "²", " (", "ok", ")\n\n",
                " ", " go",
            ]),
        ),
        (
            "llama-bpe",
            spaces(&[
                "I", "'LL", " say", " caféX", " ", "123", "4²", " (", "ok", ")\n\n", " ", " go",
            ]),
        ),
        (
            "tekken",
            spaces(&[
                "I", "'LL", " say", " café", "X", " ", "1", "2", "3", "4", "²", " (", "ok",
                ")\n\n", " ", " go",
            ]),
        ),
        (
            "gpt-4o",
            spaces(&[
                "I'LL", " say", " café", "X", " ", "123", "4²", " (", "ok", ")\n\n", " ", " go",
            ]),
        ),
    ];
    for (kind, expected) in cases {
        let splits = PreTokenizer::named(kind).unwrap().splits;
        let splits: tokenizers::PreTokenizerWrapper = serde_json::from_value(splits).unwrap();
        let mut text = PreTokenizedString::from(sample);
        splits.pre_tokenize(&mut text).unwrap();
        let found: Vec<String> = text
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            // The byte-level alphabet writes the two bytes of these as two letters.
            .map(|(piece, ..)| {
                piece
                    .replace("\u{c3}\u{a9}", "é")
                    .replace("\u{c2}\u{b2}", "²")
            })
            .collect();
        assert_eq!(found, expected, "{kind}");
    }
    assert!(PreTokenizer::named("default").is_none());
}

#[test]
fn whole_pieces_and_first_tokens() {
    // Without a merge for it "abc" is a token only where whole pieces are looked up.
    let smollm = byte_level("smollm").tokenizer("f").unwrap();
    assert_eq!(smollm.encode("abc").unwrap(), [7, 3]);
    assert_eq!(smollm.encode_with_special_tokens("abc").unwrap(), [7, 3]);
    let llama = byte_level("llama-bpe").tokenizer("f").unwrap();
    assert_eq!(llama.encode("abc").unwrap(), [8]);
    assert_eq!(llama.encode_with_special_tokens("abc").unwrap(), [0, 8]);
    assert_eq!(llama.encode("12").unwrap(), [9]);
    assert_eq!(smollm.encode("12").unwrap(), [4, 5]);

    let told = Vocabulary {
        bos: (Some(0), Some(true)),
        eos: (Some(0), Some(true)),
        ..byte_level("smollm")
    };
    let told = told.tokenizer("f").unwrap();
    assert_eq!(told.encode_with_special_tokens("ab").unwrap(), [0, 7, 0]);

    assert_eq!(smollm.encode("<s>ab<tool>").unwrap(), [0, 7, 10]);
    assert_eq!(smollm.decode(&[0, 7, 10]).unwrap(), "<s>ab<tool>");
    assert_eq!(
        smollm.decode_without_special_tokens(&[0, 7, 10]).unwrap(),
        "ab<tool>"
    );
    assert_eq!(
        (smollm.token_id("<tool>"), smollm.token(8)),
        (Some(10), Some("abc".into()))
    );
    let message = refusal(smollm.decode(&[7, 11]));
    assert!(
        message.contains("found id 11, which no token has"),
        "{message}"
    );
}

#[test]
fn ids_beyond_the_embedding_are_refused() {
    let tokenizer = byte_level("smollm")
        .tokenizer("f")
        .unwrap()
        .with_id_limit(10);
    assert_eq!(tokenizer.encode("12").unwrap(), [4, 5]);
    let message = refusal(tokenizer.encode("<tool>"));
    assert!(
        message.contains("f: token \"<tool>\": expected an id below"),
        "{message}"
    );
    assert!(
        message.contains("vocab_size = 10, found id 10"),
        "{message}"
    );
}

#[test]
fn vocabularies_that_make_no_tokenizer() {
    let with = |change: &dyn Fn(&mut Vocabulary<'static>)| {
        let mut vocabulary = byte_level("smollm");
        change(&mut vocabulary);
        refusal(vocabulary.tokenizer("f"))
    };
    let cases = [
        (
            with(&|v| v.model = "bert"),
            "f: tokenizer.ggml.model: expected \"gpt2\"",
        ),
        (
            with(&|v| v.pre = Some("chameleon")),
            "f: tokenizer.ggml.pre: expected one of gpt-2",
        ),
        (
            with(&|v| v.pre = None),
            "f: tokenizer.ggml.pre: expected one of",
        ),
        (with(&|v| v.merges = None), "f: tokenizer.ggml.merges"),
        (with(&|v| v.merges = Some(vec!["ab"])), "found \"ab\""),
        (with(&|v| v.merges = Some(vec!["a z"])), "out of vocabulary"),
        (
            with(&|v| v.tokens[2] = "a"),
            "f: tokenizer.ggml.tokens: expected each token once, found \"a\" twice",
        ),
        (
            with(&|v| v.bos.0 = Some(99)),
            "f: tokenizer.ggml.bos_token_id: expected an id below 11",
        ),
        (with(&|v| v.model = "llama"), "f: tokenizer.ggml.scores"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message} / {expected}");
    }
    let mut bytes_missing = byte_level("smollm");
    bytes_missing.model = "llama";
    bytes_missing.scores = Some(vec![0.0; 11]);
    let message = refusal(bytes_missing.tokenizer("f"));
    assert!(message.contains("found no <0x00>"), "{message}");
}

/// The tokens of a `SentencePiece` vocabulary: specials, bytes, pieces by falling score.
fn pieces() -> Vec<String> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
    let space = "\u{2581}";
    tokens.extend(
        [
            "ab", "_a", "ba", "bab", "_ab", "aba", "abab", "_b", "bb", "_a_b", "_", "a", "b",
        ]
        .map(|piece| piece.replace('_', space)),
    );
    tokens
}

fn sentencepiece(tokens: &[String]) -> Vocabulary<'_> {
    let mut kinds = vec![TokenKind::Normal; tokens.len()];
    kinds[0] = TokenKind::Unknown;
    kinds[1..3].fill(TokenKind::Control);
    kinds[3..259].fill(TokenKind::Byte);
    Vocabulary {
        model: "llama",
        pre: None,
        tokens: tokens.iter().map(String::as_str).collect(),
        kinds,
        scores: Some(
            (0..tokens.len())
                .map(|id| if id < 259 { 0.0 } else { 259.0 - id as f64 })
                .collect(),
        ),
        merges: None,
        add_space_prefix: None,
        bos: (Some(1), None),
        eos: (Some(2), None),
        chat_template: None,
    }
}

/// `SentencePiece`'s own way: of all neighbours that together are a piece, join those of the highest
/// score, leftmost first, until there are none; what is no piece becomes its bytes.
fn naive_sentencepiece(tokens: &[String], text: &str) -> Vec<u32> {
    let id = |piece: &str| tokens.iter().position(|token| token == piece);
    let mut parts: Vec<String> = format!(" {text}")
        .replace(' ', "\u{2581}")
        .chars()
        .map(String::from)
        .collect();
    loop {
        let best = (0..parts.len().saturating_sub(1))
            .filter_map(|at| Some((id(&format!("{}{}", parts[at], parts[at + 1]))?, at)))
            .min();
        let Some((_, at)) = best else { break };
        let right = parts.remove(at + 1);
        parts[at].push_str(&right);
    }
    let mut ids = Vec::new();
    for part in parts {
        match id(&part) {
            Some(id) => ids.push(id as u32),
            None => ids.extend(part.bytes().map(|byte| 3 + u32::from(byte))),
        }
    }
    ids
}

proptest! {
    #[test]
    fn sentencepiece_merges_as_sentencepiece_does(text in "[ab é]{1,20}") {
        let tokens = pieces();
        let tokenizer = sentencepiece(&tokens).tokenizer("f").unwrap();
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&ids, &naive_sentencepiece(&tokens, &text));
        prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

#[test]
fn sentencepiece_specials() {
    let tokens = pieces();
    let tokenizer = sentencepiece(&tokens).tokenizer("f").unwrap();
    let ab = tokenizer.token_id("\u{2581}ab").unwrap();
    assert_eq!(tokenizer.encode("ab").unwrap(), [ab]);
    assert_eq!(tokenizer.encode_with_special_tokens("ab").unwrap(), [1, ab]);
    let bare = Vocabulary {
        add_space_prefix: Some(false),
        ..sentencepiece(&tokens)
    };
    let bare = bare.tokenizer("f").unwrap();
    assert_eq!(bare.encode("ab").unwrap(), [bare.token_id("ab").unwrap()]);
    assert_eq!(bare.decode(&bare.encode(" a b").unwrap()).unwrap(), " a b");
}

#[test]
fn the_json_is_the_same_tokenizer() {
    let tokenizer = byte_level("llama-bpe").tokenizer("f").unwrap();
    let mut json: Value = serde_json::from_str(&tokenizer.to_json().unwrap()).unwrap();
    // Settings of the call that saved a file must not cut or fill texts.
    json["truncation"] = json!(
        { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 }
    );
    json["padding"] = json!({
        "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
    });
    let again = Tokenizer::from_json(json.to_string().as_bytes(), "g").unwrap();
    let text = "abc 12 cab<s>ab";
    assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
    assert_eq!(again.vocab_size(), 11);
    let message = refusal(Tokenizer::from_json(
        b"{\"model\": 3}",
        "dir/tokenizer.json",
    ));
    assert!(
        message.starts_with("dir/tokenizer.json: expected a tokenizer"),
        "{message}"
    );
}

#[test]
fn folders_and_their_chat_templates() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let message = refusal(Tokenizer::from_folder(path));
    assert!(
        message.contains("tokenizer.json: expected the model's tokenizer"),
        "{message}"
    );
    let json = byte_level("gpt-2")
        .tokenizer("f")
        .unwrap()
        .to_json()
        .unwrap();
    fs::write(path.join("tokenizer.json"), json).unwrap();
    let template = || {
        Tokenizer::from_folder(path)
            .unwrap()
            .chat_template()
            .map(str::to_owned)
    };
    assert_eq!(template(), None);
    let config = path.join("tokenizer_config.json");
    fs::write(&config, r#"{"chat_template": "one"}"#).unwrap();
    assert_eq!(template().as_deref(), Some("one"));
    let named = json!({ "chat_template": [
        { "name": "rag", "template": "two" }, { "name": "default", "template": "three" } ] });
    fs::write(&config, named.to_string()).unwrap();
    assert_eq!(template().as_deref(), Some("three"));
    fs::write(path.join("chat_template.jinja"), "four").unwrap();
    assert_eq!(template().as_deref(), Some("four"));
}
