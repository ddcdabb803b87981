//! The joint low rank in the metric of the gradients loses what its spectrum says, and less than any other.

mod common;

use common::{Case, gather, random_layer, random_matrix, random_rows, rng};
use mlac_converter::steps::absorb::Split;
use mlac_converter::steps::lowrank::{JointProblem, Metric};
use mlac_converter::{
    LayerFactors, LayerStatistics, Matrix, RankChoice, Recipe, StatisticsOptions, convert_layer,
};

/// No component keeps its rotation and every query head is the whole key.
fn whole_keys(statistics: &LayerStatistics) -> Split {
    let shape = statistics.attention.shape;
    let n = shape.kv_width();
    let keys = Matrix::from_fn(n, 2 * n, |i, j| if i == j { 1.0 } else { 0.0 });
    Split {
        rotary: Matrix::zeros(0, 2 * n),
        rotary_query: vec![Matrix::zeros(0, shape.head_dim); shape.query_heads],
        inv_freq: vec![],
        plain: keys,
        plain_query: vec![Matrix::identity(n); shape.query_heads],
    }
}

/// `tr(G E M E^T)`, E what is lost of `s = [k ; v]`.
fn loss(factors: &LayerFactors, metric: &Matrix<f64>, moment: &Matrix<f64>) -> f64 {
    let shape = factors.shape;
    let r = factors.ranks.kv_lora_rank;
    let values: Vec<&Matrix<f64>> = (0..shape.kv_heads)
        .map(|g| &factors.w_uv[g * shape.group_size()])
        .collect();
    let mut decoder = factors.w_uk[0].clone();
    for value in values {
        decoder = decoder.stack(value);
    }
    let mut lost = Matrix::identity(shape.stacked_width());
    lost.add_scaled(&decoder.times(&factors.encoder.row_range(0, r)), -1.0);
    metric.times(&lost.congruence(moment)).trace()
}

/// A layer that the loss does not feel has no metric: keys and values are then taken as they are, and it is told.
#[test]
fn a_layer_without_gradients_stays_finite() {
    let weights = random_layer(Case::plain(4, 2, 8, 24), 5);
    let x = random_rows(&mut rng(6), 60, 24);
    let mut statistics = gather(&weights, &[x], StatisticsOptions::default());
    let width = statistics.attention.shape.stacked_width();
    statistics.gradient = Some(Matrix::zeros(width, width));
    let ranks = RankChoice {
        kv_lora_rank: 10,
        qk_rope_head_dim: 4,
    };
    let recipe = Recipe::default().with_gradients();
    let (factors, report) = convert_layer(&weights, &statistics, ranks, &recipe).expect("factors");
    assert!(factors.encoder.is_finite());
    assert!(
        factors
            .w_uk
            .iter()
            .chain(&factors.w_uv)
            .all(Matrix::is_finite)
    );
    assert!(report.error.expect("measured") < 1.0, "{report:?}");
    let told = report.notes.iter().any(|n| n.contains("were floored"));
    assert!(told, "{:?}", report.notes);
    statistics.gradient = None;
    let refused = convert_layer(&weights, &statistics, ranks, &recipe).unwrap_err();
    assert!(refused.to_string().contains("gradients"), "{refused}");
}

#[test]
fn nothing_loses_less() {
    let weights = random_layer(Case::plain(4, 2, 8, 24), 3);
    let x = random_rows(&mut rng(4), 60, 24);
    let mut statistics = gather(&weights, &[x], StatisticsOptions::default());
    let shape = statistics.attention.shape;
    let width = shape.stacked_width();
    let root = random_matrix(&mut rng(8), width, width, 1.0).cast::<f64>();
    // Some directions matter a thousand times more than others.
    let root = Matrix::from_fn(width, width, |i, j| {
        root[(i, j)] * 1.2_f64.powi(-(j as i32))
    });
    let metric = root.times_transposed(&root);
    statistics.gradient = Some(metric.clone());
    let split = whole_keys(&statistics);
    let moment = statistics.moment.clone();
    let queries = vec![Matrix::identity(shape.kv_width()); shape.query_heads];
    let solve = |metric: Metric, r: usize, beta: f64| {
        let problem =
            JointProblem::new(&statistics, &split, &moment, &queries, metric).expect("a problem");
        let ranks = RankChoice {
            kv_lora_rank: r,
            qk_rope_head_dim: 0,
        };
        problem.solve(&shape, &split, ranks, beta).expect("factors")
    };
    for r in [1, 5, 12, 20] {
        let (factors, spectrum) = solve(Metric::Gradient, r, 1.0);
        let least = loss(&factors, &metric, &moment);
        let discarded: f64 = spectrum[r..].iter().sum();
        assert!(
            (least - discarded).abs() < 1e-6 * spectrum[0],
            "rank {r}: {least} lost, {discarded} discarded"
        );
        for (other, beta) in [
            (Metric::Output, 1.0),
            (Metric::Plain, 1.0),
            (Metric::Gradient, 2.0),
        ] {
            let (factors, _) = solve(other, r, beta);
            let more = loss(&factors, &metric, &moment);
            assert!(
                more > least + 1e-6 * spectrum[0],
                "rank {r}: {other:?} at {beta} loses {more}, {least}"
            );
        }
    }
}
