//! A decoder with its cache in ONNX Runtime.

use std::path::{Path, PathBuf};

use mlac_model::Refusal;

use super::cache::{self, CacheLayout, CachePort};
use super::session::{Kept, OrtSession, SessionOptions};
use super::tensor::{Element, HostTensor, Value};
use crate::decode::{self, Decode, Logits};
use crate::error::Result;

/// The graph for one token at a time (absorbed, in MLA layers) and for everything when it is alone.
const DECODER: &str = "decoder.onnx";
/// The graph for many tokens at once (expanded heads), when the folder has one.
const PREFILL: &str = "prefill.onnx";

/// A model folder that `mlac export` wrote, ready to decode. The cache never leaves the runtime.
pub struct Decoder {
    decode: OrtSession,
    prefill: Option<OrtSession>,
    prefill_file: Option<PathBuf>,
    options: SessionOptions,
    caches: Vec<CachePort>,
    held: Vec<Value>,
    batch: usize,
    past: usize,
}

impl Decoder {
    /// Opens a folder with `decoder.onnx` and perhaps `prefill.onnx`, which is opened when a prompt
    /// first needs it.
    pub fn open(folder: &Path, options: &SessionOptions) -> Result<Self> {
        let prefill = folder.join(PREFILL);
        let mut decoder = Self::open_file(&folder.join(DECODER), options)?;
        decoder.prefill_file = prefill.is_file().then_some(prefill);
        Ok(decoder)
    }

    /// Opens one graph and uses it for prompts and steps alike.
    pub fn open_file(file: &Path, options: &SessionOptions) -> Result<Self> {
        let decode = OrtSession::open(file, options)?;
        let caches = cache::ports(&decode)?;
        check_logits(&decode)?;
        Ok(Self {
            decode,
            prefill: None,
            prefill_file: None,
            options: *options,
            caches,
            held: Vec::new(),
            batch: 0,
            past: 0,
        })
    }

    /// Closes the prompt graph, and gives its memory back, until the next prompt.
    pub fn close_prefill(&mut self) {
        self.prefill = None;
    }

    /// Runs the graph on new tokens over `held`, which it brings up to date.
    fn run(
        &mut self,
        ids: &[&[i64]],
        batch: usize,
        seq: usize,
        fresh: bool,
        held: &mut [Value],
    ) -> Result<Logits> {
        if seq > 1
            && self.prefill.is_none()
            && let Some(file) = &self.prefill_file
        {
            let session = OrtSession::open(file, &self.options)?;
            check_logits(&session)?;
            self.prefill = Some(session);
        }
        // A prompt graph without cache inputs can only start a sequence.
        let can_prefill =
            |session: &OrtSession| fresh || session.input(&self.caches[0].input).is_some();
        let session = match &mut self.prefill {
            Some(session) if seq > 1 && can_prefill(session) => session,
            _ => &mut self.decode,
        };

        let total = self.past + seq;
        let flat: Vec<i64> = ids.concat();
        let positions: Vec<i64> = (0..batch)
            .flat_map(|_| self.past as i64..total as i64)
            .collect();
        let fixed = [
            (
                "input_ids",
                Value::new(HostTensor::i64([batch, seq], flat))?,
            ),
            (
                "position_ids",
                Value::new(HostTensor::i64([batch, seq], positions))?,
            ),
            (
                "attention_mask",
                Value::new(HostTensor::i64([batch, total], vec![1; batch * total]))?,
            ),
        ];
        for (port, value) in self.caches.iter().zip(held.iter_mut()) {
            port.make_room(value, total)?;
        }
        let mut inputs: Vec<(&str, &Value)> =
            fixed.iter().map(|(name, value)| (*name, value)).collect();
        let mut kept = Vec::new();
        let mut replaced = Vec::new();
        for (port, value) in self.caches.iter().zip(held.iter_mut()) {
            if port.in_place {
                kept.push(Kept {
                    input: &port.input,
                    output: &port.output,
                    value,
                });
            } else {
                inputs.push((&port.input, &*value));
                replaced.push(port);
            }
        }
        inputs.retain(|(name, _)| session.input(name).is_some());
        let results = if kept.is_empty() {
            session.run(&inputs)?
        } else {
            session.run_in_place(&inputs, &mut kept)?
        };
        drop(inputs);

        let is_kept = |name: &str| kept.iter().any(|kept| kept.output == name);
        let names: Vec<&str> = session
            .outputs()
            .iter()
            .map(|port| port.name.as_str())
            .filter(|name| !is_kept(name))
            .collect();
        let take = |name: &str| -> Result<Value> {
            names
                .iter()
                .position(|candidate| *candidate == name)
                .map(|index| results[index].clone())
                .ok_or_else(|| {
                    Refusal::new(
                        format!("{}: outputs", session.subject()),
                        name,
                        names.join(", "),
                        "export the model with `mlac export`",
                    )
                    .into()
                })
        };
        let next: Vec<Value> = replaced
            .iter()
            .map(|port| take(&port.output))
            .collect::<Result<_>>()?;
        for (port, value) in replaced.iter().zip(&next) {
            if port.tokens(value) != port.held(total) || value.shape().first() != Some(&batch) {
                return Err(Refusal::new(
                    format!("{}: output {}", session.subject(), port.output),
                    format!("{batch} sequences of {} tokens", port.held(total)),
                    format!("shape {:?}", value.shape()),
                    "export the model with `mlac export`",
                )
                .into());
            }
        }
        let value = take("logits")?;
        drop(kept);
        let places = self
            .caches
            .iter()
            .zip(held)
            .filter(|(port, _)| !port.in_place);
        for ((_, place), value) in places.zip(next) {
            *place = value;
        }
        Ok(Logits::of_runtime(value))
    }
}

impl Decode for Decoder {
    fn layouts(&self) -> Vec<CacheLayout> {
        let inputs = self.decode.inputs().iter();
        cache::cache_layouts(inputs.map(|port| (port.name.as_str(), port.dims.as_slice())))
    }

    fn past(&self) -> usize {
        self.past
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn reset(&mut self) {
        self.held.clear();
        self.batch = 0;
        self.past = 0;
    }

    fn fill_with_zeros(&mut self, batch: usize, tokens: usize) -> Result<()> {
        self.held = self
            .caches
            .iter()
            .map(|port| port.zeros(batch, tokens))
            .collect::<Result<_>>()?;
        self.batch = batch;
        self.past = tokens;
        Ok(())
    }

    fn cache_bytes(&self) -> usize {
        let caches = self.caches.iter().zip(&self.held);
        caches
            .map(|(port, value)| port.bytes(value, self.past))
            .sum()
    }

    fn append(&mut self, ids: &[&[i64]]) -> Result<Logits> {
        let (batch, seq) = decode::check_ids(ids, self.batch)?;
        let fresh = self.held.is_empty();
        let mut held: Vec<Value> = if fresh {
            self.caches
                .iter()
                .map(|port| port.empty(batch))
                .collect::<Result<_>>()?
        } else {
            std::mem::take(&mut self.held)
        };
        let result = self.run(ids, batch, seq, fresh, &mut held);
        // Without a result the tokens before are still there, in tensors that nobody replaced.
        if result.is_ok() || !fresh {
            self.held = held;
        }
        if result.is_ok() {
            self.batch = batch;
            self.past += seq;
        } else if self.caches.iter().any(|p| p.overwrites(self.past + seq)) {
            self.reset();
        }
        result
    }
}

/// `logits` must be `[batch, seq, vocab]` of floats.
fn check_logits(session: &OrtSession) -> Result<()> {
    let port = session.outputs().iter().find(|port| port.name == "logits");
    if port.is_some_and(|port| port.dims.len() == 3 && port.element != Element::I64) {
        return Ok(());
    }
    Err(Refusal::new(
        format!("{}: output logits", session.subject()),
        "f32 or f16 [batch, seq, vocab]",
        port.map_or_else(
            || "no such output".into(),
            |port| format!("{:?} {:?}", port.element, port.dims),
        ),
        "export the model with `mlac export`",
    )
    .into())
}
