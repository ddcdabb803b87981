//! Running `mlac`: time, peak memory, and why it failed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::digest::digest_of;
use super::harness::Step;

/// A step and what it printed on standard output.
pub type Ran = (Step, String);

/// Runs `mlac` with arguments.
pub trait Runner {
    /// Runs it; a command that fails is a step with a failure, not an error.
    fn run(&self, args: &[String]) -> io::Result<Ran>;
}

/// The built `mlac`, copied so that a build that goes on meanwhile changes nothing.
#[derive(Debug)]
pub struct Mlac {
    program: PathBuf,
    runtime: Option<PathBuf>,
    gnu_time: Option<PathBuf>,
    pub(super) digest: u64,
}

impl Mlac {
    /// Copies the `mlac` that lies beside this program into `work`.
    pub fn beside(work: &Path) -> Result<Self, String> {
        let me = std::env::current_exe().map_err(|e| format!("this program's place: {e}"))?;
        let source = me.with_file_name("mlac");
        let digest = digest_of(&source).map_err(|e| {
            format!(
                "{}: expected mlac built beside this program, found none ({e}); fix: cargo build --release -p mlac",
                source.display()
            )
        })?;
        let program = work.join(format!("mlac-{digest:016x}"));
        if !program.exists() {
            let partial = program.with_extension("partial");
            fs::copy(&source, &partial)
                .and_then(|_| fs::rename(&partial, &program))
                .map_err(|e| format!("{}: {e}", program.display()))?;
        }
        // Where mlac itself looks, which the copy has left behind.
        let runtime = (std::env::var_os("MLAC_RUNTIME_DIR").is_none())
            .then(|| {
                me.ancestors()
                    .find(|a| a.file_name() == Some("target".as_ref()))
            })
            .flatten()
            .map(|target| target.join("runtime"))
            .filter(|folder| folder.is_dir());
        let is_gnu = Command::new("time")
            .arg("--version")
            .output()
            .is_ok_and(|out| {
                [out.stdout, out.stderr]
                    .concat()
                    .windows(3)
                    .any(|w| w == b"GNU")
            });
        Ok(Self {
            program,
            runtime,
            gnu_time: is_gnu.then(|| work.join("time.txt")),
            digest,
        })
    }

    /// Whether peak memory is measured.
    pub fn measures_memory(&self) -> bool {
        self.gnu_time.is_some()
    }
}

impl Runner for Mlac {
    fn run(&self, args: &[String]) -> io::Result<Ran> {
        let mut command = match &self.gnu_time {
            Some(file) => {
                let mut command = Command::new("time");
                command.args(["-f", "%M", "-o"]).arg(file);
                command.arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        if let Some(runtime) = &self.runtime {
            command.env("MLAC_RUNTIME_DIR", runtime);
        }
        let started = Instant::now();
        let out = command.args(args).output()?;
        let seconds = started.elapsed().as_secs_f64();
        let said = match &self.gnu_time {
            Some(file) => fs::read_to_string(file).unwrap_or_default(),
            None => String::new(),
        };
        let failure = (!out.status.success()).then(|| {
            let how = said.lines().find(|l| l.starts_with("Command "));
            reason(
                &String::from_utf8_lossy(&out.stderr),
                how.unwrap_or(&out.status.to_string()),
            )
        });
        let step = Step {
            command: shell_line(args),
            seconds,
            peak_bytes: peak(&said),
            failure,
        };
        Ok((step, String::from_utf8_lossy(&out.stdout).into_owned()))
    }
}

/// Kibibytes on the last line of what GNU time says.
pub(super) fn peak(said: &str) -> Option<u64> {
    let kib: u64 = said.lines().last()?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Why a command failed: its line of error, else its last line, else how it ended.
pub(super) fn reason(stderr: &str, ended: &str) -> String {
    let mut lines = stderr
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .rev();
    let last = lines.clone().next();
    match lines.find_map(|l| l.strip_prefix("error: ")).or(last) {
        Some(line) => line.to_owned(),
        None => ended.to_owned(),
    }
}

/// A command as one would type it.
pub fn shell_line(args: &[String]) -> String {
    let quoted = args.iter().map(|arg| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+=,:@%".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) {
            arg.clone()
        } else {
            format!("'{}'", arg.replace('\'', r"'\''"))
        }
    });
    std::iter::once("mlac".to_owned())
        .chain(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}
