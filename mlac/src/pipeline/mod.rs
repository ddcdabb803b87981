//! The pipeline: one module a step, [`compile`](compile::compile) is all of them in order.

pub mod allocate;
pub mod bench;
pub mod build;
pub mod calibrate;
pub mod compile;
pub mod convert;
pub mod evaluate;
mod evidence;
pub mod export;
pub mod generate;
pub mod gradients;
pub mod kept_gradients;
pub mod purpose;
pub mod ranks;
pub mod refine;
pub mod refined_layers;
pub mod steps;
pub mod store;
pub mod streams;
pub mod subject;
pub mod verify;
