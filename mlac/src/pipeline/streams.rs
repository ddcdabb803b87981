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
}

/// Bytes of a weight in a written graph.
fn stored_bytes(weight: &WeightRef) -> usize {
    weight.shape.iter().product::<usize>() * weight.dtype.size()
}

impl GraphRunner {
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
}

/// These outputs of a layer, in f32.
pub fn taps(taps: &[Tap]) -> LayerOptions {
    LayerOptions {
        taps: taps.to_vec(),
        dtype: DType::F32,
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

    /// Runs a layer graph on window `i`.
    pub fn run(&self, runner: &mut GraphRunner, i: usize) -> Result<Vec<Value>, Error> {
        let hidden = self.windows.get(i)?;
        runner.run(&[("hidden", &hidden), ("position_ids", &self.positions)])
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
        let graph = layer_graph(config, layer, &taps(&[Tap::HiddenOut]))?;
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
