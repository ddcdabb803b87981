//! Dense linear algebra of the conversion: a row-major matrix and thin wrappers over faer.
//!
//! Products run in the element type of their operands, f32 for activations and f64 for everything
//! that is decomposed; decompositions are always f64.

mod decompose;
mod matrix;

pub use decompose::{
    Eigen, HermitianEigen, PsdRoots, hermitian_eigen, inverse, orthonormal_rows, psd_roots,
    psd_roots_of_scale, ridge_solve, symmetric_eigen,
};
pub use matrix::{Element, Matrix, Threads, gemm, gram_accumulate};
