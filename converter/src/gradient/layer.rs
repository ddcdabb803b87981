//! One decoder layer, backwards: `h = x + W_o heads(norm_1 x)`, `out = h + mlp(norm_2 h)`.

use super::attention;
use super::rows::{add_product, as_heads, beside, linear, norm_backward, norm_rows, reshaped};
use crate::error::{Error, refuse};
use crate::layer::LayerWeights;
use crate::linalg::Matrix;

/// What comes after attention: a function of each token alone.
pub trait Mlp {
    /// From the gradient of its output to that of its input, both `[tokens, D]`; `input` is normed.
    fn backward(&self, input: &Matrix<f32>, gradient: &Matrix<f32>) -> Result<Matrix<f32>, Error>;
}

/// The weights of a layer but for its MLP.
#[derive(Debug, Clone)]
pub struct DecoderLayer {
    /// Attention and the norm before it.
    pub attention: LayerWeights,
    /// Weight of the norm before the MLP `[D]`.
    pub post_norm: Vec<f32>,
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

impl DecoderLayer {
    /// From the gradient of the layer's output `[tokens, D]` to that of its input. `hidden` is the input,
    /// `attended` what attention adds to it (both `[tokens, D]`, one sequence from position 0).
    pub fn backward(
        &self,
        hidden: &Matrix<f32>,
        attended: &Matrix<f32>,
        mlp: &dyn Mlp,
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
        let normed = norm_rows(&after, &self.post_norm, self.epsilon);
        let d_normed = mlp.backward(&normed, gradient)?;
        let mut d_after = norm_backward(&after, &self.post_norm, self.epsilon, &d_normed);
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
}
