//! `mlac::Linear16`: problems, the specification in f64, what must agree with it.

pub mod backends;
pub mod problem;
pub mod python;
