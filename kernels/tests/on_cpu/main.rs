//! The kernels' own sources, compiled by g++ and run on the CPU, against the naive f64 answer.
//!
//! `host/` replaces the three files of instructions (`ptx.cuh`, `hopper.cuh`, `mma.cuh`) by functions that do what the PTX ISA says:
//! threads are fibers, wgmma reads shared memory through its descriptors, TMA writes it swizzled, and what is asynchronous on a
//! GPU happens as late as it may. Everything else, from the walk over the pieces to the epilogue, is the code that NVRTC compiles.
#![allow(
    clippy::unwrap_used,
    clippy::items_after_statements,
    clippy::needless_for_each,
    clippy::float_cmp,
    reason = "a test that cannot go on says why by panicking; its texts are short"
)]

mod append;
mod attention;
#[path = "../common/mod.rs"]
mod common;
mod machine;
mod matmul;
mod mistakes;

use mlac_kernels::{AttentionDesc, CacheDtype};

fn sinks(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        sinks: true,
        ..desc
    }
}

fn e4m3(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        cache: CacheDtype::E4m3,
        ..desc
    }
}
