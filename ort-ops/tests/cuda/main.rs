//! The CUDA operator in ONNX Runtime, without a GPU.
//!
//! A `libcuda.so.1` of the tests stands in for the driver: "device" memory is the host's, and a launch runs the kernels' own sources on the
//! CPU (`kernels/tests/plugin/fake_cuda.cpp`). The operator is registered for the CPU's execution provider, so ONNX Runtime itself drives every
//! function of it and brings tensors that this driver can read. Every case is a process of its own, because a process has one driver.
//!
//! What this cannot show: ONNX Runtime's CUDA execution provider, and what only a GPU shows.
#![expect(
    unsafe_code,
    reason = "the operator is added to the runtime's own options"
)]
#![expect(
    clippy::print_stdout,
    reason = "a test without a harness tells what it did"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on says why by panicking"
)]

#[path = "../../../kernels/tests/common/mod.rs"]
mod common;
mod environment;
mod onnx;
mod session;
#[path = "../../../kernels/tests/common/step.rs"]
mod step;

use std::path::Path;
use std::process::{Command, ExitCode};

use mlac_kernels::bundle::bundle;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::launch::Recipe;
use mlac_kernels::problem::{Problem, bits, compare};
use mlac_kernels::{Arch, AttentionDesc, Dtype, Mask};
use session::{Step, run};
use step::{empty_cubin, fake_driver, make_contiguous, new_rows};

/// A request, its lengths, and whether its cache is paged.
fn cases() -> Vec<(&'static str, AttentionDesc, Vec<u32>, bool)> {
    let sinks = |desc| AttentionDesc {
        sinks: true,
        ..desc
    };
    let hopper = sinks(AttentionDesc::latent(64, 64, 64, Arch::Sm90a));
    vec![
        ("contiguous with sinks", hopper, vec![1, 200, 65], false),
        (
            "pages, a tree, f16, mma.sync",
            AttentionDesc {
                query_tokens: 2,
                mask: Mask::Tree,
                dtype: Dtype::F16,
                ..AttentionDesc::latent(9, 64, 16, Arch::Sm80)
            },
            vec![130, 3],
            true,
        ),
        (
            "a window that nothing divides",
            AttentionDesc {
                window: Some(128),
                ..hopper
            },
            vec![400],
            false,
        ),
    ]
}

/// A step before it is run: the cache without its new rows, and what the cache must become.
fn step_of(case: usize) -> Step {
    let (_, desc, lengths, paged) = cases().swap_remove(case);
    let mut config = AttentionConfig::choose(&desc).unwrap();
    // Short caches are divided too.
    config.min_split = 1;
    let mut problem = Problem::random(desc, &lengths, 77);
    if !paged {
        make_contiguous(&mut problem);
    }
    let after: Vec<u16> = problem.cache.iter().map(|&x| bits(desc.dtype, x)).collect();
    let row = desc.row() as usize;
    let (mut before, mut fresh) = (after.clone(), Vec::new());
    for at in new_rows(&problem) {
        fresh.extend_from_slice(&after[at * row..(at + 1) * row]);
        before[at * row..(at + 1) * row].fill(0x7fff);
    }
    let recipe = Recipe::of(&desc, &config, 3).unwrap();
    let kernels = bundle(&[(recipe, empty_cubin(desc.arch))]).unwrap();
    Step {
        desc,
        config,
        problem,
        paged,
        before,
        after,
        fresh,
        kernels: Some(kernels),
        with_lse: true,
        in_place: false,
        change: None,
    }
}

/// Runs a case in every way that callers may bind it, and compares each with the f64 reference.
fn whole(case: usize) {
    for (with_lse, in_place) in [(true, false), (false, true), (true, true)] {
        let step = Step {
            with_lse,
            in_place,
            ..step_of(case)
        };
        let reference = step.problem.reference();
        // The second step in the same session finds the kernel loaded.
        for mut found in run(&step, 2).unwrap() {
            if !with_lse {
                found.answer.lse.clone_from(&reference.lse);
            }
            if let Some(complaint) = compare(&found.answer, &reference).complaint(&step.problem) {
                panic!("{}: {complaint}", step.desc);
            }
            assert!(found.cache == step.after, "{}: the cache", step.desc);
        }
    }
    // SAFETY: functions of the tests' own driver, of these types.
    unsafe {
        let driver = libloading::Library::new("libcuda.so.1").unwrap();
        for name in ["fakeModules", "fakeAllocations"] {
            let count = driver
                .get::<unsafe extern "C" fn() -> i32>(name.as_bytes())
                .unwrap();
            assert_eq!(count(), 0, "{name}: what was not given back");
        }
    }
}

/// What the operator must refuse, and how.
fn refusals() {
    type Change = fn(&mut Step);
    let changes: [(&str, Change); 11] = [
        (
            "attribute `kernels`: expected cubins with their recipes",
            |s| s.kernels = None,
        ),
        ("bytes with the checksum in their header", |s| {
            *s.kernels.as_mut().unwrap().last_mut().unwrap() ^= 1;
        }),
        ("found 40 bytes", |s| {
            s.kernels.as_mut().unwrap().truncate(40);
        }),
        ("kv_lora_rank: expected 64, which", |s| {
            s.change = Some("kv_lora_rank");
        }),
        ("sliding_window: expected 0, which", |s| {
            s.change = Some("sliding_window");
        }),
        ("type of the cache: expected f16", |s| {
            let f16 = AttentionDesc {
                dtype: Dtype::F16,
                ..s.desc
            };
            let recipe = Recipe::of(&f16, &s.config, 3).unwrap();
            s.kernels = Some(bundle(&[(recipe, empty_cubin(f16.arch))]).unwrap());
        }),
        (
            "query_tokens: expected 2, which the node has kernels for, found 1",
            |s| {
                let two = AttentionDesc {
                    query_tokens: 2,
                    ..s.desc
                };
                let recipe = Recipe::of(&two, &s.config, 3).unwrap();
                s.kernels = Some(bundle(&[(recipe, empty_cubin(two.arch))]).unwrap());
            },
        ),
        ("heads of `query`: expected 32, which", |s| {
            let fewer = AttentionDesc {
                query_heads: 32,
                ..s.desc
            };
            let recipe = Recipe::of(&fewer, &s.config, 3).unwrap();
            s.kernels = Some(bundle(&[(recipe, empty_cubin(fewer.arch))]).unwrap());
        }),
        ("input `sinks`: expected it given", |s| {
            s.change = Some("sinks");
        }),
        ("input `key_mask`: expected it left out", |s| {
            s.change = Some("key_mask");
        }),
        ("a capacity that is a multiple of 64, found 257", |s| {
            s.change = Some("capacity");
        }),
    ];
    for (expected, change) in changes {
        let mut step = step_of(0);
        change(&mut step);
        let said = run(&step, 1)
            .err()
            .unwrap_or_else(|| panic!("{expected}: not refused"));
        assert!(
            said.contains(expected),
            "expected `{expected}`, found `{said}`"
        );
    }
}

/// A process with settings of the driver in which the step must be refused with these words.
fn refused(expected: &str) {
    let said = run(&step_of(0), 1)
        .err()
        .unwrap_or_else(|| panic!("{expected}: not refused"));
    assert!(
        said.contains(expected),
        "expected `{expected}`, found `{said}`"
    );
}

fn child(driver: Option<&Path>, settings: &[(&str, &str)], words: &[&str]) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .arg("child")
        .args(words)
        .envs(settings.iter().copied());
    match driver {
        Some(folder) => command.env("LD_LIBRARY_PATH", folder),
        None => command.env_remove("LD_LIBRARY_PATH"),
    };
    let good = command.status().unwrap().success();
    println!(
        "test {} ... {}",
        words.join(": "),
        if good { "ok" } else { "FAILED" }
    );
    good
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["child", "whole", case, _] => {
            whole(case.parse().unwrap());
            return ExitCode::SUCCESS;
        }
        ["child", "refusals"] => {
            refusals();
            return ExitCode::SUCCESS;
        }
        ["child", "refused", expected] => {
            refused(expected);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let mut good = true;
    for (i, (name, desc, ..)) in cases().into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = AttentionConfig::choose(&desc).unwrap();
        config.min_split = 1;
        fake_driver(&desc, &config, folder.path(), &[]);
        let (major, minor) = desc.arch.capability();
        let capability = format!("{major}.{minor}");
        let setting = ("MLAC_FAKE_CAPABILITY", capability.as_str());
        good &= child(
            Some(folder.path()),
            &[setting],
            &["whole", &i.to_string(), name],
        );
        if i > 0 {
            continue;
        }
        good &= child(Some(folder.path()), &[setting], &["refusals"]);
        for (name, value, expected) in [
            (
                "MLAC_FAKE_CAPABILITY",
                "8.0",
                "a GPU of compute capability 9.0, found one of 8.0",
            ),
            (
                "MLAC_FAKE_CONTEXT",
                "0",
                "CUDA context: expected one that is current",
            ),
            (
                "MLAC_FAKE_FAIL",
                "cuLaunchKernelEx",
                "launch a kernel, found CUDA_ERROR_UNKNOWN (999)",
            ),
            (
                "MLAC_FAKE_FAIL",
                "cuMemAllocFromPoolAsync",
                "bytes of workspace, found CUDA_ERROR",
            ),
            (
                "MLAC_FAKE_FAIL",
                "cuModuleLoadData",
                "load the cubin, found CUDA_ERROR",
            ),
        ] {
            let settings = [setting, (name, value)];
            good &= child(Some(folder.path()), &settings, &["refused", expected]);
        }
        let expected = "libcuda.so.1 of an NVIDIA driver";
        good &= child(None, &[], &["refused", expected]);
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
