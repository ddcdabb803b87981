//! Attention of a window on sampled query rows, shared by the statistics and the error evaluation.

mod rotate;
mod softmax;

pub(crate) use rotate::RotationTable;
pub(crate) use softmax::{dot, max_abs_finite, softmax_row, sum};

use std::ops::Range;

use faer::MatRef;

use crate::layer::Attention;
use crate::linalg::{Matrix, Threads, gemm};

/// Most query rows of one parallel task.
const ROW_BLOCK: usize = 64;

/// A block of query rows and the keys they can see.
#[derive(Debug, Clone)]
pub(crate) struct RowBlock {
    /// Which of the sampled rows.
    pub(crate) rows: Range<usize>,
    /// Positions of keys that any of them sees.
    pub(crate) keys: Range<usize>,
}

/// Cuts ascending query positions into blocks: four or more, so that most keys a block computes are
/// visible, of 16 rows or more, so that products stay efficient.
pub(crate) fn row_blocks(positions: &[usize], attention: &Attention) -> Vec<RowBlock> {
    let size = (positions.len() / 4).clamp(16, ROW_BLOCK);
    (0..positions.len())
        .step_by(size)
        .map(|start| {
            let rows = start..(start + size).min(positions.len());
            let keys = attention.first_visible(positions[rows.start])..positions[rows.end - 1] + 1;
            RowBlock { rows, keys }
        })
        .collect()
}

/// Softmax probabilities `[rows, keys]` of a block of one head: `queries` `[rows, n]` (scaled)
/// against `keys` `[keys, n]`, causal and windowed; with a sink rows sum to less than 1.
pub(crate) fn block_probabilities(
    attention: &Attention,
    head: usize,
    positions: &[usize],
    block: &RowBlock,
    queries: MatRef<'_, f32>,
    keys: MatRef<'_, f32>,
) -> Matrix<f32> {
    let mut scores = Matrix::<f32>::zeros(block.rows.len(), block.keys.len());
    gemm(
        scores.view_mut(),
        false,
        queries,
        keys.transpose(),
        1.0,
        Threads::One,
    );
    for (i, &t) in positions[block.rows.clone()].iter().enumerate() {
        let visible = attention.first_visible(t) - block.keys.start..t + 1 - block.keys.start;
        softmax_row(scores.row_mut(i), visible, attention.sink(head));
    }
    scores
}
