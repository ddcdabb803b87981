//! `bench/RESULTS.md`: each bench owns one section between two markers and rewrites it whole, with
//! the command, the commit and the machine its figures come from.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The file.
pub fn results_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("RESULTS.md")
}

/// Replaces the section `name` of `file` by `body`, or appends it.
pub fn write_section(file: &Path, name: &str, command: &str, body: &str) -> io::Result<()> {
    let old = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => "# Measured figures\n".to_owned(),
        Err(e) => return Err(e),
    };
    let section = format!(
        "{}\n## {name}\n\nCommand `{command}`, commit {}, {}.\n\n{}\n{}",
        begin(name),
        commit(),
        machine(),
        body.trim_end(),
        end(name)
    );
    let partial = file.with_extension("md.partial");
    fs::write(&partial, replace_section(&old, name, &section))?;
    fs::rename(&partial, file)
}

fn begin(name: &str) -> String {
    format!("<!-- begin {name} -->")
}

fn end(name: &str) -> String {
    format!("<!-- end {name} -->")
}

fn replace_section(old: &str, name: &str, section: &str) -> String {
    match (old.find(&begin(name)), old.find(&end(name))) {
        (Some(from), Some(to)) if from < to => {
            format!(
                "{}{}{}",
                &old[..from],
                section,
                &old[to + end(name).len()..]
            )
        }
        _ => format!("{}\n\n{section}\n", old.trim_end()),
    }
}

/// The commit the working tree is at, with `+` when it has changes.
pub fn commit() -> String {
    let git = |args: &[&str]| {
        Command::new("git")
            .args(args)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .ok()
            .filter(|o| o.status.success())
            .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=10", "HEAD"]) else {
        return "unknown (no git)".to_owned();
    };
    // Pictures and prose change no figure.
    let changed = git(&[
        "status",
        "--porcelain",
        "--",
        ":/",
        ":(top,exclude,glob)**/*.md",
        ":(top,exclude,glob)**/*.svg",
    ])
    .is_none_or(|s| !s.is_empty());
    if changed { format!("{head}+") } else { head }
}

/// Processor, cores and memory of this machine; there is no GPU in any figure unless a section says so.
pub fn machine() -> String {
    let field = |file: &str, key: &str| {
        fs::read_to_string(file).ok().and_then(|text| {
            text.lines()
                .find(|l| l.starts_with(key))
                .and_then(|l| l.split_once(':'))
                .map(|(_, v)| v.trim().to_owned())
        })
    };
    let cpu =
        field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".to_owned());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field("/proc/meminfo", "MemTotal")
        .and_then(|v| {
            v.split_whitespace()
                .next()
                .and_then(|n| n.parse::<f64>().ok())
        })
        .map_or_else(
            || "unknown memory".to_owned(),
            |kib| format!("{:.0} GiB", kib / 1024.0 / 1024.0),
        );
    format!("{cpu}, {cores} cores, {memory}, no GPU")
}

/// A Markdown table.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut out = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
    for row in rows {
        let _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_in_place_and_others_stay() {
        let dir = std::env::temp_dir().join(format!("mlac-results-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("RESULTS.md");
        write_section(&file, "one", "cmd", "first").unwrap();
        write_section(&file, "two", "cmd", "second").unwrap();
        write_section(&file, "one", "cmd", "third").unwrap();
        let text = fs::read_to_string(&file).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(!text.contains("first") && text.contains("second") && text.contains("third"));
        assert!(
            text.find("third") < text.find("second"),
            "the section stays where it was"
        );
    }
}
