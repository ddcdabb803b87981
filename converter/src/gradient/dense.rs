//! One decoder layer with a gated MLP: `h = x + W_o heads(norm_1 x)`, `out = h + down(silu(gate n) o up n)`
//! with `n = norm_2 h`, backwards.

use rayon::prelude::*;

use super::attention;
use crate::error::{Error, refuse};
use crate::layer::{LayerWeights, Projection};
use crate::linalg::{Matrix, Threads, gemm};

/// The weights of a layer with a dense MLP.
#[derive(Debug, Clone)]
pub struct DenseLayer {
    /// Attention and the norm before it.
    pub attention: LayerWeights,
    /// Weight of the norm before the MLP `[D]`.
    pub post_norm: Vec<f32>,
    /// `gate_proj` `[I, D]`.
    pub gate: Projection,
    /// `up_proj` `[I, D]`.
    pub up: Projection,
    /// `down_proj` `[D, I]`.
    pub down: Projection,
    /// Epsilon of all norms.
    pub epsilon: f32,
}

/// What a layer's backward pass leaves, by token of one window.
#[derive(Debug, Clone)]
pub struct LayerGradients {
    /// The stacked vector `[k ; v]` `[tokens, 2*G*d]`.
    pub stacked: Matrix<f32>,
    /// Gradient of the stacked vector `[k ; v]` (after biases and key norm, before rotation)
    /// `[tokens, 2*G*d]`.
    pub stacked_gradient: Matrix<f32>,
    /// Gradient of the layer's input `[tokens, D]`.
    pub input: Matrix<f32>,
}

impl DenseLayer {
    /// From the gradient of the layer's output `[tokens, D]` to that of its input. `hidden` is the input,
    /// `attended` what attention adds to it (both `[tokens, D]`, one sequence from position 0).
    pub fn backward(
        &self,
        hidden: &Matrix<f32>,
        attended: &Matrix<f32>,
        gradient: &Matrix<f32>,
    ) -> Result<LayerGradients, Error> {
        let layer = &self.attention;
        let Some(input_norm) = &layer.input_norm else {
            return Err(refuse(
                format!("layer {} input_layernorm.weight", layer.layer),
                "the norm before attention",
                "none",
                "read the layer with its norm",
            ));
        };
        let mut after = hidden.clone();
        after.add_scaled(attended, 1.0);
        let mut d_after = self.mlp_backward(&after, gradient);
        d_after.add_scaled(gradient, 1.0);

        let normed = norm_rows(hidden, input_norm, self.epsilon);
        let query = linear(&normed, &layer.q);
        let (key, value) = (linear(&normed, &layer.k), linear(&normed, &layer.v));
        let d = layer.attention.shape.head_dim;
        let head_norm = |rows: &Matrix<f32>, norm: &Option<Vec<f32>>| match norm {
            Some(weight) => reshaped(rows, d, |heads| norm_rows(&heads, weight, self.epsilon)),
            None => rows.clone(),
        };
        let stacked = beside(&head_norm(&key, &layer.k_norm), &value);
        let d_heads = d_after.times(&layer.o.weight);
        let found = attention::backward(
            &layer.attention,
            &head_norm(&query, &layer.q_norm),
            &stacked,
            &d_heads,
        );
        let keys = layer.attention.shape.kv_width();
        let d_key = found.stacked.col_range(0, keys);
        let d_value = found.stacked.col_range(keys, 2 * keys);
        let head_norm_back = |rows: &Matrix<f32>, out: Matrix<f32>, norm: &Option<Vec<f32>>| {
            let Some(weight) = norm else { return out };
            let heads = as_heads(rows, d);
            reshaped(&out, d, |out| {
                norm_backward(&heads, weight, self.epsilon, &out)
            })
        };
        let d_query = head_norm_back(&query, found.query, &layer.q_norm);
        let d_key = head_norm_back(&key, d_key, &layer.k_norm);
        let mut d_normed = d_query.times(&layer.q.weight);
        for (gradient, projection) in [(&d_key, &layer.k), (&d_value, &layer.v)] {
            add_product(&mut d_normed, gradient, &projection.weight);
        }
        let mut input = norm_backward(hidden, input_norm, self.epsilon, &d_normed);
        input.add_scaled(&d_after, 1.0);
        Ok(LayerGradients {
            stacked,
            stacked_gradient: found.stacked,
            input,
        })
    }

    /// Gradient through norm and MLP, without the residual.
    fn mlp_backward(&self, after: &Matrix<f32>, gradient: &Matrix<f32>) -> Matrix<f32> {
        let normed = norm_rows(after, &self.post_norm, self.epsilon);
        let mut gate = linear(&normed, &self.gate);
        let mut up = linear(&normed, &self.up);
        let d_gated = gradient.times(&self.down.weight);
        gate.data_mut()
            .par_iter_mut()
            .zip(up.data_mut())
            .zip(d_gated.data())
            .with_min_len(1 << 14)
            .for_each(|((gate, up), d)| {
                let sigmoid = 1.0 / (1.0 + (-*gate).exp());
                let silu = *gate * sigmoid;
                *gate = d * *up * (sigmoid + silu * (1.0 - sigmoid));
                *up = d * silu;
            });
        let mut d_normed = gate.times(&self.gate.weight);
        add_product(&mut d_normed, &up, &self.up.weight);
        norm_backward(after, &self.post_norm, self.epsilon, &d_normed)
    }
}

/// `x W^T + b`.
fn linear(x: &Matrix<f32>, projection: &Projection) -> Matrix<f32> {
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
fn add_product(total: &mut Matrix<f32>, a: &Matrix<f32>, b: &Matrix<f32>) {
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
fn beside(a: &Matrix<f32>, b: &Matrix<f32>) -> Matrix<f32> {
    let mut out = Matrix::zeros(a.rows(), a.cols() + b.cols());
    for t in 0..a.rows() {
        let (left, right) = out.row_mut(t).split_at_mut(a.cols());
        left.copy_from_slice(a.row(t));
        right.copy_from_slice(b.row(t));
    }
    out
}

/// `[tokens, heads * d]` as `[tokens * heads, d]`.
fn as_heads(rows: &Matrix<f32>, d: usize) -> Matrix<f32> {
    Matrix::from_vec(rows.rows() * rows.cols() / d, d, rows.data().to_vec())
}

/// Applies `f` to the heads of every row.
fn reshaped(
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
