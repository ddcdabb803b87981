//! Loading ONNX Runtime once per process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;

use crate::error::{EngineError, Result};
use crate::find::{self, Library};

/// The loaded library. Cheap to clone; sessions keep it alive.
#[derive(Clone)]
pub struct OrtLibrary {
    pub(super) environment: Environment,
    path: PathBuf,
}

impl OrtLibrary {
    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

static LOADED: Mutex<Option<OrtLibrary>> = Mutex::new(None);

/// The process's ONNX Runtime, found by [`find::library`] and loaded at the first call.
///
/// # Errors
/// Found / needed / fix when there is none, or it is too old.
pub fn load() -> Result<OrtLibrary> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    match &*loaded {
        Some(library) => Ok(library.clone()),
        None => open(
            &mut loaded,
            &find::library(Library::OnnxRuntime)?.require()?,
        ),
    }
}

/// Loads ONNX Runtime from this file, if none was loaded before. A process can hold only one.
pub fn load_from(path: &Path) -> Result<OrtLibrary> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    match &*loaded {
        Some(library) => Ok(library.clone()),
        None => open(&mut loaded, path),
    }
}

fn open(loaded: &mut Option<OrtLibrary>, path: &Path) -> Result<OrtLibrary> {
    let subject = path.display().to_string();
    let refused = |found: String| {
        mlac_model::Refusal::new(
            subject.clone(),
            Library::OnnxRuntime.needed(),
            found,
            Library::OnnxRuntime.fix(),
        )
    };
    // `init_from` checks that the file loads, is ONNX Runtime, and is recent enough.
    let builder = ort::init_from(path).map_err(|error| refused(error.to_string()))?;
    let environment = builder
        .with_name("mlac")
        .with_telemetry(false)
        .build()
        .map_err(EngineError::ort(&subject, "start"))?;
    // Its errors come back as values; it need not write them to the terminal as well.
    environment.set_log_level(ort::logging::LogLevel::Fatal);
    let library = OrtLibrary {
        environment,
        path: path.to_path_buf(),
    };
    *loaded = Some(library.clone());
    Ok(library)
}
