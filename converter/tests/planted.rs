//! GPT-OSS-shaped layers whose keys and values lie in a known subspace.
//!
//! **The plant.** A token's state is `y = A x + c` `[r0]`, x its hidden state. At the frequencies F,
//! and only there, all KV heads' keys are complex multiples of one number: `k[g, l] = u_l[g] z_l`,
//! `z_l = a_l . y + i b_l . y`. The values are `v = V Y y` with V `[G*d, r_v]`. With
//! `r0 = 2 |F| + r_v` and random maps, the stacked `s = [k ; v]` of every token, the biases' direction
//! included (it is what `x = 0` gives), spans exactly r0 dims:
//! `span{Re, Im of u_l at l} x span V`.
//!
//! **What must hold.** A rotation multiplies `k[., l]` of all heads by one `e^{i theta s}`, so caching
//! `z_l` with RoPE keeps the keys whatever the positions: |F| components, `d_r = 2 |F|`. Nothing of
//! the keys is left for the latent, which then needs the `r_v` dims of the values and no more. So at
//! `r_v + 2 |F|` the conversion is exact, for full and sliding attention, with sinks (a softmax of
//! exact scores) and with `YaRN`'s factor (its square is in the queries), and what is decoded from
//! the cached row spans the planted subspace. One dim fewer in the latent loses a direction of the
//! values; one component fewer in the rotary key must lose its rotation, also when the latent gets
//! its two dims instead. Information cannot be had from the other part: the rotary key reaches the
//! scores only, never the values.

mod common;

use common::{
    Case, gather, gqa, mla, normal, qkv, random_layer, random_matrix, random_rows, random_vector,
    relative, rng,
};
use mlac_converter::linalg::{orthonormal_rows, symmetric_eigen};
use mlac_converter::{
    DistancePrior, LayerFactors, LayerStatistics, LayerWeights, Matrix, RankChoice, Recipe,
    StatisticsOptions, compose, convert_layer, prior_statistics,
};
use mlac_model::MlaEncoder;

struct Plant {
    weights: LayerWeights,
    /// Columns span the subspace, `[2*G*d, r0]`.
    basis: Matrix<f64>,
    /// `r_v`, 2 |F|.
    ranks: RankChoice,
}

const BIAS: f64 = 1.5;

fn plant(case: Case, frequencies: &[usize], values: usize, seed: u64) -> Plant {
    let mut weights = random_layer(case, seed);
    let shape = weights.attention.shape;
    let (d, half, n) = (shape.head_dim, shape.frequencies(), shape.kv_width());
    let r0 = 2 * frequencies.len() + values;
    let rng = &mut rng(seed + 500);
    let states = random_matrix(rng, r0, case.hidden, (case.hidden as f64).powf(-0.5));
    // `[k ; v]` from the state.
    let mut map = Matrix::<f64>::zeros(2 * n, r0);
    for &l in frequencies {
        let (a, b) = (random_vector(rng, r0, 1.0), random_vector(rng, r0, 1.0));
        for g in 0..shape.kv_heads {
            let (re, im) = (normal(rng), normal(rng));
            for i in 0..r0 {
                let (a, b) = (f64::from(a[i]), f64::from(b[i]));
                map[(g * d + l, i)] = re * a - im * b;
                map[(g * d + l + half, i)] = im * a + re * b;
            }
        }
    }
    let decode: Matrix<f64> = random_matrix(rng, n, values, 1.0).cast();
    let encode: Matrix<f64> = random_matrix(rng, values, r0, (r0 as f64).powf(-0.5)).cast();
    let part = decode.times(&encode);
    for i in 0..n {
        map.row_mut(n + i).copy_from_slice(part.row(i));
    }
    let at_zero: Matrix<f64> = random_matrix(rng, r0, 1, BIAS).cast();
    let (all, bias) = (map.times(&states.cast()), map.times(&at_zero));
    for (projection, start) in [(&mut weights.k, 0), (&mut weights.v, n)] {
        projection.weight = all.row_range(start, start + n).cast();
        let bias = bias.row_range(start, start + n);
        projection.bias = Some(bias.data().iter().map(|&x| x as f32).collect());
    }
    weights.q.bias = Some(random_vector(rng, shape.query_width(), BIAS));
    weights.o.bias = Some(random_vector(rng, shape.hidden, BIAS));
    Plant {
        weights,
        basis: map,
        ranks: RankChoice {
            kv_lora_rank: values,
            qk_rope_head_dim: 2 * frequencies.len(),
        },
    }
}

/// What is decoded from a cached row `[c ; z]`, before rotation: `[2*G*d, r + d_r]`. The keys are
/// those that some query of each group meets, the rotary queries carry the attention factor's square.
fn decoder(weights: &LayerWeights, factors: &LayerFactors) -> Matrix<f64> {
    let shape = factors.shape;
    let (d, n, r) = (shape.head_dim, shape.kv_width(), factors.ranks.kv_lora_rank);
    let factor = weights.attention.rotary.attention_factor.powi(2);
    let mut decoder = Matrix::zeros(2 * n, factors.ranks.width());
    for g in 0..shape.kv_heads {
        let h = g * shape.group_size();
        for i in 0..d {
            let key = &mut decoder.row_mut(g * d + i)[..];
            for (j, x) in key.iter_mut().enumerate() {
                *x = if j < r {
                    factors.w_uk[h][(i, j)] / factor
                } else {
                    factors.q_rope[h][(j - r, i)] / factor
                };
            }
            let value = decoder.row_mut(n + g * d + i);
            value[..r].copy_from_slice(factors.w_uv[h].row(i));
        }
    }
    decoder
}

/// Sine of the largest principal angle between the columns' spans of two matrices of one rank.
fn sine(a: &Matrix<f64>, b: &Matrix<f64>) -> f64 {
    let (_, a) = orthonormal_rows(&a.transpose());
    let (_, b) = orthonormal_rows(&b.transpose());
    // What of b's span a's does not have: (1 - A^T A) b.
    let mut rest = b.clone();
    rest.add_scaled(&b.times_transposed(&a).times(&a), -1.0);
    let square = symmetric_eigen(&rest.times_transposed(&rest), "rest").expect("finite");
    square.values[0].max(0.0).sqrt()
}

const GPT_OSS: Case = Case {
    encoder: MlaEncoder::KeptQuery,
    bias: true,
    sinks: true,
    attention_factor: 1.3466,
    ..Case::plain(16, 2, 16, 96)
};

const PLANTS: [(&str, Case, &[usize], usize); 4] = [
    ("16 heads on 2, full", GPT_OSS, &[0, 2, 5], 5),
    (
        "16 heads on 2, sliding",
        Case {
            window: Some(9),
            ..GPT_OSS
        },
        &[1, 4],
        7,
    ),
    (
        "8 heads on 4, full",
        Case {
            heads: 8,
            groups: 4,
            ..GPT_OSS
        },
        &[0, 1, 3, 7],
        6,
    ),
    (
        "8 heads on 2 of 64, sliding",
        Case {
            heads: 8,
            head_dim: 64,
            window: Some(12),
            ..GPT_OSS
        },
        &[0, 5, 9, 14],
        10,
    ),
];

fn calibrated(weights: &LayerWeights) -> LayerStatistics {
    let windows: Vec<_> = (0..3)
        .map(|w| random_rows(&mut rng(60 + w), 48, weights.attention.shape.hidden))
        .collect();
    gather(weights, &windows, StatisticsOptions::default())
}

/// Errors of scores and outputs on a window of its own, by the f64 references.
fn errors(weights: &LayerWeights, factors: &LayerFactors) -> (f64, f64) {
    let tensors = compose(weights, factors).expect("composes");
    let x = random_rows(&mut rng(99), 40, weights.attention.shape.hidden);
    let (expected, found) = (gqa(weights, &x), mla(&weights.attention, &tensors, &x));
    (
        relative(&found.scores, &expected.scores),
        relative(&[found.output], &[expected.output]),
    )
}

#[test]
fn the_planted_subspace_is_found_and_enough() {
    for (name, case, frequencies, values) in PLANTS {
        let plant = plant(case, frequencies, values, 3);
        let weights = &plant.weights;
        let sources = [
            // Sums of products in f32.
            ("calibrated", calibrated(weights), 1e-4),
            (
                "from weights",
                prior_statistics(weights, DistancePrior::default()).expect("prior"),
                1e-6,
            ),
        ];
        for (source, statistics, rounding) in sources {
            let convert = |r: usize, d_r: usize| {
                let ranks = RankChoice {
                    kv_lora_rank: r,
                    qk_rope_head_dim: d_r,
                };
                convert_layer(weights, &statistics, ranks, &Recipe::default()).expect("converts")
            };
            let (r, d_r) = (plant.ranks.kv_lora_rank, plant.ranks.qk_rope_head_dim);
            let (factors, report) = convert(r, d_r);

            // One component at every planted frequency, and all of the importance with them.
            let kept: Vec<usize> = (0..report.kept_by_frequency.len())
                .filter(|&l| report.kept_by_frequency[l] > 0)
                .collect();
            println!(
                "{name}, {source}: energy left {:.1e}",
                1.0 - report.energy_kept
            );
            assert_eq!(kept, frequencies, "{name}, {source}");
            assert!(report.importance_kept > 1.0 - 1e-6, "{name}, {source}");
            assert!(report.energy_kept > 1.0 - 1e-4, "{name}, {source}");

            let angle = sine(&decoder(weights, &factors), &plant.basis);
            let (scores, output) = errors(weights, &factors);
            println!(
                "{name}, {source}: sine {angle:.1e}, scores {scores:.1e}, output {output:.1e}"
            );
            assert!(angle < rounding, "{name}, {source}: sine {angle:.2e}");
            assert!(
                scores < rounding && output < rounding,
                "{name}, {source}: scores {scores:.2e}, output {output:.2e}"
            );
            if let Some(error) = report.error {
                assert!(error < 1e-9, "{name}: {error:.2e}");
            }

            // Encoding and decoding gives every token back.
            let both = decoder(weights, &factors).times(&factors.encoder);
            let tokens = qkv(weights, &random_rows(&mut rng(98), 9, case.hidden));
            for (k, v) in tokens.k.iter().zip(&tokens.v) {
                let s = Matrix::from_vec(2 * k.len(), 1, [k.clone(), v.clone()].concat());
                let mut rest = both.times(&s);
                rest.add_scaled(&s, -1.0);
                let norm = |m: &Matrix<f64>| m.data().iter().map(|x| x * x).sum::<f64>().sqrt();
                assert!(norm(&rest) < rounding * norm(&s), "{name}, {source}");
            }

            // All frequencies in the rotary key, the values alone in the latent: exact as well.
            let whole = weights.attention.shape.kv_width();
            let (scores, output) = errors(weights, &convert(r, whole).0);
            assert!(
                scores < rounding && output < rounding,
                "{name}, {source}, d_r {whole}: scores {scores:.2e}, output {output:.2e}"
            );

            // One less in either part shows, also where the other part gets more.
            for (r, d_r) in [(r - 1, d_r), (r - 1, whole), (r, d_r - 2), (r + 2, d_r - 2)] {
                let (scores, output) = errors(weights, &convert(r, d_r).0);
                println!("{name}, {source}, {r} + {d_r}: scores {scores:.1e}, output {output:.1e}");
                assert!(
                    output > 3e-3,
                    "{name}, {source}, {r} + {d_r}: output {output:.2e}"
                );
            }
        }
    }
}
