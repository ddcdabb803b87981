//! The comparison once more under NVIDIA's compute-sanitizer, where the machine has one.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use crate::error::{KernelError, Result};

/// Out-of-bounds and misaligned accesses; races of shared memory.
const TOOLS: [&str; 2] = ["memcheck", "racecheck"];
/// Exit code of a run in which the tool found something; no exit code of this program.
const FOUND: i32 = 99;
/// Bytes of a complaint that are kept, from its end.
const KEPT: usize = 2000;

/// What one tool said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sanitized {
    /// The tool.
    pub tool: String,
    /// The end of what it printed, where it or the comparison under it found something.
    pub complaint: Option<String>,
}

/// compute-sanitizer, on the path or where a CUDA toolkit is usually installed.
pub(super) fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|folder| folder.join("compute-sanitizer"))
        .find(|file| file.is_file())
}

/// Runs `program arguments` under every tool.
pub(super) fn sanitize(
    sanitizer: &Path,
    program: &Path,
    arguments: &[String],
    mut tell: impl FnMut(&str),
) -> Result<Vec<Sanitized>> {
    let mut all = Vec::new();
    for tool in TOOLS {
        tell(&format!("{} --tool {tool} ...", sanitizer.display()));
        let output = Command::new(sanitizer)
            .args(["--tool", tool, "--error-exitcode", &FOUND.to_string()])
            .arg(program)
            .args(arguments)
            .output()
            .map_err(|source| KernelError::Io {
                path: sanitizer.to_owned(),
                action: "run",
                source,
            })?;
        let complaint = (!output.status.success()).then(|| {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            let start = text.len().saturating_sub(KEPT);
            let start = (start..text.len()).find(|&i| text.is_char_boundary(i));
            format!("{}: {}", output.status, &text[start.unwrap_or(0)..])
        });
        let said = complaint.as_ref().map_or("ok", String::as_str);
        tell(&format!("{tool}: {said}"));
        all.push(Sanitized {
            tool: tool.to_owned(),
            complaint,
        });
    }
    Ok(all)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A stand-in that finds a race and nothing else: it prints its arguments and answers by the tool's name.
    #[test]
    fn what_a_tool_finds_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let sanitizer = folder.path().join("compute-sanitizer");
        let script = "#!/bin/sh\necho \"$@\"\n[ \"$2\" = racecheck ] && exit \"$4\"\nexit 0\n";
        std::fs::write(&sanitizer, script).unwrap();
        std::fs::set_permissions(&sanitizer, std::fs::Permissions::from_mode(0o755)).unwrap();
        let arguments = ["--parity-only".to_owned(), "--seed=7".to_owned()];
        let found = sanitize(&sanitizer, Path::new("program"), &arguments, |_| ()).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].complaint, None);
        let complaint = found[1].complaint.as_deref().unwrap();
        assert!(complaint.contains("99"), "{complaint}");
        let command = "--tool racecheck --error-exitcode 99 program --parity-only --seed=7";
        assert!(complaint.contains(command), "{complaint}");
        let missing = folder.path().join("none");
        let error = sanitize(&missing, Path::new("program"), &[], |_| ()).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }
}
