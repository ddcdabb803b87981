//! Decompositions, all in f64 over faer, each on one thread: with more, their rounding (and so the
//! bytes of a checkpoint) would depend on how many there are.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder;
use faer::linalg::qr::no_pivoting::factor::{
    qr_in_place, qr_in_place_scratch, recommended_block_size,
};
use faer::linalg::solvers::{DenseSolveCore, Solve};
use faer::traits::ComplexField;
use faer::{Conj, Mat, MatRef, Par, Side, Spec, c64};

use super::matrix::Matrix;
use crate::error::{Error, numeric};

/// Eigenvalues (largest first) and eigenvectors (columns) of a symmetric matrix.
#[derive(Debug, Clone)]
pub struct Eigen {
    /// `[n]`, non-increasing.
    pub values: Vec<f64>,
    /// `[n, n]`, column `i` belongs to `values[i]`.
    pub vectors: Matrix<f64>,
}

/// Eigenvalues (largest first) and eigenvectors (columns) of a Hermitian matrix.
#[derive(Debug, Clone)]
pub struct HermitianEigen {
    /// `[n]`, non-increasing.
    pub values: Vec<f64>,
    /// `vectors[i][g]`: component `g` of eigenvector `i`.
    pub vectors: Vec<Vec<c64>>,
}

/// Square root and inverse square root of a positive semi-definite matrix.
#[derive(Debug, Clone)]
pub struct PsdRoots {
    /// `A^{1/2}` with floored eigenvalues, `[n, n]`.
    pub root: Matrix<f64>,
    /// `A^{-1/2}` with floored eigenvalues, `[n, n]`.
    pub inverse_root: Matrix<f64>,
    /// How many eigenvalues were below the floor.
    pub floored: usize,
}

/// Eigendecomposition of a symmetric matrix.
pub fn symmetric_eigen(matrix: &Matrix<f64>, what: &str) -> Result<Eigen, Error> {
    let n = matrix.rows();
    if n == 0 {
        return Ok(Eigen {
            values: Vec::new(),
            vectors: Matrix::zeros(0, 0),
        });
    }
    let (values, vectors) = self_adjoint_eigen(matrix.view(), what)?;
    Ok(Eigen {
        values: (0..n).rev().map(|i| values[i]).collect(),
        vectors: Matrix::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)]),
    })
}

/// Eigendecomposition of a Hermitian matrix given by its elements.
pub fn hermitian_eigen(
    n: usize,
    element: impl Fn(usize, usize) -> c64,
    what: &str,
) -> Result<HermitianEigen, Error> {
    let matrix = Mat::<c64>::from_fn(n, n, element);
    let (values, vectors) = self_adjoint_eigen(matrix.as_ref(), what)?;
    Ok(HermitianEigen {
        values: (0..n).rev().map(|i| values[i].re).collect(),
        vectors: (0..n)
            .rev()
            .map(|j| (0..n).map(|i| vectors[(i, j)]).collect())
            .collect(),
    })
}

/// Eigenvalues (smallest first) and eigenvectors.
fn self_adjoint_eigen<T: ComplexField>(
    matrix: MatRef<'_, T>,
    what: &str,
) -> Result<(Vec<T>, Mat<T>), Error> {
    let n = matrix.nrows();
    let (mut values, mut vectors) = (Diag::<T>::zeros(n), Mat::<T>::zeros(n, n));
    let scratch =
        self_adjoint_evd_scratch::<T>(n, ComputeEigenvectors::Yes, Par::Seq, Spec::default());
    self_adjoint_evd(
        matrix,
        values.as_mut(),
        Some(vectors.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .map_err(|_| numeric(what, "an eigendecomposition that converges"))?;
    Ok((values.column_vector().iter().cloned().collect(), vectors))
}

/// Roots of a positive semi-definite matrix; eigenvalues below `floor` times the largest are raised
/// to it, so that the inverse exists where the data says nothing. A zero matrix counts as identity.
pub fn psd_roots(matrix: &Matrix<f64>, floor: f64, what: &str) -> Result<PsdRoots, Error> {
    psd_roots_of_scale(matrix, floor, 0.0, what)
}

/// The same where a largest eigenvalue below `scale` counts as `scale`: a matrix that is nothing but
/// rounding is then not blown up.
pub fn psd_roots_of_scale(
    matrix: &Matrix<f64>,
    floor: f64,
    scale: f64,
    what: &str,
) -> Result<PsdRoots, Error> {
    let n = matrix.rows();
    let eigen = symmetric_eigen(matrix, what)?;
    let largest = eigen.values.first().copied().unwrap_or(0.0).max(scale);
    if largest <= 0.0 {
        return Ok(PsdRoots {
            root: Matrix::identity(n),
            inverse_root: Matrix::identity(n),
            floored: n,
        });
    }
    let least = floor * largest;
    let floored = eigen.values.iter().filter(|&&x| x < least).count();
    let roots: Vec<f64> = eigen.values.iter().map(|x| x.max(least).sqrt()).collect();
    let rebuild = |f: &dyn Fn(f64) -> f64| {
        let scaled = Matrix::from_fn(n, n, |i, j| eigen.vectors[(i, j)] * f(roots[j]));
        let mut result = scaled.times_transposed(&eigen.vectors);
        result.symmetrise();
        result
    };
    Ok(PsdRoots {
        root: rebuild(&|x| x),
        inverse_root: rebuild(&|x| 1.0 / x),
        floored,
    })
}

/// Splits `e` `[r, n]` (full row rank) into `lower * q` with orthonormal rows `q` `[r, n]` and
/// `lower` `[r, r]`.
pub fn orthonormal_rows(e: &Matrix<f64>) -> (Matrix<f64>, Matrix<f64>) {
    if e.rows() == 0 {
        return (Matrix::zeros(0, 0), Matrix::zeros(0, e.cols()));
    }
    let size = e.rows();
    // Householder QR of the transpose.
    let mut factor = Mat::from_fn(e.cols(), size, |i, j| e[(j, i)]);
    let block = recommended_block_size::<f64>(e.cols(), size);
    let mut coefficients = Mat::<f64>::zeros(block, size);
    let scratch = qr_in_place_scratch::<f64>(e.cols(), size, block, Par::Seq, Spec::default());
    qr_in_place(
        factor.as_mut(),
        coefficients.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    );
    let lower = Matrix::from_fn(size, size, |i, j| if j <= i { factor[(j, i)] } else { 0.0 });
    let mut q = Mat::<f64>::identity(e.cols(), size);
    let scratch = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
        e.cols(),
        block,
        size,
    );
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factor.as_ref(),
        coefficients.as_ref(),
        Conj::No,
        q.as_mut(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    (lower, Matrix::from_view(q.as_ref().transpose()))
}

/// The inverse of a square matrix.
pub fn inverse(matrix: &Matrix<f64>, what: &str) -> Result<Matrix<f64>, Error> {
    let inverse = Matrix::from_view(matrix.view().partial_piv_lu().inverse().as_ref());
    if inverse.is_finite() {
        return Ok(inverse);
    }
    Err(numeric(what, "a matrix that can be inverted"))
}

/// Solves `(gram + ridge I) x = right` for a symmetric positive semi-definite `gram` `[n, n]` and
/// `right` `[n, m]`.
pub fn ridge_solve(
    gram: &Matrix<f64>,
    ridge: f64,
    right: &Matrix<f64>,
    what: &str,
) -> Result<Matrix<f64>, Error> {
    let n = gram.rows();
    let mut system = gram.clone();
    for i in 0..n {
        system[(i, i)] += ridge;
    }
    let factor = system.view().llt(Side::Lower).map_err(|_| {
        numeric(
            what,
            "normal equations that are positive definite (raise the ridge)",
        )
    })?;
    let solution = factor.solve(right.view());
    Ok(Matrix::from_view(solution.as_ref()))
}
