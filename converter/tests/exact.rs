//! At full rank the converted layer is the original one.

mod common;

use common::{Case, gather, gqa, mla, random_layer, random_matrix, random_rows, relative, rng};
use mlac_converter::{
    LayerFactors, LayerStatistics, LayerWeights, MlaTensors, RankChoice, Recipe, StatisticsOptions,
    TransMla, compose, convert_layer, convert_layer_svd, convert_layer_transmla, prior_statistics,
};
use mlac_model::MlaEncoder;
use proptest::prelude::*;

const CASES: [(&str, Case); 10] = [
    (
        "sinks",
        Case {
            sinks: true,
            ..Case::plain(4, 2, 8, 24)
        },
    ),
    (
        "kept query",
        Case {
            encoder: MlaEncoder::KeptQuery,
            bias: true,
            ..Case::plain(4, 2, 8, 24)
        },
    ),
    (
        "everything GPT-OSS has",
        Case {
            encoder: MlaEncoder::KeptQuery,
            bias: true,
            sinks: true,
            window: Some(7),
            attention_factor: 1.3466,
            ..Case::plain(6, 3, 8, 28)
        },
    ),
    ("plain", Case::plain(4, 2, 8, 24)),
    ("one kv head", Case::plain(3, 1, 8, 20)),
    ("one query head per kv head", Case::plain(4, 4, 8, 24)),
    (
        "biases",
        Case {
            bias: true,
            ..Case::plain(4, 2, 8, 24)
        },
    ),
    (
        "attention factor",
        Case {
            attention_factor: 1.35,
            bias: true,
            ..Case::plain(4, 2, 8, 24)
        },
    ),
    (
        "qk norm",
        Case {
            qk_norm: true,
            window: Some(5),
            ..Case::plain(4, 2, 8, 24)
        },
    ),
    (
        "head 64",
        Case {
            attention_factor: 1.2,
            ..Case::plain(6, 3, 64, 160)
        },
    ),
];

fn errors(weights: &LayerWeights, factors: &LayerFactors, tokens: usize) -> (f64, f64) {
    let tensors = compose(weights, factors).expect("composes");
    let x = random_rows(&mut rng(99), tokens, weights.attention.shape.hidden);
    let (expected, found) = (gqa(weights, &x), mla(&weights.attention, &tensors, &x));
    (
        relative(&found.scores, &expected.scores),
        relative(&[found.output], &[expected.output]),
    )
}

fn statistics(weights: &LayerWeights) -> LayerStatistics {
    let x = random_rows(&mut rng(5), 24, weights.attention.shape.hidden);
    gather(weights, &[x], StatisticsOptions::default())
}

/// Every method at every pair of ranks that is exact.
#[test]
fn full_rank_reproduces_scores_and_outputs() {
    let mut failures = Vec::new();
    for (name, case) in CASES {
        let weights = random_layer(case, 1);
        let shape = weights.attention.shape;
        let ranks = RankChoice::exact(&shape);
        let stats = statistics(&weights);
        let prior =
            prior_statistics(&weights, mlac_converter::DistancePrior::default()).expect("prior");
        let mut with_gradients = stats.clone();
        let root = random_matrix(&mut rng(6), shape.stacked_width(), 5, 1.0).cast::<f64>();
        with_gradients.gradient = Some(root.times_transposed(&root));
        let results = [
            (
                "recipe",
                convert_layer(&weights, &stats, ranks, &Recipe::default()),
            ),
            (
                "recipe with gradients",
                convert_layer(
                    &weights,
                    &with_gradients,
                    ranks,
                    &Recipe::default().with_gradients(),
                ),
            ),
            (
                "recipe from weights",
                convert_layer(&weights, &prior, ranks, &Recipe::default()),
            ),
            ("svd", convert_layer_svd(&weights, ranks)),
        ];
        for (method, result) in results {
            let (factors, report) = result.expect("converts");
            let (scores, output) = errors(&weights, &factors, 24);
            println!(
                "{name}, {method}: scores {scores:.1e}, output {output:.1e}, report {:?}",
                report.error
            );
            if scores > 3e-6 || output > 3e-6 {
                failures.push(format!(
                    "{name}, {method}: scores {scores:.2e}, output {output:.2e}"
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// What was kept under its names is the same layer again, and a damaged set is refused.
#[test]
fn named_tensors_make_the_layer_again() {
    for (name, case) in CASES {
        let weights = random_layer(case, 8);
        let ranks = RankChoice {
            kv_lora_rank: 6,
            qk_rope_head_dim: 4,
        };
        let (mut factors, _) =
            convert_layer(&weights, &statistics(&weights), ranks, &Recipe::default())
                .expect("converts");
        factors.o_bias = Some(vec![0.25; case.hidden]);
        let tensors = compose(&weights, &factors).expect("composes");
        let named = tensors.named();
        let take = |lost: Option<usize>| {
            MlaTensors::from_named(&weights, ranks, |name, shape| {
                let at = named
                    .iter()
                    .position(|(n, s, _)| *n == name && s == shape)?;
                (Some(at) != lost).then(|| named[at].2.to_vec())
            })
        };
        assert_eq!(take(None).expect("whole"), tensors, "{name}");
        for (i, (tensor, _, _)) in named.iter().enumerate() {
            if *tensor == "o_proj.bias" && !case.bias {
                continue;
            }
            let message = take(Some(i)).expect_err("refused").to_string();
            assert!(message.contains(tensor), "{name}: {message}");
        }
    }
}

/// With one KV head `TransMLA` at `d_r = d` is exact too.
#[test]
fn transmla_is_exact_where_every_component_is_kept() {
    let weights = random_layer(
        Case {
            bias: true,
            ..Case::plain(3, 1, 8, 20)
        },
        2,
    );
    let stats = statistics(&weights);
    let ranks = RankChoice::exact(&weights.attention.shape);
    let (factors, _) =
        convert_layer_transmla(&weights, &stats, ranks, TransMla::default()).expect("converts");
    let (scores, output) = errors(&weights, &factors, 24);
    assert!(
        scores < 3e-6 && output < 3e-6,
        "scores {scores:.2e}, output {output:.2e}"
    );
}

/// Without low rank only lost rotations remain: none for a window of one token, and none when all
/// frequencies are 0.
#[test]
fn only_lost_rotations_remain_without_low_rank() {
    for (name, case) in CASES {
        let mut weights = random_layer(case, 3);
        let shape = weights.attention.shape;
        let d_r = shape.kv_width() / 4 * 2;
        let ranks = RankChoice {
            kv_lora_rank: shape.stacked_width() - d_r,
            qk_rope_head_dim: d_r,
        };

        let stats = gather(
            &weights,
            &vec![random_rows(&mut rng(6), 1, shape.hidden); 3],
            StatisticsOptions::default(),
        );
        let (factors, _) =
            convert_layer(&weights, &stats, ranks, &Recipe::default()).expect("converts");
        let (scores, output) = errors(&weights, &factors, 1);
        assert!(
            scores < 1e-5 && output < 1e-5,
            "{name}, distance 0: scores {scores:.2e}, output {output:.2e}"
        );
        let (scores, _) = errors(&weights, &factors, 24);
        assert!(
            scores > 1e-3,
            "{name}: lost rotations must show, scores {scores:.2e}"
        );

        weights.attention.rotary.inv_freq.fill(0.0);
        let stats = statistics(&weights);
        let (factors, _) =
            convert_layer(&weights, &stats, ranks, &Recipe::default()).expect("converts");
        let (scores, output) = errors(&weights, &factors, 24);
        assert!(
            scores < 3e-6 && output < 3e-6,
            "{name}, no rotation: scores {scores:.2e}, output {output:.2e}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn full_rank_is_exact_for_any_shape(
        groups in 1usize..4, per_group in 1usize..4, half in 1usize..6, hidden in 6usize..30,
        bias: bool, qk_norm: bool, factor in 0.8f64..1.5, seed in 0u64..1000,
    ) {
        let case = Case { bias, qk_norm, attention_factor: factor, ..Case::plain(groups * per_group, groups, 2 * half, hidden) };
        let weights = random_layer(case, seed);
        let (factors, _) = convert_layer(&weights, &statistics(&weights), RankChoice::exact(&weights.attention.shape), &Recipe::default())
            .expect("converts");
        let (scores, output) = errors(&weights, &factors, 12);
        prop_assert!(scores < 1e-5 && output < 1e-5, "scores {scores:.2e}, output {output:.2e}");
    }

    #[test]
    fn any_allowed_ranks_convert(
        groups in 1usize..4, per_group in 1usize..3, half in 1usize..6, a in 0.0f64..1.0, b in 0.0f64..1.0, seed in 0u64..1000,
    ) {
        let weights = random_layer(Case::plain(groups * per_group, groups, 2 * half, 16), seed);
        let shape = weights.attention.shape;
        let d_r = 2 + 2 * ((a * (shape.kv_width() / 2 - 1) as f64).round() as usize);
        let r = 1 + (b * (shape.stacked_width() - d_r - 1) as f64).round() as usize;
        let ranks = RankChoice { kv_lora_rank: r, qk_rope_head_dim: d_r };
        let (factors, report) = convert_layer(&weights, &statistics(&weights), ranks, &Recipe::default()).expect("converts");
        prop_assert_eq!(factors.encoder.rows(), r + d_r);
        prop_assert_eq!(report.kept_by_frequency.iter().sum::<usize>(), d_r / 2);
        let tensors = compose(&weights, &factors).expect("composes");
        prop_assert!(tensors.named().iter().all(|(_, shape, data)| shape.iter().product::<usize>() == data.len()));
        prop_assert!(tensors.named().iter().all(|(_, _, data)| data.iter().all(|x| x.is_finite())));
    }
}
