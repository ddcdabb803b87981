//! Engines as a decoder: pieces of a prompt and single tokens over caches in the GPU's memory.

use std::path::Path;
use std::rc::Rc;

use mlac_kernels::launch::{Buffer, Device, Stream};
use mlac_model::Refusal;

use super::engine::{Context, Engine};
use super::folder;
use super::memory::{Cache, Float};
use crate::decode::{Decode, Logits, check_ids};
use crate::error::Result;
use crate::ort::{CacheLayout, cache_layer, cache_parts};
use crate::tensorrt::builder::InputShapes;

/// One profile of one engine, ready to run.
struct Runner {
    context: Context,
    batch: usize,
    /// Fewest and most new tokens.
    seq: (usize, usize),
    /// Most tokens that may be cached before the run.
    past: usize,
    inputs: Vec<String>,
}

/// An engine folder that `mlac build --backend tensorrt` wrote, ready to decode on the GPU.
pub struct EngineDecoder {
    runners: Vec<Runner>,
    caches: Vec<Cache>,
    layouts: Vec<CacheLayout>,
    fixed: Fixed,
    float: Float,
    vocab: usize,
    batch: usize,
    past: usize,
    stream: Stream,
    _device: Device,
}

/// Memory of what is not cached, for the largest run.
struct Fixed {
    ids: Buffer,
    positions: Buffer,
    mask: Buffer,
    lengths: Buffer,
    logits: Buffer,
}

impl EngineDecoder {
    /// Opens the folder on this machine's first GPU.
    ///
    /// # Errors
    /// What contradicts the manifest, the GPU, TensorRT's version or the form of `mlac export`; what the driver and TensorRT refuse.
    pub fn open(folder: &Path) -> Result<Self> {
        let opened = folder::open(folder)?;
        let device = opened.device;
        let stream = device.stream()?;
        let mut runners = Vec::new();
        for (record, engine) in &opened.engines {
            for (number, profile) in record.profiles.iter().enumerate() {
                let inputs = &profile.inputs;
                let layouts = &opened.manifest.cache;
                runners.push(Runner::open(engine, number, inputs, layouts, &stream)?);
            }
        }
        let layouts = opened.manifest.cache;
        let (record, engine) = opened
            .engines
            .iter()
            .find(|(record, _)| record.profiles.iter().any(|p| p.name == "decode"))
            .ok_or_else(|| {
                Refusal::new(
                    folder.display().to_string(),
                    "an engine with a profile \"decode\"",
                    "none",
                    "build the engines with `mlac build`",
                )
            })?;
        let context = runners.iter().map(|r| r.past + r.seq.1).max().unwrap_or(0);
        let mut caches = Vec::new();
        let decode = record.profiles.iter().filter(|p| p.name == "decode");
        for shapes in decode.flat_map(|profile| &profile.inputs) {
            let window = window(&layouts, &shapes.name);
            caches.extend(Cache::of(engine, shapes, window, context, &device)?);
        }
        let largest = |size: fn(&Runner) -> usize| runners.iter().map(size).max().unwrap_or(0);
        let (batch, tokens) = (largest(|r| r.batch), largest(|r| r.batch * r.seq.1));
        let float = Float::of(engine, "logits")?;
        let vocab = vocabulary(engine)?;
        let i64s = |count: usize| device.buffer((count * size_of::<i64>()) as u64);
        let fixed = Fixed {
            ids: i64s(tokens)?,
            positions: i64s(tokens)?,
            mask: i64s(batch * context)?,
            lengths: device.buffer((batch * size_of::<i32>()) as u64)?,
            logits: device.buffer((tokens * vocab * float.bytes()) as u64)?,
        };
        let decoder = Self {
            runners,
            caches,
            layouts,
            fixed,
            float,
            vocab,
            batch: 0,
            past: 0,
            stream,
            _device: device,
        };
        decoder.check_ports()?;
        decoder.stream.wait()?;
        Ok(decoder)
    }

    /// Every tensor of every engine must be one that a run binds, of the type that it writes.
    fn check_ports(&self) -> Result<()> {
        for runner in &self.runners {
            let engine = runner.context.engine();
            for port in engine.ports() {
                let known = match (port.output, port.name.as_str()) {
                    (false, "input_ids" | "position_ids" | "attention_mask") => {
                        port.element == "i64"
                    }
                    (false, "past_lengths") => port.element == "i32",
                    (true, "logits") => port.dims.len() == 3,
                    (false, name) => self.caches.iter().any(|cache| cache.input == name),
                    (true, name) => self.caches.iter().any(|cache| cache.output == name),
                };
                if !known {
                    return Err(Refusal::new(
                        engine.subject(),
                        "tensors of an exported decoder",
                        format!("{} {} {:?}", port.element, port.name, port.dims),
                        "build the engine from a folder of `mlac export`",
                    )
                    .into());
                }
            }
        }
        Ok(())
    }

    /// The runner that takes most of `left` tokens, and how many.
    fn choose(&self, batch: usize, left: usize) -> Result<(usize, usize)> {
        let usable = self.runners.iter().enumerate().filter_map(|(i, runner)| {
            let tokens = left.min(runner.seq.1);
            let fits = tokens >= runner.seq.0 && batch <= runner.batch && self.past <= runner.past;
            fits.then_some((i, tokens))
        });
        usable.max_by_key(|(_, tokens)| *tokens).ok_or_else(|| {
            let limits: Vec<String> = self.runners.iter().map(Runner::limits).collect();
            Refusal::new(
                "tokens for the engine",
                limits.join(", or "),
                format!("{batch} sequences of {} tokens and {left} more", self.past),
                "shorten the text, or build with a larger --max-context or --max-batch",
            )
            .into()
        })
    }

    /// Runs one piece and brings the caches up to date.
    fn piece(&mut self, ids: &[&[i64]], runner: usize) -> Result<Vec<f32>> {
        let (batch, seq, past) = (ids.len(), ids[0].len(), self.past);
        let (runner, total) = (&self.runners[runner], past + seq);
        let positions = (0..batch).flat_map(|_| past as i64..total as i64);
        let lengths = i32::try_from(past).map_err(|_| {
            Refusal::new(
                "tokens for the engine",
                "lengths of 31 bits",
                past.to_string(),
                "begin a new sequence",
            )
        })?;
        let fixed = &self.fixed;
        fixed.ids.write(&ids.concat())?;
        fixed.positions.write(&positions.collect::<Vec<i64>>())?;
        fixed.lengths.write(&vec![lengths; batch])?;
        let context = &runner.context;
        for name in &runner.inputs {
            let (shape, buffer) = match name.as_str() {
                "input_ids" => (vec![batch, seq], &fixed.ids),
                "position_ids" => (vec![batch, seq], &fixed.positions),
                "past_lengths" => (vec![batch], &fixed.lengths),
                "attention_mask" => {
                    fixed.mask.write(&vec![1_i64; batch * total])?;
                    (vec![batch, total], &fixed.mask)
                }
                _ => continue,
            };
            context.set_shape(name, &shape)?;
            context.set_address(name, buffer.region().address())?;
        }
        for cache in &self.caches {
            let (from, to) = cache.addresses();
            if runner.inputs.contains(&cache.input) {
                context.set_shape(&cache.input, &cache.input_shape(batch, past))?;
                context.set_address(&cache.input, from)?;
            }
            context.set_address(&cache.output, to)?;
        }
        context.set_address("logits", fixed.logits.region().address())?;
        let expect = |tensor: &str, expected: &[usize]| -> Result<()> {
            let found = context.shape(tensor)?;
            if found == expected {
                return Ok(());
            }
            Err(Refusal::new(
                format!("{}: output {tensor}", context.engine().subject()),
                format!("shape {expected:?}"),
                format!("{found:?}"),
                "build the engine from a folder of `mlac export`",
            )
            .into())
        };
        for cache in &self.caches {
            expect(&cache.output, &cache.output_shape(batch, total))?;
        }
        expect("logits", &[batch, seq, self.vocab])?;
        context.run(&self.stream)?;
        self.stream.wait()?;
        let logits = self.float.read(&fixed.logits, batch * seq * self.vocab)?;
        self.caches.iter_mut().for_each(Cache::turn);
        Ok(logits)
    }

    fn pieces(&mut self, ids: &[&[i64]]) -> Result<Logits> {
        let (batch, seq, vocab) = (ids.len(), ids[0].len(), self.vocab);
        let mut all = vec![0.0; batch * seq * vocab];
        let mut done = 0;
        while done < seq {
            let (runner, tokens) = self.choose(batch, seq - done)?;
            let part: Vec<&[i64]> = ids.iter().map(|row| &row[done..done + tokens]).collect();
            let logits = self.piece(&part, runner)?;
            for (b, rows) in logits.chunks(tokens * vocab).enumerate() {
                let at = (b * seq + done) * vocab;
                all[at..at + rows.len()].copy_from_slice(rows);
            }
            self.batch = batch;
            self.past += tokens;
            done += tokens;
        }
        Ok(Logits::of_host([batch, seq, vocab], all))
    }
}

impl Decode for EngineDecoder {
    fn layouts(&self) -> Vec<CacheLayout> {
        self.layouts.clone()
    }

    fn past(&self) -> usize {
        self.past
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn reset(&mut self) {
        self.batch = 0;
        self.past = 0;
    }

    fn fill_with_zeros(&mut self, batch: usize, tokens: usize) -> Result<()> {
        self.reset();
        let fits = |r: &Runner| batch <= r.batch && tokens <= r.past;
        if batch == 0 || !self.runners.iter().any(fits) {
            let limits: Vec<String> = self.runners.iter().map(Runner::limits).collect();
            return Err(Refusal::new(
                "cached tokens",
                limits.join(", or "),
                format!("{batch} sequences of {tokens} tokens"),
                "choose a shorter context, or build with a larger --max-context",
            )
            .into());
        }
        for cache in &self.caches {
            cache.clear(&self.stream)?;
        }
        self.stream.wait()?;
        (self.batch, self.past) = (batch, tokens);
        Ok(())
    }

    fn cache_bytes(&self) -> usize {
        let caches = self.caches.iter();
        caches.map(|c| c.bytes(self.batch, self.past)).sum()
    }

    fn append(&mut self, ids: &[&[i64]]) -> Result<Logits> {
        check_ids(ids, self.batch)?;
        let before = (self.batch, self.past);
        let result = self.pieces(ids);
        if result.is_err() && (self.batch, self.past) != before {
            self.reset();
        }
        result
    }
}

impl Runner {
    fn open(
        engine: &Rc<Engine>,
        profile: usize,
        inputs: &[InputShapes],
        layouts: &[CacheLayout],
        stream: &Stream,
    ) -> Result<Self> {
        let ids = inputs.iter().find(|shapes| shapes.name == "input_ids");
        let Some(([batch, most], [_, fewest])) =
            ids.and_then(|ids| Some((sizes(&ids.max)?, sizes(&ids.min)?)))
        else {
            return Err(Refusal::new(
                engine.subject(),
                "an input input_ids [batch, seq]",
                "none",
                "build the engine from a folder of `mlac export`",
            )
            .into());
        };
        Ok(Self {
            past: most_past(inputs, layouts, most),
            context: Context::open(engine, profile, stream)?,
            batch,
            seq: (fewest, most),
            inputs: inputs.iter().map(|shapes| shapes.name.clone()).collect(),
        })
    }

    fn limits(&self) -> String {
        format!(
            "at most {} sequences of at most {} tokens and {} to {} more",
            self.batch, self.past, self.seq.0, self.seq.1
        )
    }
}

/// Most tokens that may be cached before a run of up to `seq` tokens. Rows of a cache that grows are those before the run, except
/// where a window bounds them; capacities and masks count the new tokens too.
fn most_past(inputs: &[InputShapes], layouts: &[CacheLayout], seq: usize) -> usize {
    let bound = |shapes: &InputShapes| -> Option<usize> {
        if shapes.name == "attention_mask" {
            return Some(shapes.max.get(1)?.saturating_sub(seq));
        }
        let (axis, _) = cache_parts(&shapes.name)?;
        let rows = *shapes.max.get(axis)?;
        if shapes.min[axis] > 0 {
            return Some(rows.saturating_sub(seq));
        }
        let window = window(layouts, &shapes.name);
        window.is_none_or(|window| rows < window).then_some(rows)
    };
    inputs.iter().filter_map(bound).min().unwrap_or(0)
}

/// The window of the layer of a cache input.
fn window(layouts: &[CacheLayout], input: &str) -> Option<usize> {
    let layer = cache_layer(input)?;
    layouts.iter().find(|layout| layout.layer == layer)?.window
}

fn sizes(shape: &[usize]) -> Option<[usize; 2]> {
    shape.try_into().ok()
}

/// The last axis of the logits.
fn vocabulary(engine: &Engine) -> Result<usize> {
    let logits = engine.ports().iter().find(|port| port.name == "logits");
    let dims = logits.map_or(&[][..], |port| &port.dims);
    if let [_, _, vocab] = dims
        && let Ok(vocab @ 1..) = usize::try_from(*vocab)
    {
        return Ok(vocab);
    }
    Err(Refusal::new(
        format!("{}: output logits", engine.subject()),
        "[batch, seq, vocab] with a fixed vocab",
        format!("{dims:?}"),
        "build the engine from a folder of `mlac export`",
    )
    .into())
}
