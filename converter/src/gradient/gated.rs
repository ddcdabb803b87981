//! Gated MLP: `down(silu(gate x) o up x)`, backwards.

use rayon::prelude::*;

use super::Mlp;
use super::rows::{add_product, linear};
use crate::error::Error;
use crate::layer::Projection;
use crate::linalg::Matrix;

/// A dense MLP.
#[derive(Debug, Clone)]
pub struct GatedMlp {
    /// `gate_proj` `[I, D]`.
    pub gate: Projection,
    /// `up_proj` `[I, D]`.
    pub up: Projection,
    /// `down_proj` `[D, I]`.
    pub down: Projection,
}

impl Mlp for GatedMlp {
    fn backward(&self, input: &Matrix<f32>, gradient: &Matrix<f32>) -> Result<Matrix<f32>, Error> {
        let mut gate = linear(input, &self.gate);
        let mut up = linear(input, &self.up);
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
        let mut d_input = gate.times(&self.gate.weight);
        add_product(&mut d_input, &up, &self.up.weight);
        Ok(d_input)
    }
}
