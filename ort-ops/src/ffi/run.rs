//! One run of a node: the runtime's tensors as slices, and the session's threads.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::available_parallelism;

use ort_sys::{OrtErrorCode, OrtKernelContext};

use super::api::{Api, Result, Tensor};
use crate::pool::Pool;

/// # Safety
/// The tensor is this run's, holds numbers of type `T`, and nobody writes to it while the slice is used.
pub(super) unsafe fn all<'a, T>(tensor: Option<&Tensor>) -> Option<&'a [T]> {
    let tensor = tensor?;
    if tensor.count() == 0 {
        return Some(&[]);
    }
    // SAFETY: the caller's promise; the runtime aligns its tensors, and those given to it are of their type.
    Some(unsafe { std::slice::from_raw_parts(tensor.data.cast::<T>(), tensor.count()) })
}

/// # Safety
/// As for [`all`], and nobody else reads or writes it while the slice is used.
pub(super) unsafe fn all_mut<'a, T>(tensor: Option<&Tensor>) -> Option<&'a mut [T]> {
    let tensor = tensor?;
    if tensor.count() == 0 {
        return Some(&mut []);
    }
    // SAFETY: as above.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data.cast::<T>(), tensor.count()) })
}

/// Asked for once: on Linux an answer reads files, which takes longer than a short step.
static THREADS: OnceLock<usize> = OnceLock::new();

/// The session's threads.
pub(super) struct OrtPool {
    api: Api,
    context: *mut OrtKernelContext,
    threads: usize,
    /// A task panicked.
    broken: AtomicBool,
}

impl OrtPool {
    pub(super) fn new(api: Api, context: *mut OrtKernelContext) -> Self {
        Self {
            api,
            context,
            threads: *THREADS.get_or_init(|| available_parallelism().map_or(1, usize::from)),
            broken: AtomicBool::new(false),
        }
    }

    /// A failure when a task panicked.
    pub(super) fn finish(self, operator: &str) -> Result<()> {
        if !self.broken.into_inner() {
            return Ok(());
        }
        let message = format!("mlac::{operator}: a mistake in the operator, in one of its tasks");
        Err(self
            .api
            .status(OrtErrorCode::ORT_RUNTIME_EXCEPTION, &message))
    }
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
