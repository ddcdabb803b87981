//! The plugin library before TensorRT loads it, and the path to enterprise TensorRT as far as it goes without one.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::doc_markdown,
    reason = "tests"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mlac_engines::find::{self, Library};
use mlac_engines::tensorrt::{
    BuildOptions, Manifest, PluginLibrary, PluginRecord, Product, Profiles, build_engines,
};

fn plugin() -> PathBuf {
    find::library(Library::TensorRtPlugin)
        .unwrap()
        .require()
        .unwrap_or_else(|error| panic!("{error}"))
}

/// The headers that `cargo xtask setup` installs beside the plugin's folder.
fn headers() -> PathBuf {
    let folder = plugin()
        .ancestors()
        .nth(2)
        .unwrap()
        .join("tensorrt_headers");
    assert!(
        folder.is_dir(),
        "no {}: run `cargo xtask setup`",
        folder.display()
    );
    folder
}

/// The plugin's own source, compiled against the headers of the next major version.
fn plugin_for_another_major(folder: &Path) -> PathBuf {
    let from = headers().join("enterprise");
    for entry in fs::read_dir(&from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let text = fs::read_to_string(&path).unwrap();
            let changed = text.replace(
                "#define TRT_MAJOR_ENTERPRISE 11",
                "#define TRT_MAJOR_ENTERPRISE 12",
            );
            fs::write(folder.join(path.file_name().unwrap()), changed).unwrap();
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/plugin");
    let library = folder.join("libmlac_trt.so");
    let compiler = std::env::var_os("CXX")
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "g++".into());
    let status = Command::new(compiler)
        .args(["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"])
        .arg("-isystem")
        .arg(folder)
        .arg("-isystem")
        .arg(headers().join("cuda"))
        .args(
            [
                "report", "driver", "bundle", "recipe", "step", "operator", "plugin", "creator",
                "entry",
            ]
            .map(|name| source.join(format!("{name}.cpp"))),
        )
        .arg("-o")
        .arg(&library)
        .arg("-ldl")
        .status()
        .unwrap();
    assert!(status.success());
    library
}

#[test]
fn a_plugin_for_another_major_version_is_refused_with_both_versions() {
    let installed = PluginLibrary::open(&plugin()).unwrap();
    for version in [110_000, 110_400, 110_902] {
        installed.check(version).unwrap();
    }
    let error = installed.check(120_100).unwrap_err().to_string();
    assert!(
        error.contains("expected a library for TensorRT 12, which is 12.1.0 here")
            && error.contains("found one for TensorRT 11 (compiled with 11.4.0)"),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let other = PluginLibrary::open(&plugin_for_another_major(folder.path())).unwrap();
    other.check(120_100).unwrap();
    let error = other.check(110_400).unwrap_err().to_string();
    assert!(
        error.contains("expected a library for TensorRT 11, which is 11.4.0 here")
            && error.contains("found one for TensorRT 12 (compiled with 12.4.0)"),
        "{error}"
    );
}

#[test]
fn what_is_no_plugin_library_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("libmlac_trt.so");
    fs::write(&path, "no library").unwrap();
    let shim = find::library(Library::TensorRtShim)
        .unwrap()
        .require()
        .unwrap();
    for file in [path, shim, folder.path().join("none")] {
        let error = PluginLibrary::open(&file).unwrap_err().to_string();
        assert!(
            error.contains("expected libmlac_trt.so, compiled from kernels/plugin"),
            "{error}"
        );
    }
}

/// An engine folder with a plugin and a manifest that names it.
fn engine_folder(change: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(plugin()).unwrap();
    let digest = mlac_kernels::cache::digest(&bytes);
    fs::write(folder.path().join("libmlac_trt.so"), bytes).unwrap();
    let mut manifest = serde_json::json!({
        "format": 1, "tool": "mlac", "runtime": "TensorRT 11.4.0",
        "plugin": {"file": "libmlac_trt.so", "tensorrt": "11.4.0", "sha256": digest},
        "verified_on_gpu": false, "targets": ["sm90"], "cache": [], "sources": [], "engines": [],
    });
    change(&mut manifest);
    fs::write(folder.path().join("manifest.json"), manifest.to_string()).unwrap();
    folder
}

#[test]
fn a_manifest_pins_the_plugin_by_its_digest() {
    let folder = engine_folder(|_| {});
    let manifest = Manifest::read(folder.path()).unwrap();
    let record: &PluginRecord = manifest.plugin.as_ref().unwrap();
    record.open(folder.path(), 110_402).unwrap();
    let error = record.open(folder.path(), 100_900).unwrap_err().to_string();
    assert!(
        error.contains("for TensorRT 10, which is 10.9.0 here"),
        "{error}"
    );
    assert_eq!(manifest.check(folder.path(), folder.path()).unwrap(), []);
    manifest.check_runtime("TensorRT 11.4.0").unwrap();
    let error = manifest
        .check_runtime("TensorRT 11.5.0")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("expected TensorRT 11.4.0, found TensorRT 11.5.0"),
        "{error}"
    );

    // One byte of the library, and the record and the check say so.
    let library = folder.path().join("libmlac_trt.so");
    let mut bytes = fs::read(&library).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    // Another file of that name: the one that was loaded may still be mapped.
    fs::remove_file(&library).unwrap();
    fs::write(&library, bytes).unwrap();
    let error = record.open(folder.path(), 110_402).unwrap_err().to_string();
    assert!(error.contains("as the manifest has it"), "{error}");
    let stale = manifest.check(folder.path(), folder.path()).unwrap();
    assert_eq!(stale.len(), 1);
    assert!(
        stale[0].to_string().contains("the plugin is damaged"),
        "{}",
        stale[0]
    );
}

#[test]
fn a_corrupted_manifest_is_refused() {
    for (expected, folder) in [
        (
            "plain file names",
            engine_folder(|manifest| manifest["plugin"]["file"] = "../libmlac_trt.so".into()),
        ),
        (
            "a manifest that `mlac build` wrote",
            engine_folder(|manifest| manifest["plugin"]["sha256"] = 7.into()),
        ),
        (
            "format: expected 1, found 9",
            engine_folder(|manifest| manifest["format"] = 9.into()),
        ),
    ] {
        let error = Manifest::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let folder = engine_folder(|_| {});
    let path = folder.path().join("manifest.json");
    let text = fs::read(&path).unwrap();
    for end in 0..text.len() {
        fs::write(&path, &text[..end]).unwrap();
        let error = Manifest::read(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("a manifest that `mlac build` wrote"),
            "cut at {end}: {error}"
        );
    }
}

#[test]
fn a_build_for_enterprise_tensorrt_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("engines");
    let toy = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/toy");
    let build = |targets: &[&str]| {
        let options = BuildOptions {
            product: Product::Enterprise,
            targets: targets.iter().map(|name| name.parse().unwrap()).collect(),
            profiles: Profiles {
                max_batch: 1,
                max_context: 128,
                max_prefill: 16,
            },
            threads: 1,
            timing_cache: None,
        };
        build_engines(&toy, &out, &options, &mut |_| {})
            .err()
            .unwrap()
            .to_string()
    };
    assert!(build(&["sm90", "sm80"]).contains("builds for the GPU it runs on, found sm90, sm80"));
    assert!(
        build(&["sm75"])
            .contains("one of sm80, sm86, sm89, sm90, sm120, which mlac has kernels for")
    );
    // The toy has no nodes of the operator, so a machine that has TensorRT and a GPU refuses it too.
    let error = build(&["sm90"]);
    if find::library(Library::TensorRtEnterprise)
        .unwrap()
        .found
        .is_none()
    {
        assert!(
            error.contains("TensorRT (enterprise): expected libnvinfer.so.11")
                && error.contains("fix: install NVIDIA TensorRT 11 and set MLAC_TENSORRT"),
            "{error}"
        );
    }
    assert!(!out.exists());
}
