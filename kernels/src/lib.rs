//! CUDA kernels for latent attention, from a request to a cubin and its launch.
//!
//! A caller describes what it wants ([`AttentionDesc`]); [`AttentionConfig::choose`] decides tiles, stages and division of the
//! work and says why; [`Source`] is the text; [`Cache`] compiles it with NVRTC, or nvcc, or finds it; [`Report`] looks into the cubin
//! without a GPU. [`emulate`] runs the same tile order in plain Rust against a naive f64 reference.

pub mod append;
pub mod arch;
pub mod bundle;
pub mod cache;
pub mod compiler;
pub mod config;
pub mod desc;
pub mod emulate;
pub mod error;
pub mod fp8;
pub mod gpu_check;
pub mod inspect;
pub mod launch;
pub mod layer;
pub mod layout;
pub mod matmul;
pub mod params;
pub mod plan;
pub mod problem;
pub mod source;
pub mod toolchain;

pub use arch::Arch;
pub use cache::{Cache, Cubin};
pub use compiler::{Compiler, CompilerName};
pub use config::{AttentionConfig, Kernel};
pub use desc::{Attention, AttentionDesc, CacheDtype, Dtype, Mask};
pub use error::{KernelError, Result};
pub use inspect::Report;
pub use source::Source;
pub use toolchain::Toolchain;
