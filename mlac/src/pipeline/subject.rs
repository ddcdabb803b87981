//! A model to look at, whatever form it has: a checkpoint, a GGUF file, an ONNX folder or an engine folder.

use std::path::{Path, PathBuf};

use mlac_converter::CachePlan;
use mlac_engines::Decode;
use mlac_engines::ort::{Decoder, SessionOptions, cached_numbers};
use mlac_engines::tensorrt::{EngineDecoder, is_engine_folder};
use mlac_model::tokenizer::Tokenizer;
use mlac_model::{Checkpoint, ModelConfig, Refusal};

use super::purpose::refuse_unless_for_cpu;
use super::streams::{GraphRunner, HiddenStates, numbers};
use crate::error::Error;

/// The graph file that makes a folder an ONNX folder.
const DECODER: &str = "decoder.onnx";

/// A model that can be run.
pub enum Subject {
    /// Run layer by layer, one layer's weights in memory.
    Checkpoint(Box<Checkpoint>),
    /// An ONNX folder or an engine folder, run with its cache: a prefill, then steps.
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What its config.json says.
        config: Box<ModelConfig>,
        /// What runs it.
        decoder: Box<dyn Decode>,
    },
}

impl Subject {
    /// Opens a checkpoint, a GGUF file, an ONNX folder, a folder that `mlac compile` wrote (its ONNX folder), or engines of enterprise
    /// TensorRT, which run on this machine's GPU.
    pub fn open(path: &Path, threads: usize) -> Result<Self, Error> {
        let Some(folder) = decoder_folder(path) else {
            return Ok(Self::Checkpoint(Box::new(Checkpoint::open(path)?)));
        };
        Ok(Self::Folder {
            decoder: open_decoder(&folder, threads)?,
            config: Box::new(read_config(&folder)?),
            folder,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Folder { config, .. } => config,
        }
    }

    /// Numbers cached of a sequence of `context` tokens: of a folder what its graph's inputs hold.
    pub fn cache_numbers(&self, context: usize) -> u64 {
        match self {
            Self::Checkpoint(checkpoint) => {
                CachePlan::of(checkpoint.config(), 1).mla_bytes(context)
            }
            Self::Folder { decoder, .. } => cached_numbers(&decoder.layouts(), context) as u64,
        }
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        match self {
            Self::Checkpoint(checkpoint) => Ok(checkpoint.tokenizer()?),
            Self::Folder { folder, .. } => Ok(Tokenizer::from_folder(folder)?),
        }
    }

    /// Calls `each` with the position and its logits `[vocab]` for every token of `ids`; a
    /// folder with a cache takes the last `steps` tokens one at a time.
    pub fn logits(
        &mut self,
        ids: &[u32],
        steps: usize,
        threads: usize,
        mut each: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self {
            Self::Checkpoint(checkpoint) => {
                let options = SessionOptions::default().with_threads(threads);
                let mut states =
                    HiddenStates::embed(checkpoint.config(), &**checkpoint, &[ids], &options)?;
                for layer in 0..checkpoint.config().num_hidden_layers {
                    states.advance(checkpoint.config(), &**checkpoint, layer, &options)?;
                }
                let mut head = Head::open(checkpoint, &options)?;
                head.run(&states, 0, each)
            }
            Self::Folder { decoder, .. } => {
                decoder.reset();
                let ids: Vec<i64> = ids.iter().map(|&t| i64::from(t)).collect();
                let prompt = ids.len() - steps.min(ids.len() - 1);
                let logits = decoder.prefill(&ids[..prompt])?;
                for position in 0..prompt {
                    each(position, &logits.row(0, position))?;
                }
                drop(logits);
                for (position, &id) in ids.iter().enumerate().skip(prompt) {
                    each(position, &decoder.step(id)?.last(0))?;
                }
                Ok(())
            }
        }
    }
}

/// The folder of graphs or engines that `path` is or has.
fn decoder_folder(path: &Path) -> Option<PathBuf> {
    [path.to_path_buf(), path.join("onnx")]
        .into_iter()
        .find(|folder| folder.join(DECODER).is_file() || is_engine_folder(folder))
}

/// What runs a folder of graphs (ONNX Runtime) or of engines (TensorRT, on this machine's GPU).
pub fn open_decoder(folder: &Path, threads: usize) -> Result<Box<dyn Decode>, Error> {
    if is_engine_folder(folder) {
        return Ok(Box::new(EngineDecoder::open(folder)?));
    }
    refuse_unless_for_cpu(folder)?;
    let options = SessionOptions::default().with_threads(threads);
    Ok(Box::new(Decoder::open(folder, &options)?))
}

/// The configuration in an ONNX folder or an engine folder.
fn read_config(folder: &Path) -> Result<ModelConfig, Error> {
    let path = folder.join("config.json");
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let name = path.display().to_string();
    let raw = serde_json::from_slice(&bytes).map_err(|e| Error::json(&name, e))?;
    Ok(ModelConfig::from_json(&raw, &name)?)
}

/// Tokens whose logits are computed at once: bounds memory for large vocabularies.
const HEAD_CHUNK: usize = 256;

/// Final norm and output embedding of a checkpoint.
pub struct Head {
    runner: GraphRunner,
    hidden_size: usize,
    vocab_size: usize,
}

impl Head {
    /// Opens the head's graph.
    pub fn open(checkpoint: &Checkpoint, options: &SessionOptions) -> Result<Self, Error> {
        let config = checkpoint.config();
        let graph = mlac_graph::builders::head_graph(config)?;
        Ok(Self {
            runner: GraphRunner::open("the output head", &graph, checkpoint, options)?,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
        })
    }

    /// Logits `[rows, vocab_size]` of hidden states `[rows, hidden_size]`.
    pub fn logits(&mut self, rows: &[f32]) -> Result<Vec<f32>, Error> {
        let mut logits = Vec::with_capacity(rows.len() / self.hidden_size * self.vocab_size);
        for rows in rows.chunks(HEAD_CHUNK * self.hidden_size) {
            let tokens = rows.len() / self.hidden_size;
            let input = super::streams::f32_value([1, tokens, self.hidden_size], rows.to_vec())?;
            let out = self.runner.run(&[("hidden", &input)])?;
            logits.extend_from_slice(numbers(&out[0])?);
        }
        Ok(logits)
    }

    /// Calls `each` with every position's logits of window `window`.
    pub fn run(
        &mut self,
        states: &HiddenStates,
        window: usize,
        mut each: impl FnMut(usize, &[f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let hidden = states.windows.get(window)?;
        let hidden = numbers(&hidden)?;
        for (chunk, rows) in hidden.chunks(HEAD_CHUNK * self.hidden_size).enumerate() {
            for (i, logits) in self.logits(rows)?.chunks(self.vocab_size).enumerate() {
                each(chunk * HEAD_CHUNK + i, logits)?;
            }
        }
        Ok(())
    }
}

/// Refuses an empty prompt.
pub fn refuse_empty(ids: &[u32], subject: &str) -> Result<(), Error> {
    if ids.is_empty() {
        return Err(Refusal::new(subject, "at least one token", "none", "give some text").into());
    }
    Ok(())
}
