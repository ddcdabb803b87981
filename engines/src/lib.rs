//! Runtimes: finding and loading them, running models in ONNX Runtime, building TensorRT engines,
//! comparing logits.
//!
//! No runtime is linked: each is looked for when it is needed ([`find`]), and a missing one is an
//! error that says what was found, what is needed and how to get it.
#![allow(
    clippy::doc_markdown,
    reason = "product names in prose: TensorRT, SmolLM2"
)]

pub mod allocator;
pub mod decode;
pub mod doctor;
pub mod error;
pub mod find;
pub mod ort;
pub mod parity;
mod probe;
pub mod tensorrt;

pub use decode::{Decode, Logits};
pub use error::{EngineError, Result};
