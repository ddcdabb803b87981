//! Mixture of experts as GPT-OSS has it, backwards.
//!
//! `y = sum_k p_k expert_k(x)`, `p` the softmax over the K largest router logits, `expert(x) = down((up + 1) o glu)`
//! with `glu = gate o sigmoid(alpha gate)`, gate cut at the limit from above and up from both sides. Which
//! experts are chosen has no gradient; how they are weighed has: `d logit_k = p_k (e_k - sum_j p_j e_j)` with
//! `e_k = dy . expert_k(x)`. One expert's matrices are in memory at a time.

use rayon::prelude::*;

use super::Mlp;
use super::rows::{add_product, linear};
use crate::error::Error;
use crate::layer::Projection;
use crate::linalg::Matrix;

/// One expert.
#[derive(Debug, Clone)]
pub struct Expert {
    /// `[2*I, D]`, rows alternating between gate and up.
    pub gate_up: Projection,
    /// `[D, I]`.
    pub down: Projection,
}

/// The experts of a layer; `load` reads one.
pub struct Experts<L> {
    /// `[E, D]`.
    pub router: Projection,
    /// Experts that a token uses, K.
    pub experts_per_token: usize,
    /// Limit of gate and up.
    pub limit: f32,
    /// Steepness of the gate's sigmoid.
    pub alpha: f32,
    /// Reads expert e.
    pub load: L,
}

/// A token's use of an expert.
#[derive(Clone, Copy)]
struct Use {
    token: usize,
    /// p of the expert.
    weight: f32,
    /// `dy . expert(x)`.
    effect: f32,
}

impl<L: Fn(usize) -> Result<Expert, Error>> Mlp for Experts<L> {
    fn backward(&self, input: &Matrix<f32>, gradient: &Matrix<f32>) -> Result<Matrix<f32>, Error> {
        let logits = linear(input, &self.router);
        let mut uses: Vec<Vec<Use>> = vec![Vec::new(); logits.cols()];
        for token in 0..input.rows() {
            for (expert, weight) in chosen(logits.row(token), self.experts_per_token) {
                uses[expert].push(Use {
                    token,
                    weight,
                    effect: 0.0,
                });
            }
        }
        let mut d_input = Matrix::<f32>::zeros(input.rows(), input.cols());
        for (expert, uses) in uses.iter_mut().enumerate() {
            if uses.is_empty() {
                continue;
            }
            let weights = (self.load)(expert)?;
            let back = self.through(
                &weights,
                &gathered(input, uses),
                &gathered(gradient, uses),
                uses,
            );
            for (row, used) in uses.iter().enumerate() {
                for (sum, x) in d_input.row_mut(used.token).iter_mut().zip(back.row(row)) {
                    *sum += x;
                }
            }
        }
        let mut means = vec![0.0; input.rows()];
        for used in uses.iter().flatten() {
            means[used.token] += used.weight * used.effect;
        }
        let mut d_logits = Matrix::<f32>::zeros(input.rows(), logits.cols());
        for (expert, uses) in uses.iter().enumerate() {
            for used in uses {
                d_logits.row_mut(used.token)[expert] =
                    used.weight * (used.effect - means[used.token]);
            }
        }
        add_product(&mut d_input, &d_logits, &self.router.weight);
        Ok(d_input)
    }
}

impl<L> Experts<L> {
    /// Gradient of one expert's inputs `[n, D]`, weighted; fills in the effects.
    fn through(
        &self,
        expert: &Expert,
        input: &Matrix<f32>,
        gradient: &Matrix<f32>,
        uses: &mut [Use],
    ) -> Matrix<f32> {
        let (limit, alpha) = (self.limit, self.alpha);
        let mut gate_up = linear(input, &expert.gate_up);
        let width = gate_up.cols();
        let inner = Matrix::from_fn(input.rows(), width / 2, |t, i| {
            let row = gate_up.row(t);
            let gate = row[2 * i].min(limit);
            (row[2 * i + 1].clamp(-limit, limit) + 1.0) * gate * sigmoid(alpha * gate)
        });
        let output = linear(&inner, &expert.down);
        let d_inner = gradient.times(&expert.down.weight);
        for (t, used) in uses.iter_mut().enumerate() {
            let products = output.row(t).iter().zip(gradient.row(t));
            used.effect = products.map(|(y, g)| y * g).sum();
        }
        gate_up
            .data_mut()
            .par_chunks_mut(width)
            .zip(d_inner.data().par_chunks(width / 2))
            .zip(uses.par_iter())
            .for_each(|((row, d_inner), used)| {
                for (pair, d) in row.chunks_exact_mut(2).zip(d_inner) {
                    let (gate, up) = (pair[0], pair[1]);
                    let (cut_gate, cut_up) = (gate.min(limit), up.clamp(-limit, limit));
                    let open = sigmoid(alpha * cut_gate);
                    let slope = open * (1.0 + alpha * cut_gate * (1.0 - open));
                    let d = d * used.weight;
                    let inside = |is: bool| f32::from(u8::from(is));
                    pair[0] = d * (cut_up + 1.0) * slope * inside(gate <= limit);
                    pair[1] = d * cut_gate * open * inside(up.abs() <= limit);
                }
            });
        gate_up.times(&expert.gate_up.weight)
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// The `count` largest logits and the softmax over them.
fn chosen(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(count);
    let most = order.first().map_or(0.0, |&e| logits[e]);
    let weights: Vec<f32> = order.iter().map(|&e| (logits[e] - most).exp()).collect();
    let sum: f32 = weights.iter().sum();
    order
        .into_iter()
        .zip(weights.into_iter().map(|w| w / sum))
        .collect()
}

/// The rows of the tokens that use an expert.
fn gathered(rows: &Matrix<f32>, uses: &[Use]) -> Matrix<f32> {
    let data = uses
        .iter()
        .flat_map(|u| rows.row(u.token))
        .copied()
        .collect();
    Matrix::from_vec(uses.len(), rows.cols(), data)
}
