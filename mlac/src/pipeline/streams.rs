//! Hidden states of a set of token windows, carried through a model one layer at a time.
//!
//! Only one layer's weights are in memory. The states take `windows * tokens * hidden_size * 4` bytes.

use mlac_engines::ort::{HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::ValidGraph;
use mlac_graph::builders::{LayerOptions, Tap, embed_graph, layer_graph};
use mlac_graph::ir::DType;
use mlac_graph::onnx::{WeightSource, to_bytes};
use mlac_model::{ModelConfig, Refusal};

use crate::error::Error;

/// A graph loaded from memory for a few runs.
pub struct GraphRunner {
    session: OrtSession,
}

impl GraphRunner {
    /// Writes `graph` with its weights into memory and opens it in ONNX Runtime.
    pub fn open(
        subject: &str,
        graph: &ValidGraph,
        weights: &dyn WeightSource,
        options: &SessionOptions,
    ) -> Result<Self, Error> {
        let bytes = to_bytes(graph, weights)?;
        let session = OrtSession::from_bytes(subject, &bytes, options)?;
        Ok(Self { session })
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

/// Hidden states of every window, `[1, tokens, hidden_size]` each, in the runtime's memory.
#[derive(Clone)]
pub struct HiddenStates {
    /// One tensor per window.
    pub windows: Vec<Value>,
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
        let mut states = Vec::with_capacity(windows.len());
        for window in windows {
            let ids: Vec<i64> = window.iter().map(|&t| i64::from(t)).collect();
            let ids = Value::new(HostTensor::i64([1, ids.len()], ids))?;
            let mut out = runner.run(&[("input_ids", &ids)])?;
            states.push(out.remove(0));
        }
        let positions = Value::new(HostTensor::i64([1, tokens], (0..tokens as i64).collect()))?;
        Ok(Self {
            windows: states,
            positions,
            tokens,
        })
    }

    /// Window `i` as the inputs of a layer graph.
    pub fn inputs(&self, i: usize) -> [(&'static str, &Value); 2] {
        [
            ("hidden", &self.windows[i]),
            ("position_ids", &self.positions),
        ]
    }

    /// Carries the states through layer `layer`.
    pub fn advance(
        &mut self,
        config: &ModelConfig,
        weights: &dyn WeightSource,
        layer: usize,
        options: &SessionOptions,
    ) -> Result<(), Error> {
        let graph = layer_graph(config, layer, &taps(&[Tap::HiddenOut]))?;
        let subject = format!("layer {layer}");
        let mut runner = GraphRunner::open(&subject, &graph, weights, options)?;
        for i in 0..self.windows.len() {
            let mut out = runner.run(&self.inputs(i))?;
            self.windows[i] = out.remove(0);
        }
        Ok(())
    }

    /// `|self - reference|_F / |reference|_F`.
    pub fn relative_distance(&self, reference: &Self) -> Result<f64, Error> {
        let (mut difference, mut size) = (0.0_f64, 0.0_f64);
        for (a, b) in self.windows.iter().zip(&reference.windows) {
            for (x, y) in numbers(a)?.iter().zip(numbers(b)?) {
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
