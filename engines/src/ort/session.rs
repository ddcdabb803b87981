//! One ONNX file, ready to run.

use std::path::Path;

use mlac_model::Refusal;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{Session, SessionInputValue, SessionOutputs};
use ort::value::{Outlet, ValueType};
use serde::Serialize;

use super::library::{OrtLibrary, load};
use super::operators;
use super::tensor::{Element, Value};
use crate::error::{EngineError, Result};

/// How much ONNX Runtime rewrites a graph when a session opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Optimization {
    /// Nothing: the fastest to open, for graphs that run once.
    None,
    /// Constant folding and redundant nodes.
    Basic,
    /// Everything the CPU provider has.
    #[default]
    All,
}

/// How a session is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads inside an operator; 0 means one per core.
    pub threads: usize,
    /// Graph rewriting at open.
    pub optimization: Optimization,
    /// Repack weights for faster products: costs a second copy of them and time at open.
    pub prepack: bool,
    /// Keep freed tensors for reuse. Off returns memory at once, which bounds it when lengths vary.
    pub arena: bool,
    /// Let idle threads spin while an operator runs elsewhere: quicker, but takes whole cores.
    pub spin: bool,
}

impl Default for SessionOptions {
    /// For a model that runs many times.
    fn default() -> Self {
        Self {
            threads: 0,
            optimization: Optimization::All,
            prepack: true,
            arena: true,
            spin: true,
        }
    }
}

impl SessionOptions {
    /// For a graph that is opened, run a few times and dropped: no second copy of the weights, no
    /// memory kept.
    pub fn once() -> Self {
        Self {
            optimization: Optimization::Basic,
            prepack: false,
            arena: false,
            spin: false,
            ..Self::default()
        }
    }

    /// The same with this many threads; 0 means one per core.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }
}

/// What the name of an axis begins with that holds the cached tokens of a sliding window; the
/// window follows.
const WINDOW_AXIS: &str = "past_w";
/// The same of a cache that is kept in place, a ring.
const RING_AXIS: &str = "capacity_w";
/// What the name of the axis begins with that holds the rows of a cache that is kept in place.
const CAPACITY_AXIS: &str = "capacity";

/// Size of one axis of an input or output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dim {
    /// Always this size.
    Fixed(usize),
    /// Chosen at run time; the name may be empty.
    Dynamic(String),
}

impl Dim {
    /// The size, when it is fixed.
    pub fn fixed(&self) -> Option<usize> {
        match self {
            Self::Fixed(size) => Some(*size),
            Self::Dynamic(_) => None,
        }
    }

    /// The window, when the axis holds the cached tokens of a sliding window.
    pub fn window(&self) -> Option<usize> {
        match self {
            Self::Fixed(_) => None,
            Self::Dynamic(name) => name
                .strip_prefix(WINDOW_AXIS)
                .or_else(|| name.strip_prefix(RING_AXIS))?
                .parse()
                .ok(),
        }
    }

    /// Whether the axis holds the rows of a cache that is kept in place.
    pub fn is_capacity(&self) -> bool {
        matches!(self, Self::Dynamic(name) if name.starts_with(CAPACITY_AXIS))
    }
}

/// An input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name in the graph.
    pub name: String,
    /// Its element type.
    pub element: Element,
    /// Its axes, outermost first.
    pub dims: Vec<Dim>,
}

/// A tensor that is an input and an output of a model at once.
pub struct Kept<'a> {
    /// The input.
    pub input: &'a str,
    /// The output.
    pub output: &'a str,
    /// Made by [`Value::room`], and held by nobody else.
    pub value: &'a mut Value,
}

/// A model that ONNX Runtime has loaded.
pub struct OrtSession {
    session: Session,
    subject: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    // Dropped after the session.
    _library: OrtLibrary,
}

impl OrtSession {
    /// Opens an ONNX file; external data is read from beside it.
    pub fn open(path: &Path, options: &SessionOptions) -> Result<Self> {
        std::fs::metadata(path).map_err(EngineError::io(path, "open the model"))?;
        Self::commit(path.display().to_string(), options, |builder| {
            builder.commit_from_file(path)
        })
    }

    /// Opens a model from memory. `subject` names it in errors.
    pub fn from_bytes(subject: &str, model: &[u8], options: &SessionOptions) -> Result<Self> {
        Self::commit(subject.to_owned(), options, |builder| {
            builder.commit_from_memory(model)
        })
    }

    fn commit(
        subject: String,
        options: &SessionOptions,
        commit: impl FnOnce(&mut SessionBuilder) -> ort::Result<Session>,
    ) -> Result<Self> {
        let library = load()?;
        let mut builder =
            builder(&library, options).map_err(|message| EngineError::OnnxRuntime {
                subject: subject.clone(),
                action: "take the session options",
                message,
            })?;
        let session = operators::first_alone(|| commit(&mut builder))
            .map_err(EngineError::ort(&subject, "load the model"))?;
        let inputs = session
            .inputs()
            .iter()
            .map(|outlet| port(&subject, "input", outlet))
            .collect::<Result<_>>()?;
        let outputs = session
            .outputs()
            .iter()
            .map(|outlet| port(&subject, "output", outlet))
            .collect::<Result<_>>()?;
        Ok(Self {
            session,
            subject,
            inputs,
            outputs,
            _library: library,
        })
    }

    /// The file, or the name given with the bytes.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The model's inputs, in order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// The model's outputs, in order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The input of that name.
    pub fn input(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().find(|port| port.name == name)
    }

    /// Runs the model. Every input by name, in any order; every output in the order of
    /// [`outputs`](Self::outputs). Nothing is copied on the way in or out.
    pub fn run(&mut self, inputs: &[(&str, &Value)]) -> Result<Vec<Value>> {
        self.check(inputs)?;
        let feed: Vec<(&str, SessionInputValue<'_>)> = inputs
            .iter()
            .map(|(name, value)| (*name, value.runtime().into()))
            .collect();
        let mut results = self
            .session
            .run(feed)
            .map_err(EngineError::ort(&self.subject, "run"))?;
        self.outputs
            .iter()
            .map(|port| take(&self.subject, &mut results, port))
            .collect()
    }

    /// Runs the model with tensors that it changes in place. `inputs` are all others by name; every output but theirs, in
    /// the order of [`outputs`](Self::outputs).
    ///
    /// # Errors
    /// When an input does not fit, a kept tensor is shared or not of [`Value::room`], or the runtime fails: the kept tensors may then
    /// be changed.
    pub fn run_in_place(
        &mut self,
        inputs: &[(&str, &Value)],
        kept: &mut [Kept<'_>],
    ) -> Result<Vec<Value>> {
        {
            let all: Vec<(&str, &Value)> = inputs
                .iter()
                .copied()
                .chain(kept.iter().map(|kept| (kept.input, &*kept.value)))
                .collect();
            self.check(&all)?;
        }
        let failed = || EngineError::ort(&self.subject, "bind its tensors");
        let mut binding = self.session.create_binding().map_err(failed())?;
        for (name, value) in inputs {
            binding
                .bind_input(*name, value.runtime())
                .map_err(failed())?;
        }
        for kept in kept.iter_mut() {
            binding
                .bind_input(kept.input, kept.value.runtime())
                .map_err(failed())?;
            let value = kept.value.runtime_mut(&self.subject, kept.output)?;
            binding
                .bind_output(kept.output, value.view_mut())
                .map_err(failed())?;
        }
        let made = MemoryInfo::new(
            AllocationDevice::CPU,
            0,
            AllocatorType::Device,
            MemoryType::Default,
        )
        .map_err(failed())?;
        let is_kept = |port: &Port| kept.iter().any(|kept| kept.output == port.name);
        let others: Vec<&Port> = self.outputs.iter().filter(|port| !is_kept(port)).collect();
        for port in &others {
            binding
                .bind_output_to_device(port.name.as_str(), &made)
                .map_err(failed())?;
        }
        let mut results = self
            .session
            .run_binding(&binding)
            .map_err(EngineError::ort(&self.subject, "run"))?;
        others
            .iter()
            .map(|port| take(&self.subject, &mut results, port))
            .collect()
    }

    /// Names, element types and fixed axes, before the runtime sees them: its own messages name
    /// nodes inside the graph.
    fn check(&self, inputs: &[(&str, &Value)]) -> Result<()> {
        for port in &self.inputs {
            let subject = || format!("{}: input {}", self.subject, port.name);
            let Some((_, value)) = inputs.iter().find(|(name, _)| *name == port.name) else {
                return Err(Refusal::new(
                    subject(),
                    "a value",
                    "none",
                    "pass every input of the model",
                )
                .into());
            };
            let fits = value.element() == port.element
                && value.shape().len() == port.dims.len()
                && value
                    .shape()
                    .iter()
                    .zip(&port.dims)
                    .all(|(size, dim)| dim.fixed().is_none_or(|fixed| fixed == *size));
            if !fits {
                return Err(Refusal::new(
                    subject(),
                    format!("{:?} {}", port.element, shape_text(&port.dims)),
                    format!("{:?} {:?}", value.element(), value.shape()),
                    "pass a tensor of the model's type and shape",
                )
                .into());
            }
        }
        match inputs.iter().find(|(name, _)| self.input(name).is_none()) {
            Some((name, _)) => Err(Refusal::new(
                format!("{}: input {name}", self.subject),
                "one of the model's inputs",
                "no input of that name",
                "leave it out",
            )
            .into()),
            None => Ok(()),
        }
    }
}

/// An output of a run.
fn take(subject: &str, results: &mut SessionOutputs<'_>, port: &Port) -> Result<Value> {
    match results.remove(&port.name) {
        Some(value) => Value::from_runtime(subject, &port.name, value),
        None => Err(EngineError::OnnxRuntime {
            subject: subject.to_owned(),
            action: "run",
            message: format!("it gave no output {}", port.name),
        }),
    }
}

fn shape_text(dims: &[Dim]) -> String {
    let axes: Vec<String> = dims
        .iter()
        .map(|dim| match dim {
            Dim::Fixed(size) => size.to_string(),
            Dim::Dynamic(name) if name.is_empty() => "?".into(),
            Dim::Dynamic(name) => name.clone(),
        })
        .collect();
    format!("[{}]", axes.join(", "))
}

fn port(subject: &str, kind: &str, outlet: &Outlet) -> Result<Port> {
    let refused = |found: String| {
        Refusal::new(
            format!("{subject}: {kind} {}", outlet.name()),
            "a tensor of f32, f16 or i64",
            found,
            "export the model with `mlac export`",
        )
    };
    let ValueType::Tensor {
        ty,
        shape,
        dimension_symbols,
    } = outlet.dtype()
    else {
        return Err(refused(outlet.dtype().to_string()).into());
    };
    let element = Element::of(*ty).ok_or_else(|| refused(ty.to_string()))?;
    let dims = shape
        .iter()
        .enumerate()
        .map(|(axis, size)| match usize::try_from(*size) {
            Ok(size) => Dim::Fixed(size),
            Err(_) => Dim::Dynamic(
                dimension_symbols
                    .get(axis)
                    .map(ToString::to_string)
                    .unwrap_or_default(),
            ),
        })
        .collect();
    Ok(Port {
        name: outlet.name().to_owned(),
        element,
        dims,
    })
}

fn builder(
    library: &OrtLibrary,
    options: &SessionOptions,
) -> std::result::Result<SessionBuilder, String> {
    let say = |error: ort::Error<SessionBuilder>| error.to_string();
    let level = match options.optimization {
        Optimization::None => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let mut builder = Session::builder(&library.environment)
        .map_err(|error| error.to_string())?
        .with_no_environment_execution_providers()
        .map_err(say)?
        .with_execution_providers([ort::ep::CPU::default()
            .with_arena_allocator(options.arena)
            .build()])
        .map_err(say)?
        .with_optimization_level(level)
        .map_err(say)?
        .with_intra_threads(options.threads)
        .map_err(say)?
        .with_intra_op_spinning(options.spin)
        .map_err(say)?
        .with_prepacking(options.prepack)
        .map_err(say)?
        // Patterns are recorded per input shape; with a length that grows at each step they never repeat.
        .with_memory_pattern(false)
        .map_err(say)?
        .with_log_level(ort::logging::LogLevel::Fatal)
        .map_err(say)?;
    operators::add(&mut builder)?;
    Ok(builder)
}
