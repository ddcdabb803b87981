//! Checkpoints: opening, reading and writing the weights of a model.

mod copy;
mod expected;
mod gguf;
mod map;
mod reader;
pub mod safetensors;
#[cfg(test)]
mod tests;
mod writer;

use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

pub use copy::copy_tensors;
pub use expected::expected_tensors;
pub use reader::TensorReader;
pub use writer::{CheckpointWriter, TensorSink};

use self::{gguf::Gguf, safetensors::Shards};
use crate::{
    Dtype, Error, ModelConfig, TensorInfo, Tokenizer,
    config::token_ids,
    mxfp4,
    tensor::{check_finite_from, f32_into, shape_text},
};

/// Largest JSON file that is read into memory.
const LARGEST_JSON: u64 = 256 << 20;

/// Bytes of a tensor that are read at once, so few that they stay in the cache of a core; a whole
/// number of elements of every type.
const CHUNK: usize = 256 << 10;

/// Files beside the weights that belong to a model, in the order they are listed.
const SIDE_FILES: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "LICENSE",
];

/// An opened checkpoint: configuration and tensors, each checked against the other.
///
/// Opening maps the files and reads headers only; a tensor is read when it is asked for. Names
/// and layouts are those of Hugging Face whatever the file format.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    raw_config: Value,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Safetensors(Shards),
    Gguf(Gguf),
}

impl Checkpoint {
    /// Opens a folder (`config.json` with safetensors, or one `.gguf`) or a `.gguf` file.
    ///
    /// Every tensor that the configuration implies has to be there in the implied shape.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(|source| Error::io(path, source))?;
        if metadata.is_dir() {
            return match only_gguf(path)? {
                Some(file) => Self::open_gguf(path, &file),
                None => Self::open_folder(path),
            };
        }
        if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            return Self::open_gguf(path, path);
        }
        Err(Error::refusal(
            path.display().to_string(),
            "a folder with config.json and safetensors files, or a .gguf file",
            "another file",
            "give the folder that holds it",
        ))
    }

    fn open_folder(folder: &Path) -> Result<Self, Error> {
        let config_file = folder.join("config.json");
        if !config_file.is_file() {
            return Err(Error::refusal(
                config_file.display().to_string(),
                "the model's configuration",
                "no such file",
                "give the folder of a model, or get the file from the model's publisher",
            ));
        }
        let raw_config = read_json(&config_file)?;
        let mut config = ModelConfig::from_json(&raw_config, &config_file.display().to_string())?;
        add_generation_eos(&folder.join("generation_config.json"), &mut config)?;
        let (shards, tensors) = Shards::open(folder)?;
        Self::new(
            folder,
            config,
            raw_config,
            tensors,
            Weights::Safetensors(shards),
        )
    }

    /// `path` is what the user gave, `file` the GGUF file.
    fn open_gguf(path: &Path, file: &Path) -> Result<Self, Error> {
        let (gguf, raw_config, tensors) = Gguf::open(file)?;
        let config = ModelConfig::from_json(&raw_config, &file.display().to_string())?;
        Self::new(path, config, raw_config, tensors, Weights::Gguf(gguf))
    }

    fn new(
        path: &Path,
        config: ModelConfig,
        raw_config: Value,
        tensors: Vec<TensorInfo>,
        weights: Weights,
    ) -> Result<Self, Error> {
        let index: HashMap<String, usize> = tensors
            .iter()
            .enumerate()
            .map(|(at, info)| (info.name.clone(), at))
            .collect();
        expected::check(&config, &tensors, &index, &path.display().to_string())?;
        let checkpoint = Self {
            path: path.to_owned(),
            config,
            raw_config,
            tensors,
            index,
            weights,
        };
        checkpoint.check_tied_head()?;
        Ok(checkpoint)
    }

    /// A stored head that should be tied has to be the embedding.
    fn check_tied_head(&self) -> Result<(), Error> {
        let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
        if !self.config.tie_word_embeddings || !self.contains(head) {
            return Ok(());
        }
        if self.info(head)?
            == &(TensorInfo {
                name: head.into(),
                ..self.info(embedding)?.clone()
            })
            && self.same_bytes(head, embedding)?
        {
            return Ok(());
        }
        Err(Error::refusal(
            self.subject(head),
            format!("the same tensor as {embedding}, as tie_word_embeddings is true"),
            "another one",
            "set tie_word_embeddings to false in config.json if the head was trained",
        ))
    }

    fn same_bytes(&self, one: &str, other: &str) -> Result<bool, Error> {
        let other = self.reader(other)?;
        let mut buffer = vec![0; CHUNK.min(other.len())];
        let (mut offset, mut same) = (0, true);
        self.for_each_chunk(one, CHUNK, |chunk| {
            if same {
                let buffer = &mut buffer[..chunk.len()];
                other.read_at(offset, buffer)?;
                offset += chunk.len();
                same = buffer == chunk;
            }
            Ok::<_, Error>(())
        })?;
        Ok(same)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The content of `config.json`; for GGUF the equivalent, made from the metadata.
    pub fn raw_config(&self) -> &Value {
        &self.raw_config
    }

    /// The path the checkpoint was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, in the order of the files and of the data in them.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Element type and shape of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo, Error> {
        Ok(&self.tensors[self.place(name)?])
    }

    /// The stored little-endian bytes of a tensor; a quantised GGUF tensor comes as F32.
    ///
    /// They are mapped: what is touched counts as memory until [`Checkpoint::release`]. To pass
    /// through large tensors use [`Checkpoint::reader`] or [`Checkpoint::for_each_chunk`].
    pub fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let place = self.place(name)?;
        match &self.weights {
            Weights::Safetensors(shards) => Ok(Cow::Borrowed(shards.bytes(place))),
            Weights::Gguf(gguf) => gguf.bytes(place, &self.tensors[place]),
        }
    }

    /// Access to the same bytes by position, which maps nothing.
    pub fn reader(&self, name: &str) -> Result<TensorReader<'_>, Error> {
        let place = self.place(name)?;
        let source = match &self.weights {
            Weights::Safetensors(shards) => shards.source(place),
            Weights::Gguf(gguf) => gguf.source(place, &self.tensors[place])?,
        };
        Ok(TensorReader::new(self.subject(name), source))
    }

    /// Passes the bytes of a tensor through `take` in pieces of `chunk_bytes`, in order; the last
    /// may be shorter.
    pub fn for_each_chunk<E: From<Error>>(
        &self,
        name: &str,
        chunk_bytes: usize,
        take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.reader(name)?.for_each_chunk(chunk_bytes, take)
    }

    /// Takes the pages of a tensor that [`Checkpoint::bytes`] brought in out of this process's
    /// memory; touched again, they are read again.
    pub fn release(&self, name: &str) -> Result<(), Error> {
        let place = self.place(name)?;
        match &self.weights {
            Weights::Safetensors(shards) => shards.release(place),
            Weights::Gguf(gguf) => gguf.release(place),
        }
        Ok(())
    }

    /// The numbers of an F32, F16 or BF16 tensor of a known shape, row-major.
    ///
    /// Refuses another shape, another type, NaN and infinity.
    pub fn f32(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>, Error> {
        let rows = expected_shape.first().copied().unwrap_or(1);
        self.f32_rows(name, expected_shape, 0..rows)
    }

    /// The numbers of some entries along the first axis: rows of a matrix, experts of a stack.
    ///
    /// Refuses what [`Checkpoint::f32`] refuses, and rows that the tensor does not have.
    pub fn f32_rows(
        &self,
        name: &str,
        expected_shape: &[usize],
        rows: Range<usize>,
    ) -> Result<Vec<f32>, Error> {
        let info = self.info(name)?;
        if info.shape != expected_shape {
            return Err(Error::refusal(
                self.subject(name),
                format!("shape {}", shape_text(expected_shape)),
                format!("shape {}", shape_text(&info.shape)),
                "check that config.json belongs to these weights",
            ));
        }
        let (&all, row) = info.shape.split_first().unwrap_or((&1, &[]));
        if rows.start > rows.end || rows.end > all {
            return Err(Error::refusal(
                self.subject(name),
                format!("rows among its {all}"),
                format!("rows {} to {}", rows.start, rows.end),
                "read within the tensor",
            ));
        }
        if !info.dtype.is_weight() {
            return Err(self.wrong_dtype(info));
        }
        let row: usize = row.iter().product();
        let (first, size) = (rows.start * row, info.dtype.size());
        let mut numbers = vec![0.0; rows.len() * row];
        let reader = self.reader(name)?;
        let mut buffer = vec![0; CHUNK.min(numbers.len() * size)];
        for (at, part) in numbers.chunks_mut(CHUNK / size).enumerate() {
            let bytes = &mut buffer[..part.len() * size];
            reader.read_at(first * size + at * CHUNK, bytes)?;
            f32_into(info.dtype, bytes, part);
        }
        check_finite_from(&self.subject(name), &info.shape, first, &numbers)?;
        Ok(numbers)
    }

    /// The numbers of some entries along the first axis of a stack `[E, out, in]` that lies as MXFP4 in
    /// `{name}_blocks` U8 `[E, out, in / 32, 16]` and `{name}_scales` U8 `[E, out, in / 32]`.
    ///
    /// Refuses other shapes and types, entries that the stack does not have, and what [`mxfp4::decode`] refuses.
    pub fn mxfp4_rows(
        &self,
        name: &str,
        expected_shape: &[usize; 3],
        rows: Range<usize>,
    ) -> Result<Vec<f32>, Error> {
        let &[count, out, width] = expected_shape;
        let blocks = width / mxfp4::BLOCK;
        let read = |name: &str, shape: &[usize]| -> Result<Vec<u8>, Error> {
            let info = self.info(name)?;
            if info.shape != shape || info.dtype != Dtype::U8 || rows.end > count {
                return Err(Error::refusal(
                    self.subject(name),
                    format!("U8 of shape {}, with entries {rows:?}", shape_text(shape)),
                    format!(
                        "{} of shape {}",
                        info.dtype.safetensors_name(),
                        shape_text(&info.shape)
                    ),
                    "check that config.json belongs to these weights",
                ));
            }
            let entry: usize = shape[1..].iter().product();
            let mut bytes = vec![0; rows.len() * entry];
            self.reader(name)?.read_at(rows.start * entry, &mut bytes)?;
            Ok(bytes)
        };
        let packed = read(
            &format!("{name}_blocks"),
            &[count, out, blocks, mxfp4::BLOCK_BYTES],
        )?;
        let scales = read(&format!("{name}_scales"), &[count, out, blocks])?;
        let mut numbers = vec![0.0; scales.len() * mxfp4::BLOCK];
        mxfp4::decode(&packed, &scales, &mut numbers)?;
        Ok(numbers)
    }

    /// SHA-256 of what [`Checkpoint::bytes`] returns, in hexadecimal.
    pub fn sha256(&self, name: &str) -> Result<String, Error> {
        let mut digest = Sha256::new();
        self.for_each_chunk(name, CHUNK, |chunk| {
            digest.update(chunk);
            Ok::<_, Error>(())
        })?;
        Ok(format!("{:x}", digest.finalize()))
    }

    /// The tokenizer, generation and licence files that lie beside the weights; none for GGUF.
    pub fn side_files(&self) -> Vec<PathBuf> {
        if matches!(self.weights, Weights::Gguf(_)) {
            return Vec::new();
        }
        SIDE_FILES
            .iter()
            .map(|name| self.path.join(name))
            .filter(|path| path.is_file())
            .collect()
    }

    /// Name and content of the files that belong beside the weights of a converted model: the
    /// source's own, or for GGUF `tokenizer.json`, `tokenizer_config.json` and
    /// `generation_config.json` made from the metadata.
    pub fn side_contents(&self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        match &self.weights {
            Weights::Gguf(gguf) => gguf.side_contents(&self.raw_config),
            Weights::Safetensors(_) => self
                .side_files()
                .iter()
                .map(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    Ok((name.into_owned(), read_small(path)?))
                })
                .collect(),
        }
    }

    /// The model's tokenizer; it refuses texts with tokens that the model has no embedding for.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let tokenizer = match &self.weights {
            Weights::Safetensors(_) => Tokenizer::from_folder(&self.path)?,
            Weights::Gguf(gguf) => gguf.tokenizer()?,
        };
        Ok(tokenizer.with_id_limit(self.config.vocab_size))
    }

    fn place(&self, name: &str) -> Result<usize, Error> {
        self.index.get(name).copied().ok_or_else(|| {
            Error::refusal(
                format!("{}: tensor {name}", self.path.display()),
                "a tensor of this name",
                "no such tensor",
                "check that config.json belongs to these weights",
            )
        })
    }

    /// A tensor as messages name it: the file that holds it and its name.
    fn subject(&self, name: &str) -> String {
        let file = match (&self.weights, self.index.get(name)) {
            (Weights::Safetensors(shards), Some(&at)) => shards.file(at),
            _ => &self.path,
        };
        format!("{}: tensor {name}", file.display())
    }

    fn wrong_dtype(&self, info: &TensorInfo) -> Error {
        Error::refusal(
            self.subject(&info.name),
            format!("dtype {}, {} or {}", Dtype::F32, Dtype::F16, Dtype::BF16),
            format!("dtype {}", info.dtype),
            "use a checkpoint with weights of one of these types",
        )
    }
}

/// The one `.gguf` file of a folder without safetensors.
fn only_gguf(folder: &Path) -> Result<Option<PathBuf>, Error> {
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).map_err(|source| Error::io(folder, source))? {
        let path = entry.map_err(|source| Error::io(folder, source))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => return Ok(None),
            Some("gguf") => found.push(path),
            _ => {}
        }
    }
    match found.as_slice() {
        [] => Ok(None),
        [file] => Ok(Some(file.clone())),
        files => Err(Error::refusal(
            folder.display().to_string(),
            "one .gguf file",
            format!("{} of them", files.len()),
            "give the path of the file you mean",
        )),
    }
}

/// A file that has to fit in memory: configuration, index, tokenizer.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, Error> {
    let length = fs::metadata(path)
        .map_err(|source| Error::io(path, source))?
        .len();
    if length > LARGEST_JSON {
        return Err(Error::refusal(
            path.display().to_string(),
            format!("at most {LARGEST_JSON} bytes"),
            format!("{length} bytes"),
            "get the file again",
        ));
    }
    fs::read(path).map_err(|source| Error::io(path, source))
}

pub(crate) fn read_json(path: &Path) -> Result<Value, Error> {
    serde_json::from_slice(&read_small(path)?).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

/// Generation ends at the tokens of `generation_config.json` too: chat models list there what
/// `config.json` leaves out.
fn add_generation_eos(file: &Path, config: &mut ModelConfig) -> Result<(), Error> {
    if !file.is_file() {
        return Ok(());
    }
    let generation = read_json(file)?;
    let Some(value) = generation
        .get("eos_token_id")
        .filter(|value| !value.is_null())
    else {
        return Ok(());
    };
    let ids = token_ids(value).ok_or_else(|| {
        Error::refusal(
            format!("{}: eos_token_id", file.display()),
            "a token id or a list of them",
            value.to_string(),
            "correct the value in the file",
        )
    })?;
    for id in ids {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    Ok(())
}
