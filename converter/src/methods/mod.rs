//! Whole conversions of a layer: the recipe of mlac and the baselines.

pub mod recipe;
pub mod svd;
pub mod transmla;
