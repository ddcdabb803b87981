//! What a model is: its configuration, its tensors, the checkpoints that hold them and its tokenizer.
//!
//! Everything else in mlac depends on this crate and this crate depends on none of it.
//! A checkpoint is opened once with [`checkpoint::Checkpoint::open`]; tensors are read one at a
//! time, so memory is bounded by the largest tensor in flight.

pub mod checkpoint;
pub mod config;
pub mod error;
pub mod mxfp4;
pub mod refusal;
pub mod rope;
pub mod runtime;
pub mod tensor;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, CheckpointWriter};
pub use config::{
    Architecture, ExpertFormat, MlaConfig, MlaEncoder, MlaLayer, ModelConfig, MoeConfig,
};
pub use error::Error;
pub use refusal::Refusal;
pub use rope::{RopeScaling, RopeSpec, RopeTable};
pub use tensor::{Dtype, TensorInfo};
pub use tokenizer::Tokenizer;
