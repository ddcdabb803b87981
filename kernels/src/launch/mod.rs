//! Launching: arguments checked without a driver, then the driver through cudarc.
//!
//! [`Call::check`] is pure: it refuses what the request does not cover and computes every parameter and grid. [`Decoder`] needs a GPU.
//! [`Recipe`] is the same launch as a text, for code that is not Rust.

mod check;
mod decoder;
mod driver;
mod matmul;
mod module;
mod recipe;

pub(crate) use check::most_parts;
pub use check::{Append, Call, Grids, Region, Workspace};
pub use decoder::Decoder;
pub use driver::{Buffer, Device, Event, Stream};
pub use matmul::Multiplier;
pub use recipe::Recipe;
