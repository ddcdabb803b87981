//! Step 3: the constant in place of a dropped rotation.
//!
//! A component that loses its rotation is multiplied by a constant on the query side instead of by
//! `e^{i theta_l D}`. The best one is the mean over the distances the head attends to,
//! `m[h,l] = E[e^{i theta_l D}]`; what is left is `E|e^{i theta_l D} - m|^2 = 1 - |m|^2`.

use faer::c64;
use serde::{Deserialize, Serialize};

use crate::layer::Attention;
use crate::statistics::LayerStatistics;

/// What replaces the rotation of a dropped component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Constant {
    /// The mean of `e^{i theta D}` weighted by `p^2 |v_s - o_t|^2 |q[h,l]|^2 |k[g,l]|^2`: by how much
    /// the output changes with the scores and how much of them is of this frequency.
    MeanByContribution,
    /// The mean of `e^{i theta D}` weighted by `p^2`.
    MeanBySquare,
    /// The mean of `e^{i theta D}` weighted by `p`.
    Mean,
    /// 1: the component is used as if its frequency were 0.
    One,
}

/// The constants and what they leave over.
#[derive(Debug, Clone, PartialEq)]
pub struct Constants {
    /// `m[h][l]`.
    pub mean: Vec<Vec<c64>>,
    /// `E|e^{i theta_l D} - m[h,l]|^2` by `[h][l]`.
    pub spread: Vec<Vec<f64>>,
}

/// Constants of every head and frequency.
pub fn constants(statistics: &LayerStatistics, choice: Constant) -> Constants {
    let attention = &statistics.attention;
    let (mut mean, mut spread) = (Vec::new(), Vec::new());
    for head in &statistics.heads {
        let average = match choice {
            Constant::MeanByContribution | Constant::One => {
                let ratio = |(sum, energy): (&c64, &f64)| {
                    if *energy > 0.0 {
                        *sum / *energy
                    } else {
                        c64::new(1.0, 0.0)
                    }
                };
                head.rotation
                    .iter()
                    .zip(&head.rotation_energy)
                    .map(ratio)
                    .collect()
            }
            Constant::Mean => mean_rotation(attention, &head.distance_p),
            Constant::MeanBySquare => mean_rotation(attention, &head.distance_p2),
        };
        let left = |m: &c64| match choice {
            // E|e - 1|^2 = 2 - 2 Re E[e]
            Constant::One => (2.0 - 2.0 * m.re).max(0.0),
            _ => (1.0 - m.norm_sqr()).max(0.0),
        };
        spread.push(average.iter().map(left).collect());
        mean.push(match choice {
            Constant::One => vec![c64::new(1.0, 0.0); average.len()],
            _ => average,
        });
    }
    Constants { mean, spread }
}

/// `E[e^{i theta_l D}]` of every frequency under a histogram of distances.
pub(crate) fn mean_rotation(attention: &Attention, histogram: &[f64]) -> Vec<c64> {
    let total: f64 = histogram.iter().sum();
    if total <= 0.0 {
        return vec![c64::new(1.0, 0.0); attention.rotary.inv_freq.len()];
    }
    attention
        .rotary
        .inv_freq
        .iter()
        .map(|&theta| {
            let (mut re, mut im) = (0.0, 0.0);
            // e^{i theta D} by repeated multiplication, set anew every 64 steps so that errors stay at rounding.
            let (step_sin, step_cos) = f64::from(theta).sin_cos();
            let (mut sin, mut cos) = (0.0, 1.0);
            for (distance, weight) in histogram.iter().enumerate() {
                if distance % 64 == 0 {
                    (sin, cos) = (f64::from(theta) * distance as f64).sin_cos();
                }
                re += weight * cos;
                im += weight * sin;
                (cos, sin) = (
                    cos * step_cos - sin * step_sin,
                    cos * step_sin + sin * step_cos,
                );
            }
            c64::new(re / total, im / total)
        })
        .collect()
}
