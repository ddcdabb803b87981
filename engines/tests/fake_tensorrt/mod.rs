//! TensorRT and a driver for machines without: libraries compiled from the sources beside this file, our own shim over them, and
//! engine folders for them. A test runs in a child process, for both are looked for when a process first needs them.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mlac_engines::find::{self, Library};
use mlac_kernels::cache::digest;
use serde_json::{Value, json};

/// Set in the child.
const INSIDE: &str = "MLAC_FAKE_TENSORRT";

/// Classes of TensorRT whose every function ends the process, unless a class of the fake has it.
const STUBS: [(&str, &str, &str, &str); 4] = [
    (
        "NvInferImpl.h",
        "VRuntime",
        "apiv::VRuntime",
        "RuntimeStubs",
    ),
    (
        "NvInferImpl.h",
        "VCudaEngine",
        "apiv::VCudaEngine",
        "EngineStubs",
    ),
    (
        "NvInferImpl.h",
        "VExecutionContext",
        "apiv::VExecutionContext",
        "ContextStubs",
    ),
    (
        "NvInferRuntimeCommon.h",
        "IPluginRegistry",
        "IPluginRegistry",
        "RegistryStubs",
    ),
];

/// The compiled libraries.
pub struct Fakes {
    folder: PathBuf,
}

pub fn plugin() -> PathBuf {
    let search = find::library(Library::TensorRtPlugin).unwrap();
    search.require().unwrap_or_else(|error| panic!("{error}"))
}

const SOURCES: [&str; 5] = [
    "tests/fake_tensorrt/cuda.cpp",
    "tests/fake_tensorrt/nvinfer.cpp",
    "shim/shim.h",
    "shim/shim.cpp",
    "shim/run.cpp",
];

impl Fakes {
    /// Compiles them, once for the same sources.
    pub fn new() -> Self {
        let headers = plugin()
            .ancestors()
            .nth(2)
            .unwrap()
            .join("tensorrt_headers");
        let engines = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engines");
        let stubs = stubs(&headers.join("enterprise"));
        let mut key = stubs.clone().into_bytes();
        for source in SOURCES {
            key.extend(fs::read(engines.join(source)).unwrap());
        }
        let made = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let folder = made.join(format!("fake_tensorrt-{}", &digest(&key)[..16]));
        if folder.is_dir() {
            return Self { folder };
        }
        let staging = tempfile::tempdir_in(made).unwrap();
        let at = |name: &str| staging.path().join(name);
        fs::write(at("stubs.h"), stubs).unwrap();
        let compile = |sources: &[&str], library: &str| {
            let compiler = std::env::var_os("CXX").filter(|name| !name.is_empty());
            let status = Command::new(compiler.unwrap_or_else(|| "g++".into()))
                .args([
                    "-std=c++17",
                    "-O1",
                    "-fPIC",
                    "-shared",
                    "-fvisibility=hidden",
                ])
                .arg("-isystem")
                .arg(headers.join("enterprise"))
                .arg("-isystem")
                .arg(headers.join("cuda"))
                .arg("-I")
                .arg(staging.path())
                .args(sources.iter().map(|source| engines.join(source)))
                .arg("-o")
                .arg(at(library))
                .arg("-ldl")
                .status()
                .unwrap();
            assert!(status.success(), "{library} does not compile");
        };
        compile(&SOURCES[..1], "libcuda.so");
        compile(&SOURCES[1..2], "libnvinfer.so.11");
        compile(&SOURCES[3..], "libmlac_trt_shim.so");
        for (name, of) in [
            ("libcuda.so.1", "libcuda.so"),
            ("libnvonnxparser.so.11", "libnvinfer.so.11"),
        ] {
            std::os::unix::fs::symlink(of, at(name)).unwrap();
        }
        // Another test may have been first.
        let staged = staging.keep();
        if fs::rename(&staged, &folder).is_err() {
            fs::remove_dir_all(&staged).unwrap();
            assert!(folder.is_dir());
        }
        Self { folder }
    }

    /// Variables with which a process finds them.
    pub fn variables(&self) -> Vec<(&'static str, OsString)> {
        let folder = &self.folder;
        vec![
            (INSIDE, "1".into()),
            ("LD_LIBRARY_PATH", folder.into()),
            ("MLAC_TENSORRT", folder.into()),
            (
                "MLAC_TENSORRT_ENTERPRISE_SHIM",
                folder.join("libmlac_trt_shim.so").into(),
            ),
        ]
    }

    /// Runs the test of that name of this program again with the libraries and `settings`.
    pub fn run(&self, test: &str, settings: &[(&str, &str)]) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .envs(self.variables())
            .envs(settings.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{test} with {settings:?}: {said}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Whether this process is the child.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Overrides of every pure virtual function, read off TensorRT's headers.
fn stubs(headers: &Path) -> String {
    let mut out = String::from(
        "#pragma once\n#include <cstdio>\n#include <cstdlib>\n#include \"NvInfer.h\"\nnamespace nvinfer1 {\n\
         [[noreturn]] inline void unexpected(char const* name) {\n  std::fprintf(stderr, \"fake TensorRT: %s is not there\\n\", name);\n  \
         std::abort();\n}\n",
    );
    for (file, class, scoped, name) in STUBS {
        let text = fs::read_to_string(headers.join(file)).unwrap();
        let head = [format!("class {class} :"), format!("class {class}\n")];
        let start = head.iter().find_map(|head| text.find(head)).unwrap();
        let body = &text[start..];
        let body = &body[..body.find("\n};").unwrap()];
        let _ = writeln!(out, "class {name} : public {scoped} {{ public:");
        for part in body.split("virtual ").skip(1) {
            let Some((declared, _)) = part.split_once(" = 0;") else {
                continue;
            };
            if declared.starts_with('~') || declared.contains(';') {
                continue;
            }
            let declared = declared.split_whitespace().collect::<Vec<_>>().join(" ");
            let function = declared.split('(').next().unwrap();
            let function = function.rsplit([' ', '*', '&']).next().unwrap();
            let _ = writeln!(
                out,
                "  {declared} override {{ unexpected(\"{class}::{function}\"); }}"
            );
        }
        out.push_str("};\n");
    }
    out.push_str("}\n");
    out
}

/// A layer's cache.
#[derive(Debug, Clone, Copy)]
pub enum Layer {
    /// In place; with a window all rows are kept all the same.
    Latent { width: usize, window: Option<usize> },
    /// Keys and values that grow.
    Grows {
        heads: usize,
        width: usize,
        window: Option<usize>,
    },
}

/// An engine of the fake.
#[derive(Debug, Clone)]
pub struct Model {
    pub vocab: usize,
    pub batch: usize,
    pub capacity: usize,
    pub piece: usize,
    pub context: usize,
    pub f16: bool,
    pub layers: Vec<Layer>,
}

impl Default for Model {
    /// One layer of every kind.
    fn default() -> Self {
        Self {
            vocab: 11,
            batch: 2,
            capacity: 64,
            piece: 4,
            context: 64,
            f16: true,
            layers: vec![
                Layer::Latent {
                    width: 5,
                    window: None,
                },
                Layer::Grows {
                    heads: 2,
                    width: 3,
                    window: None,
                },
                Layer::Latent {
                    width: 2,
                    window: Some(6),
                },
                Layer::Grows {
                    heads: 1,
                    width: 4,
                    window: Some(6),
                },
            ],
        }
    }
}

impl Model {
    /// The engine file.
    pub fn bytes(&self) -> String {
        let mut text = format!(
            "fake-engine vocab {} batch {} capacity {} piece {} context {} logits {}\n",
            self.vocab,
            self.batch,
            self.capacity,
            self.piece,
            self.context,
            u8::from(self.f16)
        );
        for (i, layer) in self.layers.iter().enumerate() {
            let _ = match layer {
                Layer::Latent { width, .. } => writeln!(text, "latent {i} {width}"),
                Layer::Grows {
                    heads,
                    width,
                    window,
                } => writeln!(text, "grows {i} {heads} {width} {}", window.unwrap_or(0)),
            };
        }
        text
    }

    fn inputs(&self, seq: usize, usual: usize, most: usize) -> Vec<Value> {
        let b = self.batch;
        let shapes = |name: &str, min: Vec<usize>, opt: Vec<usize>, max: Vec<usize>| json!({"name": name, "min": min, "opt": opt, "max": max});
        let ids = |name| shapes(name, vec![1, seq], vec![1, seq], vec![b, seq]);
        let mut inputs = vec![
            ids("input_ids"),
            ids("position_ids"),
            shapes("past_lengths", vec![1], vec![1], vec![b]),
        ];
        for (i, layer) in self.layers.iter().enumerate() {
            match *layer {
                Layer::Latent { width, .. } => {
                    let of = |n| vec![n, self.capacity, width];
                    inputs.push(shapes(&format!("past_latent.{i}"), of(1), of(1), of(b)));
                }
                Layer::Grows {
                    heads,
                    width,
                    window,
                } => {
                    let rows = |past: usize| window.map_or(past, |w| w.min(past));
                    let of = |n, past| vec![n, heads, rows(past), width];
                    for part in ["key", "value"] {
                        let name = format!("past_key_values.{i}.{part}");
                        inputs.push(shapes(&name, of(1, 0), of(1, usual), of(b, most)));
                    }
                }
            }
        }
        inputs
    }

    /// An engine folder as `mlac build --backend tensorrt` writes it, with the side files given.
    pub fn folder(&self, side: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| {
            fs::write(folder.path().join(name), bytes).unwrap();
            digest(bytes)
        };
        let library = put("libmlac_trt.so", &fs::read(plugin()).unwrap());
        let engine = self.bytes();
        let engine_digest = put("decoder.sm90.engine", engine.as_bytes());
        let sources: Vec<Value> = side
            .iter()
            .map(|(name, bytes)| json!({"file": name, "bytes": bytes.len(), "sha256": put(name, bytes)}))
            .collect();
        let cache: Vec<Value> = self
            .layers
            .iter()
            .enumerate()
            .map(|(i, layer)| match layer {
                Layer::Latent { width, window } => {
                    json!({"layer": i, "kind": "latent", "width": width, "window": window})
                }
                Layer::Grows {
                    heads,
                    width,
                    window,
                } => json!({"layer": i, "kind": "key_value", "heads": heads,
                    "key_width": width, "value_width": width, "window": window}),
            })
            .collect();
        let profiles = json!([
            {"name": "prefill", "inputs": self.inputs(self.piece, 0, self.context - self.piece)},
            {"name": "decode", "inputs": self.inputs(1, self.context / 2, self.context - 1)},
        ]);
        let manifest = json!({
            "format": 1, "tool": "mlac", "runtime": "TensorRT 11.4.0", "verified_on_gpu": false, "targets": ["sm90"],
            "plugin": {"file": "libmlac_trt.so", "tensorrt": "11.4.0", "sha256": library},
            "cache": cache, "sources": sources,
            "engines": [{
                "file": "decoder.sm90.engine", "graph": "decoder.onnx", "targets": ["sm90"], "bytes": engine.len(),
                "sha256": engine_digest, "profiles": profiles, "attention": {"fused": 0, "decomposable": 0},
            }],
        });
        put("manifest.json", manifest.to_string().as_bytes());
        folder
    }

    /// Logits `[tokens, vocab]` of a whole sequence, without any cache.
    pub fn logits(&self, ids: &[i64]) -> Vec<f32> {
        let mut out = Vec::new();
        for own in 0..ids.len() {
            let mut sum = 0;
            for (number, layer) in self.layers.iter().enumerate() {
                let (times, window) = match *layer {
                    // The fake's operator has no windows.
                    Layer::Latent { .. } => (1, usize::MAX),
                    Layer::Grows { heads, window, .. } => (2 * heads, window.unwrap_or(usize::MAX)),
                };
                for (p, &id) in ids.iter().enumerate().take(own + 1) {
                    let row = (3 * id as usize + 5 * p + 7 * number) % 97;
                    if own - p < window {
                        sum += times * row * ((own - p) % 7 + 1);
                    }
                }
            }
            out.extend((0..self.vocab).map(|j| ((sum + 31 * j) % 251) as f32));
        }
        out
    }
}
