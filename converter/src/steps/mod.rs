//! The steps of a conversion, one file each, in the order of `methods/recipe.rs`.

pub mod absorb;
pub mod balance;
pub mod basis;
pub mod compose;
pub mod constant;
pub mod lowrank;
pub mod refit;
pub mod select;
pub mod weights;
