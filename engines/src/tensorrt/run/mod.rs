//! Running engines of enterprise TensorRT, with the GPU's memory through the driver.
//!
//! `engine` is the safe object over TensorRT's engine and contexts, `folder` checks an engine folder and opens it, `memory` holds what
//! a decoder needs on the GPU, `decoder` puts these together.

mod decoder;
mod engine;
mod folder;
mod memory;

pub use decoder::EngineDecoder;
pub use folder::is_engine_folder;
