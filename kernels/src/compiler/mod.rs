//! CUDA's compilers: a text in, a cubin out.
//!
//! NVRTC compiles unless nvcc is asked for; one never stands in for the other. Both get the same text, headers and flags.

mod nvcc;
mod nvrtc;

use std::fmt;
use std::fs;
use std::path::Path;

use crate::arch::Arch;
use crate::error::{KernelError, Result};
use crate::source::Source;
use crate::toolchain::Toolchain;
use nvcc::Nvcc;
use nvrtc::Nvrtc;

/// The major version of CUDA that the kernels are written for.
const MAJOR: u32 = 13;

/// What the text is called in the compiler's messages.
const FILE: &str = "kernel.cu";

/// What the compiler is told besides the architecture.
const FLAGS: [&str; 4] = [
    "-std=c++17",
    "-diag-suppress=177", // a constant of the prologue that this kernel has no use for
    "--ptxas-options=-v",
    "--ptxas-options=--warn-on-spills",
];

/// Which compiler is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompilerName {
    /// The library: needs no host compiler, starts no program.
    Nvrtc,
    /// The program of CUDA's toolkit, with a host compiler as its preprocessor.
    Nvcc,
}

impl CompilerName {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Nvrtc, Self::Nvcc];
}

impl fmt::Display for CompilerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nvrtc => "NVRTC",
            Self::Nvcc => "nvcc",
        })
    }
}

/// A compiler, loaded.
pub struct Compiler {
    version: String,
    identity: String,
    backend: Backend,
}

enum Backend {
    Nvrtc(Nvrtc),
    Nvcc(Nvcc),
}

/// What a compilation left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// An ELF file for the driver.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said: registers, stack, spills, warnings.
    pub log: String,
}

impl Compiler {
    /// Loads this one of the toolchain's compilers.
    ///
    /// # Errors
    /// Found / needed / fix when it is missing, cannot be loaded or run, or is another major version.
    pub fn load(toolchain: &Toolchain, name: CompilerName) -> Result<Self> {
        match name {
            CompilerName::Nvrtc => Nvrtc::load(toolchain),
            CompilerName::Nvcc => Nvcc::load(toolchain),
        }
    }

    /// For example 13.0.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Tells one compiler, and one build of it, from another, for cache keys. Name and version stand before the first comma.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Compiles a source. `kernel` names it in errors.
    ///
    /// # Errors
    /// With the compiler's log.
    pub fn compile(&self, kernel: &str, source: &Source, arch: Arch) -> Result<Compiled> {
        match &self.backend {
            Backend::Nvrtc(nvrtc) => nvrtc.compile(kernel, source, arch),
            Backend::Nvcc(nvcc) => nvcc.compile(kernel, source, arch),
        }
    }
}

/// Every flag of a compilation that is the same for both compilers.
pub fn options(arch: Arch) -> Vec<String> {
    let mut options = vec![format!("-arch={arch}")];
    options.extend(FLAGS.map(str::to_owned));
    options
}

/// A log in which the same source says the same every time.
fn without_times(log: &str) -> String {
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| !line.contains("Compile time"))
        .collect();
    lines.join("\n")
}

/// Versions do not tell every build apart; the sizes of its files do.
fn size(path: &Path) -> Result<u64> {
    fs::metadata(path)
        .map(|found| found.len())
        .map_err(KernelError::io(path, "read"))
}
