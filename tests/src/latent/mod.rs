//! `mlac::LatentAttention`: problems, the naive answer, and everything that must give it.

pub mod backends;
pub mod problem;
pub mod python;
pub mod reference;
pub mod standard;
