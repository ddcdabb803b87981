//! What the benches share: random models, criterion's figures, and the file they go to.

pub mod estimates;
pub mod random_model;
pub mod results;
