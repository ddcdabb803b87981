//! Loading TensorRT and the shim, once per process: TensorRT for RTX, or enterprise TensorRT.
#![expect(
    unsafe_code,
    reason = "loading libraries and calling their entry points"
)]

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, RTLD_NOW};
use mlac_model::Refusal;

use super::plugin::PluginLibrary;
use super::sys::{ABI, Functions, GetVersion, RUN_ABI, RunFunctions};
use crate::error::{EngineError, Result};
use crate::find::{self, Library};
use crate::probe;

/// Which TensorRT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// TensorRT for RTX: engines for consumer GPUs, built without one; no plugins.
    Rtx,
    /// Enterprise TensorRT 11: engines for the GPU it runs on, datacenter GPUs among them; plugins.
    Enterprise,
}

impl Product {
    /// Its name.
    pub fn title(self) -> &'static str {
        match self {
            Self::Rtx => "TensorRT for RTX",
            Self::Enterprise => "TensorRT",
        }
    }

    /// Builder, parser, shim.
    fn libraries(self) -> [Library; 3] {
        match self {
            Self::Rtx => [
                Library::TensorRtRtx,
                Library::TensorRtRtxParser,
                Library::TensorRtShim,
            ],
            Self::Enterprise => [
                Library::TensorRtEnterprise,
                Library::TensorRtEnterpriseParser,
                Library::TensorRtEnterpriseShim,
            ],
        }
    }
}

/// A TensorRT, loaded and checked. Cheap to clone.
#[derive(Clone)]
pub struct TensorRt {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) product: Product,
    pub(super) shim: Functions,
    registry: *mut c_void,
    pub(super) create_builder: *mut c_void,
    pub(super) create_parser: *mut c_void,
    create_runtime: *mut c_void,
    /// What runs engines, or why the shim has not got it.
    run: std::result::Result<RunFunctions, Refusal>,
    /// The plugin library that is registered: its file and digest.
    registered: Mutex<Option<(PathBuf, String)>>,
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

static LOADED: Mutex<Option<TensorRt>> = Mutex::new(None);

impl TensorRt {
    /// The process's TensorRT, found by [`find::library`] and loaded at the first call.
    ///
    /// # Errors
    /// Found / needed / fix when a library is missing or of another version than the shim, and when the process has the
    /// other product loaded: both bring functions of the same names.
    pub fn load(product: Product) -> Result<Self> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            if library.inner.product == product {
                return Ok(library.clone());
            }
            return Err(Refusal::new(
                product.title(),
                "a process without another TensorRT",
                format!("{} is loaded", library.inner.product.title()),
                "build for the two products in two runs",
            )
            .into());
        }
        let library = Self {
            inner: Arc::new(open(product)?),
        };
        *loaded = Some(library.clone());
        Ok(library)
    }

    /// Which one it is.
    pub fn product(&self) -> Product {
        self.inner.product
    }

    /// For example "TensorRT for RTX 1.7.1", as manifests have it.
    pub fn runtime(&self) -> String {
        format!("{} {}", self.inner.product.title(), self.version())
    }

    /// Registers the plugin library, which is checked against this TensorRT's version first; once per process, for TensorRT
    /// takes a plugin of one name only once.
    ///
    /// # Errors
    /// A library for another major version, one that TensorRT does not take, and another one than is registered.
    pub fn load_plugin(&self, library: &PluginLibrary) -> Result<()> {
        library.check(self.inner.version)?;
        let digest = library.digest()?;
        let registered = &self.inner.registered;
        let mut registered = registered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((path, known)) = &*registered {
            if *known == digest {
                return Ok(());
            }
            return Err(Refusal::new(
                format!("TensorRT plugin ({})", library.path().display()),
                format!("the one that is registered, {}", path.display()),
                "another file",
                "look at engines of different plugins in different runs, or build them again with one mlac",
            )
            .into());
        }
        let path = CString::new(library.path().as_os_str().as_bytes())
            .map_err(|error| EngineError::io(library.path(), "pass the path on")(error.into()))?;
        // SAFETY: `registry` is getPluginRegistry of the checked version; a C string.
        let taken = unsafe { (self.inner.shim.load_plugins)(self.inner.registry, path.as_ptr()) };
        if taken == 1 {
            *registered = Some((library.path().to_path_buf(), digest));
            return Ok(());
        }
        Err(EngineError::TensorRt {
            subject: library.path().display().to_string(),
            action: "register the plugin library",
            messages: Vec::new(),
        })
    }

    /// What runs engines, and the entry point that it wants.
    pub(super) fn run(&self) -> Result<(&RunFunctions, *mut c_void)> {
        let functions = self.inner.run.as_ref().map_err(Clone::clone)?;
        Ok((functions, self.inner.create_runtime))
    }

    /// major * 10000 + minor * 100 + patch.
    pub(super) fn number(&self) -> u32 {
        self.inner.version
    }

    /// For example "1.7.1".
    pub fn version(&self) -> String {
        probe::shown(self.inner.version)
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

fn open(product: Product) -> Result<Inner> {
    let [of_builder, of_parser, of_shim] = product.libraries();
    let builder_path = find::library(of_builder)?.require()?;
    let parser_path = find::library(of_parser)?.require()?;
    let shim_path = find::library(of_shim)?.require()?;
    let builder = load(of_builder, &builder_path)?;
    let parser = load(of_parser, &parser_path)?;
    let shim_library = load(of_shim, &shim_path)?;

    let shim = Functions::of(&shim_library)
        .map_err(|error| unusable(of_shim, &shim_path, error.to_string()))?;
    // SAFETY: the function takes nothing and returns a number.
    let abi = unsafe { (shim.abi)() };
    if abi != ABI {
        let found = format!("interface {abi}, while this mlac speaks {ABI}");
        return Err(unusable(of_shim, &shim_path, found).into());
    }
    let create_builder = symbol(
        &builder,
        of_builder,
        &builder_path,
        b"createInferBuilder_INTERNAL",
    )?;
    let registry = symbol(&builder, of_builder, &builder_path, b"getPluginRegistry")?;
    let create_runtime = symbol(
        &builder,
        of_builder,
        &builder_path,
        b"createInferRuntime_INTERNAL",
    )?;
    let create_parser = symbol(
        &parser,
        of_parser,
        &parser_path,
        b"createNvOnnxParser_INTERNAL",
    )?;
    // SAFETY: NvInferRuntime.h: `int32_t getInferLibVersion()`.
    let version = unsafe {
        let get: libloading::Symbol<'_, GetVersion> = builder
            .get(b"getInferLibVersion")
            .map_err(|error| unusable(of_builder, &builder_path, error.to_string()))?;
        get()
    };
    // SAFETY: the function takes nothing and returns a number.
    let wanted = unsafe { (shim.version)() };
    // RTX changes its tables of virtual functions with every minor version; enterprise TensorRT only adds to them within a major one.
    let serves = match product {
        Product::Rtx => version / 100 == wanted / 100,
        Product::Enterprise => version / 10_000 == wanted / 10_000 && version / 100 >= wanted / 100,
    };
    if !serves {
        let found = format!("version {}", probe::shown(version as u32));
        return Err(unusable(of_builder, &builder_path, found).into());
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
        product,
        shim,
        registry,
        create_builder,
        create_parser,
        create_runtime,
        run: runner(product, &shim_library, of_shim, &shim_path),
        registered: Mutex::new(None),
        version: version as u32,
        path: builder_path,
        plugins,
        _libraries: [builder, parser, shim_library].map(std::mem::ManuallyDrop::new),
    })
}

/// The functions that run engines: only those of enterprise TensorRT, of a shim that has them.
fn runner(
    product: Product,
    shim: &libloading::Library,
    library: Library,
    path: &Path,
) -> std::result::Result<RunFunctions, Refusal> {
    if product == Product::Rtx {
        return Err(Refusal::new(
            product.title(),
            "engines of enterprise TensorRT, which mlac runs",
            "engines of TensorRT for RTX, which it only builds",
            "build with --backend tensorrt, or run them in a program of your own",
        ));
    }
    let functions =
        RunFunctions::of(shim).map_err(|error| unusable(library, path, error.to_string()))?;
    // SAFETY: the function takes nothing and returns a number.
    let abi = unsafe { (functions.abi)() };
    if abi != RUN_ABI {
        let found = format!("interface {abi} to run engines, while this mlac speaks {RUN_ABI}");
        return Err(unusable(library, path, found));
    }
    Ok(functions)
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
