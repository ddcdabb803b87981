//! `mlac::LatentAttention`: what it tells the runtime, and what runs a node on each execution provider.

mod cpu;
mod cuda;
mod infer;
mod node;

use super::declaration::{Declaration, F32, I32, I64, Port, port};
use super::table::cache_in_place;

const NAME: &str = "LatentAttention";

/// On a CPU.
pub(super) const ON_CPU: Declaration = Declaration {
    name: c"LatentAttention",
    inputs: &INPUTS,
    outputs: &OUTPUTS,
    in_place: cache_in_place,
    infer: Some(infer::infer),
    // SAFETY: the caller's promise is this function's.
    create: |api, info, _| unsafe { Ok(Box::new(cpu::Kernel::new(api, info)?)) },
};

/// On a GPU, by the kernels that the node brings.
pub(super) const ON_CUDA: Declaration = Declaration {
    // SAFETY: as above.
    create: |api, info, element| unsafe {
        Ok(Box::new(cuda::CudaKernel::new(api, info, element)?))
    },
    ..ON_CPU
};

/// `None` as a port's type is the type of the cached numbers.
const INPUTS: [Port; 8] = [
    port("query", None, true),
    port("new_rows", None, true),
    port("cache", None, true),
    port("past_lengths", I32, true),
    port("page_table", I32, false),
    port("sinks", F32, false),
    port("tree_mask", I64, false),
    port("key_mask", I64, false),
];

const OUTPUTS: [Port; 3] = [
    port("sums", None, true),
    port("cache_out", None, true),
    port("lse", F32, false),
];
