//! Coordinates in which one step size fits all matrices.
//!
//! A matrix is what it was plus a delta D between two fixed maps. With M the weighted second moment
//! of `s = [k ; v]`, `C = E M E^T` that of the latent, `Q_h` that of the queries of head h and `S_h`
//! that of its outputs:
//!
//! - latent rows of the encoder `E + C^{1/2} D M^{-1/2}`, rotary rows `E + n D M^{-1/2}` with n the
//!   root mean square of each complex component;
//! - `W_uk,h + Q_h^{-1/2} D C^{-1/2}`, `W_uv,h + D C^{-1/2}`, `R_h + n^{-1} D Q_h^{-1/2}`;
//! - `W_o,h + D S_h^{-1/2}`.
//!
//! In these coordinates inputs of every product have unit second moment, so an element of D moves
//! what comes out by about its own size; the step is relative to the root mean square the matrix
//! has there. Moments are floored, so directions without data move little and stay finite.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::objective::{LayerTensors, tensor};
use crate::error::Error;
use crate::layer::{LayerFactors, LayerWeights};
use crate::linalg::{Matrix, PsdRoots, psd_roots};
use crate::statistics::LayerStatistics;
use crate::steps::lowrank::{QueryWeights, query_moments};
use crate::steps::weights::{TokenWeights, token_moment};

/// Eigenvalues of the moments below this fraction of the largest are raised to it.
const FLOOR: f64 = 1e-6;

/// Share of the tokens' weights that is spread uniformly; the rest goes by attention received.
const UNIFORM_SHARE: f64 = 0.05;

/// The fixed maps of one layer.
pub(super) struct Coordinates {
    stacked: PsdRoots,
    latent: PsdRoots,
    /// n of every rotary row, `[d_r]`.
    rotary: Vec<f64>,
    queries: Vec<PsdRoots>,
    outputs: Vec<PsdRoots>,
    /// Root mean squares of the matrices in the coordinates.
    rms: Sizes,
}

struct Sizes {
    /// Of every row `[r + d_r]`.
    encoder: Vec<f64>,
    /// Of every head.
    w_uk: Vec<f64>,
    w_uv: Vec<f64>,
    q_rope: Vec<f64>,
}

/// What descent added, in the coordinates.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Deltas {
    /// `[r + d_r, 2*G*d]`
    pub(super) encoder: Matrix<f64>,
    /// Per head `[d, r]`.
    pub(super) w_uk: Vec<Matrix<f64>>,
    /// Per head `[d, r]`.
    pub(super) w_uv: Vec<Matrix<f64>>,
    /// Per head `[d_r, d]`.
    pub(super) q_rope: Vec<Matrix<f64>>,
    /// Per head `[d, D]`, transposed; empty when the output projection stays.
    pub(super) output: Vec<Matrix<f64>>,
    /// `[D]`
    pub(super) bias: Option<Vec<f64>>,
}

impl Deltas {
    /// A share of them.
    pub(super) fn times(&self, share: f64) -> Self {
        let mut scaled = self.clone();
        let lists = [
            &mut scaled.w_uk,
            &mut scaled.w_uv,
            &mut scaled.q_rope,
            &mut scaled.output,
        ];
        for matrix in lists.into_iter().flatten().chain([&mut scaled.encoder]) {
            matrix.scale(share);
        }
        for x in scaled.bias.iter_mut().flatten() {
            *x *= share;
        }
        scaled
    }
}

impl Coordinates {
    /// `heads`: head outputs of the converted layer `[rows, H*d]` on some rows.
    pub(super) fn new(
        statistics: &LayerStatistics,
        factors: &LayerFactors,
        heads: &[Matrix<f32>],
    ) -> std::result::Result<Self, Error> {
        let (r, d_r) = (factors.ranks.kv_lora_rank, factors.ranks.qk_rope_head_dim);
        let d = factors.shape.head_dim;
        let weights = TokenWeights::Attention {
            uniform_share: UNIFORM_SHARE,
        };
        let moment = token_moment(statistics, weights);
        let stacked = psd_roots(&moment, FLOOR, "second moment of keys and values")?;
        let latent_moment = factors.encoder.row_range(0, r).congruence(&moment);
        let latent = psd_roots(&latent_moment, FLOOR, "second moment of the latent")?;
        let queries: Vec<PsdRoots> = query_moments(statistics, QueryWeights::Sensitivity)
            .iter()
            .map(|q| psd_roots(q, FLOOR, "second moment of queries"))
            .collect::<std::result::Result<_, _>>()?;
        let outputs: Vec<PsdRoots> = (0..factors.shape.query_heads)
            .map(|h| {
                let mut sum = Matrix::zeros(d, d);
                let mut rows = 0;
                for part in heads {
                    let own: Matrix<f64> = part.col_range(h * d, (h + 1) * d).cast();
                    sum.add_scaled(&own.transposed_times(&own), 1.0);
                    rows += part.rows();
                }
                sum.scale(1.0 / rows.max(1) as f64);
                sum.symmetrise();
                psd_roots(&sum, FLOOR, "second moment of head outputs")
            })
            .collect::<std::result::Result<_, _>>()?;

        let encoder = factors.encoder.times(&stacked.root);
        let rotary: Vec<f64> = (0..d_r)
            .map(|i| {
                let pair = [r + i % (d_r / 2), r + i % (d_r / 2) + d_r / 2];
                let square: f64 = pair
                    .iter()
                    .flat_map(|&row| encoder.row(row))
                    .map(|x| x * x)
                    .sum();
                // A component without energy stays where it is.
                let norm = (square / 2.0).sqrt();
                if norm > 0.0 { norm } else { 1.0 }
            })
            .collect();
        let latent_rows = latent.inverse_root.times(&encoder.row_range(0, r));
        let rms = Sizes {
            encoder: (0..r)
                .map(|i| rms(latent_rows.row(i)))
                .chain((0..d_r).map(|i| rms(encoder.row(r + i)) / rotary[i]))
                .collect(),
            w_uk: (factors.w_uk.iter().zip(&queries))
                .map(|(w, q)| rms(q.root.times(w).times(&latent.root).data()))
                .collect(),
            w_uv: (factors.w_uv.iter())
                .map(|w| rms(w.times(&latent.root).data()))
                .collect(),
            q_rope: (factors.q_rope.iter().zip(&queries))
                .map(|(w, q)| {
                    let mut w = w.times(&q.root);
                    for (i, n) in rotary.iter().enumerate() {
                        w.row_mut(i).iter_mut().for_each(|x| *x *= n);
                    }
                    rms(w.data())
                })
                .collect(),
        };
        Ok(Self {
            stacked,
            latent,
            rotary,
            queries,
            outputs,
            rms,
        })
    }

    /// `blockdiag(C^{1/2}, n)`, `[r + d_r, r + d_r]`.
    fn rows(&self) -> Matrix<f64> {
        let r = self.latent.root.rows();
        let width = r + self.rotary.len();
        Matrix::from_fn(width, width, |i, j| {
            if i < r && j < r {
                self.latent.root[(i, j)]
            } else if i == j {
                self.rotary[i - r]
            } else {
                0.0
            }
        })
    }

    /// The factors plus what the deltas stand for.
    pub(super) fn moved(
        &self,
        weights: &LayerWeights,
        factors: &LayerFactors,
        deltas: &Deltas,
    ) -> LayerFactors {
        let mut moved = factors.clone();
        let encoder = self.rows().times(&deltas.encoder);
        let encoder = encoder.times(&self.stacked.inverse_root);
        moved.encoder.add_scaled(&encoder, 1.0);
        for (h, query) in self.queries.iter().enumerate() {
            let w_uk = query.inverse_root.times(&deltas.w_uk[h]);
            moved.w_uk[h].add_scaled(&w_uk.times(&self.latent.inverse_root), 1.0);
            let w_uv = deltas.w_uv[h].times(&self.latent.inverse_root);
            moved.w_uv[h].add_scaled(&w_uv, 1.0);
            let mut q_rope = deltas.q_rope[h].times(&query.inverse_root);
            for (i, n) in self.rotary.iter().enumerate() {
                q_rope.row_mut(i).iter_mut().for_each(|x| *x /= n);
            }
            moved.q_rope[h].add_scaled(&q_rope, 1.0);
        }
        if let Some(o) = &mut moved.o {
            let d = factors.shape.head_dim;
            for (h, delta) in deltas.output.iter().enumerate() {
                let change = self.outputs[h].inverse_root.times(delta);
                for i in 0..o.rows() {
                    for (k, x) in o.row_mut(i)[h * d..(h + 1) * d].iter_mut().enumerate() {
                        *x += change[(k, i)];
                    }
                }
            }
        }
        if let Some(change) = &deltas.bias {
            let zeros = || vec![0.0; change.len()];
            let source = || {
                weights
                    .o
                    .bias
                    .as_ref()
                    .map(|b| b.iter().map(|&x| f64::from(x)).collect())
            };
            let before = moved.o_bias.take().or_else(source).unwrap_or_else(zeros);
            let after = before.iter().zip(change).map(|(x, y)| x + y);
            moved.o_bias = Some(after.collect());
        }
        moved
    }

    /// The layer with deltas of 0; `output` is its output projection and bias.
    pub(super) fn parameters(
        &self,
        weights: &LayerWeights,
        factors: &LayerFactors,
        (o, bias): (&Matrix<f32>, Option<&[f32]>),
        moving_bias: bool,
        on: (DType, &Device),
    ) -> Result<Parameters> {
        let shape = weights.attention.shape;
        let (heads, d, hidden) = (shape.query_heads, shape.head_dim, shape.hidden);
        let (r, d_r) = (factors.ranks.kv_lora_rank, factors.ranks.qk_rope_head_dim);
        let one = |m: &Matrix<f64>| tensor(m.cast().data(), &[m.rows(), m.cols()], on);
        let many = |list: &mut dyn Iterator<Item = &Matrix<f64>>, rows: usize, cols: usize| {
            let data: Vec<f32> = list.flat_map(Matrix::data).map(|&x| x as f32).collect();
            tensor(&data, &[heads, rows, cols], on)
        };
        let zeros = |dims: &[usize]| Var::zeros(dims, on.0, on.1);
        let inverse: Vec<f32> = self.rotary.iter().map(|n| (1.0 / n) as f32).collect();
        let mut inverse_roots = self.queries.iter().map(|q| &q.inverse_root);
        let moves_output = factors.o.is_some();
        Ok(Parameters {
            heads,
            encoder: Map {
                start: one(&factors.encoder)?,
                delta: zeros(&[r + d_r, shape.stacked_width()])?,
            },
            w_uk: Map {
                start: many(&mut factors.w_uk.iter(), d, r)?,
                delta: zeros(&[heads, d, r])?,
            },
            w_uv: Map {
                start: many(&mut factors.w_uv.iter(), d, r)?,
                delta: zeros(&[heads, d, r])?,
            },
            q_rope: Map {
                start: many(&mut factors.q_rope.iter(), d_r, d)?,
                delta: zeros(&[heads, d_r, d])?,
            },
            output: tensor(o.transpose().data(), &[heads, d, hidden], on)?,
            output_delta: moves_output
                .then(|| zeros(&[heads, d, hidden]))
                .transpose()?,
            bias: bias.map(|b| tensor(b, &[1, hidden], on)).transpose()?,
            bias_delta: (moves_output && moving_bias && bias.is_some())
                .then(|| zeros(&[1, hidden]))
                .transpose()?,
            rows: one(&self.rows())?,
            stacked: one(&self.stacked.inverse_root)?,
            latent: one(&self.latent.inverse_root)?,
            queries: many(&mut inverse_roots, d, d)?,
            rotary: tensor(&inverse, &[1, d_r, 1], on)?,
            outputs: many(&mut self.outputs.iter().map(|s| &s.inverse_root), d, d)?,
        })
    }

    /// The root mean square of every moving parameter, in the order of [`Parameters::moving`].
    pub(super) fn sizes(&self, parameters: &Parameters) -> Result<Vec<Tensor>> {
        let on = (parameters.rows.dtype(), parameters.rows.device());
        let list = |sizes: &[f64], shape: &[usize]| {
            let sizes: Vec<f32> = sizes.iter().map(|&x| x as f32).collect();
            tensor(&sizes, shape, on)
        };
        let (width, heads) = (self.rms.encoder.len(), parameters.heads);
        let mut sizes = vec![
            list(&self.rms.encoder, &[width, 1])?,
            list(&self.rms.w_uk, &[heads, 1, 1])?,
            list(&self.rms.w_uv, &[heads, 1, 1])?,
            list(&self.rms.q_rope, &[heads, 1, 1])?,
        ];
        let root_mean = |x: &Tensor, axes: &[usize]| x.sqr()?.mean_keepdim(axes)?.sqrt();
        if parameters.output_delta.is_some() {
            let roots: Vec<f32> = (self.outputs.iter())
                .flat_map(|s| s.root.data())
                .map(|&x| x as f32)
                .collect();
            let d = self.outputs[0].root.rows();
            let roots = tensor(&roots, &[heads, d, d], on)?;
            sizes.push(root_mean(&roots.matmul(&parameters.output)?, &[1, 2])?);
        }
        if let (Some(bias), Some(_)) = (&parameters.bias, &parameters.bias_delta) {
            sizes.push(root_mean(bias, &[1])?);
        }
        Ok(sizes)
    }
}

fn rms(x: &[f64]) -> f64 {
    (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt()
}

/// A matrix and what is added to it, in its coordinates.
struct Map {
    start: Tensor,
    delta: Var,
}

/// The layer as a function of its deltas.
pub(super) struct Parameters {
    heads: usize,
    encoder: Map,
    w_uk: Map,
    w_uv: Map,
    q_rope: Map,
    /// `[H, d, D]`
    output: Tensor,
    output_delta: Option<Var>,
    /// `[1, D]`
    bias: Option<Tensor>,
    bias_delta: Option<Var>,
    rows: Tensor,
    stacked: Tensor,
    latent: Tensor,
    queries: Tensor,
    rotary: Tensor,
    outputs: Tensor,
}

impl Parameters {
    /// What the optimizer moves.
    pub(super) fn moving(&self) -> Vec<Var> {
        [&self.encoder, &self.w_uk, &self.w_uv, &self.q_rope]
            .into_iter()
            .map(|map| &map.delta)
            .chain(&self.output_delta)
            .chain(&self.bias_delta)
            .cloned()
            .collect()
    }

    /// The matrices.
    pub(super) fn layer(&self) -> Result<LayerTensors> {
        let times_latent = |x: Tensor| {
            let (heads, d, r) = x.dims3()?;
            x.reshape((heads * d, r))?
                .matmul(&self.latent)?
                .reshape((heads, d, r))
        };
        let encoder = self.rows.matmul(self.encoder.delta.as_tensor())?;
        let w_uk = times_latent(self.queries.matmul(self.w_uk.delta.as_tensor())?)?;
        let w_uv = times_latent(self.w_uv.delta.as_tensor().clone())?;
        let q_rope = self.q_rope.delta.matmul(&self.queries)?;
        let output = match &self.output_delta {
            Some(delta) => (&self.output + self.outputs.matmul(delta.as_tensor())?)?,
            None => self.output.clone(),
        };
        let bias = match (&self.bias, &self.bias_delta) {
            (Some(bias), Some(delta)) => Some((bias + delta.as_tensor())?),
            (bias, _) => bias.clone(),
        };
        let (heads, d, hidden) = output.dims3()?;
        Ok(LayerTensors {
            encoder: (&self.encoder.start + encoder.matmul(&self.stacked)?)?,
            w_uk: (&self.w_uk.start + w_uk)?,
            w_uv: (&self.w_uv.start + w_uv)?,
            q_rope: (&self.q_rope.start + q_rope.broadcast_mul(&self.rotary)?)?,
            output: output.reshape((heads * d, hidden))?,
            bias,
        })
    }

    /// The deltas as they are.
    pub(super) fn deltas(&self) -> Result<Deltas> {
        let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let per_head = |x: &Tensor| -> Result<Vec<Matrix<f64>>> {
            let (_, rows, cols) = x.dims3()?;
            let data = numbers(x)?;
            let parts = data.chunks(rows * cols);
            Ok(parts
                .map(|part| Matrix::from_vec(rows, cols, part.to_vec()))
                .collect())
        };
        let (rows, cols) = self.encoder.delta.dims2()?;
        Ok(Deltas {
            encoder: Matrix::from_vec(rows, cols, numbers(&self.encoder.delta)?),
            w_uk: per_head(&self.w_uk.delta)?,
            w_uv: per_head(&self.w_uv.delta)?,
            q_rope: per_head(&self.q_rope.delta)?,
            output: self
                .output_delta
                .as_ref()
                .map_or(Ok(Vec::new()), |x| per_head(x))?,
            bias: self.bias_delta.as_ref().map(|x| numbers(x)).transpose()?,
        })
    }
}
