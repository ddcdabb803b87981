//! Compiling sources with the CPU's version of the instructions, and running attention on a problem.

use std::fs;
use std::path::Path;
use std::process::Command;

use mlac_kernels::AttentionDesc;
use mlac_kernels::config::AttentionConfig;
use mlac_kernels::problem::{Answer, Problem, from_bits, half_bytes};

use crate::common::{Edit, kernels, run_compiler, write_sources};

/// Compiles the kernels of a request into `folder/run`, with an edit of a file of them.
pub(crate) fn compile(
    desc: &AttentionDesc,
    config: &AttentionConfig,
    folder: &Path,
    edit: Option<Edit>,
) {
    let mut text = kernels(desc, config);
    text.push_str("#include \"main.cpp\"\n");
    compile_text(&text, folder, edit);
}

/// Compiles a text that includes the sources into `folder/run`.
pub(crate) fn compile_text(text: &str, folder: &Path, edit: Option<Edit>) {
    write_sources(folder, edit);
    fs::write(folder.join("run.cpp"), text).unwrap();
    let (from, to) = (folder.join("run.cpp"), folder.join("run"));
    run_compiler(&["-O1", "-Wno-unknown-pragmas"], &[from], &to);
}

/// The answer of the compiled kernels, and the plan that they made.
pub(crate) fn run(
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
