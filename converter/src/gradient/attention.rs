//! Gradients of the heads' outputs with respect to queries, keys and values.
//!
//! With `P = softmax(Q K^T)` and `O = P V`: `dV = P^T dO`, `dP = dO V^T`,
//! `dS = P o (dP - rowsum(P o dP))`, `dQ = dS K`, `dK = dS^T Q`; a sink has its share in P's rows and no
//! gradient of its own here. P is computed again, block by block, and never kept.

use rayon::prelude::*;

use crate::attention::{RotationTable, block_probabilities, dot, row_blocks};
use crate::layer::Attention;
use crate::linalg::{Matrix, Threads, gemm};

/// Gradients by token, all before rotation.
pub(super) struct AttentionGradients {
    /// `[tokens, H*d]`
    pub(super) query: Matrix<f32>,
    /// `[tokens, 2*G*d]`, keys then values.
    pub(super) stacked: Matrix<f32>,
}

/// The gradients of one window: `query` `[tokens, H*d]` and `stacked` `[tokens, 2*G*d]` before rotation,
/// `heads` `[tokens, H*d]` the gradient of the heads' outputs.
pub(super) fn backward(
    attention: &Attention,
    query: &Matrix<f32>,
    stacked: &Matrix<f32>,
    heads: &Matrix<f32>,
) -> AttentionGradients {
    let shape = attention.shape;
    let (tokens, d, keys) = (query.rows(), shape.head_dim, shape.kv_width());
    let table = RotationTable::new(&attention.rotary.inv_freq, tokens);
    let rotated: Vec<Matrix<f32>> = (0..shape.kv_heads)
        .into_par_iter()
        .map(|g| {
            turned(stacked, g * d, d, |s, from, to| {
                table.rotate(from, to, s, 1.0);
            })
        })
        .collect();
    let by_head: Vec<HeadGradients> = (0..shape.query_heads)
        .into_par_iter()
        .map(|h| {
            let g = shape.group_of(h);
            let values = Matrix::from_view(stacked.view().submatrix(0, keys + g * d, tokens, d));
            one_head(attention, &table, h, query, &rotated[g], &values, heads)
        })
        .collect();

    let mut gradients = AttentionGradients {
        query: Matrix::zeros(tokens, shape.query_width()),
        stacked: Matrix::zeros(tokens, shape.stacked_width()),
    };
    for (h, head) in by_head.iter().enumerate() {
        let g = shape.group_of(h);
        for t in 0..tokens {
            gradients.query.row_mut(t)[h * d..(h + 1) * d].copy_from_slice(head.query.row(t));
            let row = gradients.stacked.row_mut(t);
            for (start, part) in [(g * d, &head.key), (keys + g * d, &head.value)] {
                for (sum, x) in row[start..start + d].iter_mut().zip(part.row(t)) {
                    *sum += x;
                }
            }
        }
    }
    gradients
}

/// Gradients `[tokens, d]` of one query head and of its key and value head through it.
struct HeadGradients {
    query: Matrix<f32>,
    key: Matrix<f32>,
    value: Matrix<f32>,
}

fn one_head(
    attention: &Attention,
    table: &RotationTable,
    head: usize,
    query: &Matrix<f32>,
    keys: &Matrix<f32>,
    values: &Matrix<f32>,
    heads: &Matrix<f32>,
) -> HeadGradients {
    let (tokens, d) = (query.rows(), attention.shape.head_dim);
    let factor = (attention.scale * attention.rotary.attention_factor.powi(2)) as f32;
    let queries = turned(query, head * d, d, |t, from, to| {
        table.rotate(from, to, t, factor);
    });
    let positions: Vec<usize> = (0..tokens).collect();
    let [mut d_query, mut d_key, mut d_value] = [(); 3].map(|()| Matrix::<f32>::zeros(tokens, d));
    for block in row_blocks(&positions, attention) {
        let (first, count) = (block.rows.start, block.rows.len());
        let (oldest, seen) = (block.keys.start, block.keys.len());
        let rows = queries.view().submatrix(first, 0, count, d);
        let visible = keys.view().submatrix(oldest, 0, seen, d);
        let p = block_probabilities(attention, head, &positions, &block, rows, visible);
        let d_out = heads.view().submatrix(first, head * d, count, d);
        let into = d_value.view_mut().submatrix_mut(oldest, 0, seen, d);
        gemm(into, true, p.view().transpose(), d_out, 1.0, Threads::One);
        let mut d_score = Matrix::<f32>::zeros(count, seen);
        let shown = values.view().submatrix(oldest, 0, seen, d);
        gemm(
            d_score.view_mut(),
            false,
            d_out,
            shown.transpose(),
            1.0,
            Threads::One,
        );
        for i in 0..count {
            let mean = dot(p.row(i), d_score.row(i));
            for (x, p) in d_score.row_mut(i).iter_mut().zip(p.row(i)) {
                *x = p * (*x - mean);
            }
        }
        let into = d_query.view_mut().submatrix_mut(first, 0, count, d);
        gemm(into, false, d_score.view(), visible, 1.0, Threads::One);
        let into = d_key.view_mut().submatrix_mut(oldest, 0, seen, d);
        gemm(
            into,
            true,
            d_score.view().transpose(),
            rows,
            1.0,
            Threads::One,
        );
    }
    // The transpose of a rotation turns back.
    HeadGradients {
        query: turned(&d_query, 0, d, |t, from, to| {
            table.rotate_back(from, to, t, factor);
        }),
        key: turned(&d_key, 0, d, |s, from, to| {
            table.rotate_back(from, to, s, 1.0);
        }),
        value: d_value,
    }
}

/// Columns `start..start + d` of `rows`, each row through `turn(position, from, to)`.
fn turned(
    rows: &Matrix<f32>,
    start: usize,
    d: usize,
    turn: impl Fn(usize, &[f32], &mut [f32]),
) -> Matrix<f32> {
    let mut out = Matrix::zeros(rows.rows(), d);
    for t in 0..rows.rows() {
        turn(t, &rows.row(t)[start..start + d], out.row_mut(t));
    }
    out
}
