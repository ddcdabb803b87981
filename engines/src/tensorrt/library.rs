//! Loading TensorRT for RTX and the shim, once per process.
#![expect(
    unsafe_code,
    reason = "loading libraries and calling their entry points"
)]

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, RTLD_NOW};
use mlac_model::Refusal;

use super::sys::{ABI, Functions, GetVersion};
use crate::error::{EngineError, Result};
use crate::find::{self, Library};

/// TensorRT for RTX, loaded and checked. Cheap to clone.
#[derive(Clone)]
pub struct TensorRtRtx {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) shim: Functions,
    pub(super) create_builder: *mut c_void,
    pub(super) create_parser: *mut c_void,
    version: u32,
    path: PathBuf,
    plugins: Vec<String>,
    // The libraries stay loaded for the life of the process: TensorRT's own threads and static
    // destructors outlive every object made here.
    _libraries: [std::mem::ManuallyDrop<libloading::Library>; 3],
}

// SAFETY: the pointers are entry points of libraries that are never unloaded; TensorRT documents
// them as callable from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing in here changes after loading.
unsafe impl Sync for Inner {}

static LOADED: Mutex<Option<TensorRtRtx>> = Mutex::new(None);

impl TensorRtRtx {
    /// The process's TensorRT for RTX, found by [`find::library`] and loaded at the first call.
    ///
    /// # Errors
    /// Found / needed / fix when a library is missing or of another version than the shim.
    pub fn load() -> Result<Self> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            return Ok(library.clone());
        }
        let library = Self {
            inner: Arc::new(open()?),
        };
        *loaded = Some(library.clone());
        Ok(library)
    }

    /// For example "1.7.1".
    pub fn version(&self) -> String {
        version_text(self.inner.version)
    }

    /// The builder's library.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Plugins that the library registers by itself; nodes of these names must not reach it.
    pub fn plugins(&self) -> &[String] {
        &self.inner.plugins
    }
}

/// `major * 10000 + minor * 100 + patch` as text.
fn version_text(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

fn open() -> Result<Inner> {
    let builder_path = find::library(Library::TensorRtRtx)?.require()?;
    let parser_path = find::library(Library::TensorRtRtxParser)?.require()?;
    let shim_path = find::library(Library::TensorRtShim)?.require()?;
    let builder = load(Library::TensorRtRtx, &builder_path)?;
    let parser = load(Library::TensorRtRtxParser, &parser_path)?;
    let shim_library = load(Library::TensorRtShim, &shim_path)?;

    let shim = Functions::of(&shim_library)
        .map_err(|error| unusable(Library::TensorRtShim, &shim_path, error.to_string()))?;
    // SAFETY: the function takes nothing and returns a number.
    let abi = unsafe { (shim.abi)() };
    if abi != ABI {
        let found = format!("interface {abi}, while this mlac speaks {ABI}");
        return Err(unusable(Library::TensorRtShim, &shim_path, found).into());
    }
    let create_builder = symbol(
        &builder,
        Library::TensorRtRtx,
        &builder_path,
        b"createInferBuilder_INTERNAL",
    )?;
    let registry = symbol(
        &builder,
        Library::TensorRtRtx,
        &builder_path,
        b"getPluginRegistry",
    )?;
    let create_parser = symbol(
        &parser,
        Library::TensorRtRtxParser,
        &parser_path,
        b"createNvOnnxParser_INTERNAL",
    )?;
    // SAFETY: NvInferRuntime.h: `int32_t getInferLibVersion()`.
    let version = unsafe {
        let get: libloading::Symbol<'_, GetVersion> = builder
            .get(b"getInferLibVersion")
            .map_err(|error| unusable(Library::TensorRtRtx, &builder_path, error.to_string()))?;
        get()
    };
    // SAFETY: the function takes nothing and returns a number.
    let wanted = unsafe { (shim.version)() };
    // Virtual tables may grow within a minor version, never change: the patch may differ.
    if version / 100 != wanted / 100 {
        let found = format!("version {}", version_text(version as u32));
        return Err(unusable(Library::TensorRtRtx, &builder_path, found).into());
    }

    let mut plugins = Vec::new();
    for index in 0.. {
        // SAFETY: `registry` is getPluginRegistry; the shim checks the index and returns a string
        // of the registry or null.
        let name = unsafe { (shim.plugin_name)(registry, index) };
        if name.is_null() {
            break;
        }
        // SAFETY: not null, and a C string that lives as long as the library.
        plugins.push(
            unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned(),
        );
    }
    plugins.retain(|name| !name.is_empty());

    Ok(Inner {
        shim,
        create_builder,
        create_parser,
        version: version as u32,
        path: builder_path,
        plugins,
        _libraries: [builder, parser, shim_library].map(std::mem::ManuallyDrop::new),
    })
}

fn load(library: Library, path: &Path) -> Result<libloading::Library> {
    // SAFETY: initialisers of NVIDIA's libraries and of our own shim. Global, because the parser
    // looks up the builder library's symbols.
    let loaded = unsafe { Loaded::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    loaded
        .map(Into::into)
        .map_err(|error| EngineError::from(unusable(library, path, error.to_string())))
}

fn symbol(
    loaded: &libloading::Library,
    library: Library,
    path: &Path,
    name: &[u8],
) -> Result<*mut c_void> {
    // SAFETY: only the address is taken.
    let found: std::result::Result<libloading::Symbol<'_, *mut c_void>, _> =
        unsafe { loaded.get(name) };
    match found {
        Ok(address) => Ok(*address),
        Err(error) => Err(unusable(library, path, error.to_string()).into()),
    }
}

fn unusable(library: Library, path: &Path, found: String) -> Refusal {
    Refusal::new(
        format!("{} ({})", library.title(), path.display()),
        library.needed(),
        found,
        library.fix(),
    )
}
