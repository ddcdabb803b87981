//! `mlac::LatentAttention`, `mlac::Mxfp4Experts` and `mlac::Linear16` for ONNX Runtime on a CPU, the first also on an NVIDIA GPU.
//!
//! The library `libmlac_ort.so` has one entry point, [`RegisterCustomOps`], which ONNX Runtime calls
//! (`register_custom_ops_library` in Python) and mlac's own sessions call directly. What the operators compute is
//! specified in `docs/latent-attention.md`, `docs/mxfp4-experts.md` and `docs/linear16.md`.
//!
//! [`attention`], [`experts`] and [`linear`] are the operators in Rust, without ONNX Runtime. `cuda/` launches the kernels that a node brings with it.
#![expect(
    unsafe_code,
    reason = "vector instructions on rows behind pointers, and the C interfaces of ONNX Runtime and CUDA's driver"
)]
#![allow(
    clippy::inline_always,
    reason = "vector instructions must end up inside the function that enables them"
)]

pub mod attention;
mod cuda;
mod element;
pub mod experts;
mod ffi;
pub mod linear;
mod pool;
mod products;
mod refusal;
mod simd;

pub use element::Element;
#[doc(hidden)]
pub use ffi::add_cuda_in_host_memory;
pub use ffi::{RegisterCustomOps, add_to_options};
pub use pool::Pool;
pub use products::Isa;
pub use refusal::Refusal;
