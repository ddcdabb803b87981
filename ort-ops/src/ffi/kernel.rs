//! One node on the CPU: a run from the runtime's tensors to [`crate::attention`].

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;

use half::{bf16, f16};
use ort_sys::{ONNXTensorElementDataType as Type, OrtErrorCode, OrtKernelContext, OrtKernelInfo};

use super::Node;
use super::api::{Api, Result, Tensor};
use super::node::{Attributes, INPUTS, inputs};
use crate::attention::{Inputs, Pool, Shape, Step, append, attend, copy};
use crate::element::Element;
use crate::products::Isa;
use crate::refusal::Refusal;

/// A node's attributes and what runs it.
pub(super) struct Kernel {
    api: Api,
    attributes: Attributes,
    isa: Isa,
    threads: usize,
}

impl Node for Kernel {
    unsafe fn new(api: Api, info: *const OrtKernelInfo, _: Type) -> Result<Self> {
        Ok(Self {
            api,
            // SAFETY: the caller's promise.
            attributes: unsafe { Attributes::read(api, info)? },
            isa: Isa::available()[0],
            threads: available_parallelism().map_or(1, usize::from),
        })
    }

    fn api(&self) -> Api {
        self.api
    }

    unsafe fn run(&self, context: *mut OrtKernelContext) -> Result<()> {
        // SAFETY: the caller's promise.
        let inputs = unsafe { inputs(self.api, context)? };
        let invalid = |refusal: Refusal| {
            self.api
                .status(OrtErrorCode::ORT_INVALID_ARGUMENT, &refusal.to_string())
        };
        let shape = self.attributes.shape(&inputs).map_err(invalid)?;
        let pool = OrtPool {
            api: self.api,
            context,
            threads: self.threads,
            broken: AtomicBool::new(false),
        };
        let element = inputs[0].as_ref().map(|query| query.element);
        // SAFETY: the runtime checked the inputs' types against the operator's, which are those of the arms.
        let ran = unsafe {
            match element {
                Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) => {
                    self.typed::<f16>(shape, &inputs, &pool)
                }
                Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16) => {
                    self.typed::<bf16>(shape, &inputs, &pool)
                }
                _ => self.typed::<f32>(shape, &inputs, &pool),
            }
        };
        ran?.map_err(invalid)?;
        if pool.broken.into_inner() {
            let message = "mlac::LatentAttention: a mistake in the operator, in one of its tasks";
            return Err(self
                .api
                .status(OrtErrorCode::ORT_RUNTIME_EXCEPTION, message));
        }
        Ok(())
    }
}

impl Kernel {
    /// # Safety
    /// The inputs are this run's, of the operator's types with `T` for the cached numbers, and have the shapes of `shape`.
    unsafe fn typed<T: Element>(
        &self,
        shape: Shape,
        inputs: &[Option<Tensor>; INPUTS.len()],
        pool: &OrtPool,
    ) -> Result<std::result::Result<(), Refusal>> {
        // SAFETY: the caller's promise; the runtime changes no input during a run, but for a cache that is also the output.
        unsafe {
            let given = Inputs {
                query: all::<T>(inputs[0].as_ref()).unwrap_or_default(),
                new_rows: all::<T>(inputs[1].as_ref()).unwrap_or_default(),
                past_lengths: all(inputs[3].as_ref()).unwrap_or_default(),
                page_table: all(inputs[4].as_ref()),
                sinks: all(inputs[5].as_ref()),
                tree_mask: all(inputs[6].as_ref()),
                key_mask: all(inputs[7].as_ref()),
            };
            let step = match Step::new(shape, given) {
                Ok(step) => step,
                Err(refusal) => return Ok(Err(refusal)),
            };
            let out = |index: usize, shape: &[usize]| self.api.output(pool.context, index, shape);
            let Shape {
                batch,
                query_tokens,
                heads,
                ..
            } = shape;
            let sums = out(0, &[batch, query_tokens, heads, shape.kv_lora_rank])?;
            let lse = out(2, &[batch, query_tokens, heads])?;
            let cache = inputs[2].as_ref();
            let cache_out = out(1, cache.map_or(&[], |cache| &cache.shape))?;
            let sums = all_mut::<T>(sums.as_ref()).unwrap_or_default();
            let lse = all_mut::<f32>(lse.as_ref());
            let rows = all::<T>(cache).unwrap_or_default();
            attend(&step, rows, sums, lse, self.isa, pool);
            // The attention is done: from here on the cache is only written.
            let same = cache.map(|t| t.data) == cache_out.as_ref().map(|t| t.data);
            let kept = all_mut::<T>(cache_out.as_ref()).unwrap_or_default();
            if !same {
                copy(all::<T>(cache).unwrap_or_default(), kept, pool);
            }
            append(&step, kept);
        }
        Ok(Ok(()))
    }
}

/// # Safety
/// The tensor is this run's, holds numbers of type `T`, and nobody writes to it while the slice is used.
unsafe fn all<'a, T>(tensor: Option<&Tensor>) -> Option<&'a [T]> {
    let tensor = tensor?;
    if tensor.count() == 0 {
        return Some(&[]);
    }
    // SAFETY: the caller's promise; the runtime aligns its tensors, and those given to it are of their type.
    Some(unsafe { std::slice::from_raw_parts(tensor.data.cast::<T>(), tensor.count()) })
}

/// # Safety
/// As for [`all`], and nobody else reads or writes it while the slice is used.
unsafe fn all_mut<'a, T>(tensor: Option<&Tensor>) -> Option<&'a mut [T]> {
    let tensor = tensor?;
    if tensor.count() == 0 {
        return Some(&mut []);
    }
    // SAFETY: as above.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data.cast::<T>(), tensor.count()) })
}

/// The session's threads.
struct OrtPool {
    api: Api,
    context: *mut OrtKernelContext,
    threads: usize,
    /// A task panicked.
    broken: AtomicBool,
}

/// A task on its way through C.
struct Task<'a> {
    run: &'a (dyn Fn(usize) + Sync),
    broken: &'a AtomicBool,
}

unsafe extern "C" fn trampoline(task: *mut c_void, index: usize) {
    // SAFETY: the task that `run` passed, which waits until all are done.
    let task = unsafe { &*task.cast::<Task<'_>>() };
    if catch_unwind(AssertUnwindSafe(|| (task.run)(index))).is_err() {
        task.broken.store(true, Ordering::Relaxed);
    }
}

impl Pool for OrtPool {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let mut task = Task {
            run: task,
            broken: &self.broken,
        };
        if count == 0 {
            return;
        }
        // SAFETY: the context is this run's; the call returns when all tasks are done.
        let status = unsafe {
            (self.api.0.KernelContext_ParallelFor)(
                self.context,
                trampoline,
                count,
                0,
                (&raw mut task).cast(),
            )
        };
        if Api::check(status).is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    fn threads(&self) -> usize {
        self.threads
    }
}
