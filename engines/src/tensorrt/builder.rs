//! One ONNX file as a TensorRT network, and the engines built from it.
#![expect(unsafe_code, reason = "calls the shim's functions")]

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use mlac_model::Refusal;
use serde::Serialize;

use super::library::{Product, TensorRt};
use super::log::{Log, collect, text};
use super::scan;
use super::sys;
use super::target::Target;
use crate::error::{EngineError, Result};
use crate::ort::Dim;

/// An input or output of the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkTensor {
    /// Its name in the ONNX file.
    pub name: String,
    /// TensorRT's name of its element type, for example "f16".
    pub element: &'static str,
    /// Its axes, outermost first.
    pub dims: Vec<Dim>,
}

/// Smallest, most usual and largest shape of one input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct InputShapes {
    /// The input's name.
    pub name: String,
    /// Smallest size of each axis.
    pub min: Vec<usize>,
    /// The sizes to be fastest at.
    pub opt: Vec<usize>,
    /// Largest size of each axis.
    pub max: Vec<usize>,
}

/// How many of the network's attention layers must be one fused kernel, and how many may be split.
/// A layer that must be fused and cannot be makes the build fail, so in an engine that was built,
/// `fused` layers are fused. Attention written in primitive operators is in neither.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Attention {
    /// Fused, or the build fails.
    pub fused: usize,
    /// TensorRT may split them.
    pub decomposable: usize,
}

/// TensorRT for RTX 1.7 keeps the architectures that it builds for in process-wide state: two builds
/// at once take each other's ("Target SM 75 is not found in the accelerator list"). One at a time.
static BUILDING: Mutex<()> = Mutex::new(());

fn text_of(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| EngineError::io(path, "pass the path on")(error.into()))
}

/// A parsed network, from which engines for several targets can be built.
pub struct Builder {
    build: NonNull<sys::Build>,
    library: TensorRt,
    subject: String,
    // Boxed: its address is with TensorRT. Dropped after `build` is closed.
    log: Box<Log>,
}

impl Builder {
    /// Parses an ONNX file; external data is read from beside it.
    ///
    /// # Errors
    /// A file with nodes that TensorRT for RTX must not see is refused before it sees them; otherwise all
    /// of its parser's errors are in the error.
    pub fn parse(library: &TensorRt, onnx: &Path) -> Result<Self> {
        if library.product() == Product::Rtx {
            scan::check(onnx, library.plugins())?;
        }
        let path = text_of(onnx)?;
        let this = Self::open(library, onnx)?;
        // SAFETY: a live build and a C string.
        let parsed =
            unsafe { (this.library.inner.shim.parse_file)(this.build.as_ptr(), path.as_ptr()) };
        this.parsed(parsed)
    }

    /// Parses a model for enterprise TensorRT from memory; external data is read from beside `onnx`. Its plugins must be loaded.
    ///
    /// # Errors
    /// All of its parser's errors are in the error.
    pub(super) fn parse_bytes(library: &TensorRt, onnx: &Path, model: &[u8]) -> Result<Self> {
        let path = text_of(onnx)?;
        let this = Self::open(library, onnx)?;
        // SAFETY: a live build, bytes of that length and a C string.
        let parsed = unsafe {
            (this.library.inner.shim.parse_bytes)(
                this.build.as_ptr(),
                model.as_ptr().cast(),
                model.len() as u64,
                path.as_ptr(),
            )
        };
        this.parsed(parsed)
    }

    fn open(library: &TensorRt, onnx: &Path) -> Result<Self> {
        let log = Box::new(Log::default());
        let user = std::ptr::from_ref::<Log>(&log).cast_mut().cast();
        let inner = &library.inner;
        // SAFETY: both entry points are of the checked version; `user` outlives the build.
        let build =
            unsafe { (inner.shim.open)(inner.create_builder, inner.create_parser, collect, user) };
        let subject = onnx.display().to_string();
        let Some(build) = NonNull::new(build) else {
            return Err(EngineError::TensorRt {
                subject,
                action: "start",
                messages: log.take_errors(),
            });
        };
        Ok(Self {
            build,
            library: library.clone(),
            subject,
            log,
        })
    }

    fn parsed(self, answer: i32) -> Result<Self> {
        if answer == 0 {
            return Err(self.error("parse the ONNX file", self.parse_errors()));
        }
        Ok(self)
    }

    fn error(&self, action: &'static str, mut messages: Vec<String>) -> EngineError {
        let logged = self.log.take_errors();
        if messages.is_empty() {
            messages = logged;
        }
        EngineError::TensorRt {
            subject: self.subject.clone(),
            action,
            messages,
        }
    }

    fn parse_errors(&self) -> Vec<String> {
        let (shim, build) = (&self.library.inner.shim, self.build.as_ptr());
        // SAFETY: a live build.
        let count = unsafe { (shim.error_count)(build) };
        (0..count)
            .filter_map(|index| {
                let mut error = sys::ParseError {
                    code: 0,
                    node: -1,
                    text: std::ptr::null(),
                    node_name: std::ptr::null(),
                    node_operator: std::ptr::null(),
                };
                // SAFETY: a live build and a place for the answer.
                let found = unsafe { (shim.error)(build, index, &raw mut error) };
                (found == 1).then(|| {
                    format!(
                        "node {} {} `{}` (code {}): {}",
                        error.node,
                        text(error.node_operator),
                        text(error.node_name),
                        error.code,
                        text(error.text)
                    )
                })
            })
            .collect()
    }

    /// The network's inputs.
    pub fn inputs(&self) -> Vec<NetworkTensor> {
        self.tensors(0)
    }

    /// The network's outputs.
    pub fn outputs(&self) -> Vec<NetworkTensor> {
        self.tensors(1)
    }

    /// What TensorRT warned about so far.
    pub fn warnings(&self) -> Vec<String> {
        self.log.warnings()
    }

    fn tensors(&self, kind: i32) -> Vec<NetworkTensor> {
        let (shim, build) = (&self.library.inner.shim, self.build.as_ptr());
        // SAFETY: a live build.
        let count = unsafe { (shim.tensor_count)(build, kind) };
        (0..count)
            .filter_map(|index| {
                let mut tensor = sys::Tensor::unknown();
                // SAFETY: a live build and a place for the answer.
                let found = unsafe { (shim.tensor)(build, kind, index, &raw mut tensor) };
                (found == 1).then(|| NetworkTensor {
                    name: text(tensor.name),
                    element: element(tensor.dtype),
                    dims: (0..tensor.rank.clamp(0, 8) as usize)
                        .map(|axis| match usize::try_from(tensor.dims[axis]) {
                            Ok(size) => Dim::Fixed(size),
                            Err(_) => Dim::Dynamic(text(tensor.symbols[axis])),
                        })
                        .collect(),
                })
            })
            .collect()
    }

    /// The network's attention layers.
    pub fn attention(&self) -> Attention {
        let (shim, build) = (&self.library.inner.shim, self.build.as_ptr());
        let mut attention = Attention::default();
        // SAFETY: a live build.
        for index in 0..unsafe { (shim.layer_count)(build) } {
            // SAFETY: a live build and an index below its count.
            match unsafe { (shim.attention_decomposable)(build, index) } {
                0 => attention.fused += 1,
                1 => attention.decomposable += 1,
                _ => {}
            }
        }
        attention
    }

    /// Builds one serialized engine that runs on every one of `targets`, with one or more profiles.
    /// Builds of one process take turns.
    pub fn build(
        &mut self,
        targets: &[Target],
        profiles: &[Vec<InputShapes>],
        threads: usize,
    ) -> Result<Engine> {
        for target in targets {
            target.check()?;
        }
        self.build_for(targets, profiles, threads, None)
    }

    /// Builds an engine with enterprise TensorRT for the GPU of this machine. `timing` holds what earlier builds measured, and
    /// afterwards what this one did; bytes that TensorRT does not take are a warning, and nothing is known.
    pub(super) fn build_here(
        &mut self,
        profiles: &[Vec<InputShapes>],
        threads: usize,
        timing: &mut Vec<u8>,
    ) -> Result<Engine> {
        self.build_for(&[], profiles, threads, Some(timing))
    }

    fn build_for(
        &mut self,
        targets: &[Target],
        profiles: &[Vec<InputShapes>],
        threads: usize,
        timing: Option<&mut Vec<u8>>,
    ) -> Result<Engine> {
        let _alone = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
        let shim = &self.library.inner.shim;
        let numbers: Vec<i32> = targets
            .iter()
            .map(|target| target.number() as i32)
            .collect();
        let threads = i32::try_from(threads.max(1)).unwrap_or(1);
        // SAFETY: a live build and as many numbers as said.
        let config = unsafe {
            (shim.config)(
                self.build.as_ptr(),
                numbers.as_ptr(),
                numbers.len() as i32,
                threads,
            )
        };
        let Some(config) = NonNull::new(config) else {
            return Err(self.error("take the targets", Vec::new()));
        };
        let config = ConfigGuard {
            config,
            library: &self.library,
        };
        let inputs = self.inputs();
        for profile in profiles {
            // SAFETY: a live build and configuration.
            if unsafe { (shim.profile_begin)(self.build.as_ptr(), config.config.as_ptr()) } == 0 {
                return Err(self.error("make a profile", Vec::new()));
            }
            for shapes in profile {
                self.check_shapes(shapes, &inputs)?;
                self.set_shapes(&config, shapes)?;
            }
            // SAFETY: a live configuration.
            if unsafe { (shim.profile_finish)(config.config.as_ptr()) } == 0 {
                return Err(self.error("take the profile", Vec::new()));
            }
        }
        if let Some(timing) = &timing {
            self.give_timing(&config, timing)?;
        }
        // SAFETY: a live build and configuration.
        let memory = unsafe { (shim.build)(self.build.as_ptr(), config.config.as_ptr()) };
        let Some(memory) = NonNull::new(memory) else {
            return Err(self.error("build the engine", Vec::new()));
        };
        if let Some(timing) = timing {
            // SAFETY: a live configuration.
            let known = unsafe { (shim.timing_get)(config.config.as_ptr()) };
            let known = NonNull::new(known)
                .ok_or_else(|| self.error("give its timing cache", Vec::new()))?;
            *timing = self.owned(known).bytes().to_vec();
        }
        Ok(self.owned(memory))
    }

    fn owned(&self, memory: NonNull<sys::Memory>) -> Engine {
        Engine {
            memory,
            library: self.library.clone(),
        }
    }

    fn give_timing(&self, config: &ConfigGuard<'_>, bytes: &[u8]) -> Result<()> {
        let set = |bytes: &[u8]| {
            // SAFETY: a live configuration and bytes of that length.
            let taken = unsafe {
                (self.library.inner.shim.timing_set)(
                    config.config.as_ptr(),
                    bytes.as_ptr().cast(),
                    bytes.len() as u64,
                )
            };
            taken == 1
        };
        if set(bytes) {
            return Ok(());
        }
        self.log
            .warn("the timing cache is of another TensorRT or GPU: a new one is begun");
        if set(&[]) {
            Ok(())
        } else {
            Err(self.error("make a timing cache", Vec::new()))
        }
    }

    fn check_shapes(&self, shapes: &InputShapes, inputs: &[NetworkTensor]) -> Result<()> {
        let input = inputs.iter().find(|input| input.name == shapes.name);
        let fits = input.is_some_and(|input| {
            [&shapes.min, &shapes.opt, &shapes.max].iter().all(|sizes| {
                sizes.len() == input.dims.len()
                    && sizes
                        .iter()
                        .zip(&input.dims)
                        .all(|(size, dim)| dim.fixed().is_none_or(|fixed| fixed == *size))
            }) && shapes
                .min
                .iter()
                .zip(&shapes.opt)
                .all(|(min, opt)| min <= opt)
                && shapes
                    .opt
                    .iter()
                    .zip(&shapes.max)
                    .all(|(opt, max)| opt <= max)
        });
        if fits {
            return Ok(());
        }
        Err(Refusal::new(
            format!("{}: profile of input {}", self.subject, shapes.name),
            input.map_or_else(
                || "an input of the network".into(),
                |input| format!("min <= opt <= max of {:?}", input.dims),
            ),
            format!("{:?}, {:?}, {:?}", shapes.min, shapes.opt, shapes.max),
            "correct the profile",
        )
        .into())
    }

    fn set_shapes(&self, config: &ConfigGuard<'_>, shapes: &InputShapes) -> Result<()> {
        let name = CString::new(shapes.name.as_str()).map_err(|_| {
            Refusal::new(
                "profile",
                "an input name without NUL",
                shapes.name.clone(),
                "correct the profile",
            )
        })?;
        let sizes = |list: &[usize]| -> Vec<i64> { list.iter().map(|size| *size as i64).collect() };
        let (min, opt, max) = (sizes(&shapes.min), sizes(&shapes.opt), sizes(&shapes.max));
        // SAFETY: a live configuration, a C string, and three lists of the same length (checked).
        let taken = unsafe {
            (self.library.inner.shim.profile_shape)(
                config.config.as_ptr(),
                name.as_ptr(),
                min.len() as i32,
                min.as_ptr(),
                opt.as_ptr(),
                max.as_ptr(),
            )
        };
        if taken == 1 {
            Ok(())
        } else {
            Err(self.error("take the profile's shapes", Vec::new()))
        }
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        // SAFETY: made by `open`, closed once; the log is dropped after it.
        unsafe { (self.library.inner.shim.close)(self.build.as_ptr()) }
    }
}

struct ConfigGuard<'a> {
    config: NonNull<sys::Config>,
    library: &'a TensorRt,
}

impl Drop for ConfigGuard<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `config`, freed once.
        unsafe { (self.library.inner.shim.config_free)(self.config.as_ptr()) }
    }
}

/// A serialized engine, in TensorRT's memory.
pub struct Engine {
    memory: NonNull<sys::Memory>,
    library: TensorRt,
}

impl Engine {
    /// The bytes to write to a file.
    pub fn bytes(&self) -> &[u8] {
        let mut size = 0_u64;
        // SAFETY: live memory and a place for its size.
        let data = unsafe { (self.library.inner.shim.bytes)(self.memory.as_ptr(), &raw mut size) };
        if data.is_null() {
            return &[];
        }
        // SAFETY: TensorRT's memory of that size, which lives as long as `self`.
        unsafe { std::slice::from_raw_parts(data.cast(), size as usize) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: made by `build`, freed once.
        unsafe { (self.library.inner.shim.bytes_free)(self.memory.as_ptr()) }
    }
}

/// `nvinfer1::DataType`
pub(super) fn element(number: i32) -> &'static str {
    const NAMES: [&str; 12] = [
        "f32", "f16", "i8", "i32", "bool", "u8", "fp8", "bf16", "i64", "i4", "fp4", "e8m0",
    ];
    usize::try_from(number)
        .ok()
        .and_then(|index| NAMES.get(index))
        .copied()
        .unwrap_or("unknown")
}
