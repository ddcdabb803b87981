//! ONNX files from valid graphs: the model message, and the weights beside it or inside it.

mod folder;
mod layout;
mod lower;
mod memory;
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated from ONNX's own description of the format"
)]
mod proto;
mod source;

pub use folder::{Progress, WriteReport, write_folder};
pub use memory::to_bytes;
pub use source::{MemoryWeights, Overlay, StoredTensor, WeightSource};

/// ONNX's version of the model format that goes with [`crate::ir::OPSET`].
const IR_VERSION: i64 = 11;
