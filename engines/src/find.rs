//! Finding the libraries that mlac loads at run time.
//!
//! Order: the component's own variable (which must then be right: a wrong one is refused, not
//! passed over), `MLAC_RUNTIME_DIR`, `runtime/` beside the program, `target/runtime` above the
//! program and above the current folder, Python's wheels, the loader's folders.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use mlac_model::{Refusal, runtime};

/// A library that mlac can load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// `libonnxruntime.so`
    OnnxRuntime,
    /// `libtensorrt_rtx.so.1`
    TensorRtRtx,
    /// `libtensorrt_onnxparser_rtx.so.1`
    TensorRtRtxParser,
    /// `libmlac_trt_shim.so`, compiled by `cargo xtask setup`
    TensorRtShim,
    /// `libnvinfer.so.11`: enterprise TensorRT, for datacenter GPUs
    TensorRtEnterprise,
    /// `libnvonnxparser.so.11`: its ONNX parser
    TensorRtEnterpriseParser,
    /// `libmlac_trt_shim.so` for it, compiled by `cargo xtask setup`
    TensorRtEnterpriseShim,
    /// `libmlac_trt.so`: the plugin of `mlac::LatentAttention`, compiled by `cargo xtask setup`
    TensorRtPlugin,
    /// `libcuda.so.1`: part of the NVIDIA driver
    CudaDriver,
}

/// Where a library was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file.
    pub path: PathBuf,
    /// Why that one: the variable, or the kind of place.
    pub reason: &'static str,
}

/// What a search came to.
#[derive(Debug, Clone)]
pub struct Search {
    /// What was looked for.
    pub library: Library,
    /// The first match.
    pub found: Option<Found>,
    /// Every place looked at, in order.
    pub looked: Vec<PathBuf>,
}

struct Facts {
    title: &'static str,
    /// Names a file or a folder.
    variable: &'static str,
    /// Folder under `target/runtime`.
    runtime: &'static str,
    /// Folders under `site-packages`.
    wheels: &'static [&'static str],
    /// Exact file name first; a version may follow it.
    file: &'static str,
    needed: &'static str,
    fix: &'static str,
}

const SETUP: &str = "run `cargo xtask setup` in mlac's checkout";

impl Library {
    /// Every library, in the order in which `doctor` lists them.
    pub const ALL: [Self; 9] = [
        Self::OnnxRuntime,
        Self::TensorRtRtx,
        Self::TensorRtRtxParser,
        Self::TensorRtShim,
        Self::TensorRtEnterprise,
        Self::TensorRtEnterpriseParser,
        Self::TensorRtEnterpriseShim,
        Self::TensorRtPlugin,
        Self::CudaDriver,
    ];

    const fn facts(self) -> Facts {
        match self {
            Self::OnnxRuntime => Facts {
                title: "ONNX Runtime",
                variable: "MLAC_ONNXRUNTIME",
                runtime: "onnxruntime",
                wheels: &["onnxruntime/capi"],
                file: "libonnxruntime.so",
                needed: "libonnxruntime.so 1.24 or later",
                fix: "run `cargo xtask setup` in mlac's checkout, or `pip install onnxruntime==1.31.1`, \
                      or set MLAC_ONNXRUNTIME to the library",
            },
            Self::TensorRtRtx => Facts {
                title: "TensorRT for RTX",
                variable: "MLAC_TENSORRT_RTX",
                runtime: "tensorrt_rtx",
                wheels: &["tensorrt_rtx_libs"],
                file: "libtensorrt_rtx.so.1",
                needed: "libtensorrt_rtx.so.1, version 1.7",
                fix: "run `cargo xtask setup` in mlac's checkout, or `pip install tensorrt-rtx-cu13-libs==1.7.1.116`, \
                      or set MLAC_TENSORRT_RTX to the folder of the library",
            },
            Self::TensorRtRtxParser => Facts {
                title: "TensorRT for RTX, ONNX parser",
                variable: "MLAC_TENSORRT_RTX",
                runtime: "tensorrt_rtx",
                wheels: &["tensorrt_rtx_libs"],
                file: "libtensorrt_onnxparser_rtx.so.1",
                needed: "libtensorrt_onnxparser_rtx.so.1, version 1.7",
                fix: "as for TensorRT for RTX: both libraries come together",
            },
            Self::TensorRtShim => Facts {
                title: "TensorRT shim",
                variable: "MLAC_TENSORRT_SHIM",
                runtime: "tensorrt_shim",
                wheels: &[],
                file: "libmlac_trt_shim.so",
                needed: "libmlac_trt_shim.so, compiled from engines/shim",
                fix: SETUP,
            },
            Self::TensorRtEnterprise => Facts {
                title: "TensorRT (enterprise)",
                variable: "MLAC_TENSORRT",
                runtime: "tensorrt",
                wheels: &["tensorrt_libs"],
                file: "libnvinfer.so.11",
                needed: "libnvinfer.so.11, for datacenter GPUs (sm90, sm100)",
                fix: "install NVIDIA TensorRT 11 and set MLAC_TENSORRT to its lib folder",
            },
            Self::TensorRtEnterpriseParser => Facts {
                title: "TensorRT (enterprise), ONNX parser",
                variable: "MLAC_TENSORRT",
                runtime: "tensorrt",
                wheels: &["tensorrt_libs"],
                file: "libnvonnxparser.so.11",
                needed: "libnvonnxparser.so.11, of the same TensorRT",
                fix: "install NVIDIA TensorRT 11 and set MLAC_TENSORRT to its lib folder: both libraries come together",
            },
            Self::TensorRtEnterpriseShim => Facts {
                title: "TensorRT (enterprise) shim",
                variable: "MLAC_TENSORRT_ENTERPRISE_SHIM",
                runtime: "tensorrt_enterprise_shim",
                wheels: &[],
                file: "libmlac_trt_shim.so",
                needed: "libmlac_trt_shim.so, compiled from engines/shim against the headers of enterprise TensorRT",
                fix: SETUP,
            },
            Self::TensorRtPlugin => Facts {
                title: "TensorRT plugin",
                variable: "MLAC_TENSORRT_PLUGIN",
                runtime: "tensorrt_plugin",
                wheels: &[],
                file: "libmlac_trt.so",
                needed: "libmlac_trt.so, compiled from kernels/plugin for TensorRT 11",
                fix: SETUP,
            },
            Self::CudaDriver => Facts {
                title: "CUDA driver",
                variable: "MLAC_CUDA_DRIVER",
                runtime: "cuda",
                wheels: &[],
                file: "libcuda.so.1",
                needed: "libcuda.so.1 and an NVIDIA GPU, to run engines (building them needs neither)",
                fix: "install the NVIDIA driver; in a container, start it with GPU access",
            },
        }
    }

    /// The name a person knows it by.
    pub fn title(self) -> &'static str {
        self.facts().title
    }

    /// What mlac needs of it, and for what.
    pub fn needed(self) -> &'static str {
        self.facts().needed
    }

    /// How to get it.
    pub fn fix(self) -> &'static str {
        self.facts().fix
    }
}

impl Search {
    /// The library's file.
    ///
    /// # Errors
    /// Found / needed / fix, with the places that were looked at.
    pub fn require(self) -> Result<PathBuf, Refusal> {
        let Some(found) = self.found else {
            let facts = self.library.facts();
            let places: Vec<String> = self
                .looked
                .iter()
                .map(|place| place.display().to_string())
                .collect();
            return Err(Refusal::new(
                facts.title,
                facts.needed,
                format!("none in {} places ({})", places.len(), places.join(", ")),
                facts.fix,
            ));
        };
        Ok(found.path)
    }
}

/// Looks for a library with this process's variables, program and current folder.
///
/// # Errors
/// When the library's own variable is set and names nothing usable.
pub fn library(library: Library) -> Result<Search, Refusal> {
    search(library, &Surroundings::of_this_process())
}

/// The parts of the process that a search depends on.
#[derive(Debug, Default)]
pub(crate) struct Surroundings {
    pub(crate) variables: Vec<(String, OsString)>,
    pub(crate) program: Option<PathBuf>,
    pub(crate) current: Option<PathBuf>,
}

impl Surroundings {
    fn of_this_process() -> Self {
        let variables = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();
        Self {
            variables,
            program: env::current_exe().ok(),
            current: env::current_dir().ok(),
        }
    }

    fn variable(&self, name: &str) -> Option<PathBuf> {
        self.variables
            .iter()
            .find(|(found, value)| found == name && !value.is_empty())
            .map(|(_, value)| PathBuf::from(value))
    }
}

pub(crate) fn search(library: Library, around: &Surroundings) -> Result<Search, Refusal> {
    let facts = library.facts();
    let mut search = Search {
        library,
        found: None,
        looked: Vec::new(),
    };
    if let Some(named) = around.variable(facts.variable) {
        let path = if named.is_dir() {
            match_in(&named, facts.file)
        } else {
            Some(named.clone())
        };
        let Some(path) = path.filter(|path| path.is_file()) else {
            return Err(Refusal::new(
                format!("variable {}", facts.variable),
                format!("{}, or a folder with it", facts.needed),
                format!("{} (no such file in it or there)", named.display()),
                format!("correct or unset {}", facts.variable),
            ));
        };
        search.found = Some(Found {
            path,
            reason: facts.variable,
        });
        return Ok(search);
    }
    for (folder, reason) in places(&facts, around) {
        if search.looked.contains(&folder) {
            continue;
        }
        if let Some(path) = match_in(&folder, facts.file) {
            search.found = Some(Found { path, reason });
            return Ok(search);
        }
        search.looked.push(folder);
    }
    Ok(search)
}

/// The folders to look in, in order.
fn places(facts: &Facts, around: &Surroundings) -> Vec<(PathBuf, &'static str)> {
    let mut places = runtime::places(
        facts.runtime,
        around.variable("MLAC_RUNTIME_DIR").as_deref(),
        around.program.as_deref(),
        around.current.as_deref(),
    );
    for packages in site_packages(around) {
        for wheel in facts.wheels {
            places.push((packages.join(wheel), "Python wheel"));
        }
    }
    if let Some(paths) = around.variable("LD_LIBRARY_PATH") {
        places.extend(env::split_paths(&paths).map(|path| (path, "LD_LIBRARY_PATH")));
    }
    for folder in [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
        "/usr/local/cuda/lib64",
        "/usr/local/nvidia/lib64",
    ] {
        places.push((folder.into(), "system"));
    }
    places
}

/// Python's package folders, without running Python.
fn site_packages(around: &Surroundings) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(paths) = around.variable("PYTHONPATH") {
        folders.extend(env::split_paths(&paths));
    }
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(|name| around.variable(name))
        .collect();
    if let Some(home) = around.variable("HOME") {
        prefixes.push(home.join(".local"));
    }
    prefixes.push("/usr/local".into());
    prefixes.push("/usr".into());
    for prefix in prefixes {
        let library = prefix.join("lib");
        let mut versions: Vec<PathBuf> = fs::read_dir(&library)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name()
                    .and_then(|name| name.to_str())
                    .is_some_and(|name| name.starts_with("python3"))
            })
            .collect();
        versions.sort();
        for version in versions {
            folders.extend(
                ["site-packages", "dist-packages"]
                    .iter()
                    .map(|kind| version.join(kind))
                    .filter(|path| path.is_dir()),
            );
        }
    }
    folders
}

/// `file` in `folder`, else the highest-sorting `file.<version>`.
fn match_in(folder: &Path, file: &str) -> Option<PathBuf> {
    let exact = folder.join(file);
    if exact.is_file() {
        return Some(exact);
    }
    let versioned = format!("{file}.");
    fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&versioned))
        .max()
        .map(|name| folder.join(name))
        .filter(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    fn around(variables: &[(&str, &Path)], program: &Path, current: &Path) -> Surroundings {
        Surroundings {
            variables: variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.as_os_str().to_owned()))
                .collect(),
            program: Some(program.to_path_buf()),
            current: Some(current.to_path_buf()),
        }
    }

    #[test]
    fn places_are_tried_in_the_documented_order() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let program = at("checkout/target/debug/deps/mlac");
        let current = at("elsewhere/deep");
        let variables: Vec<(&str, PathBuf)> = vec![
            ("MLAC_RUNTIME_DIR", at("runtimes")),
            ("PYTHONPATH", at("packages")),
            ("VIRTUAL_ENV", at("venv")),
            ("LD_LIBRARY_PATH", at("loader")),
        ];
        let variables: Vec<(&str, &Path)> = variables
            .iter()
            .map(|(name, path)| (*name, path.as_path()))
            .collect();
        // From the last to the first: each new one must win.
        for (file, reason) in [
            ("loader/libonnxruntime.so.1.31.1", "LD_LIBRARY_PATH"),
            (
                "venv/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1",
                "Python wheel",
            ),
            (
                "packages/onnxruntime/capi/libonnxruntime.so.1.31.1",
                "Python wheel",
            ),
            (
                "elsewhere/target/runtime/onnxruntime/libonnxruntime.so",
                "target/runtime",
            ),
            (
                "checkout/target/runtime/onnxruntime/libonnxruntime.so",
                "target/runtime",
            ),
            (
                "checkout/target/debug/deps/runtime/onnxruntime/libonnxruntime.so",
                "beside the program",
            ),
            ("runtimes/onnxruntime/libonnxruntime.so", "MLAC_RUNTIME_DIR"),
        ] {
            touch(&at(file));
            let found = search(
                Library::OnnxRuntime,
                &around(&variables, &program, &current),
            )
            .unwrap()
            .found
            .unwrap();
            assert_eq!((found.path, found.reason), (at(file), reason));
        }
        touch(&at("own/libonnxruntime.so"));
        for own in [at("own"), at("own/libonnxruntime.so")] {
            let mut variables = variables.clone();
            variables.push(("MLAC_ONNXRUNTIME", &own));
            let found = search(
                Library::OnnxRuntime,
                &around(&variables, &program, &current),
            )
            .unwrap()
            .found
            .unwrap();
            assert_eq!(
                (found.path, found.reason),
                (at("own/libonnxruntime.so"), "MLAC_ONNXRUNTIME")
            );
        }
    }

    #[test]
    fn a_variable_that_names_nothing_is_refused_and_not_passed_over() {
        let root = tempfile::tempdir().unwrap();
        touch(
            &root
                .path()
                .join("target/runtime/onnxruntime/libonnxruntime.so"),
        );
        for wrong in [root.path().join("none"), root.path().to_path_buf()] {
            let around = around(&[("MLAC_ONNXRUNTIME", &wrong)], root.path(), root.path());
            let error = search(Library::OnnxRuntime, &around)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains("variable MLAC_ONNXRUNTIME: expected libonnxruntime.so"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_missing_library_is_told_with_the_places_and_the_way_out() {
        let root = tempfile::tempdir().unwrap();
        let runtimes = root.path().join("runtimes");
        let around = around(
            &[("MLAC_RUNTIME_DIR", &runtimes)],
            &root.path().join("mlac"),
            root.path(),
        );
        let error = search(Library::TensorRtShim, &around)
            .unwrap()
            .require()
            .unwrap_err()
            .to_string();
        let place = runtimes.join("tensorrt_shim").display().to_string();
        assert!(
            error.contains(&place) && error.contains("fix: run `cargo xtask setup`"),
            "{error}"
        );
    }

    #[test]
    fn the_latest_version_in_a_folder_is_taken() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            "libnvrtc.so.12",
            "libnvrtc.so.13",
            "libnvrtc-builtins.so.14",
        ] {
            touch(&root.path().join(name));
        }
        assert_eq!(
            match_in(root.path(), "libnvrtc.so"),
            Some(root.path().join("libnvrtc.so.13"))
        );
    }
}
