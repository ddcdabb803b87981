//! Step 2: which components keep their rotation.
//!
//! Dropping the rotation of component c at frequency l changes the squared scores by
//! `E|z_c|^2 * sum_h alpha_h E|q~[h,c]|^2 * E|e^{i theta_l D} - m[h,l]|^2` with
//! `q~[h,c] = q[h,l] conj(decoder[g(h),c])`. The components with the largest change are kept, over
//! all frequencies at once: slow frequencies need none, fast ones several.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};

use super::constant::Constants;
use crate::layer::{AttentionShape, Component};

/// Pattern of the kept components.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Selection {
    /// The most important ones, wherever they are.
    Greedy,
    /// Frequencies in turn: a second component of a frequency only when every frequency has one
    /// (the pattern other runtimes' MLA layers have).
    OnePerFrequency,
}

/// Importance of every component: the change of the squared scores when its rotation is dropped.
///
/// `contribution[h][l]` is the weighted energy of head h's scores at frequency l; a component has
/// the share `|decoder[g,c]|^2 E|z_c|^2` of its frequency's key energy `E|k[g,l]|^2`.
pub fn importance(
    shape: &AttentionShape,
    components: &[Component],
    contribution: &[Vec<f64>],
    constants: &Constants,
) -> Vec<f64> {
    let energy = |c: &Component, g: usize| c.decoder[g].norm_sqr() * c.energy;
    let mut key_energy = vec![vec![0.0; shape.frequencies()]; shape.kv_heads];
    for c in components {
        for (g, row) in key_energy.iter_mut().enumerate() {
            row[c.frequency] += energy(c, g);
        }
    }
    components
        .iter()
        .map(|c| {
            let l = c.frequency;
            (0..shape.query_heads)
                .map(|h| {
                    let g = shape.group_of(h);
                    let share = if key_energy[g][l] > 0.0 {
                        energy(c, g) / key_energy[g][l]
                    } else {
                        0.0
                    };
                    share * contribution[h][l] * constants.spread[h][l]
                })
                .sum()
        })
        .collect()
}

/// Indices of the `count` kept components, ascending.
pub fn select(
    shape: &AttentionShape,
    components: &[Component],
    importance: &[f64],
    count: usize,
    selection: Selection,
) -> Vec<usize> {
    let mut order: Vec<usize> = (0..components.len()).collect();
    // Ties go to the faster frequency, so the choice does not depend on the sort.
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]).then(a.cmp(&b)));
    if selection == Selection::OnePerFrequency {
        let mut taken = vec![0usize; shape.frequencies()];
        let mut round = vec![0usize; components.len()];
        for &c in &order {
            round[c] = taken[components[c].frequency];
            taken[components[c].frequency] += 1;
        }
        order.sort_by_key(|&c| (round[c], Reverse(OrderedEnergy(importance[c])), c));
    }
    let mut kept = order[..count.min(order.len())].to_vec();
    kept.sort_unstable();
    kept
}

/// Total order of importances.
#[derive(PartialEq)]
struct OrderedEnergy(f64);

impl Eq for OrderedEnergy {}

impl PartialOrd for OrderedEnergy {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for OrderedEnergy {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}
