//! From a model's configuration to ONNX files: a typed graph, the builders of every part of a
//! decoder in GQA and MLA form, a validator, a text form and a writer with external data.
//!
//! A graph holds no large tensor: its weights are references into a checkpoint
//! ([`ir::WeightRef`]) and are read one at a time while the files are written.

pub mod builders;
pub mod error;
pub mod ir;
pub mod onnx;
pub mod passes;
pub mod text;
pub mod validate;

pub use error::{Error, NodeError};
pub use validate::ValidGraph;
