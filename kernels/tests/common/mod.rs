//! The kernels' sources as g++ gets them, for the tests that run them on the CPU.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::source::{HEADERS, prologue};
use mlac_kernels::{AttentionDesc, Kernel};

const HOST: [(&str, &str); 8] = [
    ("machine.h", include_str!("../host/machine.h")),
    ("ptx.cuh", include_str!("../host/ptx.cuh")),
    ("hopper.cuh", include_str!("../host/hopper.cuh")),
    ("mma.cuh", include_str!("../host/mma.cuh")),
    ("main.cpp", include_str!("../host/main.cpp")),
    ("problem.h", include_str!("../host/problem.h")),
    ("append.cpp", include_str!("../host/append.cpp")),
    ("matmul.cpp", include_str!("../host/matmul.cpp")),
];

/// A text of a source and what takes its place.
pub(crate) type Edit = (&'static str, &'static str, &'static str);

/// The kernels of a request, with what the CPU's version must know of them.
pub(crate) fn kernels(desc: &AttentionDesc, config: &AttentionConfig) -> String {
    let grouped = config.kernel == Kernel::GroupedWgmma;
    let tma = grouped || config.kernel == Kernel::LatentWgmma;
    let flags = [
        ("HOST_PLANNED", u32::from(config.planned)),
        ("HOST_TMA", u32::from(tma)),
        ("HOST_GROUPED", u32::from(grouped)),
        ("HOST_THREADS", config.threads),
    ];
    let mut lines = vec![prologue(desc, config)];
    lines.extend(flags.map(|(name, value)| format!("#define {name} {value}")));
    let mut files = vec![config.kernel.file()];
    if config.planned {
        files.extend(["plan.cuh", "combine.cuh"]);
    }
    lines.extend(files.iter().map(|file| format!("#include \"{file}\"")));
    lines.join("\n") + "\n"
}

/// Writes every file that the sources include, with an edit of one of them.
pub(crate) fn write_sources(folder: &Path, edit: Option<Edit>) {
    for (name, body) in HEADERS.iter().chain(&HOST) {
        let body = match edit {
            Some((file, from, to)) if file == *name => {
                assert!(body.contains(from), "{file} has no `{from}`");
                body.replace(from, to)
            }
            _ => (*body).to_owned(),
        };
        fs::write(folder.join(name), body).unwrap();
    }
}

/// Compiles and links files as C++17.
pub(crate) fn run_compiler(flags: &[&str], from: &[PathBuf], to: &Path) {
    let compiler: OsString = std::env::var_os("CXX")
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "g++".into());
    let output = Command::new(&compiler)
        .arg("-std=c++17")
        .args(flags)
        .arg("-o")
        .arg(to)
        .args(from)
        .arg("-ldl")
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "no C++ compiler: found {error} for {}, needed g++ 12 or later, fix: install g++, or set CXX to a C++17 compiler",
                compiler.display()
            )
        });
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
