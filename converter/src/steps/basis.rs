//! Step 1: a complex basis of the KV heads at every frequency.
//!
//! Write KV head g's key at frequency l as the complex number `k[g,l] = k[g][l] + i k[g][l + d/2]`.
//! Rotation multiplies all heads by the same `e^{i theta_l s}`, so any complex-linear mix of the
//! heads at one frequency commutes with it. In the query metric `k'[g] = sigma_g k[g,l]` with
//! `sigma_g^2 = sum over the queries of group g of alpha_h E|q[h,l]|^2`, the Hermitian
//! eigenvectors U of `C_l = E_w[k' k'^H]` compact the energy that scores see:
//!
//! `z_c = sum_g conj(U[g,c]) sigma_g k[g,l]`, and back `k[g,l] = sum_c U[g,c] / sigma_g z_c`.

use faer::c64;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::layer::{AttentionShape, Component};
use crate::linalg::{Matrix, hermitian_eigen};

/// Which basis of the KV heads is used at every frequency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Basis {
    /// Hermitian eigenvectors in the query metric.
    ComplexQueryMetric,
    /// Hermitian eigenvectors of the keys themselves (`sigma = 1`).
    ComplexPlain,
}

/// `sigma_g` is at least this fraction of the frequency's largest, so that heads without queries
/// can be divided out again.
const SIGMA_FLOOR: f64 = 1e-4;

/// The components of all frequencies, `[d/2 * G]`, by frequency and by falling energy within it.
///
/// `moment` is the weighted `E[s s^T]` `[2*G*d, 2*G*d]`; `query_energy[h][l]` is
/// `alpha_h E|q[h,l]|^2`.
pub fn components(
    shape: &AttentionShape,
    basis: Basis,
    moment: &Matrix<f64>,
    query_energy: &[Vec<f64>],
) -> Result<Vec<Component>, Error> {
    let (groups, half) = (shape.kv_heads, shape.frequencies());
    let mut all = Vec::with_capacity(half * groups);
    for l in 0..half {
        let sigma = match basis {
            Basis::ComplexPlain => vec![1.0; groups],
            Basis::ComplexQueryMetric => {
                let mut sigma = vec![0.0; groups];
                for (h, energy) in query_energy.iter().enumerate() {
                    sigma[shape.group_of(h)] += energy[l];
                }
                floored_roots(&sigma)
            }
        };
        let eigen = hermitian_eigen(
            groups,
            |g, g2| key_moment(shape, moment, l, g, g2) * (sigma[g] * sigma[g2]),
            "second moment of the keys at one frequency",
        )?;
        for (value, vector) in eigen.values.iter().zip(&eigen.vectors) {
            all.push(Component {
                frequency: l,
                encoder: vector
                    .iter()
                    .zip(&sigma)
                    .map(|(u, s)| u.conj() * *s)
                    .collect(),
                decoder: vector.iter().zip(&sigma).map(|(u, s)| *u / *s).collect(),
                energy: value.max(0.0),
            });
        }
    }
    Ok(all)
}

/// `E[k[g,l] conj(k[g2,l])]` from the real moment.
fn key_moment(shape: &AttentionShape, moment: &Matrix<f64>, l: usize, g: usize, g2: usize) -> c64 {
    let (d, half) = (shape.head_dim, shape.frequencies());
    let (a, b) = (g * d + l, g * d + l + half);
    let (a2, b2) = (g2 * d + l, g2 * d + l + half);
    c64::new(
        moment[(a, a2)] + moment[(b, b2)],
        moment[(b, a2)] - moment[(a, b2)],
    )
}

fn floored_roots(squares: &[f64]) -> Vec<f64> {
    let largest = squares.iter().copied().fold(0.0, f64::max).sqrt();
    if largest <= 0.0 {
        return vec![1.0; squares.len()];
    }
    squares
        .iter()
        .map(|x| x.sqrt().max(SIGMA_FLOOR * largest))
        .collect()
}
