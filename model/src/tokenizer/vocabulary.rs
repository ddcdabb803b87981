//! A vocabulary as GGUF metadata holds it, made into a `tokenizer.json`.

use serde_json::{Map, Value, json};

use super::{
    Tokenizer,
    pretokenizer::{KNOWN, PreTokenizer, byte_level},
    sentencepiece,
};
use crate::{Error, Refusal};

/// What a token is for, `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    pub(crate) fn from_number(number: i64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// The `tokenizer.ggml.*` keys of one file.
pub(crate) struct Vocabulary<'a> {
    /// `model`: "gpt2" or "llama".
    pub(crate) model: &'a str,
    /// `pre`.
    pub(crate) pre: Option<&'a str>,
    /// Token of each id.
    pub(crate) tokens: Vec<&'a str>,
    /// Kind of each id, as many as tokens.
    pub(crate) kinds: Vec<TokenKind>,
    /// Score of each id, as many as tokens.
    pub(crate) scores: Option<Vec<f64>>,
    /// Merges, best first, the two parts with a space between them.
    pub(crate) merges: Option<Vec<&'a str>>,
    pub(crate) add_space_prefix: Option<bool>,
    /// Id and whether it is put before a text.
    pub(crate) bos: (Option<u32>, Option<bool>),
    /// Id and whether it is put after a text.
    pub(crate) eos: (Option<u32>, Option<bool>),
    pub(crate) chat_template: Option<&'a str>,
}

impl Vocabulary<'_> {
    /// Makes a tokenizer; `file` names the source in messages.
    pub(crate) fn tokenizer(&self, file: &str) -> Result<Tokenizer, Error> {
        self.check(file)?;
        let json = match self.model {
            "gpt2" => self.byte_level_json(file)?,
            "llama" => self.sentencepiece_json(file)?,
            other => {
                return Err(Error::refusal(
                    format!("{file}: tokenizer.ggml.model"),
                    "\"gpt2\" (byte-level BPE) or \"llama\" (SentencePiece BPE)",
                    format!("{other:?}"),
                    "use the model's safetensors checkpoint with its tokenizer.json",
                ));
            }
        };
        let tokenizer = Tokenizer::from_json(json.to_string().as_bytes(), file)?;
        Ok(tokenizer.with_chat_template(self.chat_template.map(str::to_owned)))
    }

    /// The content of a `tokenizer_config.json`.
    pub(crate) fn config_json(&self) -> Value {
        let token = |id: Option<u32>| id.and_then(|id| self.tokens.get(id as usize)).copied();
        let mut json = Map::new();
        json.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        for (key, id) in [("bos_token", self.bos.0), ("eos_token", self.eos.0)] {
            if let Some(token) = token(id) {
                json.insert(key.into(), json!(token));
            }
        }
        json.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(template) = self.chat_template {
            json.insert("chat_template".into(), json!(template));
        }
        Value::Object(json)
    }

    pub(super) fn missing(&self, file: &str, key: &str, expected: &str) -> Refusal {
        Refusal::new(
            format!("{file}: {key}"),
            format!("{expected}, as tokenizer.ggml.model is {:?}", self.model),
            "no such key",
            "get the file again, or use the model's safetensors checkpoint",
        )
    }

    fn check(&self, file: &str) -> Result<(), Refusal> {
        let mut seen = std::collections::HashSet::with_capacity(self.tokens.len());
        if let Some(twice) = self.tokens.iter().find(|&&token| !seen.insert(token)) {
            return Err(Refusal::new(
                format!("{file}: tokenizer.ggml.tokens"),
                "each token once",
                format!("{twice:?} twice"),
                "use the model's safetensors checkpoint with its tokenizer.json",
            ));
        }
        for (key, id) in [("bos_token_id", self.bos.0), ("eos_token_id", self.eos.0)] {
            if let Some(id) = id.filter(|&id| id as usize >= self.tokens.len()) {
                return Err(Refusal::new(
                    format!("{file}: tokenizer.ggml.{key}"),
                    format!("an id below {}, the number of tokens", self.tokens.len()),
                    id.to_string(),
                    "get the file again",
                ));
            }
        }
        Ok(())
    }

    fn byte_level_json(&self, file: &str) -> Result<Value, Refusal> {
        let refuse = |found: String| {
            Refusal::new(
                format!("{file}: tokenizer.ggml.pre"),
                format!("one of {KNOWN}"),
                found,
                "use the model's safetensors checkpoint with its tokenizer.json",
            )
        };
        let name = self.pre.ok_or_else(|| refuse("no such key".into()))?;
        let rules = PreTokenizer::named(name).ok_or_else(|| refuse(format!("{name:?}")))?;
        let Some(merges) = &self.merges else {
            return Err(self.missing(file, "tokenizer.ggml.merges", "a list of merges"));
        };
        let merges: Vec<[&str; 2]> = merges
            .iter()
            .map(|merge| {
                merge
                    .split_once(' ')
                    .filter(|(left, right)| !left.is_empty() && !right.is_empty())
                    .map(|(left, right)| [left, right])
                    .ok_or_else(|| {
                        Refusal::new(
                            format!("{file}: tokenizer.ggml.merges"),
                            "two tokens with a space between them",
                            format!("{merge:?}"),
                            "get the file again",
                        )
                    })
            })
            .collect::<Result<_, _>>()?;
        let model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rules.ignore_merges,
            "vocab": self.ids_json(),
            "merges": merges,
        });
        Ok(self.assemble(
            &rules.normalizer,
            &rules.splits,
            &byte_level(true),
            &model,
            self.bos.1.unwrap_or(rules.add_bos),
        ))
    }

    fn sentencepiece_json(&self, file: &str) -> Result<Value, Refusal> {
        let parts = sentencepiece::parts(self, file)?;
        let bos = self.bos.1.unwrap_or(true);
        Ok(self.assemble(
            &parts.normalizer,
            &Value::Null,
            &parts.decoder,
            &parts.model,
            bos,
        ))
    }

    fn assemble(
        &self,
        normalizer: &Value,
        pre_tokenizer: &Value,
        decoder: &Value,
        model: &Value,
        add_bos: bool,
    ) -> Value {
        let added: Vec<Value> = self
            .tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter_map(|(id, (token, kind))| {
                let special = match kind {
                    TokenKind::Control | TokenKind::Unknown => true,
                    TokenKind::UserDefined => false,
                    TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
                };
                Some(json!({
                    "id": id,
                    "content": token,
                    "single_word": false,
                    "lstrip": false,
                    "rstrip": false,
                    "normalized": false,
                    "special": special,
                }))
            })
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor(add_bos),
            "decoder": decoder,
            "model": model,
        })
    }

    /// The tokens put around a text.
    fn post_processor(&self, add_bos: bool) -> Value {
        let around = [
            (self.bos.0, add_bos),
            (self.eos.0, self.eos.1.unwrap_or(false)),
        ]
        .map(|(id, add)| id.filter(|_| add).map(|id| (id, self.tokens[id as usize])));
        if around == [None, None] {
            return Value::Null;
        }
        let [bos, eos] = around;
        let special = |token: Option<(u32, &str)>| {
            token.map(|(_, text)| json!({ "SpecialToken": { "id": text, "type_id": 0 } }))
        };
        let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
        let single: Vec<Value> = special(bos)
            .into_iter()
            .chain([text("A")])
            .chain(special(eos))
            .collect();
        let pair: Vec<Value> = special(bos)
            .into_iter()
            .chain([text("A")])
            .chain(special(eos))
            .chain(special(bos))
            .chain([text("B")])
            .chain(special(eos))
            .collect();
        let tokens: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(id, token)| {
                (
                    token.to_owned(),
                    json!({ "id": token, "ids": [id], "tokens": [token] }),
                )
            })
            .collect();
        json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": tokens,
        })
    }

    /// The object token to id.
    pub(super) fn ids_json(&self) -> Value {
        Value::Object(
            self.tokens
                .iter()
                .enumerate()
                .map(|(id, token)| ((*token).to_owned(), json!(id)))
                .collect(),
        )
    }

    /// The first token of a kind.
    pub(super) fn kind_of_first(&self, kind: TokenKind) -> Option<&str> {
        let at = self.kinds.iter().position(|&other| other == kind)?;
        self.tokens.get(at).copied()
    }
}
