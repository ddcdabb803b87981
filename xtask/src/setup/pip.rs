//! Wheels by package name, version and sha256, through the user's own pip.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Context;
use crate::error::TaskError;
use crate::process::{quiet, tail};

/// The Python versions for which the pinned lists hold wheels.
const VERSIONS: std::ops::RangeInclusive<u32> = 11..=14;

const PYTHON_FIX: &str = "install Python 3.11 with pip (Debian: apt-get install python3 python3-pip), \
                          or set MLAC_PYTHON to such an interpreter";

/// The interpreter: `MLAC_PYTHON`, else `python3.11`, else `python3`.
pub(crate) fn interpreter() -> Result<PathBuf, TaskError> {
    let chosen = std::env::var_os("MLAC_PYTHON").filter(|value| !value.is_empty());
    let candidates: Vec<PathBuf> = match chosen {
        Some(path) => vec![path.into()],
        None => ["python3.11", "python3"]
            .iter()
            .map(PathBuf::from)
            .collect(),
    };
    let mut seen = Vec::new();
    for candidate in candidates {
        let probe =
            "import sys; print(sys.version_info[0], sys.version_info[1], sys.maxsize > 2**32)";
        let Some(answer) = quiet(Command::new(&candidate).args(["-c", probe])) else {
            seen.push(format!("no `{}`", candidate.display()));
            continue;
        };
        let words: Vec<&str> = answer.text.split_whitespace().collect();
        if let ["3", minor, "True"] = words.as_slice()
            && answer.ok
            && minor.parse().is_ok_and(|minor| VERSIONS.contains(&minor))
        {
            return Ok(candidate);
        }
        seen.push(format!(
            "`{}` answered {}",
            candidate.display(),
            tail(&answer.text, 1)
        ));
    }
    Err(TaskError::missing(
        "no usable Python",
        seen.join("; "),
        format!(
            "64-bit CPython 3.{} to 3.{}",
            VERSIONS.start(),
            VERSIONS.end()
        ),
        PYTHON_FIX,
    ))
}

/// Unpacks the wheels of a pinned list into `folder`. pip verifies every one by its sha256.
pub(crate) fn install(context: &Context<'_>, list: &str, folder: &Path) -> Result<(), TaskError> {
    let python = interpreter()?;
    let pip = |arguments: &[&str]| {
        let mut command = Command::new(&python);
        command
            .args(["-m", "pip", "--disable-pip-version-check", "--no-input"])
            .args(arguments);
        command
    };
    if !quiet(&mut pip(&["--version"])).is_some_and(|answer| answer.ok) {
        return Err(TaskError::missing(
            "no pip",
            format!("`{} -m pip` does not run", python.display()),
            "pip, to fetch pinned wheels",
            PYTHON_FIX,
        ));
    }
    if context.offline {
        return Err(TaskError::missing(
            format!("not installed: the packages of xtask/pins/{list}"),
            "--offline",
            "one run with network",
            "run `cargo xtask setup` with network access to the package registry",
        ));
    }
    let list_path = context.workspace.pins().join(list);
    let answer = quiet(
        pip(&[
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--no-compile",
        ])
        .arg("--target")
        .arg(folder)
        .arg("-r")
        .arg(&list_path),
    );
    match answer {
        Some(answer) if answer.ok => Ok(()),
        Some(answer) => Err(TaskError::missing(
            format!(
                "pip could not install the packages of {}",
                list_path.display()
            ),
            tail(&answer.text, 6),
            "exactly the versions and sha256 digests of that list, for Linux x86_64",
            "check the network and pip's index settings (`python3 -m pip config list`), then run it again; \
             a digest that differs is a damaged or changed download and is never installed",
        )),
        None => Err(TaskError::missing(
            "no pip",
            "it did not start",
            "pip",
            PYTHON_FIX,
        )),
    }
}
