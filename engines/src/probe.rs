//! Asking a library for its version without starting it.
#![expect(
    unsafe_code,
    reason = "loading libraries and calling their entry points"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;

/// What a probe came to: a version, or why there is none.
type Probed<T> = Result<T, String>;

fn load(path: &Path) -> Probed<Library> {
    // SAFETY: initialisers of the vendor's library; nothing else of it runs.
    unsafe { Library::new(path) }.map_err(|error| error.to_string())
}

/// Looks a function up and hands it to `call` while the library is loaded.
fn with<F: Copy, T>(library: &Library, name: &str, call: impl FnOnce(F) -> T) -> Probed<T> {
    // SAFETY: callers name functions of a documented C interface with their documented types.
    let function: libloading::Symbol<'_, F> =
        unsafe { library.get(name.as_bytes()) }.map_err(|error| error.to_string())?;
    Ok(call(*function))
}

/// `OrtApiBase` of onnxruntime_c_api.h: fixed since its first version.
#[repr(C)]
struct OrtApiBase {
    get_api: unsafe extern "C" fn(u32) -> *const c_void,
    get_version_string: unsafe extern "C" fn() -> *const c_char,
}

/// For example "1.31.1".
pub(crate) fn onnxruntime(path: &Path) -> Probed<String> {
    let library = load(path)?;
    with(
        &library,
        "OrtGetApiBase",
        |get: unsafe extern "C" fn() -> *const OrtApiBase| {
            // SAFETY: returns a static table or null.
            let base = unsafe { get().as_ref() }.ok_or("OrtGetApiBase gave nothing")?;
            // SAFETY: returns a static C string.
            let version = unsafe { (base.get_version_string)() };
            if version.is_null() {
                return Err("no version".to_owned());
            }
            // SAFETY: not null, static.
            Ok(unsafe { CStr::from_ptr(version) }
                .to_string_lossy()
                .into_owned())
        },
    )?
}

/// For example "1.7.1": `getInferLibVersion` of both TensorRT products, major * 10000 + minor * 100 + patch.
pub(crate) fn tensorrt(path: &Path) -> Probed<String> {
    let library = load(path)?;
    // SAFETY: takes nothing, returns a number.
    let version = with(
        &library,
        "getInferLibVersion",
        |get: unsafe extern "C" fn() -> c_int| unsafe { get() },
    )?;
    // The library starts threads and registers destructors: never unload it.
    std::mem::forget(library);
    Ok(shown(version as u32))
}

/// TensorRT's version number, major * 10000 + minor * 100 + patch, as text.
pub(crate) fn shown(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

/// The TensorRT that a library of mlac's plugin was compiled for, as a number.
pub(crate) fn plugin(path: &Path) -> Probed<u32> {
    let library = load(path)?;
    // SAFETY: kernels/plugin/entry.cpp: takes nothing, returns a number.
    with(
        &library,
        "mlac_trt_plugin_tensorrt",
        |get: unsafe extern "C" fn() -> c_int| unsafe { get() },
    )
    .map(|version| version as u32)
}

/// Whether a library loads at all.
pub(crate) fn loads(path: &Path) -> Probed<()> {
    load(path).map(|_| ())
}

/// What the CUDA driver says.
pub(crate) struct Driver {
    /// The CUDA version that it supports, for example "13.0".
    pub(crate) version: String,
    /// Name and compute capability of each GPU, for example "NVIDIA L4 (sm89)".
    pub(crate) devices: Vec<String>,
}

type CuInt = unsafe extern "C" fn(*mut c_int) -> c_int;
type CuInit = unsafe extern "C" fn(u32) -> c_int;
type CuName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int;
type CuAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int;

fn check(what: &str, status: c_int) -> Probed<()> {
    if status == 0 {
        Ok(())
    } else {
        Err(format!("{what}: CUDA error {status}"))
    }
}

/// A number that a function of the driver writes.
fn number(library: &Library, function: &str) -> Probed<c_int> {
    let mut value = 0;
    let status = with(library, function, |get: CuInt| {
        // SAFETY: writes one number.
        unsafe { get(&raw mut value) }
    })?;
    check(function, status).map(|()| value)
}

/// Initialises the driver and lists its GPUs. cuda.h documents every function used; the attribute
/// numbers 75 and 76 are the compute capability's major and minor.
pub(crate) fn driver(path: &Path) -> Probed<Driver> {
    let library = load(path)?;
    let version = number(&library, "cuDriverGetVersion")?;
    let status = with(&library, "cuInit", |init: CuInit| {
        // SAFETY: takes flags, which must be 0.
        unsafe { init(0) }
    })?;
    check("cuInit", status)?;
    let count = number(&library, "cuDeviceGetCount")?;
    let mut devices = Vec::new();
    // In the driver's interface an ordinal is a device's handle.
    for device in 0..count {
        let mut name = [0 as c_char; 256];
        let status = with(&library, "cuDeviceGetName", |get: CuName| {
            // SAFETY: writes at most 256 bytes, terminated.
            unsafe { get(name.as_mut_ptr(), 256, device) }
        })?;
        check("cuDeviceGetName", status)?;
        let mut capability = [0; 2];
        for (value, attribute) in capability.iter_mut().zip([75, 76]) {
            let status = with(&library, "cuDeviceGetAttribute", |get: CuAttribute| {
                // SAFETY: writes one number.
                unsafe { get(std::ptr::from_mut(value), attribute, device) }
            })?;
            check("cuDeviceGetAttribute", status)?;
        }
        name[255] = 0;
        // SAFETY: terminated within the array.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        devices.push(format!("{name} (sm{}{})", capability[0], capability[1]));
    }
    // The driver must not be unloaded once it was initialised.
    std::mem::forget(library);
    Ok(Driver {
        version: format!("{}.{}", version / 1000, version % 1000 / 10),
        devices,
    })
}
