//! The shim's C functions (engines/shim/shim.cpp, run.cpp). Keep the two in step.
#![expect(unsafe_code, reason = "foreign functions")]

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

/// Version of the functions below; the shim must say the same.
pub(super) const ABI: i32 = 3;

/// Version of the functions that run engines; the shim must say the same.
pub(super) const RUN_ABI: i32 = 1;

/// A network being built. Opaque.
#[repr(C)]
pub(super) struct Build {
    _private: [u8; 0],
}

/// A build configuration. Opaque.
#[repr(C)]
pub(super) struct Config {
    _private: [u8; 0],
}

/// A serialized engine in TensorRT's memory. Opaque.
#[repr(C)]
pub(super) struct Memory {
    _private: [u8; 0],
}

/// An engine with its runtime. Opaque.
#[repr(C)]
pub(super) struct Engine {
    _private: [u8; 0],
}

/// An execution context. Opaque.
#[repr(C)]
pub(super) struct Context {
    _private: [u8; 0],
}

/// `MlacTrtTensor`
#[repr(C)]
pub(super) struct Tensor {
    pub(super) name: *const c_char,
    pub(super) dtype: i32,
    pub(super) rank: i32,
    pub(super) dims: [i64; 8],
    pub(super) symbols: [*const c_char; 8],
}

impl Tensor {
    /// A place for an answer.
    pub(super) fn unknown() -> Self {
        Self {
            name: std::ptr::null(),
            dtype: -1,
            rank: 0,
            dims: [0; 8],
            symbols: [std::ptr::null(); 8],
        }
    }
}

/// `MlacTrtParseError`
#[repr(C)]
pub(super) struct ParseError {
    pub(super) code: i32,
    pub(super) node: i32,
    pub(super) text: *const c_char,
    pub(super) node_name: *const c_char,
    pub(super) node_operator: *const c_char,
}

/// Called by TensorRT, possibly from threads of its own.
pub(super) type Log = extern "C" fn(user: *mut c_void, severity: i32, text: *const c_char);

macro_rules! functions {
    ($(#[$about:meta])* $name:ident: $($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        $(#[$about])*
        pub(super) struct $name {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $name {
            /// Looks every function up.
            pub(super) fn of(shim: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of engines/shim; `library` checks the ABI
                // number before it calls any other function, and keeps the library loaded.
                unsafe {
                    Ok(Self { $($field: *shim.get($symbol)?,)* })
                }
            }
        }
    };
}

functions! {
    /// The shim's functions that build.
    Functions:
    abi = b"mlac_trt_shim_abi": fn() -> i32;
    version = b"mlac_trt_shim_version": fn() -> i32;
    plugin_name = b"mlac_trt_plugin_name": fn(*mut c_void, i32) -> *const c_char;
    open = b"mlac_trt_open": fn(*mut c_void, *mut c_void, Log, *mut c_void) -> *mut Build;
    close = b"mlac_trt_close": fn(*mut Build);
    parse_file = b"mlac_trt_parse_file": fn(*mut Build, *const c_char) -> i32;
    parse_bytes = b"mlac_trt_parse_bytes": fn(*mut Build, *const c_void, u64, *const c_char) -> i32;
    load_plugins = b"mlac_trt_load_plugins": fn(*mut c_void, *const c_char) -> i32;
    error_count = b"mlac_trt_error_count": fn(*mut Build) -> i32;
    error = b"mlac_trt_error": fn(*mut Build, i32, *mut ParseError) -> i32;
    tensor_count = b"mlac_trt_tensor_count": fn(*mut Build, i32) -> i32;
    tensor = b"mlac_trt_tensor": fn(*mut Build, i32, i32, *mut Tensor) -> i32;
    layer_count = b"mlac_trt_layer_count": fn(*mut Build) -> i32;
    attention_decomposable = b"mlac_trt_attention_decomposable": fn(*mut Build, i32) -> i32;
    config = b"mlac_trt_config": fn(*mut Build, *const i32, i32, i32) -> *mut Config;
    config_free = b"mlac_trt_config_free": fn(*mut Config);
    timing_set = b"mlac_trt_timing_set": fn(*mut Config, *const c_void, u64) -> i32;
    timing_get = b"mlac_trt_timing_get": fn(*mut Config) -> *mut Memory;
    profile_begin = b"mlac_trt_profile_begin": fn(*mut Build, *mut Config) -> i32;
    profile_shape = b"mlac_trt_profile_shape": fn(*mut Config, *const c_char, i32, *const i64, *const i64, *const i64) -> i32;
    profile_finish = b"mlac_trt_profile_finish": fn(*mut Config) -> i32;
    build = b"mlac_trt_build": fn(*mut Build, *mut Config) -> *mut Memory;
    bytes = b"mlac_trt_bytes": fn(*mut Memory, *mut u64) -> *const c_void;
    bytes_free = b"mlac_trt_bytes_free": fn(*mut Memory);
}

functions! {
    /// The shim's functions that run engines.
    RunFunctions:
    abi = b"mlac_trt_run_abi": fn() -> i32;
    open = b"mlac_trt_engine_open": fn(*mut c_void, *const c_void, u64, Log, *mut c_void) -> *mut Engine;
    close = b"mlac_trt_engine_close": fn(*mut Engine);
    tensor_count = b"mlac_trt_engine_tensor_count": fn(*mut Engine) -> i32;
    tensor = b"mlac_trt_engine_tensor": fn(*mut Engine, i32, *mut Tensor) -> i32;
    alias = b"mlac_trt_engine_alias": fn(*mut Engine, *const c_char) -> *const c_char;
    profile_count = b"mlac_trt_engine_profile_count": fn(*mut Engine) -> i32;
    profile = b"mlac_trt_engine_profile": fn(*mut Engine, *const c_char, i32, i32, *mut i64) -> i32;
    context_open = b"mlac_trt_context_open": fn(*mut Engine, i32, *mut c_void) -> *mut Context;
    context_close = b"mlac_trt_context_close": fn(*mut Context);
    context_shape = b"mlac_trt_context_shape": fn(*mut Context, *const c_char, i32, *const i64) -> i32;
    context_tensor = b"mlac_trt_context_tensor": fn(*mut Context, *const c_char, *mut i64) -> i32;
    context_address = b"mlac_trt_context_address": fn(*mut Context, *const c_char, u64) -> i32;
    context_run = b"mlac_trt_context_run": fn(*mut Context, *mut c_void) -> i32;
}

/// `getInferLibVersion`, `getNvOnnxParserVersion`
pub(super) type GetVersion = unsafe extern "C" fn() -> c_int;
