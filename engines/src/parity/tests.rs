#![allow(clippy::float_cmp, reason = "figures that must be exact")]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn compare(pairs: &[(Vec<f32>, Vec<f32>)]) -> Parity {
    let mut comparer = Comparer::new();
    for (a, b) in pairs {
        comparer.add(a, b).unwrap();
    }
    comparer.finish().unwrap()
}

#[test]
fn figures_of_a_small_case_by_hand() {
    // Position 0: errors 0, 1; position 1: equal.
    let parity = compare(&[
        (vec![3.0, 4.0], vec![3.0, 3.0]),
        (vec![0.0, 2.0], vec![0.0, 2.0]),
    ]);
    assert!((parity.max_abs - 1.0).abs() < 1e-12);
    // max(|4|, rms(3, 4) = sqrt(12.5)) = 4.
    assert!((parity.max_rel - 0.25).abs() < 1e-12);
    assert_eq!(
        parity.worst,
        Some(Coordinate {
            token: 0,
            vocab: 1,
            a: 4.0,
            b: 3.0
        })
    );
    // ab = 9 + 12 + 4, aa = 9 + 16 + 4, bb = 9 + 9 + 4.
    assert!((parity.cosine - 25.0 / (29.0_f64 * 22.0).sqrt()).abs() < 1e-12);
    assert!((parity.scale - (29.0_f64 / 4.0).sqrt()).abs() < 1e-12);
    // q is uniform at position 0: KL = ln 2 - entropy(p).
    let p = 1.0 / (1.0 + (-1.0_f64).exp());
    let kl = 2.0_f64.ln() + p * p.ln() + (1.0 - p) * (1.0 - p).ln();
    assert!((parity.max_kl - kl).abs() < 1e-12 && (parity.mean_kl - kl / 2.0).abs() < 1e-12);
    assert!((parity.top1 - 0.5).abs() < 1e-12);
}

#[test]
fn each_gate_fails_alone() {
    let perfect = compare(&[(vec![1.0, 2.0, 3.0], vec![1.0, 2.0, 3.0])]);
    assert_eq!(perfect.check(&Tolerance::EXACT), vec![]);
    let spoiled = |figures: Parity| {
        let failures = figures.check(&Tolerance::EXACT);
        failures
            .iter()
            .map(|failure| failure.gate)
            .collect::<Vec<_>>()
    };
    let one = || perfect.clone();
    for (gate, figures) in [
        (
            "positions of NaN and infinity",
            Parity {
                non_finite_mismatches: 1,
                ..one()
            },
        ),
        (
            "max abs",
            Parity {
                max_abs: 0.002,
                ..one()
            },
        ),
        (
            "max rel",
            Parity {
                max_rel: f64::NAN,
                ..one()
            },
        ),
        (
            "cosine",
            Parity {
                cosine: 0.9,
                ..one()
            },
        ),
        (
            "mean KL",
            Parity {
                mean_kl: 0.1,
                ..one()
            },
        ),
        (
            "top-1 agreement",
            Parity {
                top1: 0.99,
                ..one()
            },
        ),
    ] {
        assert_eq!(spoiled(figures), [gate]);
    }
}

#[test]
fn nan_and_infinity_must_be_at_the_same_places() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (a, b, mismatches) in [
        (vec![nan, 1.0], vec![nan, 1.0], 0),
        (vec![inf, 1.0], vec![inf, 1.0], 0),
        (vec![nan, 1.0], vec![1.0, nan], 2),
        (vec![inf, 1.0], vec![-inf, 1.0], 1),
        (vec![inf, 1.0], vec![nan, 1.0], 1),
        (vec![1.0, 1.0], vec![1.0, inf], 1),
    ] {
        let parity = compare(&[(a.clone(), b.clone())]);
        assert_eq!(parity.non_finite_mismatches, mismatches, "{a:?} {b:?}");
        assert_eq!(
            parity.check(&Tolerance::EXACT).is_empty(),
            mismatches == 0,
            "{a:?} {b:?}: {parity:?}"
        );
    }
}

#[test]
fn an_error_on_a_zero_reference_is_infinite_relative_and_cosine_zero() {
    let parity = compare(&[(vec![0.0, 0.0], vec![0.5, 0.0])]);
    assert!(parity.max_rel.is_infinite() && parity.cosine == 0.0);
}

#[test]
fn nothing_compared_is_not_agreement() {
    assert!(Comparer::new().finish().is_err());
    let mut comparer = Comparer::new();
    assert!(comparer.add(&[], &[]).is_err());
    assert!(comparer.add(&[1.0], &[1.0, 2.0]).is_err());
    comparer.add(&[1.0], &[1.0]).unwrap();
    let error = comparer
        .add(&[1.0, 2.0], &[1.0, 2.0])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("position 1: expected 1 in both, found 2 and 2"),
        "{error}"
    );
}

fn rows() -> impl Strategy<Value = Vec<(Vec<f32>, Vec<f32>)>> {
    let entry = || (-400_i32..400).prop_map(|eighths| eighths as f32 / 8.0);
    (1_usize..9).prop_flat_map(move |vocab| vec((vec(entry(), vocab), vec(entry(), vocab)), 1..6))
}

proptest! {
    #[test]
    fn equal_tensors_agree_in_every_figure(pairs in rows()) {
        let same: Vec<_> = pairs.iter().map(|(a, _)| (a.clone(), a.clone())).collect();
        let parity = compare(&same);
        prop_assert!(parity.check(&Tolerance { max_abs: 0.0, max_rel: 0.0, min_cosine: 1.0 - 1e-12, max_mean_kl: 0.0, min_top1: 1.0 }).is_empty(), "{parity:?}");
    }

    #[test]
    fn the_worst_coordinate_is_where_the_error_is_greatest(pairs in rows()) {
        let parity = compare(&pairs);
        let greatest = pairs.iter().flat_map(|(a, b)| a.iter().zip(b)).map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs()).fold(0.0, f64::max);
        let worst = parity.worst.unwrap();
        prop_assert_eq!(parity.max_abs, greatest);
        prop_assert_eq!((f64::from(worst.a) - f64::from(worst.b)).abs(), greatest);
        prop_assert_eq!(pairs[worst.token].0[worst.vocab], worst.a);
        prop_assert_eq!(pairs[worst.token].1[worst.vocab], worst.b);
        prop_assert!(parity.mean_kl >= 0.0 && parity.mean_kl <= parity.max_kl + 1e-12);
    }

    #[test]
    fn a_constant_added_to_every_logit_changes_no_probability(pairs in rows(), shift in -40_i32..40) {
        let shifted: Vec<_> = pairs.iter().map(|(a, _)| (a.clone(), a.iter().map(|x| x + shift as f32).collect::<Vec<_>>())).collect();
        let parity = compare(&shifted);
        prop_assert!(parity.max_kl < 1e-12 && parity.top1 == 1.0, "{parity:?}");
        prop_assert_eq!(parity.max_abs, f64::from(shift.abs()));
    }
}
