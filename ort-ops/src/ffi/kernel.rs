//! One node: its attributes, and a run from the runtime's tensors to [`crate::attention`].

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;

use half::{bf16, f16};
use ort_sys::{ONNXTensorElementDataType as Type, OrtErrorCode, OrtKernelContext, OrtKernelInfo};

use super::api::{Api, Result, Tensor};
use crate::attention::{Inputs, Layout, Pool, Shape, Step, append, attend, copy};
use crate::element::Element;
use crate::products::Isa;
use crate::refusal::{Refusal, refuse};

/// An input or output as the operator declares it.
pub(super) struct Port {
    name: &'static str,
    /// `None`: the type of the cached numbers.
    pub(super) element: Option<Type>,
    pub(super) required: bool,
}

const fn port(name: &'static str, element: Option<Type>, required: bool) -> Port {
    Port {
        name,
        element,
        required,
    }
}

const F32: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
const I32: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
const I64: Option<Type> = Some(Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);

pub(super) const INPUTS: [Port; 8] = [
    port("query", None, true),
    port("new_rows", None, true),
    port("cache", None, true),
    port("past_lengths", I32, true),
    port("page_table", I32, false),
    port("sinks", F32, false),
    port("tree_mask", I64, false),
    port("key_mask", I64, false),
];

pub(super) const OUTPUTS: [Port; 3] = [
    port("sums", None, true),
    port("cache_out", None, true),
    port("lse", F32, false),
];

/// A node's attributes and what runs it.
pub(super) struct Kernel {
    api: Api,
    kv_lora_rank: usize,
    scale: f32,
    sliding_window: Option<usize>,
    isa: Isa,
    threads: usize,
}

impl Kernel {
    /// # Safety
    /// `info` is what the runtime gave to the kernel's creation.
    pub(super) unsafe fn new(api: Api, info: *const OrtKernelInfo) -> Result<Self> {
        // SAFETY: the caller's promise.
        let (rank, scale, window) = unsafe {
            (
                api.int(info, "kv_lora_rank"),
                api.float(info, "scale"),
                api.int(info, "sliding_window").unwrap_or(0),
            )
        };
        let invalid =
            |refusal: Refusal| api.status(OrtErrorCode::ORT_INVALID_GRAPH, &refusal.to_string());
        let text = |value: Option<String>| value.unwrap_or_else(|| "no such attribute".into());
        let kv_lora_rank = rank
            .and_then(|rank| usize::try_from(rank).ok())
            .filter(|&rank| rank > 0)
            .ok_or_else(|| {
                let found = text(rank.map(|rank| rank.to_string()));
                invalid(refuse(
                    "kv_lora_rank",
                    "1 or more",
                    found,
                    "export the model again",
                ))
            })?;
        let scale = scale
            .filter(|scale| *scale > 0.0 && scale.is_finite())
            .ok_or_else(|| {
                let found = text(scale.map(|scale| scale.to_string()));
                invalid(refuse(
                    "scale",
                    "a positive number",
                    found,
                    "export the model again",
                ))
            })?;
        let sliding_window = usize::try_from(window).map_err(|_| {
            let found = window.to_string();
            invalid(refuse(
                "sliding_window",
                "0 or more",
                found,
                "export the model again",
            ))
        })?;
        Ok(Self {
            api,
            kv_lora_rank,
            scale,
            sliding_window: (sliding_window > 0).then_some(sliding_window),
            isa: Isa::available()[0],
            threads: available_parallelism().map_or(1, usize::from),
        })
    }

    pub(super) fn api(&self) -> Api {
        self.api
    }

    /// # Safety
    /// `context` is what the runtime gave to this run.
    pub(super) unsafe fn run(&self, context: *mut OrtKernelContext) -> Result<()> {
        let mut inputs = [const { None }; INPUTS.len()];
        for (index, input) in inputs.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *input = unsafe { self.api.input(context, index)? };
        }
        let invalid = |refusal: Refusal| {
            self.api
                .status(OrtErrorCode::ORT_INVALID_ARGUMENT, &refusal.to_string())
        };
        let shape = self.shape(&inputs).map_err(invalid)?;
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

    /// The step's shape, from the inputs' shapes.
    fn shape(
        &self,
        inputs: &[Option<Tensor>; INPUTS.len()],
    ) -> std::result::Result<Shape, Refusal> {
        let dims =
            |index: usize, axes: usize, text: &str| -> std::result::Result<&[usize], Refusal> {
                let shape = inputs[index].as_ref().map_or(&[][..], |t| &t.shape[..]);
                if shape.len() == axes {
                    return Ok(shape);
                }
                let name = INPUTS[index].name;
                Err(refuse(
                    name,
                    text,
                    format!("{shape:?}"),
                    "give it that shape",
                ))
            };
        let query = dims(0, 4, "[batch, query_tokens, heads, r + d_r]")?;
        let (batch, query_tokens, heads, width) = (query[0], query[1], query[2], query[3]);
        let exact = |index: usize, expected: &[usize]| {
            let Some(tensor) = &inputs[index] else {
                return Ok(());
            };
            if tensor.shape == expected {
                return Ok(());
            }
            let (expected, found) = (format!("{expected:?}"), format!("{:?}", tensor.shape));
            let name = INPUTS[index].name;
            Err(refuse(
                name,
                expected,
                found,
                "give it the shape that `query` implies",
            ))
        };
        exact(1, &[batch, query_tokens, width])?;
        exact(3, &[batch])?;
        exact(5, &[heads])?;
        exact(6, &[batch, query_tokens])?;
        if let Some(mask) = &inputs[7] {
            let columns = dims(7, 2, "[batch, mask_length]")?[1];
            exact(7, &[batch, columns])?;
            debug_assert_eq!(mask.count(), batch * columns, "elements of the mask");
        }
        let cache = dims(2, 3, "[batch, capacity, r + d_r], or pages of such rows")?;
        let layout = if inputs[4].is_none() {
            exact(2, &[batch, cache[1], width])?;
            Layout::Contiguous { capacity: cache[1] }
        } else {
            let max_pages = dims(4, 2, "[batch, max_pages]")?[1];
            exact(4, &[batch, max_pages])?;
            exact(2, &[cache[0], cache[1], width])?;
            if cache[1] == 0 {
                let found = format!("{cache:?}");
                return Err(refuse(
                    "cache",
                    "pages of a row or more",
                    found,
                    "allocate pages",
                ));
            }
            Layout::Paged {
                num_pages: cache[0],
                page_size: cache[1],
                max_pages,
            }
        };
        for (axis, size) in [("query_tokens", query_tokens), ("heads", heads)] {
            if size == 0 {
                let found = format!("{query:?}");
                let fix = "run nothing for no tokens";
                return Err(refuse("query", format!("{axis} of 1 or more"), found, fix));
            }
        }
        Ok(Shape {
            batch,
            query_tokens,
            heads,
            kv_lora_rank: self.kv_lora_rank,
            width,
            layout,
            sliding_window: self.sliding_window,
            scale: self.scale,
        })
    }

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
