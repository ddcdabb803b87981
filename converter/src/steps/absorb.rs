//! Kept and dropped components as real matrices.
//!
//! A complex coefficient `e` on the pair `(l, l + d/2)` is the real 2 x 2 block
//! `[re e, -im e; im e, re e]`. The score of component c is `Re(q~ conj(z) e^{i theta D})` with
//! `q~ = q conj(decoder)`: kept components give rows of the rotary key and of the rotary query,
//! dropped ones rows of the plain encoder and, times `m[h,l]`, of the plain query. `YaRN`'s
//! factor multiplies cos and sin of both sides, so scores carry its square: it goes to the query
//! side of both kinds.

use faer::c64;

use super::constant::Constants;
use crate::layer::{Attention, Component};
use crate::linalg::Matrix;

/// A layer whose key is split into rotating and plain components.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Rotary rows of the encoder, real parts then imaginary parts: `[d_r, 2*G*d]`.
    pub rotary: Matrix<f64>,
    /// Rotary queries `[d_r, d]` of every query head.
    pub rotary_query: Vec<Matrix<f64>>,
    /// Radians per position of the rotary key, `[d_r/2]`.
    pub inv_freq: Vec<f32>,
    /// Plain rows of the encoder: `[G*d - d_r, 2*G*d]`.
    pub plain: Matrix<f64>,
    /// Plain queries `[G*d - d_r, d]` of every query head.
    pub plain_query: Vec<Matrix<f64>>,
}

/// Splits the components; `kept` holds ascending indices.
pub fn split(
    attention: &Attention,
    components: &[Component],
    kept: &[usize],
    constants: &Constants,
) -> Split {
    let shape = attention.shape;
    let mut is_kept = vec![false; components.len()];
    for &c in kept {
        is_kept[c] = true;
    }
    let dropped: Vec<usize> = (0..components.len()).filter(|&c| !is_kept[c]).collect();
    let factor = attention.rotary.attention_factor.powi(2);

    // Rows of unit norm: what is cached then has the size of keys.
    let norms: Vec<f64> = components
        .iter()
        .map(|c| {
            c.encoder
                .iter()
                .map(c64::norm_sqr)
                .sum::<f64>()
                .sqrt()
                .max(f64::MIN_POSITIVE)
        })
        .collect();
    let encoder = |chosen: &[usize]| {
        let mut rows = Matrix::zeros(2 * chosen.len(), shape.stacked_width());
        for (i, &c) in chosen.iter().enumerate() {
            for (g, e) in components[c].encoder.iter().enumerate() {
                let column = g * shape.head_dim + components[c].frequency;
                write_complex(
                    &mut rows,
                    i,
                    chosen.len(),
                    column,
                    shape.frequencies(),
                    *e / norms[c],
                );
            }
        }
        rows
    };
    let query = |chosen: &[usize], h: usize, constant: &dyn Fn(usize) -> c64| {
        let mut rows = Matrix::zeros(2 * chosen.len(), shape.head_dim);
        for (i, &c) in chosen.iter().enumerate() {
            let l = components[c].frequency;
            let coefficient =
                components[c].decoder[shape.group_of(h)].conj() * constant(l) * (factor * norms[c]);
            write_complex(
                &mut rows,
                i,
                chosen.len(),
                l,
                shape.frequencies(),
                coefficient,
            );
        }
        rows
    };
    let one = |_: usize| c64::new(1.0, 0.0);
    Split {
        rotary: encoder(kept),
        rotary_query: (0..shape.query_heads)
            .map(|h| query(kept, h, &one))
            .collect(),
        inv_freq: kept
            .iter()
            .map(|&c| attention.rotary.inv_freq[components[c].frequency])
            .collect(),
        plain: encoder(&dropped),
        plain_query: (0..shape.query_heads)
            .map(|h| query(&dropped, h, &|l| constants.mean[h][l]))
            .collect(),
    }
}

/// Writes the complex coefficient of output `i` (real part in row `i`, imaginary part in row
/// `i + pairs`) on the input pair `(column, column + half)`.
fn write_complex(
    rows: &mut Matrix<f64>,
    i: usize,
    pairs: usize,
    column: usize,
    half: usize,
    e: c64,
) {
    rows[(i, column)] = e.re;
    rows[(i, column + half)] = -e.im;
    rows[(i + pairs, column)] = e.im;
    rows[(i + pairs, column + half)] = e.re;
}
