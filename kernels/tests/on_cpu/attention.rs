//! Attention of every kind against the naive answer, under two orders of threads and loads.

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::plan::Plan;
use mlac_kernels::problem::{Problem, compare};
use mlac_kernels::{Arch, AttentionDesc, Dtype, Mask};

use crate::machine::{compile, run};
use crate::{e4m3, sinks};

/// Runs a request on problems of these lengths, each with so many parts.
fn check(desc: AttentionDesc, problems: &[(&[u32], u32)]) {
    let mut config = AttentionConfig::choose(&desc).unwrap();
    // Short caches are divided too.
    config.min_split = 1;
    let folder = tempfile::tempdir().unwrap();
    compile(&desc, &config, folder.path(), None);
    for (i, &(lengths, parts)) in problems.iter().enumerate() {
        let problem = Problem::random(desc, lengths, 1000 + i as u64);
        let reference = problem.reference();
        let (answer, plan) = run(&problem, &config, parts, 2 * i as u32, folder.path()).unwrap();
        if let Some(complaint) = compare(&answer, &reference).complaint(&problem) {
            panic!("{desc}\n{config}\nlengths {lengths:?}, {parts} parts: {complaint}");
        }
        if config.planned {
            let ours = Plan::of(&desc, &config, lengths, parts);
            let flat: Vec<i32> = ours
                .bounds
                .iter()
                .chain(&ours.owners)
                .flat_map(|&(a, b)| [a as i32, b as i32])
                .collect();
            assert_eq!(
                plan, flat,
                "{desc}: the plan for {lengths:?}, {parts} parts"
            );
        }
        // Other interleavings of threads and of loads: the same bits.
        let (again, _) = run(&problem, &config, parts, 2 * i as u32 + 1, folder.path()).unwrap();
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits());
        assert!(
            same(&answer.out, &again.out) && same(&answer.lse, &again.lse),
            "{desc}: lengths {lengths:?}, {parts} parts: two runs differ"
        );
    }
}

#[test]
fn k1_one_row_tile() {
    check(
        sinks(AttentionDesc::latent(64, 128, 64, Arch::Sm90a)),
        &[(&[0, 1, 64, 200], 3), (&[700], 5), (&[1300, 65, 3], 2)],
    );
}

#[test]
fn k1_the_largest_latent_and_heads_that_fill_no_tile() {
    check(
        AttentionDesc {
            dtype: Dtype::F16,
            ..AttentionDesc::latent(9, 256, 96, Arch::Sm90a)
        },
        &[(&[130, 513], 4)],
    );
}

#[test]
fn k2_latents_that_two_warpgroups_share() {
    check(
        sinks(AttentionDesc::latent(64, 512, 64, Arch::Sm90a)),
        &[(&[1, 450], 3)],
    );
    check(
        AttentionDesc {
            query_tokens: 2,
            mask: Mask::Tree,
            dtype: Dtype::F16,
            ..AttentionDesc::latent(16, 320, 32, Arch::Sm90a)
        },
        &[(&[65, 400], 3)],
    );
}

#[test]
fn k4_verification_with_a_tree_and_with_three_row_tiles() {
    let desc = sinks(AttentionDesc::latent(64, 64, 64, Arch::Sm90a));
    check(
        AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..desc
        },
        &[(&[66, 500, 4, 2], 3)],
    );
    check(
        AttentionDesc {
            query_tokens: 3,
            ..desc
        },
        &[(&[129, 400, 1], 4)],
    );
}

#[test]
fn k5_a_window_of_128() {
    let desc = sinks(AttentionDesc::latent(64, 64, 32, Arch::Sm90a));
    check(
        AttentionDesc {
            window: Some(128),
            ..desc
        },
        &[(&[0, 5, 127, 128, 129, 1000], 1)],
    );
}

#[test]
fn mma_with_every_division_of_heads() {
    check(
        sinks(AttentionDesc::latent(64, 128, 64, Arch::Sm80)),
        &[(&[0, 1, 97, 300], 3)],
    );
    check(
        AttentionDesc {
            query_tokens: 2,
            mask: Mask::Tree,
            window: Some(100),
            ..AttentionDesc::latent(9, 64, 16, Arch::Sm89)
        },
        &[(&[300, 70], 3)],
    );
}

#[test]
fn mma_with_the_largest_latent() {
    check(
        AttentionDesc {
            dtype: Dtype::F16,
            ..sinks(AttentionDesc::latent(40, 512, 64, Arch::Sm120))
        },
        &[(&[150], 3)],
    );
}

#[test]
fn gqa() {
    check(
        sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm90a)),
        &[(&[0, 1, 33, 1000], 5)],
    );
    check(
        AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..sinks(AttentionDesc::grouped(14, 2, 64, Arch::Sm89))
        },
        &[(&[66, 700], 4)],
    );
    check(
        AttentionDesc {
            window: Some(128),
            dtype: Dtype::F16,
            ..AttentionDesc::grouped(4, 1, 128, Arch::Sm80)
        },
        &[(&[40, 129, 600], 1)],
    );
}

#[test]
fn k3_fp8_tiles_of_a_warpgroup_each() {
    check(
        e4m3(sinks(AttentionDesc::latent(64, 128, 64, Arch::Sm90a))),
        &[(&[0, 1, 64, 200], 3), (&[1300, 65, 3], 2)],
    );
    check(
        AttentionDesc {
            dtype: Dtype::F16,
            window: Some(128),
            ..e4m3(AttentionDesc::latent(9, 192, 80, Arch::Sm90a))
        },
        &[(&[130, 513], 2)],
    );
}

#[test]
fn k3_fp8_tiles_that_two_warpgroups_share() {
    check(
        e4m3(sinks(AttentionDesc::latent(64, 512, 64, Arch::Sm90a))),
        &[(&[1, 450], 3)],
    );
    check(
        AttentionDesc {
            query_tokens: 3,
            mask: Mask::Tree,
            ..e4m3(AttentionDesc::latent(64, 64, 32, Arch::Sm90a))
        },
        &[(&[65, 700, 4], 3)],
    );
}

#[test]
fn k3_fp8_with_mma() {
    check(
        e4m3(sinks(AttentionDesc::latent(64, 128, 64, Arch::Sm80))),
        &[(&[0, 1, 97, 300], 3)],
    );
    check(
        AttentionDesc {
            query_tokens: 2,
            mask: Mask::Tree,
            window: Some(100),
            dtype: Dtype::F16,
            ..e4m3(AttentionDesc::latent(9, 64, 16, Arch::Sm89))
        },
        &[(&[300, 70], 3)],
    );
    check(
        e4m3(sinks(AttentionDesc::latent(40, 512, 64, Arch::Sm120))),
        &[(&[150], 3)],
    );
}

#[test]
fn gqa_with_wgmma() {
    check(
        AttentionDesc {
            query_tokens: 7,
            mask: Mask::Tree,
            ..sinks(AttentionDesc::grouped(18, 2, 64, Arch::Sm90a))
        },
        &[(&[66, 700, 6], 4)],
    );
    check(
        AttentionDesc {
            query_tokens: 3,
            dtype: Dtype::F16,
            ..AttentionDesc::grouped(12, 3, 128, Arch::Sm90a)
        },
        &[(&[0, 2, 129, 900], 5)],
    );
    check(
        AttentionDesc {
            window: Some(128),
            ..sinks(AttentionDesc::grouped(8, 1, 64, Arch::Sm90a))
        },
        &[(&[40, 129, 600], 1)],
    );
}
