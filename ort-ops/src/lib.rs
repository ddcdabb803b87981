//! `mlac::LatentAttention` for ONNX Runtime on a CPU.
//!
//! The library `libmlac_ort.so` has one entry point, [`RegisterCustomOps`], which ONNX Runtime calls
//! (`register_custom_ops_library` in Python) and mlac's own sessions call directly. What the operator computes is
//! specified in `docs/latent-attention.md`.
//!
//! [`attention`] is the operator in Rust, without ONNX Runtime.
#![expect(
    unsafe_code,
    reason = "vector instructions on rows behind pointers, and the C interface of ONNX Runtime"
)]
#![allow(
    clippy::inline_always,
    reason = "vector instructions must end up inside the function that enables them"
)]

pub mod attention;
mod element;
mod ffi;
mod products;
mod refusal;
mod simd;

pub use element::Element;
pub use ffi::{RegisterCustomOps, add_to_options};
pub use products::Isa;
pub use refusal::Refusal;
