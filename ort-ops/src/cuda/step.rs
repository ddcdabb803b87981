//! One step: a kernel's recipe followed with the tensors of a call.

use std::ffi::{CString, c_int, c_void};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use super::bundle::Bundle;
use super::driver::{Address, Driver, Function, Grid, Module, Pool, Stream, TensorMap};
use super::recipe::{Argument, Kernel, Map, Number, Place, TENSORS, Value};
use crate::refusal::{Refusal, refuse};

/// Regions of the workspace begin at multiples of this.
const ALIGNMENT: u64 = 256;

/// What a call brings.
pub(crate) struct Call {
    /// In the order of [`TENSORS`]; absent ones are 0. Where the LSE is absent it goes to the workspace.
    pub(crate) tensors: [Address; TENSORS.len()],
    pub(crate) batch: i32,
    /// Columns of the page table.
    pub(crate) page_stride: i32,
    pub(crate) cache_pages: i32,
    pub(crate) scale: f32,
}

/// Where each region begins, and where the last one ends.
fn places(kernel: &Kernel, batch: i32, page_stride: i32) -> (Vec<u64>, u64) {
    let (batch, stride) = (batch as u64, page_stride as u64);
    let mut next = 0_u64;
    let begins = kernel
        .regions
        .iter()
        .map(|region| {
            let begin = next;
            let bytes =
                region.fixed + region.per_request * batch + region.per_entry * batch * stride;
            next = (begin + bytes).next_multiple_of(ALIGNMENT);
            begin
        })
        .collect();
    (begins, next)
}

/// Copies within the device's memory, in the order of the stream.
///
/// # Safety
/// Both stretches are memory of the device that is current, and stay until the copy is done.
pub(crate) unsafe fn copy(
    to: Address,
    from: Address,
    bytes: usize,
    stream: Stream,
) -> Result<(), Refusal> {
    let driver = Driver::get()?;
    driver.context()?;
    // SAFETY: the caller's promise.
    unsafe { driver.copy(to, from, bytes, stream) }
}

/// A device's pool, which all nodes share: a step's workspace serves the next node.
fn pool(driver: &Driver, device: c_int) -> Result<Pool, Refusal> {
    static POOLS: Mutex<Vec<(c_int, usize)>> = Mutex::new(Vec::new());
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, pool)) = pools.iter().find(|(of, _)| *of == device) {
        return Ok(*pool as Pool);
    }
    let pool = driver.pool(device)?;
    pools.push((device, pool as usize));
    Ok(pool)
}

/// A kernel loaded into the context that was current then.
pub(crate) struct Loaded {
    driver: &'static Driver,
    /// An address: contexts are compared and never followed.
    context: usize,
    module: Module,
    /// As the recipe's launches.
    functions: Vec<Function>,
    pool: Pool,
}

// SAFETY: modules, functions and pools belong to a context, not to a thread; the driver's functions may be called from any.
unsafe impl Send for Loaded {}
// SAFETY: as above; nothing of it changes once it is made.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Refuses without a driver or context, on a GPU of another architecture, and what the driver does not take.
    pub(crate) fn new(bundle: &Bundle, place: usize) -> Result<Self, Refusal> {
        let (driver, kernel) = (Driver::get()?, bundle.kernel(place));
        let (context, device) = driver.context()?;
        let found = driver.capability(device)?;
        if found != kernel.capability {
            let (major, minor) = kernel.capability;
            return Err(refuse(
                &format!("kernel {}", kernel.name),
                format!("a GPU of compute capability {major}.{minor}"),
                format!("one of {}.{}", found.0, found.1),
                "bundle kernels for this GPU",
            ));
        }
        let mut loaded = Self {
            driver,
            context: context as usize,
            module: driver.load(bundle.cubin(place))?,
            functions: Vec::new(),
            pool: pool(driver, device)?,
        };
        for launch in &kernel.launches {
            let name = CString::new(launch.function.as_str()).unwrap_or_default();
            // SAFETY: the module was loaded above.
            let function = unsafe { driver.function(loaded.module, &name, launch.shared_bytes)? };
            loaded.functions.push(function);
        }
        Ok(loaded)
    }

    /// Whether it can be launched on this thread.
    pub(crate) fn is_of_current_context(&self) -> Result<bool, Refusal> {
        Ok(self.driver.context()?.0 as usize == self.context)
    }

    /// Launches everything on the stream, in the recipe's order.
    ///
    /// # Safety
    /// The tensors are memory of the device, of the shapes that kernel and call say, and stay until the stream is done; the
    /// kernel is the one that this was loaded for.
    pub(crate) unsafe fn run(
        &self,
        kernel: &Kernel,
        call: &Call,
        stream: Stream,
    ) -> Result<(), Refusal> {
        let (begins, bytes) = places(kernel, call.batch, call.page_stride);
        let rows = call.batch as u64 * (kernel.query_tokens * kernel.heads) as u64;
        let unwanted = if call.tensors[LSE] == 0 { rows * 4 } else { 0 };
        // SAFETY: the pool lives as long as the process, the stream is the caller's.
        let workspace = unsafe {
            self.driver.allocate(
                (bytes + unwanted).max(ALIGNMENT) as usize,
                self.pool,
                stream,
            )?
        };
        let mut tensors = call.tensors;
        if unwanted > 0 {
            tensors[LSE] = workspace + bytes;
        }
        let regions: Vec<Address> = begins.iter().map(|begin| workspace + begin).collect();
        let arguments = Arguments {
            driver: self.driver,
            kernel,
            call,
            tensors,
            regions,
        };
        let launched =
            kernel
                .launches
                .iter()
                .zip(&self.functions)
                .try_for_each(|(launch, &function)| {
                    let work = launch.fixed + launch.per_request * call.batch as u64;
                    let grid = Grid {
                        blocks: narrow(work.div_ceil(launch.divisor))?,
                        threads: launch.threads,
                        shared_bytes: launch.shared_bytes,
                        dependent: launch.dependent,
                    };
                    let mut held = launch
                        .arguments
                        .iter()
                        .map(|argument| arguments.of(argument))
                        .collect::<Result<Vec<_>, _>>()?;
                    let mut pointers: Vec<*mut c_void> =
                        held.iter_mut().map(Held::pointer).collect();
                    // SAFETY: the recipe describes the function's arguments; tensors are the caller's promise.
                    unsafe { self.driver.launch(function, &grid, stream, &mut pointers) }
                });
        // SAFETY: allocated above for this stream. It is given back also when a launch was refused.
        let freed = unsafe { self.driver.free(workspace, stream) };
        launched.and(freed)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: loaded once; the runtime destroys a node when its runs are done.
        unsafe { self.driver.unload(self.module) };
    }
}

fn narrow(value: u64) -> Result<u32, Refusal> {
    i32::try_from(value).map(|value| value as u32).map_err(|_| {
        let found = value.to_string();
        refuse("step", "numbers of 31 bits", found, "divide the cache")
    })
}

/// An argument while its launch is made.
enum Held {
    /// Words, for their alignment.
    Block(Vec<u64>),
    Map(Box<TensorMap>),
}

impl Held {
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Self::Block(words) => words.as_mut_ptr().cast(),
            Self::Map(map) => ptr::from_mut(&mut **map).cast(),
        }
    }
}

/// What the arguments of all launches are made from.
struct Arguments<'a> {
    driver: &'static Driver,
    kernel: &'a Kernel,
    call: &'a Call,
    /// The call's, and a place for what it does not want.
    tensors: [Address; TENSORS.len()],
    regions: Vec<Address>,
}

impl Arguments<'_> {
    fn address(&self, place: Place) -> Address {
        match place {
            Place::Tensor(tensor) => self.tensors[tensor],
            Place::Region(region) => {
                // Whoever brings a page table needs no made one.
                let given = self.tensors[PAGE_TABLE];
                if given != 0 && self.kernel.regions[region].name == "pages" {
                    given
                } else {
                    self.regions[region]
                }
            }
        }
    }

    fn of(&self, argument: &Argument) -> Result<Held, Refusal> {
        match argument {
            Argument::Block(bytes, fields) => Ok(Held::Block(self.block(*bytes, fields))),
            Argument::Map(map) => self.map(map).map(|map| Held::Map(Box::new(map))),
        }
    }

    fn block(&self, bytes: usize, fields: &[(usize, Value)]) -> Vec<u64> {
        let mut block = vec![0_u8; bytes.next_multiple_of(8)];
        let call = self.call;
        for &(offset, value) in fields {
            let mut put = |bytes: &[u8]| block[offset..offset + bytes.len()].copy_from_slice(bytes);
            match value {
                Value::Pointer(place) => put(&self.address(place).to_ne_bytes()),
                Value::Constant(constant) => put(&constant.to_ne_bytes()),
                Value::Number(Number::Batch) => put(&call.batch.to_ne_bytes()),
                Value::Number(Number::PageStride) => put(&call.page_stride.to_ne_bytes()),
                Value::Number(Number::CachePages) => put(&call.cache_pages.to_ne_bytes()),
                Value::Number(Number::Scale) => put(&call.scale.to_ne_bytes()),
            }
        }
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        };
        block.chunks_exact(8).map(word).collect()
    }

    fn map(&self, map: &Map) -> Result<TensorMap, Refusal> {
        let last =
            map.per_request * self.call.batch as u64 + map.per_page * self.call.cache_pages as u64;
        let extents = [map.extents[0], map.extents[1], last];
        self.driver
            .map(map.words, self.address(map.place), extents, map.edges)
    }
}

/// Indices of `page_table` and `lse` in [`TENSORS`].
const PAGE_TABLE: usize = 4;
const LSE: usize = 8;
