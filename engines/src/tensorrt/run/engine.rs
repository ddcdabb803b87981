//! A deserialised engine and its execution contexts.
#![expect(unsafe_code, reason = "calls the shim's functions")]

use std::ffi::CString;
use std::ptr::NonNull;
use std::rc::Rc;

use mlac_kernels::launch::Stream;
use mlac_model::Refusal;

use crate::error::{EngineError, Result};
use crate::tensorrt::builder::{InputShapes, element};
use crate::tensorrt::library::TensorRt;
use crate::tensorrt::log::{Log, collect, text};
use crate::tensorrt::sys;

/// An input or output of an engine.
#[derive(Debug, Clone)]
pub(super) struct Port {
    pub(super) name: String,
    /// For example "f16".
    pub(super) element: &'static str,
    pub(super) output: bool,
    /// Sizes of its axes; -1 where they vary.
    pub(super) dims: Vec<i64>,
}

/// An engine in the GPU's memory.
pub(super) struct Engine {
    handle: NonNull<sys::Engine>,
    library: TensorRt,
    subject: String,
    ports: Vec<Port>,
    // Boxed: its address is with TensorRT. Dropped after `handle` is closed.
    log: Box<Log>,
}

impl Engine {
    /// Gives the bytes of an engine file to TensorRT, which needs the engine's plugins registered and a current context of the GPU.
    ///
    /// # Errors
    /// TensorRT's own words.
    pub(super) fn open(library: &TensorRt, subject: &str, bytes: &[u8]) -> Result<Self> {
        let log = Box::new(Log::default());
        let user = std::ptr::from_ref::<Log>(&log).cast_mut().cast();
        let (run, create) = library.run()?;
        // SAFETY: the entry point is of the checked version; bytes of that length; `user` outlives the engine.
        let handle = unsafe {
            (run.open)(
                create,
                bytes.as_ptr().cast(),
                bytes.len() as u64,
                collect,
                user,
            )
        };
        let Some(handle) = NonNull::new(handle) else {
            return Err(EngineError::TensorRt {
                subject: subject.to_owned(),
                action: "take the engine",
                messages: log.take_errors(),
            });
        };
        let mut engine = Self {
            handle,
            library: library.clone(),
            subject: subject.to_owned(),
            ports: Vec::new(),
            log,
        };
        // SAFETY: a live engine.
        let count = unsafe { (run.tensor_count)(handle.as_ptr()) };
        for index in 0..count {
            let port = engine.describe(run, index)?;
            engine.ports.push(port);
        }
        Ok(engine)
    }

    fn describe(&self, run: &sys::RunFunctions, index: i32) -> Result<Port> {
        let mut tensor = sys::Tensor::unknown();
        // SAFETY: a live engine and a place for the answer.
        let kind = unsafe { (run.tensor)(self.handle.as_ptr(), index, &raw mut tensor) };
        let name = text(tensor.name);
        if !(kind == 1 || kind == 2) {
            return Err(Refusal::new(
                format!("{}: tensor {index} `{name}`", self.subject),
                "a dense tensor of at most 8 axes in the GPU's memory",
                "another kind",
                "build the engine with `mlac build`",
            )
            .into());
        }
        Ok(Port {
            name,
            element: element(tensor.dtype),
            output: kind == 2,
            dims: tensor.dims[..tensor.rank.clamp(0, 8) as usize].to_vec(),
        })
    }

    /// Its inputs and outputs.
    pub(super) fn ports(&self) -> &[Port] {
        &self.ports
    }

    /// Its file, for messages.
    pub(super) fn subject(&self) -> &str {
        &self.subject
    }

    /// How many profiles it was built with.
    pub(super) fn profiles(&self) -> Result<usize> {
        let (run, _) = self.library.run()?;
        // SAFETY: a live engine.
        let count = unsafe { (run.profile_count)(self.handle.as_ptr()) };
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The input whose memory an output must have, where the engine names one.
    pub(super) fn alias(&self, output: &str) -> Result<Option<String>> {
        let (run, _) = self.library.run()?;
        let name = c_name(output)?;
        // SAFETY: a live engine and a C string.
        let found = unsafe { (run.alias)(self.handle.as_ptr(), name.as_ptr()) };
        Ok((!found.is_null()).then(|| text(found)))
    }

    /// The shapes of an input in a profile, as the engine itself has them.
    pub(super) fn shapes(&self, input: &str, profile: usize) -> Result<InputShapes> {
        let (run, _) = self.library.run()?;
        let name = c_name(input)?;
        let sizes = |which: i32| -> Result<Vec<usize>> {
            let mut dims = [0_i64; 8];
            // SAFETY: a live engine, a C string and a place for 8 sizes.
            let rank = unsafe {
                (run.profile)(
                    self.handle.as_ptr(),
                    name.as_ptr(),
                    profile as i32,
                    which,
                    dims.as_mut_ptr(),
                )
            };
            usize_dims(rank, &dims).ok_or_else(|| {
                self.error(format!("tell the shapes of {input} in profile {profile}"))
            })
        };
        Ok(InputShapes {
            name: input.to_owned(),
            min: sizes(0)?,
            opt: sizes(1)?,
            max: sizes(2)?,
        })
    }

    fn error(&self, action: String) -> EngineError {
        let mut messages = vec![action];
        messages.extend(self.log.take_errors());
        EngineError::TensorRt {
            subject: self.subject.clone(),
            action: "run the engine",
            messages,
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Ok((run, _)) = self.library.run() {
            // SAFETY: made by `open`, closed once; the log is dropped after it. Contexts hold the engine.
            unsafe { (run.close)(self.handle.as_ptr()) }
        }
    }
}

/// What runs an engine with one of its profiles.
pub(super) struct Context {
    handle: NonNull<sys::Context>,
    engine: Rc<Engine>,
    profile: usize,
}

impl Context {
    /// Makes a context; the profile is chosen in the order of the stream.
    pub(super) fn open(engine: &Rc<Engine>, profile: usize, stream: &Stream) -> Result<Self> {
        let (run, _) = engine.library.run()?;
        // SAFETY: a live engine and stream.
        let handle =
            unsafe { (run.context_open)(engine.handle.as_ptr(), profile as i32, stream.handle()) };
        let Some(handle) = NonNull::new(handle) else {
            return Err(engine.error(format!("make a context for profile {profile}")));
        };
        Ok(Self {
            handle,
            engine: Rc::clone(engine),
            profile,
        })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Tells an input's shape.
    pub(super) fn set_shape(&self, input: &str, shape: &[usize]) -> Result<()> {
        let (run, _) = self.engine.library.run()?;
        let name = c_name(input)?;
        let sizes: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        // SAFETY: a live context, a C string, as many sizes as said.
        let taken = unsafe {
            (run.context_shape)(
                self.handle.as_ptr(),
                name.as_ptr(),
                sizes.len() as i32,
                sizes.as_ptr(),
            )
        };
        if taken == 1 {
            return Ok(());
        }
        let action = format!(
            "take the shape {shape:?} of {input} in profile {}",
            self.profile
        );
        Err(self.engine.error(action))
    }

    /// A tensor's shape, given the inputs'.
    pub(super) fn shape(&self, tensor: &str) -> Result<Vec<usize>> {
        let (run, _) = self.engine.library.run()?;
        let name = c_name(tensor)?;
        let mut dims = [0_i64; 8];
        // SAFETY: a live context, a C string and a place for 8 sizes.
        let rank =
            unsafe { (run.context_tensor)(self.handle.as_ptr(), name.as_ptr(), dims.as_mut_ptr()) };
        usize_dims(rank, &dims)
            .ok_or_else(|| self.engine.error(format!("tell the shape of {tensor}")))
    }

    /// Tells where a tensor is. The memory must be as large as its shape and live until the runs are done.
    pub(super) fn set_address(&self, tensor: &str, address: u64) -> Result<()> {
        let (run, _) = self.engine.library.run()?;
        let name = c_name(tensor)?;
        // SAFETY: a live context and a C string; TensorRT only keeps the address.
        let taken = unsafe { (run.context_address)(self.handle.as_ptr(), name.as_ptr(), address) };
        if taken == 1 {
            return Ok(());
        }
        Err(self.engine.error(format!("take the memory of {tensor}")))
    }

    /// Puts a run into the stream. Every tensor's memory must have been told.
    pub(super) fn run(&self, stream: &Stream) -> Result<()> {
        let (run, _) = self.engine.library.run()?;
        // SAFETY: a live context and stream; the decoder keeps the memory of every tensor, as large as the profile's largest shapes.
        let taken = unsafe { (run.context_run)(self.handle.as_ptr(), stream.handle()) };
        if taken == 1 {
            return Ok(());
        }
        Err(self
            .engine
            .error(format!("run with profile {}", self.profile)))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Ok((run, _)) = self.engine.library.run() {
            // SAFETY: made by `open`, closed once, before the engine that it holds.
            unsafe { (run.context_close)(self.handle.as_ptr()) }
        }
    }
}

fn usize_dims(rank: i32, dims: &[i64; 8]) -> Option<Vec<usize>> {
    let rank = usize::try_from(rank).ok()?;
    dims.get(..rank)?
        .iter()
        .map(|&size| usize::try_from(size).ok())
        .collect()
}

fn c_name(name: &str) -> Result<CString> {
    CString::new(name).map_err(|_| {
        Refusal::new(
            "name of a tensor",
            "a name without NUL",
            name,
            "build the engine with `mlac build`",
        )
        .into()
    })
}
