//! ONNX Runtime, loaded at run time: sessions, tensors, and a decoder with its cache.

mod cache;
mod decoder;
mod library;
mod operators;
mod session;
mod tensor;

pub use cache::{CacheKind, CacheLayout, cache_layouts, cached_numbers};
pub(crate) use cache::{cache_layer, cache_parts};
pub use decoder::Decoder;
pub use library::{OrtLibrary, load, load_from};
pub use session::{Dim, Kept, Optimization, OrtSession, Port, SessionOptions};
pub use tensor::{Element, HostData, HostTensor, Value};
