//! Perplexity at equal cache: which conversions are run, what is kept of each, and the tables.
//!
//! The program `quality` reads top to bottom: a [`request`], its [`jobs`], each of which runs `mlac` or
//! is found done in the work folder ([`harness`], [`mlac`]), and the [`section`] of `RESULTS.md` made of all.

mod digest;
pub mod harness;
pub mod jobs;
pub mod mlac;
pub mod request;
pub mod section;
