//! Statistics against naive sums, and what they refuse.

mod common;

use common::{Case, Qkv, dot, gather, narrow, qkv, random_layer, random_rows, rng, rotate};
use mlac_converter::{
    DistancePrior, LayerStatistics, LayerWeights, StatisticsOptions, WindowActivations,
    prior_statistics,
};

fn close(found: f64, expected: f64, what: &str) {
    assert!(
        (found - expected).abs() <= 2e-4 * expected.abs().max(1e-3),
        "{what}: {found}, expected {expected}"
    );
}

/// Every sum over every row, written down from the definitions.
#[test]
fn sums_match_the_definitions() {
    for window in [None, Some(6)] {
        let case = Case {
            window,
            attention_factor: 1.2,
            bias: true,
            ..Case::plain(4, 2, 8, 24)
        };
        let weights = random_layer(case, 11);
        let (tokens, d, heads) = (37, 8, 4);
        let x = random_rows(&mut rng(12), tokens, 24);
        // All rows are sampled.
        let found = gather(
            &weights,
            std::slice::from_ref(&x),
            StatisticsOptions::default(),
        );
        assert_eq!(
            (found.windows, found.tokens, found.rows),
            (1, tokens, tokens)
        );
        let Qkv { q, k, v } = qkv(&weights, &x);
        let attention = &weights.attention;
        let mut token_weights = vec![0.0; tokens];
        let mut sensitivities = vec![0.0; tokens];
        for h in 0..heads {
            let g = h / 2;
            let head = |rows: &[Vec<f64>], s: usize, h: usize| rows[s][h * d..(h + 1) * d].to_vec();
            let metric = |a: &[f64], b: &[f64]| {
                let map = |x: &[f64]| -> Vec<f64> {
                    (0..24)
                        .map(|i| {
                            (0..d)
                                .map(|j| f64::from(weights.o.weight[(i, h * d + j)]) * x[j])
                                .sum()
                        })
                        .collect()
                };
                dot(&map(a), &map(b))
            };
            let (mut p2_total, mut sensitivity) = (0.0, 0.0);
            let (mut by_distance, mut by_distance2) = (vec![0.0; tokens], vec![0.0; tokens]);
            let mut rotation = vec![(0.0, 0.0, 0.0); d / 2];
            let mut query_sensitive = vec![0.0; d * d];
            for t in 0..tokens {
                let first = attention.first_visible(t);
                let turn = |x: &[f64], s: usize| {
                    rotate(
                        x,
                        &attention.rotary.inv_freq,
                        s,
                        attention.rotary.attention_factor,
                    )
                };
                let own = head(&q, t, h);
                let scores: Vec<f64> = (first..=t)
                    .map(|s| attention.scale * dot(&turn(&own, t), &turn(&head(&k, s, g), s)))
                    .collect();
                let total: f64 = scores.iter().map(|x| x.exp()).sum();
                let p: Vec<f64> = scores.iter().map(|x| x.exp() / total).collect();
                let mut o = vec![0.0; d];
                for (i, p) in p.iter().enumerate() {
                    for (o, v) in o.iter_mut().zip(head(&v, first + i, g)) {
                        *o += p * v;
                    }
                }
                for (i, p) in p.iter().enumerate() {
                    let s = first + i;
                    let off: Vec<f64> = head(&v, s, g).iter().zip(&o).map(|(v, o)| v - o).collect();
                    let w = p * p * metric(&off, &off);
                    token_weights[s] += p * p;
                    sensitivities[s] += w;
                    p2_total += p * p;
                    sensitivity += w;
                    by_distance[t - s] += p;
                    by_distance2[t - s] += p * p;
                    let key = head(&k, s, g);
                    for (l, sums) in rotation.iter_mut().enumerate() {
                        let energy = w
                            * (own[l].powi(2) + own[l + d / 2].powi(2))
                            * (key[l].powi(2) + key[l + d / 2].powi(2));
                        let angle = f64::from(attention.rotary.inv_freq[l]) * (t - s) as f64;
                        sums.0 += energy;
                        sums.1 += energy * angle.cos();
                        sums.2 += energy * angle.sin();
                    }
                    for a in 0..d {
                        for b in 0..d {
                            query_sensitive[a * d + b] += w * own[a] * own[b];
                        }
                    }
                }
            }
            let head = &found.heads[h];
            close(head.p2, p2_total, "p2");
            close(head.sensitivity, sensitivity, "sensitivity");
            close(head.alpha(), sensitivity / p2_total, "alpha");
            for distance in 0..head.distance_p.len() {
                close(
                    head.distance_p[distance],
                    by_distance[distance],
                    "p by distance",
                );
                close(
                    head.distance_p2[distance],
                    by_distance2[distance],
                    "p^2 by distance",
                );
            }
            for (l, (energy, re, im)) in rotation.into_iter().enumerate() {
                close(head.rotation_energy[l], energy, "rotation energy");
                assert!(
                    (head.rotation[l].re - re).abs() + (head.rotation[l].im - im).abs()
                        < 2e-4 * energy
                );
            }
            for (found, expected) in head.query_sensitive.data().iter().zip(&query_sensitive) {
                assert!(
                    (found - expected).abs() < 1e-3 * sensitivity,
                    "{found}, expected {expected}"
                );
            }
        }
        close(found.attended, token_weights.iter().sum(), "attended");
        close(found.sensitive, sensitivities.iter().sum(), "sensitive");
        for (i, j) in [(0, 0), (3, 17), (20, 31), (31, 20)] {
            let at = |s: usize, i: usize| if i < 16 { k[s][i] } else { v[s][i - 16] };
            let sum = |w: &dyn Fn(usize) -> f64| {
                (0..tokens).map(|s| w(s) * at(s, i) * at(s, j)).sum::<f64>()
            };
            assert!((found.moment[(i, j)] - sum(&|_| 1.0)).abs() < 1e-3);
            assert!((found.moment_attended[(i, j)] - sum(&|s| token_weights[s])).abs() < 1e-3);
            assert!((found.moment_sensitive[(i, j)] - sum(&|s| sensitivities[s])).abs() < 1e-3);
        }
    }
}

#[test]
fn merged_parts_equal_the_whole() {
    let weights = random_layer(Case::plain(4, 2, 8, 24), 13);
    let windows: Vec<_> = (0..3)
        .map(|i| random_rows(&mut rng(20 + i), 30 + i as usize, 24))
        .collect();
    let whole = gather(&weights, &windows, StatisticsOptions::default());
    let mut merged = gather(&weights, &windows[..1], StatisticsOptions::default());
    merged
        .merge(gather(
            &weights,
            &windows[1..],
            StatisticsOptions::default(),
        ))
        .expect("same layer");
    assert_eq!(
        (merged.tokens, merged.windows, merged.samples.len()),
        (whole.tokens, whole.windows, whole.samples.len())
    );
    for (a, b) in merged
        .moment_attended
        .data()
        .iter()
        .zip(whole.moment_attended.data())
    {
        assert!((a - b).abs() < 1e-9 * whole.moment_attended.trace());
    }
    for (a, b) in merged.heads.iter().zip(&whole.heads) {
        close(a.p2, b.p2, "p2");
        assert_eq!(a.distance_p.len(), b.distance_p.len());
    }
    let other = random_layer(Case::plain(4, 4, 8, 24), 13);
    assert!(
        merged
            .merge(gather(&other, &windows, StatisticsOptions::default()))
            .is_err()
    );
}

fn refusal(weights: &LayerWeights, q: &[f32], k: &[f32], v: &[f32], tokens: usize) -> String {
    let mut statistics = LayerStatistics::new(
        3,
        &weights.attention,
        &weights.o.weight,
        StatisticsOptions::default(),
    )
    .expect("valid");
    let window = WindowActivations { tokens, q, k, v };
    let message = statistics
        .accumulate(&window)
        .expect_err("refused")
        .to_string();
    assert_eq!(
        statistics.tokens, 0,
        "a refused window leaves nothing behind"
    );
    message
}

#[test]
fn bad_windows_are_refused_by_name() {
    let weights = random_layer(Case::plain(4, 2, 8, 24), 14);
    let Qkv { q, k, v } = qkv(&weights, &random_rows(&mut rng(15), 5, 24));
    let (q, k, v) = (narrow(&q), narrow(&k), narrow(&v));
    let mut broken = k.clone();
    broken[2 * 16 + 3] = f32::NAN;
    let message = refusal(&weights, &q, &broken, &v, 5);
    assert!(
        message.contains("keys of layer 3") && message.contains("NaN at token 2"),
        "{message}"
    );
    let mut broken = v.clone();
    broken[0] = f32::INFINITY;
    assert!(refusal(&weights, &q, &k, &broken, 5).contains("values of layer 3"));
    assert!(refusal(&weights, &q[1..], &k, &v, 5).contains("queries of layer 3"));
    assert!(refusal(&weights, &[], &[], &[], 0).contains("at least one token"));
    let empty = LayerStatistics::new(
        3,
        &weights.attention,
        &weights.o.weight,
        StatisticsOptions::default(),
    )
    .expect("valid");
    assert!(
        empty
            .check()
            .expect_err("empty")
            .to_string()
            .contains("layer 3")
    );
}

/// With standard normal inputs the prior's moments are those of the data.
#[test]
fn prior_moments_match_normal_inputs() {
    for qk_norm in [false, true] {
        let mut weights = random_layer(
            Case {
                bias: !qk_norm,
                qk_norm,
                ..Case::plain(4, 2, 16, 64)
            },
            16,
        );
        weights.input_norm = Some((0..64).map(|i| 0.5 + (i % 3) as f32 / 2.0).collect());
        let prior = prior_statistics(&weights, DistancePrior::default()).expect("prior");
        let gamma = weights.input_norm.clone().expect("set");
        let windows: Vec<Vec<Vec<f64>>> = (0..8)
            .map(|i| {
                let mut rows = random_rows(&mut rng(40 + i), 400, 64);
                for row in &mut rows {
                    for (x, g) in row.iter_mut().zip(&gamma) {
                        *x *= f64::from(*g);
                    }
                }
                rows
            })
            .collect();
        let options = StatisticsOptions {
            sampled_rows: 8,
            ..StatisticsOptions::default()
        };
        let found = gather(&weights, &windows, options);
        let tokens = found.tokens as f64;
        let scale = prior.moment.trace() / 64.0;
        for (a, b) in prior.moment.data().iter().zip(found.moment.data()) {
            assert!(
                (a - b / tokens).abs() < 0.2 * scale,
                "qk norm {qk_norm}: prior {a}, data {}",
                b / tokens
            );
        }
        for (a, b) in prior.heads.iter().zip(&found.heads) {
            close_to(a.query.trace(), b.query.trace() / tokens, 0.05);
        }
    }
    assert!(
        prior_statistics(
            &random_layer(Case::plain(2, 1, 4, 8), 1),
            DistancePrior {
                length: 0,
                exponent: 1.0
            }
        )
        .is_err()
    );
}

fn close_to(a: f64, b: f64, relative: f64) {
    assert!((a - b).abs() < relative * b.abs(), "{a} against {b}");
}
