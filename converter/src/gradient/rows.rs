//! Pieces of a layer on rows of tokens, forwards and backwards.

use crate::layer::Projection;
use crate::linalg::{Matrix, Threads, gemm};

/// `x W^T + b`.
pub(super) fn linear(x: &Matrix<f32>, projection: &Projection) -> Matrix<f32> {
    let mut out = x.times_transposed(&projection.weight);
    if let Some(bias) = &projection.bias {
        for t in 0..out.rows() {
            for (x, b) in out.row_mut(t).iter_mut().zip(bias) {
                *x += b;
            }
        }
    }
    out
}

/// `total += a b`.
pub(super) fn add_product(total: &mut Matrix<f32>, a: &Matrix<f32>, b: &Matrix<f32>) {
    gemm(
        total.view_mut(),
        true,
        a.view(),
        b.view(),
        1.0,
        Threads::All,
    );
}

/// `[a | b]` row by row.
pub(super) fn beside(a: &Matrix<f32>, b: &Matrix<f32>) -> Matrix<f32> {
    let mut out = Matrix::zeros(a.rows(), a.cols() + b.cols());
    for t in 0..a.rows() {
        let (left, right) = out.row_mut(t).split_at_mut(a.cols());
        left.copy_from_slice(a.row(t));
        right.copy_from_slice(b.row(t));
    }
    out
}

/// `[tokens, heads * d]` as `[tokens * heads, d]`.
pub(super) fn as_heads(rows: &Matrix<f32>, d: usize) -> Matrix<f32> {
    Matrix::from_vec(rows.rows() * rows.cols() / d, d, rows.data().to_vec())
}

/// Applies `f` to the heads of every row.
pub(super) fn reshaped(
    rows: &Matrix<f32>,
    d: usize,
    f: impl FnOnce(Matrix<f32>) -> Matrix<f32>,
) -> Matrix<f32> {
    Matrix::from_vec(rows.rows(), rows.cols(), f(as_heads(rows, d)).into_data())
}

/// `1 / sqrt(mean(x^2) + eps)`.
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    (mean + epsilon).sqrt().recip()
}

/// RMS norm of every row.
pub(super) fn norm_rows(x: &Matrix<f32>, weight: &[f32], epsilon: f32) -> Matrix<f32> {
    let mut out = x.clone();
    for t in 0..out.rows() {
        let row = out.row_mut(t);
        let scale = inverse_rms(row, epsilon);
        for (x, w) in row.iter_mut().zip(weight) {
            *x *= scale * w;
        }
    }
    out
}

/// Gradient of the rows of `x` from that of their norm: with `r = 1 / rms`,
/// `dx = r (w o dy) - x r^3 / n * sum(w o dy o x)`.
pub(super) fn norm_backward(
    x: &Matrix<f32>,
    weight: &[f32],
    epsilon: f32,
    gradient: &Matrix<f32>,
) -> Matrix<f32> {
    let mut out = gradient.clone();
    for t in 0..x.rows() {
        let (row, out) = (x.row(t), out.row_mut(t));
        let scale = inverse_rms(row, epsilon);
        let mut along = 0.0;
        for ((g, w), x) in out.iter_mut().zip(weight).zip(row) {
            *g *= w;
            along += *g * x;
        }
        let back = along * scale.powi(3) / row.len() as f32;
        for (g, x) in out.iter_mut().zip(row) {
            *g = *g * scale - x * back;
        }
    }
    out
}
