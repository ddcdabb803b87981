//! What the conversion finds in activations with known structure.

mod common;

use common::{Case, gather, normal, random_layer, random_matrix, rng};
use mlac_converter::{
    LayerStatistics, LayerWeights, Matrix, RankChoice, Recipe, StatisticsOptions, TransMla,
    convert_layer, convert_layer_transmla, layer_error,
};
use mlac_model::Refusal;

/// Hidden states in a subspace of `rank` dims, with a first token that lies far from the rest.
fn windows(hidden: usize, rank: usize, tokens: usize, count: u64, seed: u64) -> Vec<Vec<Vec<f64>>> {
    let basis = random_matrix(&mut rng(1000), rank, hidden, (rank as f64).powf(-0.5));
    (0..count)
        .map(|w| {
            let rng = &mut rng(seed + w);
            (0..tokens)
                .map(|t| {
                    let z: Vec<f64> = (0..rank)
                        .map(|i| normal(rng) * 3.0 / (1.0 + i as f64))
                        .collect();
                    let mut x: Vec<f64> = (0..hidden)
                        .map(|j| (0..rank).map(|i| z[i] * f64::from(basis[(i, j)])).sum())
                        .collect();
                    if t == 0 {
                        for (j, x) in x.iter_mut().enumerate() {
                            *x = 6.0 * f64::from(basis[(0, j)])
                                - 4.0 * f64::from(basis[(rank - 1, j)]);
                        }
                    }
                    x
                })
                .collect()
        })
        .collect()
}

fn correlated(seed: u64) -> (LayerWeights, LayerStatistics, LayerStatistics) {
    let weights = random_layer(Case::plain(6, 3, 16, 48), seed);
    let options = StatisticsOptions {
        kept_windows: 4,
        ..StatisticsOptions::default()
    };
    let stats = gather(&weights, &windows(48, 30, 96, 4, 7), options);
    let held_out = gather(
        &weights,
        &windows(48, 30, 96, 2, 77),
        StatisticsOptions::default(),
    );
    (weights, stats, held_out)
}

fn ranks(r: usize, d_r: usize) -> RankChoice {
    RankChoice {
        kv_lora_rank: r,
        qk_rope_head_dim: d_r,
    }
}

fn error(
    stats: &LayerStatistics,
    weights: &LayerWeights,
    factors: &mlac_converter::LayerFactors,
) -> f64 {
    layer_error(stats, &weights.o.weight, factors)
        .expect("statistics")
        .expect("kept windows")
}

/// Keys and values of rank 10 in all fit a latent of rank 10 once every rotation is kept or null.
#[test]
fn planted_low_rank_is_recovered() {
    let mut weights = random_layer(Case::plain(4, 2, 8, 24), 5);
    weights.attention.rotary.inv_freq.fill(0.0);
    let stats = gather(
        &weights,
        &windows(24, 10, 64, 2, 3),
        StatisticsOptions::default(),
    );
    let convert = |r: usize| {
        let (factors, _) =
            convert_layer(&weights, &stats, ranks(r, 2), &Recipe::default()).expect("converts");
        error(&stats, &weights, &factors)
    };
    let (enough, fewer) = (convert(10), convert(6));
    assert!(enough < 1e-7, "rank 10 leaves {enough:.2e}");
    assert!(
        fewer > 1e-4,
        "rank 6 cannot hold rank 10, yet leaves only {fewer:.2e}"
    );
}

#[test]
fn error_falls_with_the_rank() {
    let (weights, stats, held_out) = correlated(21);
    let mut last = f64::INFINITY;
    for r in [8, 16, 24, 40, 64] {
        let (factors, report) =
            convert_layer(&weights, &stats, ranks(r, 16), &Recipe::default()).expect("converts");
        let found = error(&held_out, &weights, &factors);
        assert!(found < last, "rank {r}: {found:.3e} after {last:.3e}");
        assert!(report.spectrum.windows(2).all(|w| w[0] >= w[1] - 1e-12));
        assert!((report.spectrum.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        last = found;
    }
}

#[test]
fn recipe_beats_transmla() {
    for seed in [21, 22, 23] {
        let (weights, stats, held_out) = correlated(seed);
        let (ours, _) =
            convert_layer(&weights, &stats, ranks(32, 16), &Recipe::default()).expect("converts");
        let (theirs, _) =
            convert_layer_transmla(&weights, &stats, ranks(32, 16), TransMla::default())
                .expect("converts");
        let (ours, theirs) = (
            error(&held_out, &weights, &ours),
            error(&held_out, &weights, &theirs),
        );
        assert!(
            ours < 0.8 * theirs,
            "seed {seed}: recipe {ours:.3e}, TransMLA {theirs:.3e}"
        );
    }
}

#[test]
fn the_same_input_gives_the_same_factors() {
    let (weights, stats, _) = correlated(25);
    let convert = || {
        convert_layer(&weights, &stats, ranks(24, 8), &Recipe::default())
            .expect("converts")
            .0
    };
    let pool = |threads: usize| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("pool")
    };
    let one = pool(1).install(convert);
    assert!(one == pool(1).install(convert), "one thread, twice");
    assert!(one == pool(3).install(convert), "three threads");
}

/// Targets given with the windows are what errors are measured against.
#[test]
fn errors_are_measured_against_given_targets() {
    let (weights, stats, _) = correlated(26);
    let (factors, _) = convert_layer(
        &weights,
        &stats,
        RankChoice::exact(&weights.attention.shape),
        &Recipe::default(),
    )
    .expect("converts");
    assert!(error(&stats, &weights, &factors) < 1e-9);
    let mut shifted = stats.clone();
    for sample in &mut shifted.samples {
        sample.targets = Some(Matrix::from_fn(sample.positions.len(), 48, |_, _| 1e3));
    }
    let found = error(&shifted, &weights, &factors);
    assert!((found - 1.0).abs() < 0.05, "far targets: {found}");
}

#[test]
fn wrong_ranks_and_methods_are_refused() {
    let (weights, stats, _) = correlated(27);
    let refused = |r, d_r| {
        let result = convert_layer(&weights, &stats, ranks(r, d_r), &Recipe::default());
        match result.expect_err("refused") {
            mlac_converter::Error::Refused(Refusal { subject, .. }) => subject,
            other @ (mlac_converter::Error::Weights(_) | mlac_converter::Error::Gradient(_)) => {
                panic!("another error: {other}")
            }
        }
    };
    assert_eq!(refused(8, 3), "qk_rope_head_dim");
    assert_eq!(refused(8, 50), "qk_rope_head_dim");
    assert_eq!(refused(0, 8), "kv_lora_rank");
    assert_eq!(refused(89, 8), "kv_lora_rank");
    for (d_r, freqfold) in [(12, None), (8, Some(3)), (16, Some(16))] {
        let result = convert_layer_transmla(&weights, &stats, ranks(8, d_r), TransMla { freqfold });
        assert!(result.is_err(), "d_r {d_r}, freqfold {freqfold:?}");
    }
    for freqfold in [1, 2, 4, 8] {
        convert_layer_transmla(
            &weights,
            &stats,
            ranks(8, 16),
            TransMla {
                freqfold: Some(freqfold),
            },
        )
        .expect("converts");
    }
    let mut broken = weights.clone();
    broken.k.weight.data_mut()[5] = f32::NAN;
    let message = convert_layer(&broken, &stats, ranks(8, 8), &Recipe::default())
        .expect_err("NaN")
        .to_string();
    assert!(message.contains("layer 3 k_proj"), "{message}");
}
