//! The squared error of a converted layer's output, as candle operations.
//!
//! Per head h, query row t and key s, with `row_s = E s` whose last `d_r` numbers are turned by s:
//! `x = scale * [W_uk,h^T q ; turned(R_h q)] . row_s`, `p = softmax(x)` with the head's sink,
//! `o_h = W_uv,h sum_s p row_s[..r]`, `y = sum_h W_o,h o_h + b`, error `sum |y - T|^2 / sum |T|^2`.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::attention::RotationTable;
use crate::layer::Attention;
use crate::linalg::Matrix;
use crate::statistics::WindowSample;

/// Added to scores a query does not see.
const UNSEEN: f64 = -1e30;

/// The matrices of a converted layer.
pub(super) struct LayerTensors {
    /// `[r + d_r, 2*G*d]`
    pub(super) encoder: Tensor,
    /// `[H, d, r]`
    pub(super) w_uk: Tensor,
    /// `[H, d, r]`
    pub(super) w_uv: Tensor,
    /// `[H, d_r, d]`
    pub(super) q_rope: Tensor,
    /// `[H*d, D]`, transposed.
    pub(super) output: Tensor,
    /// `[1, D]`
    pub(super) bias: Option<Tensor>,
}

/// Query rows of one window, all keys they see, and what should come out.
pub(super) struct Batch {
    /// `[keys, 2*G*d]`
    stacked: Tensor,
    /// Times the scale of scores: `[H, rows, d]`.
    queries: Tensor,
    /// 0, or [`UNSEEN`]: `[1, rows, keys]`.
    mask: Tensor,
    /// Cosines and sines of the keys' positions `[keys, d_r/2]`.
    key_turn: [Tensor; 2],
    /// And of the rows' `[1, rows, d_r/2]`.
    query_turn: [Tensor; 2],
    /// `[rows, D]`
    targets: Tensor,
    /// `sum |T|^2`
    energy: f64,
}

/// A layer whose error is differentiated.
pub(super) struct Objective<'a> {
    attention: &'a Attention,
    latent: usize,
    /// `[H, 1, 1]`
    sinks: Option<Tensor>,
    dtype: DType,
    device: Device,
}

/// A tensor of a matrix in `dtype` on `device`.
pub(super) fn tensor(
    data: &[f32],
    shape: &[usize],
    (dtype, device): (DType, &Device),
) -> Result<Tensor> {
    Tensor::from_slice(data, shape, device)?.to_dtype(dtype)
}

impl<'a> Objective<'a> {
    pub(super) fn new(
        attention: &'a Attention,
        latent: usize,
        on: (DType, &Device),
    ) -> Result<Self> {
        let sinks = attention
            .sinks
            .as_ref()
            .map(|s| tensor(s, &[s.len(), 1, 1], on))
            .transpose()?;
        Ok(Self {
            attention,
            latent,
            sinks,
            dtype: on.0,
            device: on.1.clone(),
        })
    }

    /// A window's rows as tensors; `table` is that of the rotary key.
    pub(super) fn batch(&self, sample: &WindowSample, table: &RotationTable) -> Result<Batch> {
        let on = (self.dtype, &self.device);
        let shape = self.attention.shape;
        let (rows, d) = (sample.positions.len(), shape.head_dim);
        let first = self.attention.first_visible(sample.positions[0]);
        let keys = first..sample.positions[rows - 1] + 1;
        let half = table.half();

        let stacked = sample.stacked.row_range(keys.start, keys.end);
        let mut queries = vec![0.0f32; rows * shape.query_width()];
        for h in 0..shape.query_heads {
            for t in 0..rows {
                let from = &sample.queries.row(t)[h * d..(h + 1) * d];
                queries[(h * rows + t) * d..][..d].copy_from_slice(from);
            }
        }
        let mut mask = Matrix::<f32>::zeros(rows, keys.len());
        for (i, &t) in sample.positions.iter().enumerate() {
            let seen = self.attention.first_visible(t)..=t;
            for (s, x) in keys.clone().zip(mask.row_mut(i)) {
                if !seen.contains(&s) {
                    *x = UNSEEN as f32;
                }
            }
        }
        let turn = |positions: &mut dyn Iterator<Item = usize>, shape: &[usize]| {
            let (mut cos, mut sin) = (Vec::new(), Vec::new());
            for s in positions {
                cos.extend_from_slice(table.at(s).0);
                sin.extend_from_slice(table.at(s).1);
            }
            Ok::<_, candle_core::Error>([tensor(&cos, shape, on)?, tensor(&sin, shape, on)?])
        };
        let nothing = Matrix::zeros(rows, shape.hidden);
        let targets = sample.targets.as_ref().unwrap_or(&nothing);
        let energy: f64 = targets
            .data()
            .iter()
            .map(|&x| f64::from(x) * f64::from(x))
            .sum();
        Ok(Batch {
            stacked: tensor(stacked.data(), &[keys.len(), stacked.cols()], on)?,
            queries: (tensor(&queries, &[shape.query_heads, rows, d], on)? * self.attention.scale)?,
            mask: tensor(mask.data(), &[1, rows, keys.len()], on)?,
            key_turn: turn(&mut keys.clone(), &[keys.len(), half])?,
            query_turn: turn(&mut sample.positions.iter().copied(), &[1, rows, half])?,
            targets: tensor(targets.data(), &[rows, shape.hidden], on)?,
            energy: energy.max(f64::MIN_POSITIVE),
        })
    }

    /// What the layer puts out, `[rows, D]`.
    pub(super) fn output(&self, layer: &LayerTensors, batch: &Batch) -> Result<Tensor> {
        let shape = self.attention.shape;
        let (heads, rows, keys) = (
            shape.query_heads,
            batch.targets.dim(0)?,
            batch.stacked.dim(0)?,
        );
        let r = self.latent;
        let cached = batch.stacked.matmul(&layer.encoder.t()?)?;
        let width = cached.dim(1)?;
        let latent = cached.narrow(1, 0, r)?.contiguous()?;
        let key = turned(&cached.narrow(1, r, width - r)?, &batch.key_turn)?;
        let cached = Tensor::cat(&[&latent, &key], 1)?;

        let plain = batch.queries.matmul(&layer.w_uk)?;
        let rotary = turned(
            &batch.queries.matmul(&layer.q_rope.transpose(1, 2)?)?,
            &batch.query_turn,
        )?;
        let queries = Tensor::cat(&[&plain, &rotary], D::Minus1)?;
        let scores = queries
            .reshape((heads * rows, width))?
            .matmul(&cached.t()?)?
            .reshape((heads, rows, keys))?
            .broadcast_add(&batch.mask)?;

        // The largest score is a constant: it cancels.
        let mut most = scores.detach().max_keepdim(D::Minus1)?;
        if let Some(sinks) = &self.sinks {
            most = most.broadcast_maximum(sinks)?;
        }
        let weights = scores.broadcast_sub(&most)?.exp()?;
        let mut total = weights.sum_keepdim(D::Minus1)?;
        if let Some(sinks) = &self.sinks {
            total = (total + sinks.broadcast_sub(&most)?.exp()?)?;
        }
        let context = weights
            .reshape((heads * rows, keys))?
            .matmul(&latent)?
            .reshape((heads, rows, r))?
            .broadcast_div(&total)?;
        let outputs = context
            .matmul(&layer.w_uv.transpose(1, 2)?)?
            .transpose(0, 1)?
            .contiguous()?
            .reshape((rows, heads * shape.head_dim))?;
        let y = outputs.matmul(&layer.output)?;
        match &layer.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// `sum |y - T|^2 / sum |T|^2` over the batch, a scalar.
    pub(super) fn error(&self, layer: &LayerTensors, batch: &Batch) -> Result<Tensor> {
        let difference = (self.output(layer, batch)? - &batch.targets)?;
        difference.sqr()?.sum_all()? / batch.energy
    }
}

/// Turns the last axis, half-split, by given cosines and sines.
fn turned(x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let a = x.narrow(D::Minus1, 0, half)?.contiguous()?;
    let b = x.narrow(D::Minus1, half, half)?.contiguous()?;
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}
