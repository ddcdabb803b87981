//! What a model is: its configuration, its tensors, the checkpoints that hold them and its tokenizer.
//!
//! Everything else in mlac depends on this crate and this crate depends on none of it.
//! A checkpoint is opened once with [`checkpoint::Checkpoint::open`]; tensors are read one at a
//! time, so memory is bounded by the largest tensor in flight.

pub mod config;
pub mod refusal;
pub mod rope;

pub use config::{Architecture, MlaConfig, MlaEncoder, MlaLayer, ModelConfig};
pub use refusal::Refusal;
pub use rope::{RopeScaling, RopeSpec};
