//! The dense product against the bits of the exact sum, and mistakes in it.

use std::fs;
use std::process::Command;

use mlac_kernels::Arch;
use mlac_kernels::matmul::{Matmul, Operand, entry};

use crate::common::Edit;
use crate::machine::compile_text;

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
