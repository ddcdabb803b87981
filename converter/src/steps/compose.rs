//! The factors as the tensors of an MLA checkpoint.
//!
//! `Hidden`: the encoder acts on the hidden state, `kv_a = E [W_k ; W_v]` with bias
//! `E [b_k ; b_v]`, and `q_proj` holds `[W_q,h ; q_rope_h W_q,h]` per head. `NormedKey`: the norm
//! of keys sits between projection and encoder, so `kv_a = E` acts on `[k ; v]` and `q_rope_proj`
//! on the normed query heads; `q_proj`, `k_proj`, `v_proj` and the norms stay as they are.
//! `KeptQuery`: the encoder of `Hidden` with the queries of `NormedKey`; `q_proj` stays as it is.
//! Products run in f64 and are rounded to f32 once.

use mlac_model::{MlaEncoder, MlaLayer};

use crate::error::{Error, refuse};
use crate::layer::{LayerFactors, LayerWeights, Projection, RankChoice};
use crate::linalg::Matrix;

/// The tensors of one converted layer.
#[derive(Debug, Clone, PartialEq)]
pub struct MlaTensors {
    /// Shapes and encoder form.
    pub form: MlaLayer,
    /// `Hidden`: `[H*(d+d_r), D]`, per head first d, then `d_r` rows. Otherwise the source's.
    pub q_proj: Projection,
    /// `[r+d_r, D]`; `NormedKey`: `[r+d_r, 2*G*d]` on `[normed keys ; values]`.
    pub kv_a_proj_with_mqa: Projection,
    /// `[H*(d+d), r]`, per head first the key rows, then the value rows.
    pub kv_b_proj: Matrix<f32>,
    /// `[D, H*d]`.
    pub o_proj: Projection,
    /// `NormedKey` and `KeptQuery`: `[H*d_r, d]`.
    pub q_rope_proj: Option<Matrix<f32>>,
    /// `NormedKey` only: the source's `k_proj`.
    pub k_proj: Option<Projection>,
    /// `NormedKey` only: the source's `v_proj`.
    pub v_proj: Option<Projection>,
    /// `NormedKey` only: the source's `q_norm` `[d]`.
    pub q_norm: Option<Vec<f32>>,
    /// `NormedKey` only: the source's `k_norm` `[d]`.
    pub k_norm: Option<Vec<f32>>,
    /// Radians per position, `[d_r/2]`.
    pub rotary_inv_freq: Vec<f32>,
}

impl MlaTensors {
    /// The new tensors by name below `model.layers.{i}.self_attn.`, with shapes; without those that
    /// the form keeps as the source has them ([`MlaEncoder::keeps`]).
    pub fn named(&self) -> Vec<(&'static str, Vec<usize>, &[f32])> {
        let mut list = Vec::new();
        let projections = [
            ("q_proj.weight", "q_proj.bias", &self.q_proj),
            (
                "kv_a_proj_with_mqa.weight",
                "kv_a_proj_with_mqa.bias",
                &self.kv_a_proj_with_mqa,
            ),
            ("o_proj.weight", "o_proj.bias", &self.o_proj),
        ];
        for (weight, bias, projection) in projections {
            if self.form.encoder.keeps(weight) {
                continue;
            }
            list.push((
                weight,
                vec![projection.weight.rows(), projection.weight.cols()],
                projection.weight.data(),
            ));
            if let Some(data) = &projection.bias {
                list.push((bias, vec![data.len()], data));
            }
        }
        for (name, matrix) in [
            ("kv_b_proj.weight", Some(&self.kv_b_proj)),
            ("q_rope_proj.weight", self.q_rope_proj.as_ref()),
        ] {
            if let Some(m) = matrix {
                list.push((name, vec![m.rows(), m.cols()], m.data()));
            }
        }
        list.push((
            "rotary_inv_freq",
            vec![self.rotary_inv_freq.len()],
            &self.rotary_inv_freq,
        ));
        list
    }
}

impl MlaTensors {
    /// The tensors of a layer whose new ones were kept as [`MlaTensors::named`] gives them: `take`
    /// gives the numbers of a name in a shape, or none where there is no such tensor.
    pub fn from_named(
        weights: &LayerWeights,
        ranks: RankChoice,
        mut take: impl FnMut(&str, &[usize]) -> Option<Vec<f32>>,
    ) -> Result<Self, Error> {
        weights.check()?;
        let shape = weights.attention.shape;
        ranks.check(&shape)?;
        let (d, r, d_r) = (shape.head_dim, ranks.kv_lora_rank, ranks.qk_rope_head_dim);
        let (heads, encoder) = (shape.query_heads, weights.encoder);
        let hidden = encoder == MlaEncoder::Hidden;
        let normed = encoder == MlaEncoder::NormedKey;
        let mut matrix = |name: &str, rows: usize, cols: usize| {
            let data = take(name, &[rows, cols]).ok_or_else(|| lost(weights, name))?;
            Ok::<_, Error>(Matrix::from_vec(rows, cols, data))
        };
        let input = if normed {
            shape.stacked_width()
        } else {
            shape.hidden
        };
        let q_weight = hidden
            .then(|| matrix("q_proj.weight", heads * (d + d_r), shape.hidden))
            .transpose()?;
        let kv_a_weight = matrix("kv_a_proj_with_mqa.weight", r + d_r, input)?;
        let o_weight = matrix("o_proj.weight", shape.hidden, heads * d)?;
        let kv_b_proj = matrix("kv_b_proj.weight", heads * 2 * d, r)?;
        let q_rope_proj = (!hidden)
            .then(|| matrix("q_rope_proj.weight", heads * d_r, d))
            .transpose()?;
        let rotary_inv_freq =
            take("rotary_inv_freq", &[d_r / 2]).ok_or_else(|| lost(weights, "rotary_inv_freq"))?;
        let mut bias = |name: &str, needed: bool, size: usize| match take(name, &[size]) {
            None if needed => Err(lost(weights, name)),
            found => Ok(found),
        };
        let affine = !normed && (weights.k.bias.is_some() || weights.v.bias.is_some());
        let q_bias = hidden && weights.q.bias.is_some();
        Ok(Self {
            form: MlaLayer {
                kv_lora_rank: r,
                qk_rope_head_dim: d_r,
                qk_nope_head_dim: d,
                v_head_dim: d,
                encoder,
            },
            q_proj: match q_weight {
                Some(weight) => Projection {
                    weight,
                    bias: bias("q_proj.bias", q_bias, heads * (d + d_r))?,
                },
                None => weights.q.clone(),
            },
            kv_a_proj_with_mqa: Projection {
                weight: kv_a_weight,
                bias: bias("kv_a_proj_with_mqa.bias", affine, r + d_r)?,
            },
            kv_b_proj,
            o_proj: Projection {
                weight: o_weight,
                bias: bias("o_proj.bias", weights.o.bias.is_some(), shape.hidden)?,
            },
            q_rope_proj,
            k_proj: normed.then(|| weights.k.clone()),
            v_proj: normed.then(|| weights.v.clone()),
            q_norm: weights.q_norm.clone(),
            k_norm: weights.k_norm.clone(),
            rotary_inv_freq,
        })
    }
}

fn lost(weights: &LayerWeights, name: &str) -> Error {
    refuse(
        format!("kept tensor {name} of layer {}", weights.layer),
        "one of the layer's shape",
        "none",
        "remove the file; the layer is then converted again",
    )
}

/// Builds the tensors of a converted layer.
pub fn compose(weights: &LayerWeights, factors: &LayerFactors) -> Result<MlaTensors, Error> {
    weights.check()?;
    factors.ranks.check(&weights.attention.shape)?;
    let shape = weights.attention.shape;
    let (d, r) = (shape.head_dim, factors.ranks.kv_lora_rank);
    let encoder = weights.encoder;

    let mut kv_b = Matrix::zeros(0, r);
    for h in 0..shape.query_heads {
        kv_b = kv_b.stack(&factors.w_uk[h]).stack(&factors.w_uv[h]);
    }
    let o_proj = Projection {
        weight: factors
            .o
            .as_ref()
            .map_or_else(|| weights.o.weight.clone(), Matrix::cast),
        bias: factors.o_bias.as_ref().map_or_else(
            || weights.o.bias.clone(),
            |b| Some(b.iter().map(|&x| x as f32).collect()),
        ),
    };
    let mut tensors = MlaTensors {
        form: MlaLayer {
            kv_lora_rank: r,
            qk_rope_head_dim: factors.ranks.qk_rope_head_dim,
            qk_nope_head_dim: d,
            v_head_dim: d,
            encoder,
        },
        q_proj: weights.q.clone(),
        kv_a_proj_with_mqa: Projection {
            weight: factors.encoder.cast(),
            bias: None,
        },
        kv_b_proj: kv_b.cast(),
        o_proj,
        q_rope_proj: None,
        k_proj: None,
        v_proj: None,
        q_norm: None,
        k_norm: None,
        rotary_inv_freq: factors.inv_freq.clone(),
    };
    match encoder {
        MlaEncoder::Hidden => {
            tensors.q_proj = hidden_queries(weights, factors);
            tensors.kv_a_proj_with_mqa = hidden_encoder(weights, factors);
        }
        MlaEncoder::KeptQuery => {
            tensors.kv_a_proj_with_mqa = hidden_encoder(weights, factors);
            tensors.q_rope_proj = Some(rotary_queries(factors, d));
        }
        MlaEncoder::NormedKey => {
            tensors.q_rope_proj = Some(rotary_queries(factors, d));
            tensors.k_proj = Some(weights.k.clone());
            tensors.v_proj = Some(weights.v.clone());
            tensors.q_norm.clone_from(&weights.q_norm);
            tensors.k_norm.clone_from(&weights.k_norm);
        }
    }
    Ok(tensors)
}

/// `[W_q,h ; q_rope_h W_q,h]` of every head, biases alike.
fn hidden_queries(weights: &LayerWeights, factors: &LayerFactors) -> Projection {
    let shape = weights.attention.shape;
    let d = shape.head_dim;
    let rows = d + factors.ranks.qk_rope_head_dim;
    let mut data = Vec::with_capacity(shape.query_heads * rows * shape.hidden);
    let mut bias = weights.q.bias.as_ref().map(|_| Vec::new());
    for h in 0..shape.query_heads {
        let own = weights.q.weight.row_range(h * d, (h + 1) * d);
        let rotary: Matrix<f32> = factors.q_rope[h].times(&own.cast()).cast();
        data.extend_from_slice(own.data());
        data.extend_from_slice(rotary.data());
        if let (Some(all), Some(source)) = (&mut bias, &weights.q.bias) {
            let own = &source[h * d..(h + 1) * d];
            all.extend_from_slice(own);
            all.extend(apply(&factors.q_rope[h], own.iter().copied()));
        }
    }
    Projection {
        weight: Matrix::from_vec(shape.query_heads * rows, shape.hidden, data),
        bias,
    }
}

/// `[H*d_r, d]`.
fn rotary_queries(factors: &LayerFactors, d: usize) -> Matrix<f32> {
    let mut rows = Matrix::zeros(0, d);
    for q_rope in &factors.q_rope {
        rows = rows.stack(q_rope);
    }
    rows.cast()
}

/// `E [W_k ; W_v]` and `E [b_k ; b_v]`.
fn hidden_encoder(weights: &LayerWeights, factors: &LayerFactors) -> Projection {
    let stacked: Matrix<f64> = weights.k.weight.stack(&weights.v.weight).cast();
    let n = weights.attention.shape.kv_width();
    let part = |bias: &Option<Vec<f32>>| bias.clone().unwrap_or_else(|| vec![0.0; n]);
    let bias = (weights.k.bias.is_some() || weights.v.bias.is_some()).then(|| {
        apply(
            &factors.encoder,
            part(&weights.k.bias)
                .into_iter()
                .chain(part(&weights.v.bias)),
        )
    });
    Projection {
        weight: factors.encoder.times(&stacked).cast(),
        bias,
    }
}

/// `matrix @ x`, rounded to f32.
fn apply(matrix: &Matrix<f64>, x: impl Iterator<Item = f32>) -> Vec<f32> {
    let x: Vec<f64> = x.map(f64::from).collect();
    (0..matrix.rows())
        .map(|i| {
            matrix
                .row(i)
                .iter()
                .zip(&x)
                .map(|(a, b)| a * b)
                .sum::<f64>() as f32
        })
        .collect()
}
