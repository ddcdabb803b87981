//! Refit of the output projection, ranks for budgets, cache sizes.

mod common;

use common::{Case, random_layer, random_matrix, rng};
use mlac_converter::rank::DEFAULT_ALIGN;
use mlac_converter::{
    AttentionShape, Budget, CachePlan, LayerCache, Matrix, OutputRefit, Projection, RankChoice,
    RefitOptions,
};
use proptest::prelude::*;

/// Heads X, targets `X W^T + b`, windows of different lengths.
fn refit(weight: &Matrix<f32>, bias: f32) -> OutputRefit {
    let shape = random_layer(Case::plain(4, 2, 4, 10), 1).attention.shape;
    let mut refit = OutputRefit::new(2, &shape);
    for (seed, tokens) in [(1, 50), (2, 70)] {
        let mut x = random_matrix(&mut rng(seed), tokens, 16, 1.0);
        for t in 0..tokens {
            x.row_mut(t)[0] += 1.0;
        }
        let mut target = x.times_transposed(weight);
        for y in target.data_mut() {
            *y += bias;
        }
        refit
            .accumulate(tokens, x.data(), target.data())
            .expect("finite");
    }
    refit
}

#[test]
fn refit_finds_the_map_and_the_bias() {
    let (truth, start) = (
        random_matrix(&mut rng(7), 10, 16, 0.3),
        random_matrix(&mut rng(8), 10, 16, 0.3),
    );
    let original = Projection {
        weight: start,
        bias: None,
    };
    let refit = refit(&truth, 0.5);
    let solved = refit
        .solve(
            &original,
            RefitOptions {
                lambda: 0.0,
                fit_bias: true,
                compensate: false,
            },
        )
        .expect("solves");
    for (a, b) in solved.o.data().iter().zip(truth.data()) {
        assert!((a - f64::from(*b)).abs() < 1e-4, "{a} against {b}");
    }
    assert!(
        solved
            .bias
            .as_ref()
            .expect("fitted")
            .iter()
            .all(|b| (b - 0.5).abs() < 1e-4)
    );
    assert!(
        solved.error_before > 0.5 && solved.error_after < 1e-6,
        "{} to {}",
        solved.error_before,
        solved.error_after
    );
    // Without a bias the constant is left over.
    let solved = refit
        .solve(
            &original,
            RefitOptions {
                lambda: 0.0,
                fit_bias: false,
                compensate: false,
            },
        )
        .expect("solves");
    assert!(
        solved.bias.is_none()
            && solved.error_after > 1e-3
            && solved.error_after < solved.error_before
    );
    // A large ridge stays at the original, whose own bias is kept.
    let original = Projection {
        bias: Some(vec![0.5; 10]),
        ..original
    };
    let solved = refit
        .solve(
            &original,
            RefitOptions {
                lambda: 1e9,
                fit_bias: false,
                compensate: false,
            },
        )
        .expect("solves");
    for (a, b) in solved.o.data().iter().zip(original.weight.data()) {
        assert!((a - f64::from(*b)).abs() < 1e-6);
    }
    assert_eq!(solved.bias, Some(vec![0.5; 10]));
}

#[test]
fn refit_refuses_bad_input() {
    let shape = random_layer(Case::plain(4, 2, 4, 10), 1).attention.shape;
    let mut refit = OutputRefit::new(2, &shape);
    let original = Projection {
        weight: Matrix::zeros(10, 16),
        bias: None,
    };
    assert!(refit.solve(&original, RefitOptions::default()).is_err());
    assert!(refit.accumulate(2, &[0.0; 31], &[0.0; 20]).is_err());
    let message = refit
        .accumulate(1, &[f32::NAN; 16], &[0.0; 10])
        .expect_err("NaN")
        .to_string();
    assert!(message.contains("head outputs of layer 2"), "{message}");
    // All-zero heads still solve: the ridge holds the original.
    refit.accumulate(1, &[0.0; 16], &[1.0; 10]).expect("finite");
    assert!(
        refit
            .solve(
                &original,
                RefitOptions {
                    lambda: -1.0,
                    fit_bias: false,
                    compensate: false,
                }
            )
            .is_err()
    );
    assert!(
        refit
            .solve(&original, RefitOptions::default())
            .expect("solves")
            .o
            .is_finite()
    );
}

const SMOLLM2: AttentionShape = AttentionShape {
    hidden: 576,
    query_heads: 9,
    kv_heads: 3,
    head_dim: 64,
};

#[test]
fn budgets_give_the_measured_ranks() {
    for (fraction, r, d_r) in [
        (0.25, 64, 32),
        (0.375, 96, 48),
        (0.5, 128, 64),
        (0.75, 224, 64),
        (1.0, 192, 192),
    ] {
        let plan = Budget::Fraction(fraction)
            .ranks(&SMOLLM2, DEFAULT_ALIGN)
            .expect("fits");
        assert_eq!(
            plan.ranks,
            RankChoice {
                kv_lora_rank: r,
                qk_rope_head_dim: d_r
            },
            "budget {fraction}"
        );
        assert!((plan.fraction() - fraction).abs() < 1e-9);
    }
    assert_eq!(
        Budget::Exact.ranks(&SMOLLM2, 16).expect("exact").ranks,
        RankChoice::exact(&SMOLLM2)
    );
}

#[test]
fn budgets_out_of_range_are_refused() {
    for fraction in [0.0, -0.5, 1.01, f64::NAN, f64::INFINITY, 1e-4] {
        let message = Budget::Fraction(fraction)
            .ranks(&SMOLLM2, 16)
            .expect_err("refused")
            .to_string();
        assert!(message.contains("--budget"), "{message}");
    }
    for align in [0, 1, 12] {
        assert!(Budget::Fraction(0.5).ranks(&SMOLLM2, align).is_err());
    }
    assert!(
        Budget::Ranks(RankChoice {
            kv_lora_rank: 400,
            qk_rope_head_dim: 64
        })
        .ranks(&SMOLLM2, 16)
        .is_err()
    );
}

#[test]
fn tiny_heads_get_a_smaller_alignment_and_say_so() {
    let shape = AttentionShape {
        hidden: 32,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };
    let plan = Budget::Fraction(0.5).ranks(&shape, 16).expect("fits");
    assert!(plan.align < 16 && plan.note.is_some());
    assert!(plan.ranks.width() <= 16);
}

proptest! {
    #[test]
    fn no_budget_is_exceeded(groups in 1usize..9, half in 1usize..65, fraction in 0.01f64..1.0, shift in 1u32..6) {
        let shape = AttentionShape { hidden: 64, query_heads: groups, kv_heads: groups, head_dim: 2 * half };
        if let Ok(plan) = Budget::Fraction(fraction).ranks(&shape, 1 << shift) {
            prop_assert!(plan.ranks.check(&shape).is_ok());
            prop_assert!(plan.ranks.width() as f64 <= fraction * shape.stacked_width() as f64 + 1e-6);
        } else {
            prop_assert!(fraction * (shape.stacked_width() as f64) < 4.0);
        }
    }
}

#[test]
fn cache_bytes_by_context() {
    let converted = Some(RankChoice {
        kv_lora_rank: 128,
        qk_rope_head_dim: 64,
    });
    let layer = |converted, sliding_window| LayerCache {
        layer: 0,
        gqa_width: 384,
        converted,
        sliding_window,
    };
    let plan = CachePlan {
        layers: vec![
            layer(converted, None),
            layer(None, Some(128)),
            layer(converted, Some(128)),
        ],
        element_bytes: 2,
    };
    // 100 tokens fit every window; 1000 fill two.
    assert_eq!(
        (plan.gqa_bytes(100), plan.mla_bytes(100)),
        (3 * 38_400 * 2, (19_200 + 38_400 + 19_200) * 2)
    );
    assert_eq!(plan.gqa_bytes(1000), (384_000 + 2 * 128 * 384) * 2);
    assert_eq!(plan.mla_bytes(1000), (192_000 + 128 * 384 + 128 * 192) * 2);
    assert_eq!(plan.bytes_per_token(), (768, 384));
    // Without weights the speed-up is the ratio of caches; with many it tends to 1.
    let only_full = CachePlan {
        layers: vec![layer(converted, None)],
        element_bytes: 2,
    };
    assert!((only_full.decode_speedup(4096, 1, 0) - 2.0).abs() < 1e-12);
    assert!((only_full.decode_speedup(16, 1, 1 << 40) - 1.0).abs() < 1e-6);
}
