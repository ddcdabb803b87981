//! The CUDA driver through cudarc, opened at run time and probed before use.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use std::ffi::c_void;
use std::fmt::Display;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute_enum as A;
use cudarc::driver::{result, sys};
use mlac_model::Refusal;

use super::check::Region;
use crate::Arch;
use crate::error::{KernelError, Result};

pub(super) fn failed<E: Display>(action: &str) -> impl FnOnce(E) -> KernelError + use<'_, E> {
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

    /// Refuses a kernel for another architecture.
    pub(super) fn expect(&self, arch: Arch, kernel: &str) -> Result<()> {
        if self.capability == arch.capability() {
            return Ok(());
        }
        let (major, minor) = self.capability;
        Err(Refusal::new(
            format!("kernel {kernel}"),
            format!("a GPU of architecture {arch}"),
            format!("{}, compute capability {major}.{minor}", self.name),
            "build the kernel for this GPU's architecture",
        )
        .into())
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
    pub(super) stream: sys::CUstream,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// `kernels/plugin/driver.h` has these of cuda.h too: its assertions have the same sizes, its constants the same numbers.
    #[test]
    fn other_copies_of_the_drivers_types_are_right() {
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
        // So has the operator of ONNX Runtime, in Rust.
        let text = include_str!("../../../ort-ops/src/cuda/driver.rs");
        let pool = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        for line in [
            format!(
                "size_of::<LaunchAttribute>() == {})",
                size_of::<sys::CUlaunchAttribute>()
            ),
            format!(
                "size_of::<LaunchConfig>() == {})",
                size_of::<sys::CUlaunchConfig>()
            ),
            format!(
                "size_of::<TensorMap>() == {})",
                size_of::<sys::CUtensorMap>()
            ),
            format!(
                "size_of::<PoolProps>() == {})",
                size_of::<sys::CUmemPoolProps>()
            ),
            format!(
                "CAPABILITY_MAJOR: c_int = {};",
                A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as u32
            ),
            format!(
                "CAPABILITY_MINOR: c_int = {};",
                A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as u32
            ),
            format!("MAX_DYNAMIC_SHARED: c_int = {};", shared as u32),
            format!("PROGRAMMATIC_SERIALIZATION: c_int = {};", attribute as u32),
            format!("RELEASE_THRESHOLD: c_int = {};", pool as u32),
        ] {
            assert!(text.contains(&line), "driver.rs has no `{line}`");
        }
        assert_eq!(std::mem::offset_of!(sys::CUmemPoolProps, location), 8);
        assert_eq!(std::mem::offset_of!(sys::CUmemPoolProps, maxSize), 24);
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
