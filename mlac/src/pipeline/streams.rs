//! Hidden states of a set of token windows, carried through a model one layer at a time.
//!
//! Only one layer's weights are in memory, or, where they are large, in mapped files. The states take
//! `windows * tokens * hidden_size * 4` bytes, in memory or, where they are large, in a file
//! ([`super::store`]).

use mlac_engines::ort::{HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::ValidGraph;
use mlac_graph::builders::{LayerOptions, Tap, embed_graph, layer_graph};
use mlac_graph::ir::DType;
use mlac_graph::ir::WeightRef;
use mlac_graph::onnx::{WeightSource, to_bytes, write_folder};
use mlac_model::{ModelConfig, Refusal};
use tempfile::TempDir;

use super::store::Store;
use crate::error::Error;

/// Bytes of weights from which on a graph goes through a file: loading from memory holds every
/// weight twice, and a protobuf message ends at 2 GiB.
const LARGE: usize = 256 << 20;

/// Tokens of a sequence that go through a layer at a time: enough for efficient products, few enough that
/// the scores stay in the processor's cache and most of those that are masked are never computed.
const PIECE: usize = 512;

/// A graph loaded for a few runs.
pub struct GraphRunner {
    session: OrtSession,
    /// Where its weights lie mapped.
    _folder: Option<TempDir>,
}

impl GraphRunner {
    /// Opens `graph` with its weights in ONNX Runtime.
    pub fn open(
        subject: &str,
        graph: &ValidGraph,
        weights: &dyn WeightSource,
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let large = graph.graph().weights().map(stored_bytes).sum::<usize>() > LARGE;
        if !large {
            let bytes = to_bytes(graph, weights)?;
            return Ok(Self {
                session: OrtSession::from_bytes(subject, &bytes, options)?,
                _folder: None,
            });
        }
        let folder = tempfile::tempdir()
            .map_err(|source| Error::io("a temporary folder of layer weights", source))?;
        let graphs = [("layer.onnx", graph)];
        write_folder(folder.path(), &graphs, "layer.data", weights, &mut |_| ())?;
        Ok(Self {
            session: OrtSession::open(&folder.path().join("layer.onnx"), options)?,
            _folder: Some(folder),
        })
    }

    /// Runs on those of the given inputs that the graph has; the outputs in the order they were asked
    /// for when the graph was built.
    pub fn run(&mut self, inputs: &[(&str, &Value)]) -> Result<Vec<Value>, Error> {
        let wanted: Vec<(&str, &Value)> = inputs
            .iter()
            .copied()
            .filter(|(name, _)| self.session.input(name).is_some())
            .collect();
        Ok(self.session.run(&wanted)?)
    }

    /// Runs and gives the output of that name.
    pub fn run_for(&mut self, name: &str, inputs: &[(&str, &Value)]) -> Result<Value, Error> {
        let at = self
            .session
            .outputs()
            .iter()
            .position(|port| port.name == name);
        let at = at.ok_or_else(|| {
            Refusal::new(
                self.session.subject(),
                format!("an output {name}"),
                "none of that name",
                "report this as a defect of mlac",
            )
        })?;
        Ok(self.run(inputs)?.swap_remove(at))
    }

    /// Runs a layer on the states `[1, tokens, D]` of a sequence, where it has a cache in pieces of
    /// `piece` tokens; the taps of the whole sequence.
    fn run_in_pieces(
        &mut self,
        hidden: &Value,
        positions: &Value,
        piece: usize,
    ) -> Result<Vec<Value>, Error> {
        let mut caches = self.empty_caches()?;
        let [_, tokens, width] = *hidden.shape() else {
            return Err(not_states(hidden));
        };
        if caches.is_empty() {
            return self.run(&[("hidden", hidden), ("position_ids", positions)]);
        }
        let taps = self.session.outputs().len() - caches.len();
        let mut whole: Vec<Vec<f32>> = vec![Vec::new(); taps];
        let mut widths = vec![0; taps];
        let states = numbers(hidden)?;
        for start in (0..tokens).step_by(piece) {
            let end = (start + piece).min(tokens);
            let part = states[start * width..end * width].to_vec();
            let part = f32_value([1, end - start, width], part)?;
            let at = HostTensor::i64([1, end - start], (start as i64..end as i64).collect());
            let at = Value::new(at)?;
            let mut inputs = vec![("hidden", &part), ("position_ids", &at)];
            inputs.extend(caches.iter().map(|(name, cache)| (name.as_str(), cache)));
            let mut out = self.run(&inputs)?;
            for ((_, cache), present) in caches.iter_mut().zip(out.split_off(taps)) {
                *cache = present;
            }
            for ((whole, width), part) in whole.iter_mut().zip(&mut widths).zip(out) {
                let part_width = part.shape().iter().skip(2).product();
                *width = part_width;
                whole.reserve_exact(tokens * part_width - whole.len());
                whole.extend_from_slice(numbers(&part)?);
            }
        }
        whole
            .into_iter()
            .zip(widths)
            .map(|(data, width)| f32_value([1, tokens, width], data))
            .collect()
    }

    /// The caches of a layer before the first token, by input name.
    fn empty_caches(&self) -> Result<Vec<(String, Value)>, Error> {
        self.session
            .inputs()
            .iter()
            .filter(|port| port.name.starts_with("past_"))
            .map(|port| {
                // Batch 1; the one other axis without a fixed size is that of the tokens.
                let mut shape: Vec<usize> =
                    port.dims.iter().map(|d| d.fixed().unwrap_or(0)).collect();
                shape[0] = 1;
                let empty = Value::new(HostTensor::f32(shape, Vec::new()))?;
                Ok((port.name.clone(), empty))
            })
            .collect()
    }
}

fn not_states(value: &Value) -> Error {
    Refusal::new(
        "states of a layer graph",
        "a tensor [1, tokens, hidden_size]",
        format!("{:?}", value.shape()),
        "report this as a defect of mlac",
    )
    .into()
}

/// Bytes of a weight in a written graph.
fn stored_bytes(weight: &WeightRef) -> usize {
    weight.shape.iter().product::<usize>() * weight.dtype.size()
}

/// These outputs of a layer of `config`, in f32. With attention the layer has a cache, so that windows go
/// through it in pieces; not with experts, which would be decoded anew for every piece.
pub fn taps(config: &ModelConfig, taps: &[Tap]) -> LayerOptions {
    let attends = |tap: &Tap| matches!(tap, Tap::HiddenOut | Tap::Heads | Tap::AttnOut);
    LayerOptions {
        taps: taps.to_vec(),
        dtype: DType::F32,
        cached: config.moe.is_none() && taps.iter().any(attends),
    }
}

/// The numbers of an f32 output.
pub fn numbers(value: &Value) -> Result<&[f32], Error> {
    value.as_f32().ok_or_else(|| {
        Refusal::new(
            "output of a layer graph",
            "f32",
            format!("{:?}", value.element()),
            "report this as a defect of mlac",
        )
        .into()
    })
}

/// Hidden states of every window, `[1, tokens, hidden_size]` each.
pub struct HiddenStates {
    /// One tensor per window.
    pub windows: Store,
    /// `position_ids` of a window, `[1, tokens]`.
    pub positions: Value,
    /// Tokens in a window.
    pub tokens: usize,
}

impl HiddenStates {
    /// The embeddings of `windows`, all of one length.
    pub fn embed(
        config: &ModelConfig,
        weights: &dyn WeightSource,
        windows: &[&[u32]],
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let tokens = windows.first().map_or(0, |w| w.len());
        let graph = embed_graph(config)?;
        let mut runner = GraphRunner::open("the embedding", &graph, weights, options)?;
        let mut states = Store::new(windows.len(), &[1, tokens, config.hidden_size])?;
        for window in windows {
            let ids: Vec<i64> = window.iter().map(|&t| i64::from(t)).collect();
            let ids = Value::new(HostTensor::i64([1, ids.len()], ids))?;
            let mut out = runner.run(&[("input_ids", &ids)])?;
            states.push(out.remove(0))?;
        }
        let positions = Value::new(HostTensor::i64([1, tokens], (0..tokens as i64).collect()))?;
        Ok(Self {
            windows: states,
            positions,
            tokens,
        })
    }

    /// The same states in a place of their own.
    pub fn copy(&self) -> Result<Self, Error> {
        Ok(Self {
            windows: self.windows.copy()?,
            positions: self.positions.clone(),
            tokens: self.tokens,
        })
    }

    /// Runs a layer graph on window `i`; the taps it was built with.
    pub fn run(&self, runner: &mut GraphRunner, i: usize) -> Result<Vec<Value>, Error> {
        let hidden = self.windows.get(i)?;
        runner.run_in_pieces(&hidden, &self.positions, PIECE)
    }

    /// Carries the states through layer `layer`.
    pub fn advance(
        &mut self,
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layer: usize,
        options: &SessionOptions,
    ) -> Result<(), Error> {
        Self::advance_all(&mut [self], config, weights, layer, options)
    }

    /// Carries several sets of states through layer `layer`, whose weights are loaded once.
    pub fn advance_all(
        all: &mut [&mut Self],
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layer: usize,
        options: &SessionOptions,
    ) -> Result<(), Error> {
        let graph = layer_graph(config, layer, &taps(config, &[Tap::HiddenOut]))?;
        let subject = format!("layer {layer}");
        let mut runner = GraphRunner::open(&subject, &graph, weights, options)?;
        for states in all {
            for i in 0..states.windows.count() {
                let mut out = states.run(&mut runner, i)?;
                states.windows.set(i, out.remove(0))?;
            }
        }
        Ok(())
    }

    /// `|self - reference|_F / |reference|_F`.
    pub fn relative_distance(&self, reference: &Self) -> Result<f64, Error> {
        let (mut difference, mut size) = (0.0_f64, 0.0_f64);
        for i in 0..self.windows.count() {
            let (a, b) = (self.windows.get(i)?, reference.windows.get(i)?);
            for (x, y) in numbers(&a)?.iter().zip(numbers(&b)?) {
                difference += f64::from(x - y).powi(2);
                size += f64::from(*y).powi(2);
            }
        }
        Ok((difference / size.max(f64::MIN_POSITIVE)).sqrt())
    }
}

/// An f32 input.
pub fn f32_value<const N: usize>(shape: [usize; N], numbers: Vec<f32>) -> Result<Value, Error> {
    Ok(Value::new(HostTensor::f32(shape, numbers))?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use mlac_model::Checkpoint;

    use super::*;

    /// Full attention, sliding windows and sinks, several pieces across the window's edge.
    #[test]
    fn pieces_give_what_the_whole_sequence_gives() {
        mlac_engines::ort::load().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        for (name, layers) in [
            ("llama_gqa", 1),
            ("mistral_window", 1),
            ("gpt_oss_dense", 2),
        ] {
            let checkpoint = Checkpoint::open(fixtures.join(name)).unwrap();
            let config = checkpoint.config();
            let (tokens, width) = (45, config.hidden_size);
            let hidden = (0..tokens * width)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
                .collect();
            let hidden = f32_value([1, tokens, width], hidden).unwrap();
            let positions = HostTensor::i64([1, tokens], (0..tokens as i64).collect());
            let positions = Value::new(positions).unwrap();
            for layer in 0..layers {
                let options = LayerOptions {
                    taps: vec![Tap::HiddenOut, Tap::Heads],
                    dtype: DType::F32,
                    cached: true,
                };
                let graph = layer_graph(config, layer, &options).unwrap();
                let mut runner =
                    GraphRunner::open(name, &graph, &checkpoint, &SessionOptions::default())
                        .unwrap();
                let mut run = |piece| {
                    let out = runner.run_in_pieces(&hidden, &positions, piece).unwrap();
                    out.iter()
                        .flat_map(|v| numbers(v).unwrap().to_vec())
                        .collect()
                };
                let (whole, pieces): (Vec<f32>, Vec<f32>) = (run(tokens), run(7));
                let scale = whole.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                for (i, (a, b)) in whole.iter().zip(&pieces).enumerate() {
                    let near = (a - b).abs() <= 1e-5 * scale;
                    assert!(
                        near,
                        "{name} layer {layer}, number {i}: {a} whole, {b} in pieces"
                    );
                }
            }
        }
    }
}
