//! Launching: arguments checked without a driver, then the driver through cudarc.
//!
//! [`Call::check`] is pure: it refuses what the request does not cover and computes every parameter and grid. [`Decoder`] needs a GPU.
//! [`Recipe`] is the same launch as a text, for code that is not Rust.

mod check;
mod driver;
mod recipe;

pub use check::{Append, Call, Grids, Region, Workspace};
pub use driver::{Buffer, Decoder, Device, Event, Stream};
pub use recipe::Recipe;
