//! Launching: arguments checked without a driver, then the driver through cudarc.
//!
//! [`Call::check`] is pure: it refuses what the request does not cover and computes every parameter and grid. [`Decoder`] needs a GPU.

mod check;
mod driver;

pub use check::{Append, Call, Grids, Region, Workspace};
pub use driver::{Buffer, Decoder, Device, Event, Stream};
