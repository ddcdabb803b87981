//! Passes over a graph. A pass decides; [`crate::ir::GraphBuilder`] applies what it decided.

pub(crate) mod dead;
mod experts;
mod linear;
mod rewrite;

pub use experts::lower_mxfp4_experts;
pub use linear::lower_linear16;
