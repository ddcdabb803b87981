//! The kernels' tile order, streams, splits and merges against the naive f64 answer.
#![allow(
    clippy::unwrap_used,
    clippy::format_push_string,
    clippy::items_after_statements,
    clippy::needless_for_each,
    reason = "a test that cannot go on says why by panicking; its texts are short"
)]

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::emulate::emulate;
use mlac_kernels::fp8::quantise;
use mlac_kernels::plan::{Plan, Tiles};
use mlac_kernels::problem::{Problem, Random, compare};
use mlac_kernels::{Arch, Attention, AttentionDesc, CacheDtype, Dtype, Mask};
use proptest::prelude::*;

/// Requests that reach every kernel and every branch of its masks, with small ranks so that they run quickly.
fn descs() -> impl Strategy<Value = AttentionDesc> {
    let attention = prop_oneof![
        (
            prop_oneof![Just(64_u32), Just(128), Just(320)],
            prop_oneof![Just(16_u32), Just(64)],
            prop_oneof![Just(1_u32), Just(9), Just(64), Just(80)],
        )
            .prop_map(|(kv_lora_rank, rope_dim, heads)| (
                Attention::Latent {
                    kv_lora_rank,
                    rope_dim
                },
                heads
            )),
        prop_oneof![Just((1_u32, 1_u32)), Just((2, 8)), Just((3, 9))].prop_map(
            |(kv_heads, heads)| (
                Attention::Grouped {
                    kv_heads,
                    head_dim: 64
                },
                heads
            )
        ),
    ];
    (
        attention,
        1_u32..=5,
        prop_oneof![Just(Mask::Full), Just(Mask::Causal), Just(Mask::Tree)],
        prop_oneof![
            Just(None),
            Just(Some(1_u32)),
            Just(Some(64)),
            Just(Some(65)),
            Just(Some(128)),
            Just(Some(700))
        ],
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(Arch::ALL.to_vec()),
    )
        .prop_map(
            |((attention, query_heads), query_tokens, mask, window, sinks, f16, e4m3, arch)| {
                AttentionDesc {
                    attention,
                    query_heads,
                    query_tokens,
                    mask,
                    window: window.filter(|&w| mask != Mask::Tree || w >= 64),
                    sinks,
                    dtype: if f16 { Dtype::F16 } else { Dtype::Bf16 },
                    cache: match attention {
                        Attention::Latent { .. } if e4m3 => CacheDtype::E4m3,
                        _ => CacheDtype::Same,
                    },
                    page: 64,
                    arch,
                }
            },
        )
}

fn lengths() -> impl Strategy<Value = Vec<u32>> {
    let edge = prop_oneof![
        Just(0_u32),
        Just(1),
        Just(63),
        Just(64),
        Just(65),
        Just(128),
        0_u32..300,
        0_u32..1200
    ];
    prop::collection::vec(edge, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_tile_order_computes_attention(
        desc in descs(),
        lengths in lengths(),
        parts in prop_oneof![Just(1_u32), 1_u32..9, 1_u32..140],
        min_split in prop_oneof![Just(1_u32), 1_u32..9],
        seed in any::<u64>(),
        large in any::<bool>(),
        infinite in 0_u32..3,
    ) {
        let mut config = AttentionConfig::choose(&desc).unwrap();
        config.min_split = min_split;
        let mut problem = Problem::random(desc, &lengths, seed);
        if large {
            // Scores in the hundreds: any maximum that is not subtracted overflows. In the thousands f32 rounds the scores
            // themselves by more than the tolerance.
            problem.q.iter_mut().for_each(|q| *q *= 512.0);
        }
        match (infinite, problem.sinks.first_mut()) {
            (1, Some(sink)) => *sink = f32::INFINITY,
            (2, Some(sink)) => *sink = f32::NEG_INFINITY,
            _ => {}
        }
        let reference = problem.reference();
        let answer = emulate(&problem, &config, parts);
        let complaint = compare(&answer, &reference).complaint(&problem);
        prop_assert!(complaint.is_none(), "{desc}\n{config}\n{}", complaint.unwrap_or_default());
        if desc.sinks && infinite == 1 {
            prop_assert!(answer.out[..desc.out_row() as usize].iter().all(|&x| x == 0.0), "a sink of infinity takes everything");
        }
        // The same numbers whatever lies in other pages and however often it runs.
        prop_assert_eq!(&answer, &emulate(&problem, &config, parts));
    }

    /// An FP8 cache is off by no more than its rounding explains: scores move by `e <= scale * sum |q| |key - key'|`, so weights by a
    /// factor between `exp(-2e)` and `exp(2e)`, and outputs by `(exp(2e) - 1) * max |value'|` and what the values themselves move.
    #[test]
    fn quantisation_moves_outputs_no_further_than_its_rounding(
        seed in any::<u64>(),
        exponent in -6_i32..4,
        heads in 1_u32..5,
    ) {
        let plain = AttentionDesc { sinks: true, ..AttentionDesc::latent(heads, 64, 16, Arch::Sm80) };
        let mut before = Problem::random(plain, &[70, 3], seed);
        let mut random = Random::new(seed);
        for row in before.cache.chunks_exact_mut(80) {
            let size = 2.0_f32.powi(exponent) * (1.0 + random.below(8) as f32);
            row.iter_mut().for_each(|x| *x *= size * (1.0 + random.below(1000) as f32 / 1000.0));
        }
        let mut after = before.clone();
        after.desc.cache = CacheDtype::E4m3;
        after.scales = vec![1.0; before.cache.len() / 80];
        let (mut moved, mut key_error, mut largest) = (0.0_f64, 0.0_f64, 0.0_f64);
        for (row, scale) in after.cache.chunks_exact_mut(80).zip(&mut after.scales) {
            if row[0].is_nan() {
                continue;
            }
            let exact: Vec<f32> = row.to_vec();
            let (latent, key) = row.split_at_mut(64);
            let (found, codes, keys) = quantise(latent, key);
            *scale = found;
            latent.copy_from_slice(&codes);
            key.copy_from_slice(&keys);
            let off: Vec<f64> = exact.iter().zip(&*row).map(|(x, y)| f64::from(x - y * found).abs()).collect();
            moved = off[..64].iter().copied().fold(moved, f64::max);
            key_error = key_error.max(off.iter().sum());
            largest = row[..64].iter().map(|y| f64::from(y * found).abs()).fold(largest, f64::max);
        }
        // Queries are at most 1.
        let e = f64::from(before.scale) * key_error;
        let bound = ((2.0 * e).exp() - 1.0) * largest + moved + 1e-6;
        let (a, b) = (before.reference(), after.reference());
        for (x, y) in a.out.iter().zip(&b.out) {
            prop_assert!(f64::from((x - y).abs()) <= bound, "{x} became {y}, bound {bound}");
        }
        for (x, y) in a.lse.iter().zip(&b.lse) {
            prop_assert!(f64::from((x - y).abs()) <= e + 1e-5, "{x} became {y}, bound {e}");
        }
        prop_assert!(b.out != a.out, "nothing was quantised");
        // And the kernel's order agrees with the reference on what it reads.
        let config = AttentionConfig::choose(&after.desc).unwrap();
        let complaint = compare(&emulate(&after, &config, 3), &b).complaint(&after);
        prop_assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    }

    #[test]
    fn every_tile_is_in_one_piece_and_every_slot_is_written_once(
        desc in descs(),
        lengths in prop::collection::vec(prop_oneof![Just(0_u32), 0_u32..200, 0_u32..40_000], 1..20),
        parts in 1_u32..300,
        min_split in 1_u32..20,
    ) {
        let mut config = AttentionConfig::choose(&desc).unwrap();
        config.min_split = min_split;
        config.planned = true;
        let plan = Plan::of(&desc, &config, &lengths, parts);
        let pieces = plan.pieces();
        let mut slots = Vec::new();
        for unit in 0..config.units(&desc) * lengths.len() as u32 {
            let whole = plan.tiles(unit);
            let mut next = whole.begin;
            let mine: Vec<_> = pieces.iter().filter(|piece| piece.unit == unit).collect();
            prop_assert!(!mine.is_empty(), "unit {unit} is computed by nobody");
            for piece in &mine {
                let Tiles { begin, end } = piece.tiles;
                prop_assert_eq!(begin, next);
                next = end;
                prop_assert_eq!(piece.slot.is_some(), mine.len() > 1);
                if mine.len() > 1 {
                    prop_assert!(end - begin >= min_split, "a piece of {} tiles", end - begin);
                }
            }
            prop_assert_eq!(next, whole.end);
            let expected: Vec<u32> = mine.iter().filter_map(|piece| piece.slot).collect();
            prop_assert_eq!(&plan.slots(unit), &expected, "what combine reads of unit {}", unit);
            slots.extend(expected);
        }
        slots.sort_unstable();
        let count = slots.len();
        slots.dedup();
        prop_assert_eq!(count, slots.len(), "two pieces in one slot");
        prop_assert!(slots.last().is_none_or(|&slot| slot < 2 * parts));
    }
}

/// What the tests above must notice: each of these changes moves the answer beyond tolerance.
#[test]
fn mistakes_are_noticed() {
    let desc = AttentionDesc {
        sinks: true,
        window: Some(100),
        query_tokens: 2,
        ..AttentionDesc::latent(4, 64, 16, Arch::Sm90a)
    };
    let problem = Problem::random(desc, &[300, 130], 7);
    let config = AttentionConfig::choose(&desc).unwrap();
    let reference = problem.reference();
    assert_eq!(
        compare(&emulate(&problem, &config, 8), &reference).complaint(&problem),
        None
    );
    type Mistake = fn(&mut Problem);
    let mistakes: [(&str, Mistake); 6] = [
        ("a window one longer", |p| p.desc.window = Some(101)),
        ("the full mask", |p| p.desc.mask = Mask::Full),
        ("no sinks", |p| p.sinks.clear()),
        ("sinks that are scaled", |p| {
            let scale = p.scale;
            p.sinks.iter_mut().for_each(|s| *s *= scale);
        }),
        ("another page", |p| p.pages.swap(3, 4)),
        ("one token less", |p| p.lengths[0] -= 1),
    ];
    for (name, mistake) in mistakes {
        let mut wrong = problem.clone();
        mistake(&mut wrong);
        let answer = emulate(&wrong, &config, 8);
        assert!(
            compare(&answer, &reference).complaint(&problem).is_some(),
            "{name} went unnoticed"
        );
    }
}
