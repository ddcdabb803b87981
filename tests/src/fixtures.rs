//! The committed fixtures: what other programs computed (see `tests/oracle`).

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use crate::{Outcome, text};

/// Tokens of the one prefill; the rest of a fixture's text is decoded token by token.
pub const PREFILL: usize = 24;
/// Tokens decoded one by one.
pub const STEPS: usize = 32;
/// The text of a fixture as one prefill, then token by token.
pub const STEPWISE: [usize; 1 + STEPS] = {
    let mut pieces = [1; 1 + STEPS];
    pieces[0] = PREFILL;
    pieces
};
/// The same text in pieces of other sizes, some of several tokens on top of a cache.
pub const PIECES: [usize; 6] = [17, 7, 1, 5, 1, 25];
/// How many tiny models are committed.
pub const MODELS: usize = 22;

/// `tests/fixtures`.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// A tiny model and transformers' logits for it.
#[derive(Debug)]
pub struct Fixture {
    /// Folder name.
    pub name: String,
    /// `config.json` and safetensors files, with `io.safetensors` beside them.
    pub folder: PathBuf,
    /// Texts of equal length and what the model answers.
    pub io: Io,
}

/// Texts and expected logits, row-major.
#[derive(Debug)]
pub struct Io {
    /// Texts side by side.
    pub batch: usize,
    /// Tokens of each, padding included.
    pub seq: usize,
    /// Logits per token.
    pub vocab: usize,
    /// `[batch, seq]`.
    pub input_ids: Vec<i64>,
    /// `[batch, seq]`, 0 where a text is padded (on the left).
    pub attention_mask: Vec<i64>,
    /// `[batch, seq]`, from 0 at each text's first real token.
    pub position_ids: Vec<i64>,
    /// `[batch, seq, vocab]`; zero where a text is padded.
    pub logits: Vec<f32>,
}

impl Io {
    /// Whether any text is padded.
    pub fn padded(&self) -> bool {
        self.attention_mask.contains(&0)
    }

    /// `[batch, seq, vocab]`.
    pub fn shape(&self) -> [usize; 3] {
        [self.batch, self.seq, self.vocab]
    }

    /// Columns `range` of an integer tensor `[batch, seq]`.
    pub fn columns(&self, tensor: &[i64], range: std::ops::Range<usize>) -> Vec<i64> {
        tensor
            .chunks(self.seq)
            .flat_map(|row| row[range.clone()].iter().copied())
            .collect()
    }

    /// The numbers of a `[batch, seq, vocab]` tensor at real tokens.
    pub fn real<T: Copy + Into<f64>>(&self, logits: &[T]) -> Vec<f64> {
        logits
            .chunks(self.vocab)
            .zip(&self.attention_mask)
            .filter(|(_, mask)| **mask != 0)
            .flat_map(|(row, _)| row.iter().map(|&number| number.into()))
            .collect()
    }
}

/// Every tiny model, by name.
pub fn models() -> Outcome<Vec<Fixture>> {
    let root = folder();
    let mut found = Vec::new();
    for entry in fs::read_dir(&root).map_err(|error| format!("{}: {error}", root.display()))? {
        let folder = entry.map_err(text)?.path();
        if folder.join("config.json").is_file() {
            found.push(model_at(&folder)?);
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// One tiny model.
pub fn model(name: &str) -> Outcome<Fixture> {
    model_at(&folder().join(name))
}

fn model_at(folder: &Path) -> Outcome<Fixture> {
    let name = folder
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(Fixture {
        name,
        folder: folder.to_path_buf(),
        io: io(&folder.join("io.safetensors"))?,
    })
}

fn io(file: &Path) -> Outcome<Io> {
    let tensors = Tensors::read(file)?;
    let [batch, seq, vocab] = tensors.shape("logits")?[..] else {
        return Err(format!("{}: logits are not three axes", file.display()));
    };
    Ok(Io {
        batch,
        seq,
        vocab,
        input_ids: tensors.i64("input_ids")?,
        attention_mask: tensors.i64("attention_mask")?,
        position_ids: tensors.i64("position_ids")?,
        logits: tensors.f32("logits")?,
    })
}

/// What a reader of SmolLM2-135M-Instruct must reproduce.
#[derive(Debug)]
pub struct SmolLm2 {
    /// The text's tokens.
    pub input_ids: Vec<i64>,
    /// For each token, the id of the largest logit.
    pub top1: Vec<i64>,
    /// For each token, over the whole vocabulary.
    pub logsumexp: Vec<f32>,
    /// Ids whose logits are recorded.
    pub probe_ids: Vec<i64>,
    /// `[tokens, probe_ids]`.
    pub probe_logits: Vec<f32>,
}

/// Transformers' answers for `SmolLM2`'s GGUF file.
pub fn smollm2() -> Outcome<SmolLm2> {
    let tensors = Tensors::read(&folder().join("smollm2").join("oracle.safetensors"))?;
    Ok(SmolLm2 {
        input_ids: tensors.i64("input_ids")?,
        top1: tensors.i64("top1")?,
        logsumexp: tensors.f32("logsumexp")?,
        probe_ids: tensors.i64("probe_ids")?,
        probe_logits: tensors.f32("probe_logits")?,
    })
}

/// A JSON fixture.
pub fn json(path: &str) -> Outcome<serde_json::Value> {
    let file = folder().join(path);
    let bytes = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: {error}", file.display()))
}

/// A safetensors file in memory, read by the safetensors crate rather than by mlac.
struct Tensors {
    file: PathBuf,
    bytes: Vec<u8>,
}

impl Tensors {
    fn read(file: &Path) -> Outcome<Self> {
        let bytes = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(Self {
            file: file.to_path_buf(),
            bytes,
        })
    }

    fn get<T>(&self, name: &str, dtype: Dtype, each: impl Fn(&[u8]) -> T) -> Outcome<Vec<T>> {
        let wrong = |why: String| format!("{}: {name}: {why}", self.file.display());
        let all = SafeTensors::deserialize(&self.bytes).map_err(|error| wrong(text(error)))?;
        let tensor = all.tensor(name).map_err(|error| wrong(text(error)))?;
        if tensor.dtype() != dtype {
            return Err(wrong(format!("expected {dtype}, found {}", tensor.dtype())));
        }
        Ok(tensor
            .data()
            .chunks(dtype.bitsize() / 8)
            .map(each)
            .collect())
    }

    fn shape(&self, name: &str) -> Outcome<Vec<usize>> {
        let all = SafeTensors::deserialize(&self.bytes).map_err(text)?;
        Ok(all.tensor(name).map_err(text)?.shape().to_vec())
    }

    fn i64(&self, name: &str) -> Outcome<Vec<i64>> {
        self.get(name, Dtype::I64, |bytes| {
            bytes
                .iter()
                .rev()
                .fold(0_i64, |number, byte| (number << 8) | i64::from(*byte))
        })
    }

    fn f32(&self, name: &str) -> Outcome<Vec<f32>> {
        self.get(name, Dtype::F32, |bytes| {
            f32::from_bits(
                bytes
                    .iter()
                    .rev()
                    .fold(0_u32, |number, byte| (number << 8) | u32::from(*byte)),
            )
        })
    }
}
