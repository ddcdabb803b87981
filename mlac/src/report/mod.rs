//! The report of a compilation: data, charts, page.

pub mod charts;
pub mod data;
mod decode;
pub mod html;
