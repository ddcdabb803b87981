//! The cache append against its own problem's answer, and mistakes in it.

use std::fs;
use std::process::Command;

use mlac_kernels::append::AppendProblem;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::problem::half_bytes;
use mlac_kernels::source::prologue;
use mlac_kernels::{Arch, AttentionDesc, Dtype};

use crate::common::Edit;
use crate::e4m3;
use crate::machine::compile_text;

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
