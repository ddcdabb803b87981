//! Cubins and launches, as every kernel needs them.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::ffi::{CString, c_void};
use std::ptr;

use cudarc::driver::{result, sys};

use super::check::Region;
use super::driver::{Stream, failed};
use super::recipe::{MAP_BOX, TensorMap};
use crate::desc::Dtype;
use crate::error::Result;

/// A loaded cubin.
pub(super) struct Module(sys::CUmodule);

impl Module {
    pub(super) fn load(cubin: &[u8]) -> Result<Self> {
        // SAFETY: the image is an ELF file that the driver checks; it is copied.
        unsafe { result::module::load_data(cubin.as_ptr().cast()) }
            .map(Self)
            .map_err(failed("load the cubin"))
    }

    pub(super) fn function(&self, name: &str) -> Result<sys::CUfunction> {
        let text = CString::new(name).map_err(failed("name a function"))?;
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.0, text) }
            .map_err(failed("find a function of the cubin"))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// Allows a function so much dynamic shared memory; how many of its CTAs a multiprocessor runs at a time.
pub(super) fn resident(function: sys::CUfunction, threads: u32, shared_bytes: u32) -> Result<u32> {
    // SAFETY: the function exists.
    unsafe {
        result::function::set_function_attribute(
            function,
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            shared_bytes as i32,
        )
    }
    .map_err(failed("reserve shared memory"))?;
    // SAFETY: the function exists.
    unsafe {
        result::occupancy::max_active_block_per_multiprocessor(
            function,
            threads as i32,
            shared_bytes as usize,
        )
    }
    .map(|count| count.max(1) as u32)
    .map_err(failed("count resident CTAs"))
}

/// A tensor of three dimensions, innermost first, without gaps, read in swizzled boxes of 64 x 64 x 1; zeros beyond its edges.
pub(super) fn tensor_map(
    dtype: Dtype,
    region: Region,
    extent: [u64; 3],
) -> Result<sys::CUtensorMap> {
    let strides = [extent[0] * 2, extent[0] * extent[1] * 2];
    let steps = [1_u32; 3];
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    // SAFETY: all arrays have three (strides: two) elements; the map is aligned by its type.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            TensorMap::data_type(dtype),
            3,
            region.address() as *mut c_void,
            extent.as_ptr(),
            strides.as_ptr(),
            MAP_BOX.as_ptr(),
            steps.as_ptr(),
            TensorMap::INTERLEAVE,
            TensorMap::SWIZZLE,
            TensorMap::PROMOTION,
            TensorMap::FILL,
        )
    }
    .result()
    .map_err(failed("describe a tensor"))?;
    Ok(map)
}

/// Launches; `dependent` lets it start while the kernel before it in the stream still runs (the kernel itself waits for its results).
pub(super) fn launch(
    function: sys::CUfunction,
    blocks: u32,
    threads: u32,
    shared: u32,
    stream: &Stream,
    dependent: bool,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream.stream,
        attrs: &raw mut attribute,
        numAttrs: u32::from(dependent),
    };
    // SAFETY: the arguments are those of the function, in its order, and are copied before the call returns; their sizes were checked.
    unsafe {
        sys::cuLaunchKernelEx(
            &raw const config,
            function,
            arguments.as_mut_ptr(),
            ptr::null_mut(),
        )
    }
    .result()
    .map_err(failed("launch a kernel"))
}
