//! A window kept for measuring the error of a converted layer.

use super::WindowActivations;
use crate::layer::AttentionShape;
use crate::linalg::Matrix;

/// The stacked key/value vectors of a window and the queries of a few of its rows.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowSample {
    /// `[k ; v]` of every token: `[L, 2*G*d]`.
    pub stacked: Matrix<f32>,
    /// Ascending positions of the evaluated query rows.
    pub positions: Vec<usize>,
    /// Their queries before rotation: `[rows, H*d]`.
    pub queries: Matrix<f32>,
    /// What the layer should put out at these rows `[rows, D]`; `None`: what the original layer puts
    /// out on this window.
    pub targets: Option<Matrix<f32>>,
}

impl WindowSample {
    /// Copies a window and the queries at `positions`.
    pub(crate) fn new(
        window: &WindowActivations<'_>,
        shape: &AttentionShape,
        positions: Vec<usize>,
        target: Option<&[f32]>,
    ) -> Self {
        let rows = |data: &[f32], width: usize| {
            let picked = positions
                .iter()
                .flat_map(|&t| &data[t * width..(t + 1) * width]);
            Matrix::from_vec(positions.len(), width, picked.copied().collect())
        };
        Self {
            stacked: stack(window, shape),
            queries: rows(window.q, shape.query_width()),
            targets: target.map(|data| rows(data, shape.hidden)),
            positions,
        }
    }
}

/// `[k ; v]` of every token: `[L, 2*G*d]`.
pub(super) fn stack(window: &WindowActivations<'_>, shape: &AttentionShape) -> Matrix<f32> {
    let n = shape.kv_width();
    let mut stacked = Matrix::zeros(window.tokens, 2 * n);
    for s in 0..window.tokens {
        let row = stacked.row_mut(s);
        row[..n].copy_from_slice(&window.k[s * n..(s + 1) * n]);
        row[n..].copy_from_slice(&window.v[s * n..(s + 1) * n]);
    }
    stacked
}

/// `count` ascending positions in `0..tokens`, one at a pseudo-random place of each stratum; all
/// of them when there are no more.
pub(crate) fn stratified_positions(tokens: usize, count: usize, seed: u64) -> Vec<usize> {
    if tokens <= count {
        return (0..tokens).collect();
    }
    (0..count)
        .map(|i| {
            let (start, end) = (i * tokens / count, (i + 1) * tokens / count);
            start + (split_mix(seed ^ i as u64) % (end - start) as u64) as usize
        })
        .collect()
}

/// One step of SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn split_mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_spread_ascending_and_repeatable() {
        let positions = stratified_positions(2048, 256, 7);
        assert_eq!(positions.len(), 256);
        for (i, &t) in positions.iter().enumerate() {
            assert!((i * 8..(i + 1) * 8).contains(&t), "row {i} at {t}");
        }
        assert_eq!(positions, stratified_positions(2048, 256, 7));
        assert_ne!(positions, stratified_positions(2048, 256, 8));
        assert_eq!(stratified_positions(3, 256, 7), vec![0, 1, 2]);
    }
}
