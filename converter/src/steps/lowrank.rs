//! Step 4: joint low rank of the plain key components and the values, in the metric of the model's
//! loss or of the layer's output.
//!
//! With `n = plain @ s`, v the values and `x = [n ; v]`, factor `y = A^{1/2} B x`, `B = diag(1 ; beta)`. A is
//! what the model's loss feels of an error of x: the Fisher information of `s`, seen through the decoders of
//! the plain components. Without gradients it is the local `blockdiag(A_q, A_v)`: `A_q = sum_h E[q~_h
//! q~_h^T]` weighs what scores see (`q~_h` the plain queries, scaled by how much an error of head h's
//! scores moves the output), `A_v = blockdiag_g sum_{h in g} W_o,h^T W_o,h` what the output sees. The
//! principal components V of `E_w[y y^T]` (uncentred) give the latent `c = V_r^T y`; the decoder is
//! `x^ = B^{-1} A^{-1/2} V_r c`.
//! The latent is turned so that its encoder has orthonormal rows, which keeps the cached numbers
//! in the range of keys and values.

use serde::{Deserialize, Serialize};

use super::absorb::Split;
use crate::error::{Error, refuse};
use crate::layer::{AttentionShape, LayerFactors, RankChoice};
use crate::linalg::{
    Eigen, Matrix, PsdRoots, inverse, orthonormal_rows, psd_roots, psd_roots_of_scale,
    symmetric_eigen,
};
use crate::statistics::LayerStatistics;

/// Metric in which the low rank is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Metric {
    /// What the model's loss feels, by its gradients ([`crate::gradient`]), which the statistics must have.
    Gradient,
    /// What scores and outputs see.
    Output,
    /// Keys and values as they are; keys scaled so that both have the same mean column norm
    /// (`TransMLA`'s balanced KV).
    BalancedPlain,
    /// Keys and values as they are.
    Plain,
}

/// Which queries stand for the layer's queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueryWeights {
    /// Every token's, all heads alike.
    Plain,
    /// Every token's, heads weighted by `alpha_h`.
    Alpha,
    /// Sampled rows, weighted by how much an error of their scores moves the output.
    Sensitivity,
}

/// Eigenvalues of the metrics below this fraction of the largest are raised to it.
pub const METRIC_FLOOR: f64 = 1e-7;

/// A metric of the plain components below this fraction of that of all is taken for as large: no
/// query sees them, and what is left is rounding.
const SMALLEST_METRIC: f64 = 1e-3;

/// Everything of the factorisation that does not depend on beta, in terms of `x = [n ; v]`.
#[derive(Debug, Clone)]
pub struct JointProblem {
    /// `[plain ; 0 I]`, what makes x of s: `[n + G*d, 2*G*d]`.
    select: Matrix<f64>,
    /// `E_w[x x^T]`.
    moment: Matrix<f64>,
    /// Roots of the metric A of x.
    roots: PsdRoots,
    plain: usize,
}

/// The query moment `E[q q^T]` `[d, d]` of every head in the chosen weights.
pub fn query_moments(statistics: &LayerStatistics, weights: QueryWeights) -> Vec<Matrix<f64>> {
    let tokens = statistics.tokens.max(1) as f64;
    let insensitive = statistics.insensitive();
    statistics
        .heads
        .iter()
        .enumerate()
        .map(|(h, head)| {
            let (source, factor) = match weights {
                QueryWeights::Sensitivity if insensitive => {
                    (&head.query, statistics.value_size(h) / tokens)
                }
                QueryWeights::Plain => (&head.query, 1.0 / tokens),
                QueryWeights::Alpha => (&head.query, head.alpha() / tokens),
                QueryWeights::Sensitivity if head.p2 > 0.0 => {
                    (&head.query_sensitive, 1.0 / head.p2)
                }
                QueryWeights::Sensitivity => (&head.query, 0.0),
            };
            let mut moment = source.clone();
            moment.scale(factor);
            moment
        })
        .collect()
}

/// `E|q[h,l]|^2` by `[h][l]` of query moments.
pub fn query_energy(shape: &AttentionShape, moments: &[Matrix<f64>]) -> Vec<Vec<f64>> {
    let half = shape.frequencies();
    moments
        .iter()
        .map(|m| {
            (0..half)
                .map(|l| m[(l, l)] + m[(l + half, l + half)])
                .collect()
        })
        .collect()
}

impl JointProblem {
    /// Builds the problem from a split layer, the weighted moment of `s` and the query moments.
    pub fn new(
        statistics: &LayerStatistics,
        split: &Split,
        moment: &Matrix<f64>,
        queries: &[Matrix<f64>],
        metric: Metric,
    ) -> Result<Self, Error> {
        let shape = statistics.attention.shape;
        let (plain, n) = (split.plain.rows(), shape.kv_width());
        let roots = match metric {
            Metric::Gradient => gradient_roots(statistics, split)?,
            Metric::Output => output_roots(statistics, split, queries)?,
            Metric::BalancedPlain => {
                let keys = split.plain.congruence(moment);
                let mean_norm = |values: &mut dyn Iterator<Item = f64>, count: usize| {
                    values.map(|x| x.max(0.0).sqrt()).sum::<f64>() / count.max(1) as f64
                };
                let key_norm = mean_norm(&mut (0..plain).map(|i| keys[(i, i)]), plain);
                let value_norm = mean_norm(&mut (n..2 * n).map(|i| moment[(i, i)]), n);
                let ratio = if key_norm > 0.0 && value_norm > 0.0 {
                    key_norm / value_norm
                } else {
                    1.0
                };
                blocks(
                    &scaled_identity(plain, 1.0 / ratio),
                    &scaled_identity(n, 1.0),
                )
            }
            Metric::Plain => scaled_identity(plain + n, 1.0),
        };
        let values = Matrix::from_fn(n, 2 * n, |i, j| if j == n + i { 1.0 } else { 0.0 });
        let select = split.plain.stack(&values);
        let moment = select.congruence(moment);
        Ok(Self {
            select,
            moment,
            roots,
            plain,
        })
    }

    /// How many eigenvalues of the metric were raised to the floor.
    pub fn floored(&self) -> usize {
        self.roots.floored
    }

    /// The factorisation at one beta, and all eigenvalues of `E_w[y y^T]` (largest first).
    pub fn solve(
        &self,
        shape: &AttentionShape,
        split: &Split,
        ranks: RankChoice,
        beta: f64,
    ) -> Result<(LayerFactors, Vec<f64>), Error> {
        let decomposed = self.decompose(beta)?;
        let factors = self.cut(shape, split, ranks, &decomposed);
        Ok((factors, decomposed.eigen.values))
    }

    /// 1 for keys, beta for values.
    fn weight(&self, beta: f64) -> impl Fn(usize) -> f64 {
        let plain = self.plain;
        move |i| if i < plain { 1.0 } else { beta }
    }

    /// The principal components of `E_w[y y^T]` at one beta.
    pub(crate) fn decompose(&self, beta: f64) -> Result<Decomposed, Error> {
        let weight = self.weight(beta);
        let size = self.moment.rows();
        let weighted = Matrix::from_fn(size, size, |i, j| {
            self.moment[(i, j)] * weight(i) * weight(j)
        });
        let eigen = symmetric_eigen(
            &self.roots.root.congruence(&weighted),
            "joint second moment of keys and values",
        )?;
        Ok(Decomposed { beta, eigen })
    }

    /// The factors that keep the first r principal components.
    pub(crate) fn cut(
        &self,
        shape: &AttentionShape,
        split: &Split,
        ranks: RankChoice,
        decomposed: &Decomposed,
    ) -> LayerFactors {
        let Decomposed { beta, eigen } = decomposed;
        let (plain, r, d) = (self.plain, ranks.kv_lora_rank, shape.head_dim);
        let weight = self.weight(*beta);
        let basis = eigen.vectors.col_range(0, r);

        // c = V_r^T A^{1/2} B x, then turned to orthonormal encoder rows: E = L Q, c' = Q s, decoders times L.
        let mut scaled = basis.transposed_times(&self.roots.root);
        for i in 0..r {
            for (j, x) in scaled.row_mut(i).iter_mut().enumerate() {
                *x *= weight(j);
            }
        }
        let (lower, orthonormal) = orthonormal_rows(&scaled.times(&self.select));
        let mut decoder = self.roots.inverse_root.times(&basis).times(&lower);
        for j in 0..decoder.rows() {
            let back = 1.0 / weight(j);
            decoder.row_mut(j).iter_mut().for_each(|x| *x *= back);
        }
        let key_decoder = decoder.row_range(0, plain);
        let value_decoder = decoder.row_range(plain, decoder.rows());

        LayerFactors {
            shape: *shape,
            ranks,
            encoder: orthonormal.stack(&split.rotary),
            w_uk: split
                .plain_query
                .iter()
                .map(|m| m.transposed_times(&key_decoder))
                .collect(),
            w_uv: (0..shape.query_heads)
                .map(|h| {
                    value_decoder.row_range(shape.group_of(h) * d, (shape.group_of(h) + 1) * d)
                })
                .collect(),
            q_rope: split.rotary_query.clone(),
            inv_freq: split.inv_freq.clone(),
            o: None,
            o_bias: None,
        }
    }
}

/// Roots of the gradients' metric, seen through the decoders of the plain components.
fn gradient_roots(statistics: &LayerStatistics, split: &Split) -> Result<PsdRoots, Error> {
    let Some(gradient) = &statistics.gradient else {
        return Err(refuse(
            format!("statistics of layer {}", statistics.layer),
            "the metric of the loss's gradients",
            "none",
            "take gradients first, or use the metric of scores and outputs",
        ));
    };
    let n = statistics.attention.shape.kv_width();
    let seen = plain_decoders(split, n)?.transpose().congruence(gradient);
    let whole = SMALLEST_METRIC * gradient.trace();
    psd_roots_of_scale(&seen, METRIC_FLOOR, whole, "metric of the gradients")
}

/// Roots of `blockdiag(A_q, A_v)`.
fn output_roots(
    statistics: &LayerStatistics,
    split: &Split,
    queries: &[Matrix<f64>],
) -> Result<PsdRoots, Error> {
    let attention = &statistics.attention;
    let shape = attention.shape;
    let (plain, n) = (split.plain.rows(), shape.kv_width());
    let mut a_q = Matrix::zeros(plain, plain);
    for (m, q) in split.plain_query.iter().zip(queries) {
        a_q.add_scaled(&m.congruence(q), attention.scale.powi(2));
    }
    // What all components together weigh, those with a rotation as well.
    let factor = attention.scale * attention.rotary.attention_factor.powi(2);
    let whole = factor.powi(2) * queries.iter().map(Matrix::trace).sum::<f64>();
    let mut a_v = Matrix::zeros(n, n);
    for (h, head) in statistics.heads.iter().enumerate() {
        let start = shape.group_of(h) * shape.head_dim;
        for i in 0..shape.head_dim {
            for j in 0..shape.head_dim {
                a_v[(start + i, start + j)] += head.output_metric[(i, j)];
            }
        }
    }
    let keys = psd_roots_of_scale(
        &a_q,
        METRIC_FLOOR,
        SMALLEST_METRIC * whole,
        "metric of the queries",
    )?;
    let values = psd_roots(&a_v, METRIC_FLOOR, "metric of o_proj")?;
    Ok(blocks(&keys, &values))
}

/// How an error of `x = [n ; v]` becomes one of `s = [k ; v]`: `[2*G*d, n + G*d]`.
fn plain_decoders(split: &Split, n: usize) -> Result<Matrix<f64>, Error> {
    let plain = split.plain.rows();
    let components = split.plain.stack(&split.rotary).col_range(0, n);
    let back = inverse(&components, "basis of the key components")?;
    Ok(Matrix::from_fn(2 * n, plain + n, |i, j| {
        match (i < n, j < plain) {
            (true, true) => back[(i, j)],
            (false, false) if i - n == j - plain => 1.0,
            _ => 0.0,
        }
    }))
}

/// The roots of a matrix of two blocks.
fn blocks(a: &PsdRoots, b: &PsdRoots) -> PsdRoots {
    let diagonal = |a: &Matrix<f64>, b: &Matrix<f64>| {
        let (n, m) = (a.rows(), b.rows());
        Matrix::from_fn(n + m, n + m, |i, j| match (i < n, j < n) {
            (true, true) => a[(i, j)],
            (false, false) => b[(i - n, j - n)],
            _ => 0.0,
        })
    };
    PsdRoots {
        root: diagonal(&a.root, &b.root),
        inverse_root: diagonal(&a.inverse_root, &b.inverse_root),
        floored: a.floored + b.floored,
    }
}

/// Principal components of the joint moment at one balance of keys and values.
#[derive(Debug, Clone)]
pub(crate) struct Decomposed {
    beta: f64,
    eigen: Eigen,
}

fn scaled_identity(n: usize, factor: f64) -> PsdRoots {
    let diagonal = |x: f64| Matrix::from_fn(n, n, |i, j| if i == j { x } else { 0.0 });
    PsdRoots {
        root: diagonal(factor),
        inverse_root: diagonal(1.0 / factor),
        floored: 0,
    }
}
