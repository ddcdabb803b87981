//! The operator on a GPU: kernels that come with the node, launched through the CUDA driver.
//!
//! The library knows no kernel. A node brings cubins with *recipes* in its attribute `kernels`, the bytes that a TensorRT engine carries too
//! (`kernels/src/bundle.rs`); a recipe says in text how a step is launched. The driver is opened at run time, nothing is linked.

mod bundle;
mod driver;
mod recipe;
mod step;

pub(crate) use bundle::Bundle;
pub(crate) use recipe::Kernel;
pub(crate) use step::{Call, Loaded, copy};
