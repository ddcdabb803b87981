//! Reading GGUF: the header is checked here, blocks are dequantised by candle.
//!
//! Tensors get Hugging Face's names and row order, the metadata becomes a `config.json`, so nothing
//! above this folder knows which format a model came in.

mod block;
mod config;
mod cursor;
mod header;
mod names;

use std::{borrow::Cow, ops::Range, path::Path};

use serde_json::{Value as Json, json};

use self::{block::BlockType, header::Header};
use super::{map::Map, reader::Source};
use crate::{
    Architecture, Error, TensorInfo, Tokenizer,
    tensor::f32_from_bytes,
    tokenizer::vocabulary::{TokenKind, Vocabulary},
};

/// The tensor of rotary divisors; it becomes part of the configuration.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An opened GGUF file.
#[derive(Debug)]
pub(super) struct Gguf {
    map: Map,
    /// The path, as messages name it.
    file: String,
    places: Vec<Place>,
}

/// Where a tensor is and what has to be done to it.
#[derive(Debug)]
struct Place {
    block: BlockType,
    range: Range<usize>,
    /// Head size, if rows have to be brought back to Hugging Face's order.
    unpermute: Option<usize>,
}

impl Gguf {
    /// Opens a file; returns it with its `config.json` and its tensors under their names.
    pub(super) fn open(path: &Path) -> Result<(Self, Json, Vec<TensorInfo>), Error> {
        let map = Map::open(path)?;
        let file = path.display().to_string();
        let header = Header::read(&map, &file)?;
        if let Some(parts) = header.integer("split.count")?.filter(|&parts| parts > 1) {
            return Err(header.refuse(
                "split.count",
                "a model in one file",
                format!("{parts} files"),
                "join them with llama.cpp's gguf-split --merge",
            ));
        }
        let architecture = config::architecture(&header)?;
        let mut factors = None;
        let mut kept = Vec::with_capacity(header.tensors.len());
        for tensor in &header.tensors {
            if tensor.name != ROPE_FACTORS {
                kept.push(tensor);
                continue;
            }
            if tensor.block != BlockType::F32 {
                return Err(header.refuse(
                    "tensor rope_freqs.weight",
                    "type F32",
                    tensor.block.name(),
                    "get the file again",
                ));
            }
            factors = f32_from_bytes(crate::Dtype::F32, &map[tensor.range.clone()]);
        }
        let config = config::config_json(&header, architecture, factors.as_deref())?;
        let head_dim = config["head_dim"].as_u64().unwrap_or_default() as usize;
        let mut tensors = Vec::with_capacity(kept.len());
        let mut places = Vec::with_capacity(kept.len());
        for tensor in kept {
            let Some(name) = names::hugging_face(tensor.name) else {
                return Err(header.refuse(
                    &format!("tensor {}", tensor.name),
                    "a tensor of a llama, qwen2 or qwen3 model",
                    "a name that mlac does not know",
                    "use a supported model, or its safetensors checkpoint",
                ));
            };
            let permuted = architecture == Architecture::Llama && names::is_permuted(&name);
            let whole_heads = head_dim > 0 && tensor.shape[0].is_multiple_of(head_dim);
            if permuted && !whole_heads {
                return Err(header.refuse(
                    &format!("tensor {}", tensor.name),
                    format!("rows of whole heads of {head_dim}"),
                    format!("{} rows", tensor.shape[0]),
                    "get the file again",
                ));
            }
            places.push(Place {
                block: tensor.block,
                range: tensor.range.clone(),
                unpermute: permuted.then_some(head_dim),
            });
            tensors.push(TensorInfo::new(
                name,
                tensor.block.dtype(),
                tensor.shape.clone(),
            ));
        }
        Ok((Self { map, file, places }, config, tensors))
    }

    /// The bytes of a tensor, by its place in the list [`Gguf::open`] returned; a quantised one
    /// comes as F32.
    pub(super) fn bytes(&self, at: usize, info: &TensorInfo) -> Result<Cow<'_, [u8]>, Error> {
        let place = &self.places[at];
        let stored = &self.map[place.range.clone()];
        let bytes = if place.block.is_quantised() {
            let subject = format!("{}: tensor {}", self.file, info.name);
            let numbers = block::dequantise(place.block, stored, &subject)?;
            self.release(at);
            Cow::Owned(numbers)
        } else {
            Cow::Borrowed(stored)
        };
        Ok(match place.unpermute {
            Some(head_dim) => {
                let row = bytes.len() / info.shape[0].max(1);
                Cow::Owned(names::unpermute(&bytes, row, head_dim))
            }
            None => bytes,
        })
    }

    /// The same bytes by position; computed ones are held.
    pub(super) fn source(&self, at: usize, info: &TensorInfo) -> Result<Source<'_>, Error> {
        let place = &self.places[at];
        if place.block.is_quantised() || place.unpermute.is_some() {
            return Ok(Source::Memory(self.bytes(at, info)?));
        }
        Ok(Source::File {
            map: &self.map,
            range: place.range.clone(),
        })
    }

    /// Takes a tensor's pages out of memory.
    pub(super) fn release(&self, at: usize) {
        self.map.release(self.places[at].range.clone());
    }

    /// The tokenizer of the file's own vocabulary.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer, Error> {
        self.with_vocabulary(|vocabulary| vocabulary.tokenizer(&self.file))
    }

    /// The files that lie beside a safetensors checkpoint of the same model.
    pub(super) fn side_contents(&self, config: &Json) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let tokenizer = self.tokenizer()?.to_json()?;
        let tokenizer_config = self.with_vocabulary(|vocabulary| Ok(vocabulary.config_json()))?;
        let generation: serde_json::Map<String, Json> =
            ["bos_token_id", "eos_token_id", "pad_token_id"]
                .into_iter()
                .filter_map(|key| Some((key.to_owned(), config.get(key)?.clone())))
                .filter(|(_, value)| !value.is_null())
                .collect();
        Ok(vec![
            (
                "generation_config.json".into(),
                format!("{:#}\n", json!(generation)).into_bytes(),
            ),
            ("tokenizer.json".into(), tokenizer.into_bytes()),
            (
                "tokenizer_config.json".into(),
                format!("{tokenizer_config:#}\n").into_bytes(),
            ),
        ])
    }

    fn with_vocabulary<T>(
        &self,
        use_it: impl FnOnce(&Vocabulary<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let header = Header::read(&self.map, &self.file)?;
        use_it(&vocabulary(&header)?)
    }
}

fn vocabulary<'a>(header: &Header<'a>) -> Result<Vocabulary<'a>, Error> {
    let missing = |key: &str, expected: &str| {
        header.refuse(
            key,
            expected,
            "no such key",
            "use a file with its vocabulary, or the model's safetensors checkpoint",
        )
    };
    let key = "tokenizer.ggml.model";
    let model = header
        .text(key)?
        .ok_or_else(|| missing(key, "the kind of vocabulary"))?;
    let key = "tokenizer.ggml.tokens";
    let tokens = header
        .texts(key)?
        .ok_or_else(|| missing(key, "the list of tokens"))?;
    let key = "tokenizer.ggml.token_type";
    let numbers = header
        .numbers(key)?
        .ok_or_else(|| missing(key, "the kind of each token"))?;
    let kinds = numbers
        .iter()
        .map(|&number| {
            TokenKind::from_number(number as i64).ok_or_else(|| {
                header.refuse(
                    key,
                    "kinds 1 to 6",
                    number.to_string(),
                    "get the file again",
                )
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let scores = header.numbers("tokenizer.ggml.scores")?;
    for (key, count) in [
        (key, kinds.len()),
        (
            "tokenizer.ggml.scores",
            scores.as_ref().map_or(tokens.len(), Vec::len),
        ),
    ] {
        if count != tokens.len() {
            return Err(header.refuse(
                key,
                format!("{} elements, one for each token", tokens.len()),
                count.to_string(),
                "get the file again",
            ));
        }
    }
    let id = |key: &str| -> Result<Option<u32>, Error> {
        header
            .integer(key)?
            .map(|id| {
                u32::try_from(id).map_err(|_| {
                    header.refuse(key, "a token id", id.to_string(), "get the file again")
                })
            })
            .transpose()
    };
    Ok(Vocabulary {
        model,
        pre: header.text("tokenizer.ggml.pre")?,
        tokens,
        kinds,
        scores,
        merges: header.texts("tokenizer.ggml.merges")?,
        add_space_prefix: header.boolean("tokenizer.ggml.add_space_prefix")?,
        bos: (
            id("tokenizer.ggml.bos_token_id")?,
            header.boolean("tokenizer.ggml.add_bos_token")?,
        ),
        eos: (
            id("tokenizer.ggml.eos_token_id")?,
            header.boolean("tokenizer.ggml.add_eos_token")?,
        ),
        chat_template: header.text("tokenizer.chat_template")?,
    })
}
