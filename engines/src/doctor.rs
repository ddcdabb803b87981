//! What of the runtimes is there, what is needed, and how to get it. Never fails and never panics:
//! a library that does not load is a finding.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::find::{self, Library};
use crate::probe;

/// One component's finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The name a person knows it by.
    pub component: String,
    /// The file and where it was found; `None` when it is missing or does not work.
    pub found: Option<String>,
    /// Its version, when it says one.
    pub version: Option<String>,
    /// What mlac needs of it.
    pub needed: String,
    /// What to do; `None` when there is nothing to do.
    pub fix: Option<String>,
    /// Whether mlac's main path needs it: convert, export, run in ONNX Runtime, build engines.
    pub required: bool,
}

/// Looks at every component, in a fixed order.
pub fn examine() -> Vec<Part> {
    let mut parts: Vec<Part> = Library::ALL.into_iter().map(examine_library).collect();
    parts.push(examine_python());
    parts
}

fn required(library: Library) -> bool {
    matches!(
        library,
        Library::OnnxRuntime
            | Library::TensorRtRtx
            | Library::TensorRtRtxParser
            | Library::TensorRtShim
    )
}

fn examine_library(library: Library) -> Part {
    let mut part = Part {
        component: library.title().into(),
        found: None,
        version: None,
        needed: library.needed().into(),
        fix: Some(library.fix().into()),
        required: required(library),
    };
    let search = match find::library(library) {
        Ok(search) => search,
        Err(refusal) => {
            part.fix = Some(refusal.to_string());
            return part;
        }
    };
    let Some(found) = search.found else {
        return part;
    };
    match version(library, &found.path) {
        Ok(version) => {
            part.found = Some(format!("{} ({})", found.path.display(), found.reason));
            part.version = version;
            part.fix = None;
        }
        Err(problem) => {
            part.fix = Some(format!(
                "{} does not work: {problem}; {}",
                found.path.display(),
                library.fix()
            ));
        }
    }
    part
}

/// The version that a library says, if its interface has one; an error when it does not load.
fn version(library: Library, path: &Path) -> Result<Option<String>, String> {
    match library {
        Library::OnnxRuntime => probe::onnxruntime(path).map(Some),
        Library::TensorRtRtx | Library::TensorRtEnterprise => probe::tensorrt(path).map(Some),
        Library::TensorRtRtxParser
        | Library::TensorRtEnterpriseParser
        | Library::TensorRtShim
        | Library::TensorRtEnterpriseShim => probe::loads(path).map(|()| None),
        Library::TensorRtPlugin => probe::plugin(path)
            .map(|version| Some(format!("for TensorRT {}", probe::shown(version)))),
        Library::CudaDriver => {
            let driver = probe::driver(path)?;
            if driver.devices.is_empty() {
                return Err("no GPU".into());
            }
            Ok(Some(format!(
                "CUDA {}, {}",
                driver.version,
                driver.devices.join(", ")
            )))
        }
    }
}

fn examine_python() -> Part {
    let mut part = Part {
        component: "Python".into(),
        found: None,
        version: None,
        needed: "Python 3.11 or later, for `cargo xtask` only: it fetches the runtimes and runs the reference checks".into(),
        fix: Some("install Python 3.11 with pip (Debian: apt-get install python3 python3-pip)".into()),
        required: false,
    };
    for program in ["python3.11", "python3"] {
        let answer = Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let Ok(answer) = answer else { continue };
        let text = String::from_utf8_lossy(&answer.stdout);
        let Some(version) = text.trim().strip_prefix("Python ") else {
            continue;
        };
        let minor = version
            .strip_prefix("3.")
            .and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
        if answer.status.success() && minor.is_some_and(|minor| minor >= 11) {
            part.found = Some(program.into());
            part.version = Some(version.to_owned());
            part.fix = None;
            break;
        }
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_set_up_everything_required_is_found_with_its_version() {
        let parts = examine();
        assert_eq!(parts.len(), Library::ALL.len() + 1);
        for part in parts.iter().filter(|part| part.required) {
            assert!(part.found.is_some() && part.fix.is_none(), "{part:?}");
        }
        let version = |name: &str| {
            parts
                .iter()
                .find(|part| part.component == name)
                .unwrap()
                .version
                .clone()
                .unwrap()
        };
        assert!(version("ONNX Runtime").starts_with("1."));
        assert!(version("TensorRT for RTX").starts_with("1.7."));
    }

    #[test]
    fn a_file_that_is_no_library_is_a_finding() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("lib.so");
        std::fs::write(&file, "not a library").unwrap();
        for library in Library::ALL {
            assert!(version(library, &file).is_err(), "{library:?}");
        }
        // A real library without the functions that are asked for.
        let other = find::library(Library::TensorRtShim)
            .unwrap()
            .require()
            .unwrap();
        for library in [
            Library::OnnxRuntime,
            Library::TensorRtRtx,
            Library::CudaDriver,
        ] {
            assert!(version(library, &other).is_err(), "{library:?}");
        }
    }
}
