//! Rotary embedding of f32 vectors, half-split.

/// Positions between which the addition theorem carries on: it loses about one unit of f64's last place
/// a step.
const ANCHOR: usize = 64;

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
    /// The table of positions `0..positions`, computed in f64: sines and cosines at every
    /// `ANCHOR`th position, by the addition theorem in between.
    pub(crate) fn new(inv_freq: &[f32], positions: usize) -> Self {
        let half = inv_freq.len();
        let (mut cos, mut sin) = (
            Vec::with_capacity(positions * half),
            Vec::with_capacity(positions * half),
        );
        let steps: Vec<(f64, f64)> = inv_freq.iter().map(|&f| f64::from(f).sin_cos()).collect();
        let mut at = vec![(0.0, 1.0); half];
        for s in 0..positions {
            for ((at, &f), &(step_sin, step_cos)) in at.iter_mut().zip(inv_freq).zip(&steps) {
                if s % ANCHOR == 0 {
                    *at = (s as f64 * f64::from(f)).sin_cos();
                }
                let (y, x) = *at;
                sin.push(y as f32);
                cos.push(x as f32);
                *at = (y * step_cos + x * step_sin, x * step_cos - y * step_sin);
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

    /// Turns one vector back, times `factor`: the transpose of [`Self::rotate`].
    pub(crate) fn rotate_back(
        &self,
        input: &[f32],
        output: &mut [f32],
        position: usize,
        factor: f32,
    ) {
        let h = self.half;
        let (cos, sin) = self.at(position);
        let (a, b) = input.split_at(h);
        let (out_a, out_b) = output.split_at_mut(h);
        for l in 0..h {
            out_a[l] = (a[l] * cos[l] + b[l] * sin[l]) * factor;
            out_b[l] = (b[l] * cos[l] - a[l] * sin[l]) * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_has_its_angle() {
        let inv_freq = [1.0, 0.731, 0.01, 1e-5];
        let table = RotationTable::new(&inv_freq, 3000);
        for s in 0..3000 {
            let (cos, sin) = table.at(s);
            for (l, &f) in inv_freq.iter().enumerate() {
                let angle = s as f64 * f64::from(f);
                assert!(
                    (f64::from(cos[l]) - angle.cos()).abs() < 6e-8,
                    "cos {f} {s}"
                );
                assert!(
                    (f64::from(sin[l]) - angle.sin()).abs() < 6e-8,
                    "sin {f} {s}"
                );
            }
        }
    }
}
