//! Rotary embedding of f32 vectors, half-split.

/// Cosines and sines of every position and frequency.
#[derive(Debug, Clone)]
pub(crate) struct RotationTable {
    half: usize,
    /// `[positions, half]`
    cos: Vec<f32>,
    /// `[positions, half]`
    sin: Vec<f32>,
}

impl RotationTable {
    /// The table of positions `0..positions`; angles are computed in f64.
    pub(crate) fn new(inv_freq: &[f32], positions: usize) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(positions * half),
            Vec::with_capacity(positions * half),
        );
        for s in 0..positions {
            for &f in inv_freq {
                let (y, x) = (s as f64 * f64::from(f)).sin_cos();
                cos.push(x as f32);
                sin.push(y as f32);
            }
        }
        Self { half, cos, sin }
    }

    /// Positions in the table.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Cosines and sines `[half]` of a position.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Frequencies in the table.
    pub(crate) fn half(&self) -> usize {
        self.half
    }

    /// Turns one vector `[2 * half]` by its position, times `factor`.
    pub(crate) fn rotate(&self, input: &[f32], output: &mut [f32], position: usize, factor: f32) {
        let h = self.half;
        let (cos, sin) = self.at(position);
        let (a, b) = input.split_at(h);
        let (out_a, out_b) = output.split_at_mut(h);
        for l in 0..h {
            out_a[l] = (a[l] * cos[l] - b[l] * sin[l]) * factor;
            out_b[l] = (b[l] * cos[l] + a[l] * sin[l]) * factor;
        }
    }
}
