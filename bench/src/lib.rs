//! What the benches share: random models, criterion's figures, the speed of memory, comparisons of quality, and the file they go to.

pub mod estimates;
pub mod memory;
pub mod quality;
pub mod random_model;
pub mod results;
