//! nvcc, the program of CUDA's toolkit, run in a temporary folder.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mlac_model::Refusal;

use super::{Backend, Compiled, Compiler, CompilerName, FILE, MAJOR, options, size, without_times};
use crate::arch::Arch;
use crate::error::{KernelError, Result};
use crate::source::{HEADERS, Source};
use crate::toolchain::Toolchain;

const CUBIN: &str = "kernel.cubin";
const FIX: &str = "run `cargo xtask setup` again, or set MLAC_CUDA to CUDA 13.0 with nvcc";

/// Variables that nvcc takes flags from: what a cubin is made of must not depend on them.
const VARIABLES: [&str; 3] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"];

/// The program, found and asked for its version.
pub(super) struct Nvcc {
    program: PathBuf,
    /// nvcc has its preprocessor expand macros.
    host: OsString,
}

impl Nvcc {
    pub(super) fn load(toolchain: &Toolchain) -> Result<Compiler> {
        // It is run in another folder.
        let program = absolute(&toolchain.nvcc()?)?;
        let told = answer(&mut command(&program, &["--version"])).map_err(|found| {
            Refusal::new(
                program.display().to_string(),
                "a program for Linux x86_64",
                found,
                FIX,
            )
        })?;
        let version = version(&program, &told)?;
        let host = env::var_os("CXX")
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "g++".into());
        let host = match Path::new(&host) {
            path if path.components().count() > 1 => absolute(path)?.into_os_string(),
            _ => host,
        };
        // The parts of nvcc are packages of their own: sizes tell mixtures apart.
        let identity = format!(
            "{} {version}, {}, cicc and ptxas of {} and {} bytes, {}",
            CompilerName::Nvcc,
            told.lines().collect::<Vec<_>>().join(", "),
            size(&toolchain.cicc())?,
            size(&toolchain.ptxas())?,
            host_version(&host)?
        );
        Ok(Compiler {
            version,
            identity,
            backend: Backend::Nvcc(Self { program, host }),
        })
    }

    pub(super) fn compile(&self, kernel: &str, source: &Source, arch: Arch) -> Result<Compiled> {
        let folder =
            tempfile::tempdir().map_err(KernelError::io(&env::temp_dir(), "create a folder in"))?;
        for (name, text) in HEADERS.into_iter().chain([(FILE, source.text.as_str())]) {
            let path = folder.path().join(name);
            fs::write(&path, text).map_err(KernelError::io(&path, "write"))?;
        }
        let output = command(&self.program, &["-cubin", "-o", CUBIN, FILE])
            .args(options(arch))
            .arg("-ccbin")
            .arg(&self.host)
            .current_dir(folder.path())
            // Its intermediate files go with the folder.
            .env("TMPDIR", folder.path())
            .output()
            .map_err(KernelError::io(&self.program, "run"))?;
        let log = without_times(&said(&output));
        if !output.status.success() {
            return Err(KernelError::Compile {
                kernel: kernel.to_owned(),
                compiler: CompilerName::Nvcc,
                action: "compile",
                code: output.status.to_string(),
                log,
            });
        }
        let path = folder.path().join(CUBIN);
        let cubin = fs::read(&path).map_err(KernelError::io(&path, "read"))?;
        Ok(Compiled { cubin, log })
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(KernelError::io(path, "find"))
}

fn command(program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    for name in VARIABLES {
        command.env_remove(name);
    }
    command
}

fn said(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    text.trim_end().to_owned()
}

/// What a program says, or why it says nothing.
fn answer(command: &mut Command) -> std::result::Result<String, String> {
    let output = command
        .output()
        .map_err(|error: io::Error| error.to_string())?;
    if output.status.success() {
        Ok(said(&output))
    } else {
        Err(format!("{}: {}", output.status, said(&output)))
    }
}

/// The number in `Cuda compilation tools, release 13.0, V13.0.88`.
fn version(program: &Path, told: &str) -> Result<String> {
    let number = told
        .split(|c: char| c == ',' || c.is_whitespace())
        .find_map(|word| {
            word.strip_prefix('V')
                .filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
    let major = number.and_then(|number| number.split('.').next()?.parse().ok());
    match number {
        Some(number) if major == Some(MAJOR) => Ok(number.to_owned()),
        _ => Err(Refusal::new(
            program.display().to_string(),
            format!("nvcc {MAJOR}"),
            number.map_or_else(
                || {
                    format!(
                        "no version in `{}`",
                        told.lines().next().unwrap_or_default()
                    )
                },
                |number| format!("nvcc {number}"),
            ),
            FIX,
        )
        .into()),
    }
}

/// The first line of what the host compiler says of itself.
fn host_version(host: &OsStr) -> Result<String> {
    let told = answer(&mut command(host, &["--version"])).map_err(|found| {
        Refusal::new(
            "host compiler of nvcc",
            "g++ 9 or later",
            format!("{found} for `{}`", host.display()),
            "install g++ (Debian: apt-get install g++), set CXX to a C++17 compiler, or compile with NVRTC, which needs none",
        )
    })?;
    Ok(told.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_others_than_13_refused() {
        let read = |release: &str| {
            let told = format!(
                "nvcc: NVIDIA (R) Cuda compiler driver\nBuilt on Wed_Aug_20\n{release}\nBuild cuda"
            );
            version(Path::new("bin/nvcc"), &told)
        };
        assert_eq!(
            read("Cuda compilation tools, release 13.0, V13.0.88").unwrap(),
            "13.0.88"
        );
        for (release, found) in [
            (
                "Cuda compilation tools, release 12.9, V12.9.41",
                "found nvcc 12.9.41",
            ),
            ("release 13.0", "found no version in `nvcc: NVIDIA"),
        ] {
            let error = read(release).unwrap_err().to_string();
            assert!(
                error.contains("bin/nvcc: expected nvcc 13")
                    && error.contains(found)
                    && error.contains("fix: run `cargo xtask setup`"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_missing_nvcc_one_that_does_not_run_and_a_missing_host_compiler_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let put = |files: &[&str]| {
            for file in files {
                let path = folder.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "not a program").unwrap();
            }
        };
        let load = || {
            let toolchain = Toolchain::among(Some(folder.path()), &[]).unwrap();
            Nvcc::load(&toolchain).err().unwrap().to_string()
        };
        put(&Toolchain::FILES);
        let error = load();
        assert!(
            error.contains("nvcc: expected a folder with bin/nvcc")
                && error.contains("without bin/nvcc, bin/nvcc.profile")
                && error.contains("fix: run `cargo xtask setup`"),
            "{error}"
        );
        put(&Toolchain::NVCC);
        let error = load();
        assert!(
            error.contains("bin/nvcc: expected a program for Linux x86_64"),
            "{error}"
        );
        let error = host_version(&folder.path().join("no-g++").into_os_string())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("host compiler of nvcc: expected g++ 9 or later, found No such file"),
            "{error}"
        );
    }
}
