//! The CUDA driver's functions that a step calls, opened at run time.
//!
//! CUDA's own headers are not needed: these are the types and numbers of cuda.h that its interface fixes.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use libloading::Library;

use crate::refusal::{Refusal, refuse};

/// A device address, `CUdeviceptr`.
pub(crate) type Address = u64;
pub(crate) type Stream = *mut c_void;
pub(super) type Context = *mut c_void;
pub(super) type Module = *mut c_void;
pub(super) type Function = *mut c_void;
pub(super) type Pool = *mut c_void;

const LIBRARY: &str = "libcuda.so.1";
const NEEDED: &str = "libcuda.so.1 of an NVIDIA driver for CUDA 13.0 (580 or later)";
const FIX: &str = "install the NVIDIA driver; in a container, start it with GPU access";

const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const MAX_DYNAMIC_SHARED: c_int = 8;
const PROGRAMMATIC_SERIALIZATION: c_int = 6;
const RELEASE_THRESHOLD: c_int = 4;

/// `CUlaunchAttribute`.
#[repr(C)]
struct LaunchAttribute {
    id: c_int,
    pad: [u8; 4],
    allowed: c_int,
    rest: [u32; 15],
}

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Stream,
    attributes: *mut LaunchAttribute,
    attribute_count: c_uint,
}

/// `CUtensorMap`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap([u64; 16]);

/// `CUmemPoolProps`: memory of a device, not shared with other processes.
#[repr(C)]
struct PoolProps {
    alloc_type: c_int,
    handle_types: c_int,
    location_type: c_int,
    location: c_int,
    security: *mut c_void,
    max_size: usize,
    usage: u16,
    reserved: [u8; 54],
}

const _: () = assert!(size_of::<LaunchAttribute>() == 72);
const _: () = assert!(size_of::<LaunchConfig>() == 56);
const _: () = assert!(size_of::<TensorMap>() == 128);
const _: () = assert!(size_of::<PoolProps>() == 88);

macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// The functions, resolved once.
        pub(super) struct Driver {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Driver {
            fn resolve(library: &Library) -> Result<Self, Refusal> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the type is the one that cuda.h gives to this function.
                        let symbol = unsafe { library.get($symbol.as_bytes()) };
                        *symbol.map_err(|_| {
                            let found = format!("a library without {}", $symbol);
                            refuse("CUDA driver", NEEDED, found, FIX)
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    error_name = "cuGetErrorName": fn(c_int, *mut *const c_char);
    error_string = "cuGetErrorString": fn(c_int, *mut *const c_char);
    current_context = "cuCtxGetCurrent": fn(*mut Context);
    current_device = "cuCtxGetDevice": fn(*mut c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    module_load = "cuModuleLoadData": fn(*mut Module, *const c_void);
    module_unload = "cuModuleUnload": fn(Module);
    module_function = "cuModuleGetFunction": fn(*mut Function, Module, *const c_char);
    function_attribute = "cuFuncSetAttribute": fn(Function, c_int, c_int);
    copy_async = "cuMemcpyDtoDAsync_v2": fn(Address, Address, usize, Stream);
    pool_create = "cuMemPoolCreate": fn(*mut Pool, *const PoolProps);
    pool_attribute = "cuMemPoolSetAttribute": fn(Pool, c_int, *mut c_void);
    allocate = "cuMemAllocFromPoolAsync": fn(*mut Address, usize, Pool, Stream);
    free = "cuMemFreeAsync": fn(Address, Stream);
    launch = "cuLaunchKernelEx": fn(*const LaunchConfig, Function, *mut *mut c_void, *mut *mut c_void);
    encode_tiled = "cuTensorMapEncodeTiled": fn(*mut TensorMap, c_int, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32,
        c_int, c_int, c_int, c_int);
}

/// Sizes of one launch.
pub(super) struct Grid {
    pub(super) blocks: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    /// May start while the kernel before it still runs.
    pub(super) dependent: bool,
}

impl Driver {
    /// Opened at the first call and kept; without a driver every call says what is missing.
    pub(super) fn get() -> Result<&'static Self, Refusal> {
        static OPENED: Mutex<Option<&'static Driver>> = Mutex::new(None);
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = *opened {
            return Ok(driver);
        }
        // SAFETY: opening the driver's library has no preconditions.
        let library = unsafe { Library::new(LIBRARY) }
            .map_err(|error| refuse("CUDA driver", NEEDED, error.to_string(), FIX))?;
        let driver = Self::resolve(&library)?;
        // SAFETY: the driver takes no flags.
        driver.check(unsafe { (driver.init)(0) }, "start")?;
        // Never closed: the driver's threads outlive every object of ours.
        std::mem::forget(library);
        let driver: &'static Self = Box::leak(Box::new(driver));
        *opened = Some(driver);
        Ok(driver)
    }

    fn check(&self, status: c_int, action: &str) -> Result<(), Refusal> {
        if status == 0 {
            return Ok(());
        }
        let words = |ask: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: there is a place for the pointer; the driver's texts are static.
            unsafe {
                ask(status, &raw mut text);
                if text.is_null() {
                    "no description".to_owned()
                } else {
                    CStr::from_ptr(text).to_string_lossy().into_owned()
                }
            }
        };
        let (name, words) = (words(self.error_name), words(self.error_string));
        let found = format!("{name} ({status}), {words}");
        Err(refuse(
            "CUDA driver",
            format!("that it can {action}"),
            found,
            "see the driver's message; an earlier fault of the process shows here too",
        ))
    }

    /// The context that is current on this thread, and its device.
    pub(super) fn context(&self) -> Result<(Context, c_int), Refusal> {
        let (mut context, mut device) = (ptr::null_mut(), 0);
        // SAFETY: there is a place for each answer.
        unsafe {
            let status = (self.current_context)(&raw mut context);
            self.check(status, "tell the current context")?;
            if context.is_null() {
                return Err(refuse(
                    "CUDA context",
                    "one that is current on this thread",
                    "none",
                    "run the node on ONNX Runtime's CUDAExecutionProvider",
                ));
            }
            let status = (self.current_device)(&raw mut device);
            self.check(status, "tell the current device")?;
        }
        Ok((context, device))
    }

    /// Compute capability of a device: major and minor.
    pub(super) fn capability(&self, device: c_int) -> Result<(u32, u32), Refusal> {
        let ask = |attribute| {
            let mut value = 0;
            // SAFETY: there is a place for the answer.
            let status = unsafe { (self.device_attribute)(&raw mut value, attribute, device) };
            self.check(status, "tell the compute capability")?;
            Ok(value as u32)
        };
        Ok((ask(CAPABILITY_MAJOR)?, ask(CAPABILITY_MINOR)?))
    }

    pub(super) fn load(&self, cubin: &[u8]) -> Result<Module, Refusal> {
        let mut module = ptr::null_mut();
        // SAFETY: the image is an ELF file that the driver checks; it is copied.
        let status = unsafe { (self.module_load)(&raw mut module, cubin.as_ptr().cast()) };
        self.check(status, "load the cubin")?;
        Ok(module)
    }

    /// # Safety
    /// The module is loaded, and nothing launches its functions any more.
    pub(super) unsafe fn unload(&self, module: Module) {
        // SAFETY: the caller's promise. A status here has nowhere to go.
        let _ = unsafe { (self.module_unload)(module) };
    }

    /// A function of a loaded module, with so much dynamic shared memory allowed.
    ///
    /// # Safety
    /// The module is loaded.
    pub(super) unsafe fn function(
        &self,
        module: Module,
        name: &CStr,
        shared_bytes: u32,
    ) -> Result<Function, Refusal> {
        let mut function = ptr::null_mut();
        // SAFETY: the caller's promise; the name ends with 0.
        unsafe {
            let status = (self.module_function)(&raw mut function, module, name.as_ptr());
            self.check(status, "find a function of the cubin")?;
            if shared_bytes > 0 {
                let status =
                    (self.function_attribute)(function, MAX_DYNAMIC_SHARED, shared_bytes as c_int);
                self.check(status, "reserve shared memory")?;
            }
        }
        Ok(function)
    }

    /// # Safety
    /// Both stretches are memory of the device that is current, and stay until the copy is done.
    pub(super) unsafe fn copy(
        &self,
        to: Address,
        from: Address,
        bytes: usize,
        stream: Stream,
    ) -> Result<(), Refusal> {
        // SAFETY: the caller's promise.
        let status = unsafe { (self.copy_async)(to, from, bytes, stream) };
        self.check(status, "copy the cache")
    }

    /// A pool of the device's memory that keeps what is given back to it, for the next step.
    pub(super) fn pool(&self, device: c_int) -> Result<Pool, Refusal> {
        let props = PoolProps {
            alloc_type: 1,    // pinned
            handle_types: 0,  // none
            location_type: 1, // a device
            location: device,
            security: ptr::null_mut(),
            max_size: 0,
            usage: 0,
            reserved: [0; 54],
        };
        let (mut pool, mut all) = (ptr::null_mut(), u64::MAX);
        // SAFETY: both structures outlive the calls.
        unsafe {
            let status = (self.pool_create)(&raw mut pool, &raw const props);
            self.check(status, "make a pool of memory")?;
            let status = (self.pool_attribute)(pool, RELEASE_THRESHOLD, (&raw mut all).cast());
            self.check(status, "set up a pool of memory")?;
        }
        Ok(pool)
    }

    /// Memory for the work that follows on the stream.
    ///
    /// # Safety
    /// Pool and stream exist.
    pub(super) unsafe fn allocate(
        &self,
        bytes: usize,
        pool: Pool,
        stream: Stream,
    ) -> Result<Address, Refusal> {
        let mut address = 0;
        // SAFETY: the caller's promise.
        let status = unsafe { (self.allocate)(&raw mut address, bytes, pool, stream) };
        self.check(status, &format!("allocate {bytes} bytes of workspace"))?;
        Ok(address)
    }

    /// Gives memory back when the work before on the stream is done.
    ///
    /// # Safety
    /// [`allocate`](Self::allocate) gave it for this stream.
    pub(super) unsafe fn free(&self, address: Address, stream: Stream) -> Result<(), Refusal> {
        // SAFETY: the caller's promise.
        let status = unsafe { (self.free)(address, stream) };
        self.check(status, "give the workspace back")
    }

    /// # Safety
    /// The arguments are those of the function, in its order, and what they point to on the device stays until the stream is done.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        grid: &Grid,
        stream: Stream,
        arguments: &mut [*mut c_void],
    ) -> Result<(), Refusal> {
        let mut attribute = LaunchAttribute {
            id: PROGRAMMATIC_SERIALIZATION,
            pad: [0; 4],
            allowed: 1,
            rest: [0; 15],
        };
        let config = LaunchConfig {
            grid: [grid.blocks, 1, 1],
            block: [grid.threads, 1, 1],
            shared_bytes: grid.shared_bytes,
            stream,
            attributes: &raw mut attribute,
            attribute_count: u32::from(grid.dependent),
        };
        // SAFETY: the caller's promise; the arguments are copied before the call returns.
        let status = unsafe {
            (self.launch)(
                &raw const config,
                function,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.check(status, "launch a kernel")
    }

    /// A tensor of three dimensions without gaps, of 2-byte elements.
    pub(super) fn map(
        &self,
        words: [c_int; 5],
        address: Address,
        extents: [u64; 3],
        edges: [u32; 3],
    ) -> Result<TensorMap, Refusal> {
        let mut map = TensorMap([0; 16]);
        let strides = [extents[0] * 2, extents[0] * extents[1] * 2];
        let steps = [1_u32; 3];
        let [data_type, interleave, swizzle, promotion, fill] = words;
        // SAFETY: all arrays have three (strides: two) elements; the address is only noted down.
        let status = unsafe {
            (self.encode_tiled)(
                &raw mut map,
                data_type,
                3,
                address as *mut c_void,
                extents.as_ptr(),
                strides.as_ptr(),
                edges.as_ptr(),
                steps.as_ptr(),
                interleave,
                swizzle,
                promotion,
                fill,
            )
        };
        self.check(status, "describe a tensor")?;
        Ok(map)
    }
}
