//! Input at the edge of what a conversion can use: what comes out is finite, and what had to be
//! filled in is said.

mod common;

use common::{Case, Qkv, Rows, gather, narrow, normal, qkv, random_layer, random_rows, rng};
use mlac_converter::refine::{RefineOptions, RefineWindows, TakeWindow, refine};
use mlac_converter::{
    Error, LayerFactors, LayerReport, LayerStatistics, LayerWeights, RankChoice, Recipe,
    StatisticsOptions, TransMla, WindowActivations, compose, convert_layer, convert_layer_svd,
    convert_layer_transmla, layer_error, prior_statistics,
};
use mlac_model::MlaEncoder;

const HIDDEN: usize = 24;
const PLAIN: Case = Case::plain(4, 2, 8, HIDDEN);
const GPT_OSS: Case = Case {
    encoder: MlaEncoder::KeptQuery,
    bias: true,
    sinks: true,
    window: Some(7),
    attention_factor: 1.3466,
    ..PLAIN
};
const QK_NORM: Case = Case {
    qk_norm: true,
    ..PLAIN
};

fn ranks(kv_lora_rank: usize, qk_rope_head_dim: usize) -> RankChoice {
    RankChoice {
        kv_lora_rank,
        qk_rope_head_dim,
    }
}

/// Small, TransMLA's divisor of the head, and all there can be.
const RANKS: [RankChoice; 3] = [
    RankChoice {
        kv_lora_rank: 3,
        qk_rope_head_dim: 2,
    },
    RankChoice {
        kv_lora_rank: 12,
        qk_rope_head_dim: 8,
    },
    RankChoice {
        kv_lora_rank: 24,
        qk_rope_head_dim: 8,
    },
];

fn statistics(weights: &LayerWeights, windows: &[Rows]) -> LayerStatistics {
    gather(weights, windows, StatisticsOptions::default())
}

/// What a method gives.
type Converted = Result<(LayerFactors, LayerReport), Error>;

/// Every method on these statistics, which gives finite tensors; the reports of the recipe.
#[track_caller]
fn all_finite(
    what: &str,
    weights: &LayerWeights,
    statistics: &LayerStatistics,
) -> Vec<LayerReport> {
    let mut reports = Vec::new();
    for ranks in RANKS {
        let results: [(&str, Converted); 3] = [
            (
                "recipe",
                convert_layer(weights, statistics, ranks, &Recipe::default()),
            ),
            (
                "transmla",
                convert_layer_transmla(weights, statistics, ranks, TransMla::default()),
            ),
            ("svd", convert_layer_svd(weights, ranks)),
        ];
        for (method, result) in results {
            let (factors, report) = result.unwrap_or_else(|e| panic!("{what}, {method}: {e}"));
            let tensors = compose(weights, &factors).expect("composes");
            for (name, _, data) in tensors.named() {
                let worst = data.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                assert!(
                    data.iter().all(|x| x.is_finite()) && worst < 1e6,
                    "{what}, {method}, {ranks:?}: {name} goes up to {worst}"
                );
            }
            let numbers = [report.energy_kept, report.importance_kept, report.beta];
            let numbers = numbers.iter().chain(&report.spectrum).chain(&report.error);
            assert!(
                numbers.clone().all(|x| x.is_finite()),
                "{what}, {method}: {report:?}"
            );
            if method == "recipe" {
                reports.push(report);
            }
        }
    }
    reports
}

#[track_caller]
fn says(report: &LayerReport, words: &str) {
    assert!(
        report.notes.iter().any(|n| n.contains(words)),
        "no {words:?} in {:?}",
        report.notes
    );
}

fn constant(tokens: usize) -> Rows {
    vec![random_rows(&mut rng(1), 1, HIDDEN).remove(0); tokens]
}

/// All tokens equal: one direction of keys and values, and scores that cannot move the output.
#[test]
fn equal_tokens() {
    for case in [PLAIN, GPT_OSS, QK_NORM] {
        let weights = random_layer(case, 41);
        let stats = statistics(&weights, &[constant(40), constant(40)]);
        for report in all_finite("equal tokens", &weights, &stats) {
            says(&report, "rank 1");
            // With a sink they do: it takes what the only value does not get.
            if !case.sinks {
                says(&report, "scores do not move the output");
            }
            let allowed = if case.sinks { 0.3 } else { 1e-9 };
            let error = report.error.expect("kept windows");
            assert!(error < allowed, "{case:?}: {error:.2e}");
        }
    }
}

/// No two tokens ever meet.
#[test]
fn windows_of_one_token() {
    for case in [PLAIN, GPT_OSS, QK_NORM] {
        let weights = random_layer(case, 42);
        let windows: Vec<Rows> = (0..60)
            .map(|w| random_rows(&mut rng(200 + w), 1, HIDDEN))
            .collect();
        let stats = statistics(&weights, &windows);
        for report in all_finite("one-token windows", &weights, &stats) {
            if !case.sinks {
                says(&report, "scores do not move the output");
            }
        }
        // Keys are still compressed by what queries see of them, not thrown away.
        let (factors, _) =
            convert_layer(&weights, &stats, ranks(24, 8), &Recipe::default()).expect("converts");
        let usual = statistics(&weights, &[random_rows(&mut rng(300), 60, HIDDEN)]);
        let error = layer_error(&usual, &weights.o.weight, &factors)
            .expect("statistics")
            .expect("kept windows");
        println!("one-token windows, {case:?}: {error}");
        assert!(error < 0.2, "all but lost rotations is kept: {error}");
    }
}

#[test]
fn fewer_tokens_than_dims() {
    for case in [PLAIN, GPT_OSS, QK_NORM] {
        let weights = random_layer(case, 43);
        let stats = statistics(&weights, &[random_rows(&mut rng(2), 5, HIDDEN)]);
        let reports = all_finite("five tokens", &weights, &stats);
        for report in &reports {
            says(report, "5 calibration tokens");
        }
        // Five tokens span five dims, whatever the latent's rank.
        says(&reports[2], "rank 5");
    }
}

/// States in a subspace: a latent larger than what they span holds it and says so.
#[test]
fn a_latent_larger_than_the_numerical_rank() {
    let weights = random_layer(PLAIN, 44);
    let basis = random_rows(&mut rng(3), 4, HIDDEN);
    let windows: Vec<Rows> = (0..2)
        .map(|w| {
            let rng = &mut rng(400 + w);
            (0..60)
                .map(|_| {
                    let z: Vec<f64> = (0..4).map(|_| normal(rng)).collect();
                    (0..HIDDEN)
                        .map(|j| (0..4).map(|i| z[i] * basis[i][j]).sum())
                        .collect()
                })
                .collect()
        })
        .collect();
    let stats = statistics(&weights, &windows);
    let reports = all_finite("rank 4", &weights, &stats);
    assert!(reports[0].notes.iter().all(|n| !n.contains("rank 4")));
    for report in &reports[1..] {
        says(report, "rank 4");
        assert!(report.energy_kept > 1.0 - 1e-6);
    }
    // An ordinary layer has nothing to say about ranks.
    let usual = statistics(&weights, &[random_rows(&mut rng(4), 200, HIDDEN)]);
    for report in all_finite("usual", &weights, &usual) {
        assert!(
            report.notes.iter().all(|n| !n.contains("rank")),
            "{:?}",
            report.notes
        );
    }
}

/// One head of one projection is zero, or all of them.
#[test]
fn zero_heads() {
    for case in [PLAIN, GPT_OSS, QK_NORM] {
        for name in ["q", "k", "v", "o"] {
            for all in [false, true] {
                let mut weights = random_layer(case, 45);
                let d = case.head_dim;
                match name {
                    "o" => {
                        let o = &mut weights.o.weight;
                        for i in 0..o.rows() {
                            let end = if all { o.cols() } else { d };
                            o.row_mut(i)[..end].fill(0.0);
                        }
                    }
                    other => {
                        let projection = match other {
                            "q" => &mut weights.q,
                            "k" => &mut weights.k,
                            _ => &mut weights.v,
                        };
                        let end = if all { projection.weight.rows() } else { d };
                        for i in 0..end {
                            projection.weight.row_mut(i).fill(0.0);
                        }
                        if let Some(bias) = &mut projection.bias {
                            bias[..end].fill(0.0);
                        }
                    }
                }
                let windows = [random_rows(&mut rng(5), 60, HIDDEN)];
                let what = format!("zero {name}, all {all}");
                all_finite(&what, &weights, &statistics(&weights, &windows));
                let prior = prior_statistics(&weights, mlac_converter::DistancePrior::default())
                    .expect("prior");
                all_finite(&what, &weights, &prior);
                // What is left is still exact at full rank.
                let stats = statistics(&weights, &windows);
                let full = RankChoice::exact(&weights.attention.shape);
                let (factors, _) =
                    convert_layer(&weights, &stats, full, &Recipe::default()).expect("converts");
                if let Some(error) =
                    layer_error(&stats, &weights.o.weight, &factors).expect("statistics")
                {
                    assert!(error < 1e-9, "{what}: {error}");
                }
            }
        }
    }
}

/// Activations that are finite but whose squares are not, and those that are not finite.
#[test]
fn activations_that_are_no_use_are_refused_by_name() {
    let weights = random_layer(PLAIN, 46);
    let Qkv { q, k, v } = qkv(&weights, &random_rows(&mut rng(6), 30, HIDDEN));
    let (q, k, v) = (narrow(&q), narrow(&k), narrow(&v));
    for (part, name) in [(0, "queries"), (1, "keys"), (2, "values")] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e25, -3e38] {
            let mut parts = [q.clone(), k.clone(), v.clone()];
            parts[part][100] = bad;
            let mut stats = statistics(&weights, &[]);
            let result = stats
                .accumulate(&WindowActivations {
                    tokens: 30,
                    q: &parts[0],
                    k: &parts[1],
                    v: &parts[2],
                })
                .map(|()| convert_layer(&weights, &stats, ranks(8, 4), &Recipe::default()));
            let message = match result {
                Err(e) | Ok(Err(e)) => e.to_string(),
                Ok(Ok(_)) => panic!("{name} with {bad} were taken"),
            };
            assert!(
                message.contains(name) && message.contains("layer 3"),
                "{name} with {bad}: {message}"
            );
        }
    }
}

struct Windows(Vec<[Vec<f32>; 4]>, usize);

impl RefineWindows for Windows {
    type Error = Error;

    fn count(&self) -> usize {
        self.0.len()
    }

    fn visit(&self, window: usize, take: &mut TakeWindow<'_>) -> Result<(), Error> {
        let [q, k, v, target] = &self.0[window];
        let tokens = self.1;
        take(&WindowActivations { tokens, q, k, v }, target)
    }
}

/// Gradient steps on the same edges: finite, and never worse where nothing was trained.
#[test]
fn refinement_of_degenerate_layers_stays_finite() {
    for (what, tokens, zero) in [
        ("equal tokens", 20, false),
        ("one token", 1, false),
        ("zero heads", 20, true),
    ] {
        for case in [PLAIN, GPT_OSS] {
            let mut weights = random_layer(case, 47);
            if zero {
                for i in 0..case.head_dim {
                    weights.q.weight.row_mut(i).fill(0.0);
                    weights.k.weight.row_mut(i).fill(0.0);
                    weights.v.weight.row_mut(i).fill(0.0);
                }
            }
            let states: Vec<Rows> = (0..4)
                .map(|w| match what {
                    "equal tokens" => constant(tokens),
                    _ => random_rows(&mut rng(500 + w), tokens, HIDDEN),
                })
                .collect();
            let windows = states.iter().map(|x| {
                let Qkv { q, k, v } = qkv(&weights, x);
                let target = vec![0.5; tokens * HIDDEN];
                [narrow(&q), narrow(&k), narrow(&v), target]
            });
            let windows = Windows(windows.collect(), tokens);
            let stats = statistics(&weights, &states);
            let (mut factors, _) =
                convert_layer(&weights, &stats, ranks(8, 4), &Recipe::default()).expect("converts");
            factors.o = Some(weights.o.weight.cast());
            let options = RefineOptions {
                steps: 12,
                ..RefineOptions::default()
            };
            let refined = refine(
                &weights,
                &stats,
                &factors,
                false,
                &windows,
                &options,
                &mut |_| {},
            )
            .expect("refines");
            let report = refined.report;
            assert!(
                report.error_after.is_finite() && report.error_after <= report.error_before,
                "{what}: {report:?}"
            );
            let better = refined.factors.unwrap_or(factors);
            let tensors = compose(&weights, &better).expect("composes");
            for (name, _, data) in tensors.named() {
                assert!(data.iter().all(|x| x.is_finite()), "{what}: {name}");
            }
        }
    }
}
