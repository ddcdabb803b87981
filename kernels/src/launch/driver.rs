//! The CUDA driver through cudarc, opened at run time and probed before use.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::ffi::{CString, c_void};
use std::fmt::Display;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute_enum as A;
use cudarc::driver::{result, sys};
use mlac_model::Refusal;

use super::check::{Append, Call, Grids, MAX_PARTS, Region};
use super::recipe::{COMBINE_THREADS, MAP_BOX, PLAN_THREADS, TensorMap};
use crate::config::{AttentionConfig, Kernel};
use crate::desc::{Attention, AttentionDesc, CacheDtype, Dtype};
use crate::error::{KernelError, Result};

fn failed<E: Display>(action: &str) -> impl FnOnce(E) -> KernelError + use<'_, E> {
    move |error| KernelError::Driver {
        action: action.to_owned(),
        message: error.to_string(),
    }
}

struct Context {
    device: sys::CUdevice,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `Device::open`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A GPU with its primary context, current on the thread that opened it.
#[derive(Clone)]
pub struct Device {
    context: Arc<Context>,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    l2_bytes: u64,
    memory_bytes: u64,
}

impl Device {
    /// Opens the GPU of that number.
    ///
    /// # Errors
    /// Found / needed / fix without a driver or a GPU.
    pub fn open(number: u32) -> Result<Self> {
        // cudarc panics when the library is missing, so it is probed first.
        // SAFETY: opening the driver's library has no preconditions.
        if !unsafe { sys::is_culib_present() } {
            return Err(Refusal::new(
                "CUDA driver",
                "libcuda.so.1 of an NVIDIA driver for CUDA 13.0 (580 or later)",
                "no such library",
                "install the NVIDIA driver; in a container, start it with GPU access",
            )
            .into());
        }
        result::init().map_err(failed("start"))?;
        let count = result::device::get_count().map_err(failed("count GPUs"))?;
        if number as i64 >= i64::from(count) {
            return Err(Refusal::new(
                format!("GPU {number}"),
                format!("a number below {count}"),
                "no such GPU",
                "choose another, or start the container with GPU access",
            )
            .into());
        }
        let device = result::device::get(number as i32).map_err(failed("open the GPU"))?;
        // SAFETY: the device exists; the context is released when `Context` is dropped.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(failed("make a context"))?;
        let held = Arc::new(Context { device });
        // SAFETY: the context was retained above.
        unsafe { result::ctx::set_current(context) }.map_err(failed("use the context"))?;
        let attribute = |which| {
            // SAFETY: the device exists.
            unsafe { result::device::get_attribute(device, which) }
                .map(|value| value as u32)
                .map_err(failed("read an attribute of the GPU"))
        };
        Ok(Self {
            name: result::device::get_name(device).map_err(failed("name the GPU"))?,
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: u64::from(attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
            // SAFETY: the device exists.
            memory_bytes: unsafe { result::device::total_mem(device) }
                .map_err(failed("read the GPU's memory"))? as u64,
            context: held,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability: major and minor.
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of its L2 cache.
    pub fn l2_bytes(&self) -> u64 {
        self.l2_bytes
    }

    /// Bytes of its memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Allocates.
    pub fn buffer(&self, bytes: u64) -> Result<Buffer> {
        // SAFETY: a context is current; freed when the buffer is dropped.
        let address = unsafe { result::malloc_sync(bytes.max(256) as usize) }
            .map_err(failed("allocate memory"))?;
        Ok(Buffer {
            region: Region::of(address, bytes),
            _context: Arc::clone(&self.context),
        })
    }

    /// Allocates and fills.
    pub fn upload<T: Copy>(&self, numbers: &[T]) -> Result<Buffer> {
        let buffer = self.buffer(size_of_val(numbers) as u64)?;
        if !numbers.is_empty() {
            // SAFETY: the buffer is as long as the slice.
            unsafe { result::memcpy_htod_sync(buffer.region.address(), numbers) }
                .map_err(failed("copy to the GPU"))?;
        }
        Ok(buffer)
    }

    /// Makes a stream.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream {
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(failed("make a stream"))?,
            _context: Arc::clone(&self.context),
        })
    }

    /// Makes an event.
    pub fn event(&self) -> Result<Event> {
        Ok(Event {
            event: result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(failed("make an event"))?,
            _context: Arc::clone(&self.context),
        })
    }
}

/// Device memory, freed when dropped.
pub struct Buffer {
    region: Region,
    _context: Arc<Context>,
}

impl Buffer {
    /// Its place.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Sets every byte, in the order of the stream.
    pub fn fill(&self, byte: u8, stream: &Stream) -> Result<()> {
        // SAFETY: the memory is this buffer's.
        unsafe {
            result::memset_d8_async(
                self.region.address(),
                byte,
                self.region.bytes() as usize,
                stream.stream,
            )
        }
        .map_err(failed("fill memory"))
    }

    /// Copies from another buffer of at least this size, in the order of the stream.
    pub fn copy_from(&self, other: &Self, bytes: u64, stream: &Stream) -> Result<()> {
        let bytes = bytes.min(self.region.bytes()).min(other.region.bytes());
        // SAFETY: both regions are at least that long.
        unsafe {
            result::memcpy_dtod_async(
                self.region.address(),
                other.region.address(),
                bytes as usize,
                stream.stream,
            )
        }
        .map_err(failed("copy on the GPU"))
    }

    /// Fills it with repetitions of another, in the order of the stream.
    pub fn repeat(&self, pattern: &Self, stream: &Stream) -> Result<()> {
        let mut done = 0;
        while done < self.region.bytes() && pattern.region.bytes() > 0 {
            let bytes = pattern.region.bytes().min(self.region.bytes() - done);
            // SAFETY: both stretches are within their buffers.
            unsafe {
                result::memcpy_dtod_async(
                    self.region.address() + done,
                    pattern.region.address(),
                    bytes as usize,
                    stream.stream,
                )
            }
            .map_err(failed("copy on the GPU"))?;
            done += bytes;
        }
        Ok(())
    }

    /// Writes numbers to its beginning; the work before must be done.
    ///
    /// # Errors
    /// More numbers than there is room for, and the driver's.
    pub fn write<T: Copy>(&self, numbers: &[T]) -> Result<()> {
        let bytes = size_of_val(numbers) as u64;
        if bytes > self.region.bytes() {
            return Err(Refusal::new(
                "numbers for the GPU",
                format!(
                    "at most {} bytes, which the buffer holds",
                    self.region.bytes()
                ),
                format!("{bytes} bytes"),
                "give fewer",
            )
            .into());
        }
        if numbers.is_empty() {
            return Ok(());
        }
        // SAFETY: the buffer is at least as long as the slice.
        unsafe { result::memcpy_htod_sync(self.region.address(), numbers) }
            .map_err(failed("copy to the GPU"))
    }

    /// Reads it back; the work before must be done.
    pub fn download<T: Copy + Default>(&self) -> Result<Vec<T>> {
        self.read(self.region.bytes() as usize / size_of::<T>())
    }

    /// Reads `count` numbers from its beginning, or as many as there are; the work before must be done.
    pub fn read<T: Copy + Default>(&self, count: usize) -> Result<Vec<T>> {
        let count = count.min(self.region.bytes() as usize / size_of::<T>());
        let mut numbers = vec![T::default(); count];
        if !numbers.is_empty() {
            // SAFETY: the slice is no longer than the buffer, and any bits are a number.
            unsafe { result::memcpy_dtoh_sync(&mut numbers, self.region.address()) }
                .map_err(failed("copy from the GPU"))?;
        }
        Ok(numbers)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::buffer`, freed once. An error here has nowhere to go.
        let _ = unsafe { result::free_sync(self.region.address()) };
    }
}

/// An order of work.
pub struct Stream {
    stream: sys::CUstream,
    _context: Arc<Context>,
}

impl Stream {
    /// The driver's handle, for libraries that enqueue work of their own. It lives as long as the stream.
    pub fn handle(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Waits until all of its work is done.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the stream exists.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("finish the work"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

/// A point in a stream's time.
pub struct Event {
    event: sys::CUevent,
    _context: Arc<Context>,
}

impl Event {
    /// Puts it behind the work that the stream has.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both exist.
        unsafe { result::event::record(self.event, stream.stream) }
            .map_err(failed("record an event"))
    }

    /// Microseconds from an earlier event; both must be reached.
    pub fn microseconds_since(&self, start: &Self) -> Result<f64> {
        // SAFETY: both exist.
        unsafe { result::event::elapsed(start.event, self.event) }
            .map(|milliseconds| f64::from(milliseconds) * 1e3)
            .map_err(failed("read the time between events"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

struct Module(sys::CUmodule);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded once, unloaded once.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

/// The kernels of one request on one GPU.
pub struct Decoder {
    desc: AttentionDesc,
    config: AttentionConfig,
    parts: u32,
    decode: sys::CUfunction,
    plan: Option<(sys::CUfunction, sys::CUfunction)>,
    append: Option<sys::CUfunction>,
    _module: Module,
    _device: Device,
}

/// Threads of `mlac_append`.
const APPEND_THREADS: u32 = 128;

impl Decoder {
    /// Loads a cubin.
    ///
    /// # Errors
    /// When the GPU is another architecture, or the driver does not take the cubin.
    pub fn load(
        device: &Device,
        desc: &AttentionDesc,
        config: &AttentionConfig,
        cubin: &[u8],
    ) -> Result<Self> {
        if device.capability != desc.arch.capability() {
            return Err(Refusal::new(
                format!("kernel {}", desc.slug()),
                format!("a GPU of architecture {}", desc.arch),
                format!(
                    "{}, compute capability {}.{}",
                    device.name, device.capability.0, device.capability.1
                ),
                "build the kernel for this GPU's architecture",
            )
            .into());
        }
        // SAFETY: the image is an ELF file that the driver checks; it is copied.
        let module = Module(
            unsafe { result::module::load_data(cubin.as_ptr().cast()) }
                .map_err(failed("load the cubin"))?,
        );
        let function = |name: &str| {
            let text = CString::new(name).map_err(failed("name a function"))?;
            // SAFETY: the module is loaded.
            unsafe { result::module::get_function(module.0, text) }
                .map_err(failed("find a function of the cubin"))
        };
        let decode = function("mlac_decode")?;
        // SAFETY: the function exists.
        unsafe {
            result::function::set_function_attribute(
                decode,
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                config.shared_bytes as i32,
            )
        }
        .map_err(failed("reserve shared memory"))?;
        // SAFETY: the function exists.
        let resident = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(
                decode,
                config.threads as i32,
                config.shared_bytes as usize,
            )
        }
        .map_err(failed("count resident CTAs"))?;
        let plan = if config.planned {
            Some((function("mlac_plan")?, function("mlac_combine")?))
        } else {
            None
        };
        let append = match desc.attention {
            Attention::Latent { .. } => Some(function("mlac_append")?),
            Attention::Grouped { .. } => None,
        };
        Ok(Self {
            desc: *desc,
            config: config.clone(),
            parts: (device.multiprocessors * (resident.max(1) as u32)).min(MAX_PARTS),
            decode,
            plan,
            append,
            _module: module,
            _device: device.clone(),
        })
    }

    /// CTAs that run at a time: what [`Workspace::of`](super::Workspace::of) and [`Call::check`] want.
    pub fn parts(&self) -> u32 {
        self.parts
    }

    /// Checks the arguments, then plans, decodes and combines, in the order of the stream.
    ///
    /// # Errors
    /// What [`Call::check`] refuses; what the driver says.
    pub fn launch(&self, call: &Call, stream: &Stream) -> Result<()> {
        let grids = call.check(&self.desc, &self.config, self.parts)?;
        if let Some((plan, _)) = self.plan {
            let mut params = grids.plan;
            launch(
                plan,
                1,
                PLAN_THREADS,
                0,
                stream,
                false,
                &mut [ptr::from_mut(&mut params).cast()],
            )?;
        }
        let mut params = grids.decode;
        let dependent = self.plan.is_some() && self.desc.arch.has_wgmma();
        let mut maps = self.maps(call, &grids)?;
        let mut arguments = vec![ptr::from_mut(&mut params).cast()];
        arguments.extend(
            maps.iter_mut()
                .map(|map| ptr::from_mut(map).cast::<c_void>()),
        );
        launch(
            self.decode,
            grids.decode_blocks,
            self.config.threads,
            self.config.shared_bytes,
            stream,
            dependent,
            &mut arguments,
        )?;
        if let Some((_, combine)) = self.plan {
            launch(
                combine,
                grids.combine_blocks,
                COMBINE_THREADS,
                0,
                stream,
                self.desc.arch.has_wgmma(),
                &mut [ptr::from_mut(&mut params).cast()],
            )?;
        }
        Ok(())
    }

    /// Checks the arguments, then writes rows into the cache, in the order of the stream.
    ///
    /// # Errors
    /// What [`Append::check`] refuses; what the driver says.
    pub fn append(&self, rows: &Append, stream: &Stream) -> Result<()> {
        let (mut params, blocks) = rows.check(&self.desc)?;
        let Some(function) = self.append else {
            return Err(failed("append")("the request has no latent"));
        };
        launch(
            function,
            blocks,
            APPEND_THREADS,
            0,
            stream,
            false,
            &mut [ptr::from_mut(&mut params).cast()],
        )
    }

    /// The tensor maps that the decode kernel takes, in its order: boxes of 64 columns, 64 rows, one token or page.
    fn maps(&self, call: &Call, grids: &Grids) -> Result<Vec<sys::CUtensorMap>> {
        let desc = &self.desc;
        let (row, page) = (u64::from(desc.row()), u64::from(desc.page));
        let tokens = u64::from(call.batch * desc.query_tokens);
        let queries = (call.q, [row, u64::from(desc.query_heads), tokens]);
        let of_cache = |region| {
            let columns = row * u64::from(desc.kv_heads());
            (region, [columns, page, grids.cache_pages])
        };
        let wanted = match (self.config.kernel, desc.cache) {
            (Kernel::LatentWgmma, CacheDtype::Same) => vec![queries, of_cache(call.cache)],
            (Kernel::LatentWgmma, CacheDtype::E4m3) => vec![queries],
            (Kernel::GroupedWgmma, _) => vec![of_cache(call.cache), of_cache(call.values)],
            (Kernel::LatentMma | Kernel::GroupedMma, _) => Vec::new(),
        };
        wanted
            .into_iter()
            .map(|(region, extent)| tensor_map(desc.dtype, region, extent))
            .collect()
    }
}

/// A tensor of three dimensions, innermost first, without gaps, read in swizzled boxes of 64 x 64 x 1; zeros beyond its edges.
fn tensor_map(dtype: Dtype, region: Region, extent: [u64; 3]) -> Result<sys::CUtensorMap> {
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
fn launch(
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

#[cfg(test)]
mod tests {
    use super::*;

    /// `kernels/plugin/driver.h` has these of cuda.h too: its assertions have the same sizes, its constants the same numbers.
    #[test]
    fn the_plugins_copy_of_the_drivers_types_is_right() {
        let text = include_str!("../../plugin/driver.h");
        let attribute =
            sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let shared =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        for line in [
            format!(
                "sizeof(LaunchAttribute) == {},",
                size_of::<sys::CUlaunchAttribute>()
            ),
            format!(
                "sizeof(LaunchConfig) == {},",
                size_of::<sys::CUlaunchConfig>()
            ),
            format!("sizeof(TensorMap) == {},", size_of::<sys::CUtensorMap>()),
            format!("kProgrammaticSerialization = {};", attribute as u32),
            format!("kMaxDynamicShared = {};", shared as u32),
            format!(
                "kComputeCapabilityMajor = {};",
                A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as u32
            ),
            format!(
                "kComputeCapabilityMinor = {};",
                A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as u32
            ),
        ] {
            assert!(text.contains(&line), "driver.h has no `{line}`");
        }
        assert_eq!(std::mem::offset_of!(sys::CUlaunchAttribute, value), 8);
        assert_eq!(std::mem::offset_of!(sys::CUlaunchConfig, hStream), 32);
        assert_eq!(std::mem::offset_of!(sys::CUlaunchConfig, attrs), 40);
        assert_eq!(std::mem::offset_of!(sys::CUlaunchConfig, numAttrs), 48);
    }

    #[test]
    fn a_missing_driver_is_told_and_not_panicked_about() {
        match Device::open(0) {
            Ok(device) => assert!(device.multiprocessors() > 0),
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains("fix: ") || text.starts_with("CUDA driver: cannot"),
                    "{text}"
                );
            }
        }
    }
}
