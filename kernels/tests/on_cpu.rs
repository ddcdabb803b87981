//! The kernels' own sources, compiled by g++ and run on the CPU, against the naive f64 answer.
//!
//! `host/` replaces the three files of instructions (`ptx.cuh`, `hopper.cuh`, `mma.cuh`) by functions that do what the PTX ISA says:
//! threads are fibers, wgmma reads shared memory through its descriptors, TMA writes it swizzled, and what is asynchronous on a
//! GPU happens as late as it may. Everything else, from the walk over the pieces to the epilogue, is the code that NVRTC compiles.
#![allow(
    clippy::unwrap_used,
    clippy::items_after_statements,
    clippy::needless_for_each,
    clippy::float_cmp,
    reason = "a test that cannot go on says why by panicking; its texts are short"
)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Edit, kernels, run_compiler, write_sources};
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::plan::Plan;
use mlac_kernels::problem::{Answer, Problem, Random, bits, compare, from_bits};
use mlac_kernels::source::prologue;
use mlac_kernels::{Arch, AttentionDesc, Dtype, Mask};

/// Compiles the kernels of a request into `folder/run`, with an edit of a file of them.
fn compile(desc: &AttentionDesc, config: &AttentionConfig, folder: &Path, edit: Option<Edit>) {
    let mut text = kernels(desc, config);
    text.push_str("#include \"main.cpp\"\n");
    compile_text(&text, folder, edit);
}

/// Compiles a text that includes the sources into `folder/run`.
fn compile_text(text: &str, folder: &Path, edit: Option<Edit>) {
    write_sources(folder, edit);
    fs::write(folder.join("run.cpp"), text).unwrap();
    let (from, to) = (folder.join("run.cpp"), folder.join("run"));
    run_compiler(&["-O1", "-Wno-unknown-pragmas"], &[from], &to);
}

/// The answer of the compiled kernels, and the plan that they made.
fn run(
    problem: &Problem,
    config: &AttentionConfig,
    parts: u32,
    seed: u32,
    folder: &Path,
) -> Result<(Answer, Vec<i32>), String> {
    let desc = &problem.desc;
    let row = match desc.kv_heads() {
        1 => desc.row(),
        heads => heads * desc.row(),
    } as usize;
    let cache_pages = problem.cache.len() / row / desc.page as usize;
    let grid = if config.planned { parts } else { 3 };
    let mut file = Vec::new();
    for number in [
        problem.lengths.len() as u32,
        problem.page_stride,
        cache_pages as u32,
        parts,
        grid,
        seed,
        problem.scale.to_bits(),
        0,
    ] {
        file.extend(number.to_le_bytes());
    }
    problem
        .lengths
        .iter()
        .for_each(|x| file.extend(x.to_le_bytes()));
    problem
        .pages
        .iter()
        .for_each(|x| file.extend(x.to_le_bytes()));
    for numbers in [&problem.q, &problem.cache, &problem.values] {
        numbers
            .iter()
            .for_each(|&x| file.extend(bits(desc.dtype, x).to_le_bytes()));
    }
    problem
        .sinks
        .iter()
        .for_each(|x| file.extend(x.to_le_bytes()));
    problem
        .tree
        .iter()
        .for_each(|x| file.extend(x.to_le_bytes()));
    fs::write(folder.join("problem"), file).unwrap();
    let output = Command::new(folder.join("run"))
        .arg(folder.join("problem"))
        .arg(folder.join("answer"))
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(format!(
            "{desc}\n{config}\nlengths {:?}, {parts} parts, seed {seed}: {} {}",
            problem.lengths,
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    let bytes = fs::read(folder.join("answer")).unwrap();
    let rows = problem.lengths.len() * (desc.query_tokens * desc.query_heads) as usize;
    let (out, rest) = bytes.split_at(rows * desc.out_row() as usize * 2);
    let (lse, plan) = rest.split_at(rows * 4);
    let words = |bytes: &[u8]| -> Vec<[u8; 4]> {
        bytes
            .chunks_exact(4)
            .map(|c| [c[0], c[1], c[2], c[3]])
            .collect()
    };
    let answer = Answer {
        out: out
            .chunks_exact(2)
            .map(|c| from_bits(desc.dtype, u16::from_le_bytes([c[0], c[1]])))
            .collect(),
        lse: words(lse).into_iter().map(f32::from_le_bytes).collect(),
    };
    Ok((
        answer,
        words(plan).into_iter().map(i32::from_le_bytes).collect(),
    ))
}

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

fn sinks(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        sinks: true,
        ..desc
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

/// Each of these edits of the sources must be noticed: by a wrong answer, or because somebody waits for ever.
#[test]
fn mistakes_in_the_sources_are_noticed() {
    let latent = sinks(AttentionDesc::latent(64, 64, 64, Arch::Sm90a));
    let mma = sinks(AttentionDesc::latent(32, 64, 64, Arch::Sm80));
    let gqa = sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm80));
    let edits: [(&str, AttentionDesc, Edit); 9] = [
        (
            "a phase of the ring",
            latent,
            (
                "mla_sm90.cuh",
                "(count / kStages & 1) ^ 1",
                "(count / kStages & 1)",
            ),
        ),
        (
            "a stage given back before its values are read",
            latent,
            (
                "mla_sm90.cuh",
                "        wgmma_wait<0>();\n        pin(o);",
                "",
            ),
        ),
        (
            "rows beyond the request left as they are",
            latent,
            ("mla_sm90.cuh", "start + kTile > piece.length", "false"),
        ),
        (
            "queries that come too early",
            latent,
            (
                "mla_sm90.cuh",
                "    barrier_wait(empty, parity);\n    parity ^= 1;",
                "    parity ^= 1;",
            ),
        ),
        (
            "values by the wrong rows",
            latent,
            ("mla_sm90.cuh", "tile + k * 2048", "tile + k * 1024"),
        ),
        (
            "a merge that forgets a warpgroup's scale",
            latent,
            (
                "mla_sm90.cuh",
                "exchange[i * 128 + thread] * other[r]",
                "exchange[i * 128 + thread] * own[r]",
            ),
        ),
        (
            "a sink in every piece",
            latent,
            (
                "mla_sm90.cuh",
                "    if (piece.slot >= 0) {\n      if (store) p.lse_part[slot_row + row + 8 * r] = lse;\n    } else if",
                "    if (piece.slot >= 0) {\n      if (store) p.lse_part[slot_row + row + 8 * r] = lse;\n      if (kSinks) denominator += exp2_fast(p.sinks[head] * kLog2e - top);\n    } else if",
            ),
        ),
        (
            "a tile that is not waited for",
            mma,
            (
                "mla_mma.cuh",
                "copy_wait<kStages - 2>();",
                "copy_wait<kStages - 1>();",
            ),
        ),
        (
            "a ring overwritten too early",
            gqa,
            (
                "gqa_mma.cuh",
                "(i + kStages - 1) % kStages",
                "(i + kStages) % kStages",
            ),
        ),
    ];
    for (name, desc, edit) in edits {
        let mut config = AttentionConfig::choose(&desc).unwrap();
        config.min_split = 1;
        config.stages = config.stages.min(3);
        let folder = tempfile::tempdir().unwrap();
        compile(&desc, &config, folder.path(), Some(edit));
        let problem = Problem::random(desc, &[1000, 70, 130], 5);
        let noticed = match run(&problem, &config, 2, 0, folder.path()) {
            Err(_) => true,
            Ok((answer, _)) => compare(&answer, &problem.reference())
                .complaint(&problem)
                .is_some(),
        };
        assert!(noticed, "{name} went unnoticed");
    }
}

#[test]
fn appended_rows_are_rotated_and_strangers_are_left_out() {
    let desc = AttentionDesc {
        dtype: Dtype::F16,
        ..AttentionDesc::latent(64, 128, 48, Arch::Sm90a)
    };
    let config = AttentionConfig::choose(&desc).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut text = prologue(&desc, &config);
    text.push_str("#include \"append.cuh\"\n#include \"append.cpp\"\n");
    compile_text(&text, folder.path(), None);
    let (rank, rope, table_rows, cache_rows) = (128_usize, 48_usize, 50_usize, 128_usize);
    // Position and slot of each token; the last three belong nowhere.
    let tokens: [(i32, i32); 6] = [(0, 5), (49, 127), (7, 64), (3, -1), (3, 128), (50, 9)];
    let mut random = Random::new(3);
    let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| random.eighth()).collect() };
    let (latent, key) = (numbers(tokens.len() * rank), numbers(tokens.len() * rope));
    let angles: Vec<f32> = (0..table_rows * rope / 2)
        .map(|i| i as f32 * 0.37)
        .collect();
    let mut file = Vec::new();
    for number in [tokens.len(), table_rows, cache_rows] {
        file.extend((number as u32).to_le_bytes());
    }
    tokens.iter().for_each(|t| file.extend(t.0.to_le_bytes()));
    tokens.iter().for_each(|t| file.extend(t.1.to_le_bytes()));
    angles
        .iter()
        .for_each(|a| file.extend(a.cos().to_le_bytes()));
    angles
        .iter()
        .for_each(|a| file.extend(a.sin().to_le_bytes()));
    for x in latent.iter().chain(&key) {
        file.extend(bits(desc.dtype, *x).to_le_bytes());
    }
    fs::write(folder.path().join("problem"), file).unwrap();
    let status = Command::new(folder.path().join("run"))
        .arg(folder.path().join("problem"))
        .arg(folder.path().join("answer"))
        .status()
        .unwrap();
    assert!(status.success());
    let cache: Vec<u16> = fs::read(folder.path().join("answer"))
        .unwrap()
        .chunks_exact(2)
        .map(|c| u16::from_le_bytes([c[0], c[1]]))
        .collect();
    for (slot, row) in cache.chunks_exact(rank + rope).enumerate() {
        let Some(token) = tokens[..3].iter().position(|t| t.1 as usize == slot) else {
            assert!(row.iter().all(|&b| b == 0x7fff), "row {slot} was written");
            continue;
        };
        let number = |i: usize| f64::from(from_bits(desc.dtype, row[i]));
        for i in 0..rank {
            assert_eq!(number(i), f64::from(latent[token * rank + i]));
        }
        for i in 0..rope / 2 {
            let angle = f64::from(angles[tokens[token].0 as usize * rope / 2 + i]);
            let (x, y) = (
                f64::from(key[token * rope + i]),
                f64::from(key[token * rope + i + rope / 2]),
            );
            let expected = [
                x * angle.cos() - y * angle.sin(),
                y * angle.cos() + x * angle.sin(),
            ];
            for (found, expected) in [number(rank + i), number(rank + rope / 2 + i)]
                .into_iter()
                .zip(expected)
            {
                assert!(
                    (found - expected).abs() < 1e-3,
                    "token {token}, component {i}: {found}, expected {expected}"
                );
            }
        }
    }
}
