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
use mlac_kernels::append::AppendProblem;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::matmul::{Matmul, Operand, entry};
use mlac_kernels::plan::Plan;
use mlac_kernels::problem::{Answer, Problem, compare, from_bits, half_bytes};
use mlac_kernels::source::prologue;
use mlac_kernels::{Arch, AttentionDesc, CacheDtype, Dtype, Mask};

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
    let cache = problem.cache_bytes();
    let cache_pages = cache.len() as u64 / desc.page_bytes();
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
    file.extend(half_bytes(desc.dtype, &problem.q));
    file.extend(cache);
    file.extend(half_bytes(desc.dtype, &problem.values));
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

fn e4m3(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        cache: CacheDtype::E4m3,
        ..desc
    }
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

/// Each of these edits of the sources must be noticed: by a wrong answer, or because somebody waits for ever.
#[test]
fn mistakes_in_the_sources_are_noticed() {
    let latent = sinks(AttentionDesc::latent(64, 64, 64, Arch::Sm90a));
    let mma = sinks(AttentionDesc::latent(32, 64, 64, Arch::Sm80));
    let gqa = sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm80));
    let wgmma = sinks(AttentionDesc::grouped(16, 2, 64, Arch::Sm90a));
    let fp8 = e4m3(latent);
    let fp8_mma = e4m3(mma);
    let shared = sinks(AttentionDesc::latent(64, 320, 64, Arch::Sm90a));
    let edits: [(&str, AttentionDesc, Edit); 17] = [
        (
            "a phase of the ring",
            latent,
            (
                "sm90_load.cuh",
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
            ("sm90_tiles.cuh", "start + kTile > piece.length", "false"),
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
                "sm90_output.cuh",
                "exchange[i * 128 + thread] * other[r]",
                "exchange[i * 128 + thread] * own[r]",
            ),
        ),
        (
            "a sink in every piece",
            latent,
            (
                "sm90_output.cuh",
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
            "maxima of rows, and rotated keys, that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "keys are done with.\n  named_barrier<3, kConsumers>();\n",
                "keys are done with.\n",
            ),
        ),
        (
            "weights of the other warpgroup that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "  fence_async_proxy();\n  named_barrier<4, kConsumers>();\n",
                "  fence_async_proxy();\n",
            ),
        ),
        (
            "sums of the other warpgroup that are not waited for",
            shared,
            (
                "mla_sm90.cuh",
                "    named_barrier<5, kConsumers>();\n    sum[0]",
                "    sum[0]",
            ),
        ),
        (
            "a page given back before it is converted",
            fp8,
            (
                "sm90_fp8.cuh",
                "  if (kBuffers == 1) converters_barrier(ring.group);\n",
                "  if (kBuffers == 1) converters_barrier(ring.group);\n  if (ring.lane == 0) barrier_arrive(ring.empty + 8 * stage);\n",
            ),
        ),
        (
            "weights without their token's scale",
            fp8,
            ("sm90_fp8.cuh", "= x * of.x;", "= x;"),
        ),
        (
            "a tile multiplied before all of it is converted",
            fp8_mma,
            (
                "mla_mma.cuh",
                "      if (i == 0) convert_queries(memory);\n      __syncthreads();\n",
                "      if (i == 0) convert_queries(memory);\n",
            ),
        ),
        (
            "codes widened to another power of two",
            fp8_mma,
            ("fp8.cuh", "0x5c005c00", "0x58005800"),
        ),
        (
            "values beyond the request left as they are",
            wgmma,
            ("gqa_sm90.cuh", "if (valid < kTile) {", "if (false) {"),
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
        let reference = problem.reference();
        // Whoever runs ahead: nobody, the loading warpgroup, either of the computing ones.
        let noticed = (0..4).any(
            |seed| match run(&problem, &config, 2, seed, folder.path()) {
                Err(_) => true,
                Ok((answer, _)) => compare(&answer, &reference).complaint(&problem).is_some(),
            },
        );
        assert!(noticed, "{name} went unnoticed");
    }
}

/// What is wrong with the rows that the compiled append kernel wrote, or nothing.
fn append(desc: AttentionDesc, edit: Option<Edit>) -> Option<String> {
    let config = AttentionConfig::choose(&desc).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut text = prologue(&desc, &config);
    text.push_str("#include \"append.cuh\"\n#include \"append.cpp\"\n");
    compile_text(&text, folder.path(), edit);
    let problem = AppendProblem::random(desc, 70, 3).unwrap();
    let mut file = Vec::new();
    for number in [
        problem.slots.len() as u32,
        problem.table_rows,
        problem.pages,
    ] {
        file.extend(number.to_le_bytes());
    }
    for number in problem.positions.iter().chain(&problem.slots) {
        file.extend(number.to_le_bytes());
    }
    for number in problem.cosines.iter().chain(&problem.sines) {
        file.extend(number.to_le_bytes());
    }
    file.extend(half_bytes(desc.dtype, &problem.latent));
    file.extend(half_bytes(desc.dtype, &problem.key));
    fs::write(folder.path().join("problem"), file).unwrap();
    let status = Command::new(folder.path().join("run"))
        .arg(folder.path().join("problem"))
        .arg(folder.path().join("answer"))
        .status()
        .unwrap();
    if !status.success() {
        return Some(format!("the program ended with {status}"));
    }
    problem.complaint(&fs::read(folder.path().join("answer")).unwrap())
}

/// What is wrong with a dense product by the compiled kernel on so many CTAs, or nothing.
fn multiply(arch: Arch, size: [u32; 3], blocks: u32, edit: Option<Edit>) -> Option<String> {
    let matmul = Matmul::of(arch);
    let [rows, columns, depth] = size;
    let folder = tempfile::tempdir().unwrap();
    let source = matmul.source().text;
    // The instructions that the source generates are in the CPU's version of the file before them.
    let constants = source.split("#include").next().unwrap();
    let text = format!(
        "{constants}#define HOST_TMA {}\n#define HOST_THREADS {}\n#include \"{}\"\n#include \"matmul.cpp\"\n",
        u32::from(arch.has_wgmma()),
        matmul.threads,
        matmul.file()
    );
    compile_text(&text, folder.path(), edit);
    let (a, b) = (Operand::random(1), Operand::random(2));
    let entries = |rows: u32| 0..u64::from(rows) * u64::from(depth);
    for seed in 0..4 {
        let mut file = Vec::new();
        for number in [rows, columns, depth, blocks, seed] {
            file.extend(number.to_le_bytes());
        }
        entries(rows).for_each(|at| file.extend(a.at(at).to_le_bytes()));
        entries(columns).for_each(|at| file.extend(b.at(at).to_le_bytes()));
        fs::write(folder.path().join("problem"), file).unwrap();
        let output = Command::new(folder.path().join("run"))
            .arg(folder.path().join("problem"))
            .arg(folder.path().join("answer"))
            .output()
            .unwrap();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Some(format!("{}: {said}", output.status));
        }
        let answer = fs::read(folder.path().join("answer")).unwrap();
        for (at, found) in answer.chunks_exact(2).enumerate() {
            let (row, column) = (
                at as u64 / u64::from(columns),
                at as u64 % u64::from(columns),
            );
            let expected = entry(&a, &b, row, column, depth);
            let found = u16::from_le_bytes([found[0], found[1]]);
            if found != expected {
                return Some(format!(
                    "row {row}, column {column}: {found:#x}, not {expected:#x}"
                ));
            }
        }
    }
    None
}

#[test]
fn dense_products_have_the_bits_of_the_sum() {
    let size = [384, 512, 192];
    for (arch, mistakes) in [
        (
            Arch::Sm90a,
            [
                // A stage given back while it is multiplied.
                (
                    "matmul_sm90.cuh",
                    "wgmma_wait<1>();\n      if (at > 0 && lane == 0) barrier_arrive(empty + 8 * ((count - 1) % kStages));",
                    "if (lane == 0) barrier_arrive(empty + 8 * stage);",
                ),
                // The second warpgroup's rows.
                ("matmul_sm90.cuh", "group * kSubTile", "0 * kSubTile"),
            ],
        ),
        (
            Arch::Sm80,
            [
                (
                    "matmul_mma.cuh",
                    "copy_wait<kStages - 2>",
                    "copy_wait<kStages - 1>",
                ),
                (
                    "matmul_mma.cuh",
                    "    __syncthreads();\n    const int row",
                    "    const int row",
                ),
            ],
        ),
    ] {
        assert_eq!(multiply(arch, size, 2, None), None, "{arch}");
        for edit in mistakes {
            let noticed = multiply(arch, size, 2, Some(edit));
            assert!(noticed.is_some(), "{arch}: `{}` went unnoticed", edit.2);
        }
    }
}

#[test]
fn appended_rows_are_rotated_and_strangers_are_left_out() {
    for (desc, edits) in [
        (
            AttentionDesc {
                dtype: Dtype::F16,
                ..AttentionDesc::latent(64, 128, 48, Arch::Sm90a)
            },
            [
                ("x * cosines[at] - y", "x * cosines[at] + y"),
                ("slot >= p.cache_rows", "false"),
            ],
        ),
        (
            e4m3(AttentionDesc::latent(64, 192, 80, Arch::Sm80)),
            [
                (
                    "largest_key = max(largest_key, __shfl",
                    "largest_key = min(largest_key, __shfl",
                ),
                ("[in_page] = scale", "[in_page] = inverse"),
            ],
        ),
    ] {
        assert_eq!(append(desc, None), None, "{desc}");
        for (from, to) in edits {
            let noticed = append(desc, Some(("append.cuh", from, to)));
            assert!(noticed.is_some(), "{desc}: `{to}` went unnoticed");
        }
    }
    // One row, and a key of more than 64 numbers.
    let desc = e4m3(AttentionDesc {
        dtype: Dtype::F16,
        ..AttentionDesc::latent(64, 64, 128, Arch::Sm90a)
    });
    assert_eq!(append(desc, None), None, "{desc}");
}
