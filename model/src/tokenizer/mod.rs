//! Text to token ids and back.

mod pretokenizer;
mod sentencepiece;
#[cfg(test)]
mod tests;
pub(crate) mod vocabulary;

use std::path::Path;

use serde_json::Value;

use crate::{Error, checkpoint::read_small};

/// A tokenizer from `tokenizer.json` or from the vocabulary inside a GGUF file.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    source: String,
    chat_template: Option<String>,
    vocab_size: usize,
    /// Rows of the model's embedding, when the tokenizer belongs to a model.
    id_limit: Option<usize>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("source", &self.source)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` in a folder, and the chat template beside it.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::refusal(
                path.display().to_string(),
                "the model's tokenizer",
                "no such file",
                "save the tokenizer with transformers' save_pretrained (a fast tokenizer)",
            ));
        }
        let mut tokenizer = Self::from_json(&read_small(&path)?, &path.display().to_string())?;
        tokenizer.chat_template = folder_chat_template(folder)?;
        Ok(tokenizer)
    }

    /// Reads the content of a `tokenizer.json`; `source` names it in messages.
    pub fn from_json(json: &[u8], source: &str) -> Result<Self, Error> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| {
            Error::refusal(
                source,
                "a tokenizer as the tokenizers library writes it",
                error.to_string(),
                "get the file again",
            )
        })?;
        // A file may carry the settings of the call that wrote it; texts here are never cut or filled.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| Self::failed(source, &error))?;
        let vocab_size = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |largest| largest as usize + 1);
        Ok(Self {
            inner,
            source: source.to_owned(),
            chat_template: None,
            vocab_size,
            id_limit: None,
        })
    }

    pub(crate) fn with_chat_template(mut self, template: Option<String>) -> Self {
        self.chat_template = template;
        self
    }

    /// Refuses from now on to encode to ids that the model has no embedding for.
    pub(crate) fn with_id_limit(mut self, rows: usize) -> Self {
        self.id_limit = Some(rows);
        self
    }

    /// Token ids of a text, none added. Special tokens that are spelled out in the text
    /// (`<|im_start|>`) become their one id.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_as(text, false)
    }

    /// Token ids of a text with the tokens the model expects around it: `<s>` for Llama, none for
    /// Qwen.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_as(text, true)
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| Self::failed(&self.source, &error))?;
        let ids = encoding.get_ids().to_vec();
        if let Some(rows) = self.id_limit
            && let Some(&id) = ids.iter().find(|&&id| id as usize >= rows)
        {
            return Err(Error::refusal(
                format!(
                    "{}: token {:?}",
                    self.source,
                    self.token(id).unwrap_or_default()
                ),
                format!("an id below the model's vocab_size = {rows}"),
                format!("id {id}"),
                "check that the tokenizer belongs to the model, or remove the token from the text",
            ));
        }
        Ok(ids)
    }

    /// The text of token ids, special tokens spelled out. Ids without a token are refused.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.decode_as(ids, false)
    }

    /// The text of token ids without special tokens, as a reader wants it.
    pub fn decode_without_special_tokens(&self, ids: &[u32]) -> Result<String, Error> {
        self.decode_as(ids, true)
    }

    fn decode_as(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> {
        if let Some(unknown) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(Error::refusal(
                self.source.as_str(),
                "ids of tokens",
                format!("id {unknown}, which no token has"),
                "check that the tokenizer belongs to the model",
            ));
        }
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| Self::failed(&self.source, &error))
    }

    /// One more than the largest token id; a model may have more embedding rows than that.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, spelled as the vocabulary has it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The Jinja template that turns a conversation into a prompt, if the model has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The content of a `tokenizer.json` for this tokenizer.
    pub fn to_json(&self) -> Result<String, Error> {
        self.inner
            .to_string(true)
            .map_err(|error| Self::failed(&self.source, &error))
    }

    fn failed(source: &str, error: &dyn std::fmt::Display) -> Error {
        Error::refusal(
            source,
            "a tokenizer that handles this input",
            error.to_string(),
            "check that the tokenizer belongs to the model",
        )
    }
}

/// `chat_template.jinja` (transformers 5) or the key in `tokenizer_config.json`.
fn folder_chat_template(folder: &Path) -> Result<Option<String>, Error> {
    let jinja = folder.join("chat_template.jinja");
    if jinja.is_file() {
        let bytes = read_small(&jinja)?;
        return String::from_utf8(bytes).map(Some).map_err(|error| {
            Error::refusal(
                jinja.display().to_string(),
                "UTF-8 text",
                error.to_string(),
                "get the file again",
            )
        });
    }
    let config = folder.join("tokenizer_config.json");
    if !config.is_file() {
        return Ok(None);
    }
    let json = crate::checkpoint::read_json(&config)?;
    Ok(match json.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        // A list of named templates: the one called "default".
        Some(Value::Array(list)) => list
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template").and_then(Value::as_str))
            .map(str::to_owned),
        _ => None,
    })
}
