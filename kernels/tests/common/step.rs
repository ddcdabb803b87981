//! Steps of the operator, and a driver that runs them on the CPU, for everything that follows recipes.

use std::fs;
use std::path::Path;

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::problem::Problem;
use mlac_kernels::{Arch, AttentionDesc};

use crate::common::{kernels, run_compiler, write_sources};

/// An ELF file with nothing but the header that says for which GPU it is.
pub(crate) fn empty_cubin(arch: Arch) -> Vec<u8> {
    let (major, minor) = arch.capability();
    let mut bytes = vec![0_u8; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[18] = 190;
    bytes[49] = (major * 10 + minor) as u8;
    bytes
}

/// Sequence after sequence instead of pages in any order.
pub(crate) fn make_contiguous(problem: &mut Problem) {
    let row = problem.desc.row() as usize;
    let batch = problem.lengths.len();
    let capacity = problem.page_stride as usize * 64;
    let mut cache = vec![0.25; batch * capacity * row];
    for request in 0..batch {
        for position in 0..problem.lengths[request] {
            let from = problem.cache_row(request, position) * row;
            let to = (request * capacity + position as usize) * row;
            cache[to..to + row].copy_from_slice(&problem.cache[from..from + row]);
        }
    }
    problem.cache = cache;
    problem.pages = (0..(batch as i32) * problem.page_stride as i32).collect();
}

/// Rows of the cache that the new tokens take, in the order of requests and tokens.
pub(crate) fn new_rows(problem: &Problem) -> Vec<usize> {
    let tokens = problem.desc.query_tokens;
    (0..problem.lengths.len())
        .flat_map(|request| {
            let past = problem.lengths[request] - tokens;
            (0..tokens).map(move |t| (request, past + t))
        })
        .map(|(request, position)| problem.cache_row(request, position))
        .collect()
}

/// Compiles a `libcuda.so.1` into the folder that runs a request's kernels on the CPU.
pub(crate) fn fake_driver(
    desc: &AttentionDesc,
    config: &AttentionConfig,
    folder: &Path,
    flags: &[&str],
) {
    write_sources(folder, None);
    let fake = include_str!("../plugin/fake_cuda.cpp");
    let text = kernels(desc, config) + "#include \"store.cuh\"\n" + fake;
    fs::write(folder.join("fake.cpp"), text).unwrap();
    let mut all = vec![
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
    ];
    all.extend(flags);
    run_compiler(
        &all,
        &[folder.join("fake.cpp")],
        &folder.join("libcuda.so.1"),
    );
}
