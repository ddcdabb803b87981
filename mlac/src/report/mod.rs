//! The report of a compilation: data, charts, page.

pub mod charts;
pub mod data;
pub mod html;
