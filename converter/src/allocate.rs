//! One budget for all layers: how many numbers each layer caches, and how they are divided between
//! latent and rotary key.
//!
//! Per layer a *curve*: the error of the layer's output at many pairs (r, `d_r`), measured on kept
//! calibration windows. Per layer a *price*: how much the model's output suffers per unit of that
//! error, measured by the caller. The loss of a choice is the sum over layers of price times error;
//! numbers go where they lower it most (marginal loss per number along the lower convex hull of
//! each curve, which is optimal for the sum up to the last step).

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, refuse};
use crate::error_eval::LayerEvaluator;
use crate::layer::{AttentionShape, LayerWeights, RankChoice};
use crate::methods::recipe::{Prepared, Recipe, prepare};
use crate::statistics::LayerStatistics;

/// Error of one layer's output at one pair of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// r and `d_r`.
    pub ranks: RankChoice,
    /// Relative squared error of the layer's output on the kept windows.
    pub error: f64,
}

/// Everything allocation knows of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerCurve {
    /// Index of the layer.
    pub layer: usize,
    /// Measured points, in any order.
    pub points: Vec<CurvePoint>,
    /// Loss of the model per unit of the layer's error.
    pub price: f64,
}

/// The step of ranks for layers that get `even` numbers each when all get the same: `align`, or less
/// where that leaves no room for three steps or the keys are narrower.
pub fn step(shape: &AttentionShape, align: usize, even: usize) -> usize {
    let mut step = align.max(2);
    while step > 2 && (even < 3 * step || shape.kv_width() / 2 < step) {
        step /= 2;
    }
    step
}

/// Pairs of ranks to measure: multiples of `step` that are no finer than a sixteenth of the keys,
/// denser where caches are small.
pub fn grid(shape: &AttentionShape, step: usize) -> Vec<RankChoice> {
    let (keys, whole) = (shape.kv_width(), shape.stacked_width());
    let step = step.max(keys / 16 / step * step);
    let ladder = |most: usize| {
        let mut at = step;
        let mut list = Vec::new();
        while at <= most {
            list.push(at);
            // Half an octave of resolution.
            at += (at / 4 / step).max(1) * step;
        }
        list
    };
    let rotary: Vec<usize> = ladder(keys / 2);
    let mut pairs = Vec::new();
    for &qk_rope_head_dim in &rotary {
        for kv_lora_rank in ladder(whole - qk_rope_head_dim) {
            pairs.push(RankChoice {
                kv_lora_rank,
                qk_rope_head_dim,
            });
        }
    }
    pairs
}

/// Measures the error at each pair of ranks of `grid`, which lists pairs of one `d_r` together.
pub fn curve(
    weights: &LayerWeights,
    statistics: &LayerStatistics,
    recipe: &Recipe,
    grid: &[RankChoice],
    beta: f64,
) -> Result<Vec<CurvePoint>, Error> {
    let Some(evaluator) = LayerEvaluator::new(statistics, &weights.o.weight) else {
        return Err(refuse(
            format!("allocation of layer {}", weights.layer),
            "kept calibration windows",
            "none",
            "calibrate on a text, or give ranks instead of a budget",
        ));
    };
    let mut points = Vec::with_capacity(grid.len());
    for pairs in grid.chunk_by(|a, b| a.qk_rope_head_dim == b.qk_rope_head_dim) {
        let prepared: Prepared = prepare(weights, statistics, pairs[0], recipe)?;
        let low_rank = prepared.decompose(beta)?;
        let measured: Vec<CurvePoint> = pairs
            .par_iter()
            .map(|&ranks| CurvePoint {
                ranks,
                error: evaluator.error(&low_rank.cut(&prepared, ranks)),
            })
            .collect();
        points.extend(measured);
    }
    Ok(points)
}

/// The point with the least loss at each width, and only those on the lower convex hull: widths
/// ascending, loss descending, slopes rising.
fn hull(curve: &LayerCurve) -> Vec<CurvePoint> {
    let mut points: Vec<CurvePoint> = curve.points.clone();
    points.sort_by(|a, b| {
        (a.ranks.width(), a.error)
            .partial_cmp(&(b.ranks.width(), b.error))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let mut hull: Vec<CurvePoint> = Vec::new();
    for point in points {
        if hull.last().is_some_and(|last| {
            last.error <= point.error || last.ranks.width() == point.ranks.width()
        }) {
            continue;
        }
        while let [.., a, b] = hull.as_slice() {
            let slope = |p: &CurvePoint, q: &CurvePoint| {
                (q.error - p.error) / (q.ranks.width() - p.ranks.width()) as f64
            };
            if slope(a, b) <= slope(b, &point) {
                break;
            }
            hull.pop();
        }
        hull.push(point);
    }
    hull
}

/// Distributes `budget` numbers per token over the layers, ranks in multiples of `step`; the ranks in
/// the order of `curves`.
pub fn allocate(
    curves: &[LayerCurve],
    budget: usize,
    step: usize,
) -> Result<Vec<RankChoice>, Error> {
    for curve in curves {
        let errors = curve.points.iter().map(|p| p.error);
        if let Some(bad) = errors
            .chain([curve.price])
            .find(|x| !x.is_finite() || *x < 0.0)
        {
            return Err(refuse(
                format!("measured loss of layer {}", curve.layer),
                "finite errors and a finite price, none below 0",
                bad.to_string(),
                "check the calibration text, or give ranks instead of a budget",
            ));
        }
    }
    let hulls: Vec<Vec<CurvePoint>> = curves.iter().map(hull).collect();
    let least: usize = hulls
        .iter()
        .map(|h| h.first().map_or(0, |p| p.ranks.width()))
        .sum();
    if hulls.iter().any(Vec::is_empty) || least > budget {
        return Err(refuse(
            "--budget",
            format!(
                "room for at least {least} numbers a token in {} layers",
                curves.len()
            ),
            budget.to_string(),
            "raise the budget, or convert fewer layers",
        ));
    }
    let mut at = vec![0; curves.len()];
    let mut left = budget - least;
    loop {
        // The step along a hull that gains most per number among those that still fit.
        let best = (0..curves.len())
            .filter_map(|i| {
                let (now, next) = (hulls[i][at[i]], hulls[i].get(at[i] + 1)?);
                let cost = next.ranks.width() - now.ranks.width();
                let gain = curves[i].price * (now.error - next.error) / cost as f64;
                (cost <= left).then_some((gain, i, cost))
            })
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, i, cost)) = best else { break };
        at[i] += 1;
        left -= cost;
    }
    let mut ranks: Vec<RankChoice> = hulls.iter().zip(&at).map(|(h, &i)| h[i].ranks).collect();
    // What is left is too little for a whole step along any hull; latents take it where the slope is steepest.
    while left >= step {
        let best = (0..curves.len())
            .filter_map(|i| {
                let (now, next) = (hulls[i][at[i]], hulls[i].get(at[i] + 1)?);
                let cost = next.ranks.width() - now.ranks.width();
                let taken = ranks[i].width() - now.ranks.width();
                let gain = curves[i].price * (now.error - next.error) / cost as f64;
                (taken + step < cost).then_some((gain / (1.0 + taken as f64 / step as f64), i))
            })
            .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let Some((_, i)) = best else { break };
        ranks[i].kv_lora_rank += step;
        left -= step;
    }
    Ok(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(kv_lora_rank: usize, qk_rope_head_dim: usize, error: f64) -> CurvePoint {
        CurvePoint {
            ranks: RankChoice {
                kv_lora_rank,
                qk_rope_head_dim,
            },
            error,
        }
    }

    /// Error `scale * 2^-(width/16)` with the better of two divisions at every width.
    fn geometric(layer: usize, scale: f64, price: f64) -> LayerCurve {
        let points = (2..12)
            .flat_map(|n: i32| {
                let error = scale * 0.5_f64.powi(n);
                let r = 16 * n as usize - 16;
                [point(r, 16, error), point(r - 8, 24, 1.5 * error)]
            })
            .collect();
        LayerCurve {
            layer,
            points,
            price,
        }
    }

    #[test]
    fn equal_layers_get_equal_ranks_and_dear_ones_more() {
        let width = |r: &RankChoice| r.width();
        let equal = [geometric(0, 1.0, 1.0), geometric(1, 1.0, 1.0)];
        let ranks = allocate(&equal, 160, 16).unwrap();
        assert_eq!(ranks.iter().map(width).collect::<Vec<_>>(), [80, 80]);
        assert!(ranks.iter().all(|r| r.qk_rope_head_dim == 16), "{ranks:?}");
        // Four times the price is two halvings: two steps of 16 more than the other.
        let dear = [geometric(0, 1.0, 1.0), geometric(1, 1.0, 4.0)];
        let ranks = allocate(&dear, 160, 16).unwrap();
        assert_eq!(ranks.iter().map(width).collect::<Vec<_>>(), [64, 96]);
        // The same by a larger error instead.
        let large = [geometric(0, 1.0, 1.0), geometric(1, 4.0, 1.0)];
        assert_eq!(allocate(&large, 160, 16).unwrap(), ranks);
    }

    #[test]
    fn the_budget_is_kept_and_refused_when_too_small() {
        let curves = [geometric(0, 1.0, 1.0), geometric(1, 3.0, 0.2)];
        for budget in 64..400 {
            let spent: usize = allocate(&curves, budget, 16)
                .unwrap()
                .iter()
                .map(RankChoice::width)
                .sum();
            assert!(
                spent <= budget && (spent + 16 > budget || spent == 352),
                "{spent} of {budget}"
            );
        }
        assert!(allocate(&curves, 63, 16).is_err());
    }

    #[test]
    fn losses_that_are_no_numbers_are_refused() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            let priced = geometric(7, 1.0, bad);
            let refusal = allocate(&[priced], 160, 16).unwrap_err().to_string();
            assert!(refusal.contains("layer 7"), "{refusal}");
            let mut measured = geometric(8, 1.0, 1.0);
            measured.points[3].error = bad;
            let refusal = allocate(&[measured], 160, 16).unwrap_err().to_string();
            assert!(refusal.contains("layer 8"), "{refusal}");
        }
    }

    #[test]
    fn what_is_left_goes_to_latents() {
        let coarse = |layer| LayerCurve {
            layer,
            points: vec![point(16, 16, 1.0), point(112, 16, 0.1)],
            price: 1.0,
        };
        let ranks = allocate(&[coarse(0), coarse(1)], 128 + 32 + 32, 16).unwrap();
        let widths: Vec<usize> = ranks.iter().map(RankChoice::width).collect();
        assert_eq!(widths, [128, 64]);
    }

    #[test]
    fn points_above_the_hull_are_passed_over() {
        // 32 -> 48 gains nothing, 32 -> 64 a lot.
        let curve = LayerCurve {
            layer: 0,
            points: vec![point(16, 16, 1.0), point(32, 16, 0.99), point(48, 16, 0.1)],
            price: 1.0,
        };
        let widths: Vec<usize> = hull(&curve).iter().map(|p| p.ranks.width()).collect();
        assert_eq!(widths, [32, 64]);
    }

    #[test]
    fn the_grid_fits_the_layer() {
        for (kv_heads, head_dim) in [(3, 64), (8, 64), (1, 16), (2, 8)] {
            let shape = AttentionShape {
                hidden: 64,
                query_heads: kv_heads,
                kv_heads,
                head_dim,
            };
            for even in [6, shape.stacked_width() / 4, shape.stacked_width()] {
                let pairs = grid(&shape, step(&shape, 16, even));
                assert!(!pairs.is_empty(), "{shape:?}");
                for ranks in pairs {
                    assert!(ranks.check(&shape).is_ok(), "{ranks:?} in {shape:?}");
                }
            }
        }
    }
}
