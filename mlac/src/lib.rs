//! mlac: a GQA checkpoint in, a proven MLA engine out.
//!
//! [`pipeline::compile`] is the whole way and reads top to bottom; every step of it is a module
//! and a command of its own.

pub mod cli;
pub mod error;
pub mod pipeline;
pub mod progress;
pub mod release;
pub mod report;
pub mod staging;
pub mod windows;

pub use error::Error;
