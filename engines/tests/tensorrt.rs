//! TensorRT for RTX on this machine, with or without a GPU: parsing, refusing, building.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::doc_markdown,
    reason = "tests"
)]

use std::fs;
use std::path::{Path, PathBuf};

use mlac_engines::ort::{CacheLayout, Dim};
use mlac_engines::tensorrt::{
    BuildOptions, BuildProgress, Builder, InputShapes, Manifest, Product, Profiles, Target,
    TensorRt, build_engines,
};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn targets(names: &[&str]) -> Vec<Target> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

/// A missing runtime fails here, with found / needed / fix.
fn library() -> TensorRt {
    TensorRt::load(Product::Rtx).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_library_is_the_one_that_the_shim_was_compiled_for() {
    assert!(
        library().version().starts_with("1.7."),
        "{}",
        library().version()
    );
}

#[test]
fn one_engine_for_each_target_and_one_for_all() {
    let mut builder = Builder::parse(&library(), &data("half.onnx")).unwrap();
    let sizes: Vec<_> = builder.inputs()[0].dims.iter().map(Dim::fixed).collect();
    assert_eq!(sizes, [None, Some(4)]);
    assert_eq!(
        (
            builder.inputs()[0].element,
            builder.outputs()[0].name.as_str()
        ),
        ("f16", "y")
    );
    let shapes = InputShapes {
        name: "x".into(),
        min: vec![1, 4],
        opt: vec![2, 4],
        max: vec![8, 4],
    };
    for names in [
        &["sm89"][..],
        &["sm120"],
        &["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"],
    ] {
        let engine = builder
            .build(&targets(names), &[vec![shapes.clone()]], 1)
            .unwrap();
        assert!(
            engine.bytes().len() > 1000,
            "{names:?}: {}",
            engine.bytes().len()
        );
    }
}

#[test]
fn profiles_that_do_not_fit_are_refused() {
    let mut builder = Builder::parse(&library(), &data("half.onnx")).unwrap();
    let shapes = |name: &str, min: usize, opt: usize, width: usize| InputShapes {
        name: name.into(),
        min: vec![min, width],
        opt: vec![opt, width],
        max: vec![8, width],
    };
    for wrong in [
        shapes("z", 1, 2, 4),
        shapes("x", 3, 2, 4),
        shapes("x", 1, 9, 4),
        shapes("x", 1, 2, 5),
    ] {
        let error = builder
            .build(&targets(&["sm89"]), &[vec![wrong]], 1)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("half.onnx: profile of input"), "{error}");
    }
    // No profile at all for a varying axis: TensorRT's own words.
    let error = builder
        .build(&targets(&["sm89"]), &[], 1)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("could not build the engine:") && error.contains("profile"),
        "{error}"
    );
}

#[test]
fn all_parser_errors_are_told_not_only_the_first() {
    let error = Builder::parse(&library(), &data("unsupported.onnx"))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("could not parse the ONNX file"), "{error}");
    assert!(
        error.contains("Bernoulli `coin`") && error.contains("Multinomial `dice`"),
        "{error}"
    );
}

#[test]
fn files_are_refused_before_tensorrt_can_end_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.onnx");
    fs::write(&garbage, [0x3a, 0xff, 0xff]).unwrap();
    for (file, expected) in [
        (data("foreign.onnx"), "1 nodes of mlac::LatentAttention"),
        (
            data("foreign_nested.onnx"),
            "1 nodes of mlac::LatentAttention",
        ),
        (garbage, "expected an ONNX file"),
        (folder.path().join("none.onnx"), "cannot read the ONNX file"),
    ] {
        let error = Builder::parse(&library(), &file).err().unwrap().to_string();
        assert!(error.contains(expected), "{file:?}: {error}");
    }
}

fn options(names: &[&str]) -> BuildOptions {
    let profiles = Profiles {
        max_batch: 2,
        max_context: 16,
        max_prefill: 8,
    };
    BuildOptions {
        product: Product::Rtx,
        targets: targets(names),
        profiles,
        threads: 1,
        timing_cache: None,
    }
}

/// A copy of the toy's two graphs with a configuration file.
fn toy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["decoder.onnx", "prefill.onnx"] {
        fs::copy(data("toy").join(name), folder.path().join(name)).unwrap();
    }
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    folder
}

#[test]
fn a_folder_becomes_engines_with_a_manifest_that_notices_every_change() {
    let (onnx, work) = (toy(), tempfile::tempdir().unwrap());
    let out = work.path().join("engines");
    let mut seen = Vec::new();
    let report = build_engines(
        onnx.path(),
        &out,
        &options(&["sm89", "sm120"]),
        &mut |progress| {
            seen.push(progress.clone());
        },
    )
    .unwrap();
    assert_eq!(
        seen.iter()
            .filter(|progress| matches!(progress, BuildProgress::Building { count: 4, .. }))
            .count(),
        4
    );
    assert_eq!(report.engines.len(), 4);

    let manifest = Manifest::read(&out).unwrap();
    assert_eq!(manifest, report.manifest);
    assert!(!manifest.verified_on_gpu);
    assert_eq!(manifest.targets, ["sm89", "sm120"]);
    let cache: Vec<usize> = manifest
        .cache
        .iter()
        .map(CacheLayout::numbers_per_token)
        .collect();
    assert_eq!(cache, [8, 3]);
    let sources: Vec<&str> = manifest
        .sources
        .iter()
        .map(|source| source.file.as_str())
        .collect();
    assert_eq!(sources, ["config.json", "decoder.onnx", "prefill.onnx"]);
    for engine in &manifest.engines {
        assert_eq!(
            fs::metadata(out.join(&engine.file)).unwrap().len(),
            engine.bytes
        );
    }
    assert_eq!(manifest.check(&out, onnx.path()).unwrap(), []);

    fs::write(onnx.path().join("config.json"), "{ }").unwrap();
    fs::remove_file(onnx.path().join("prefill.onnx")).unwrap();
    let engine = out.join(&manifest.engines[0].file);
    let mut bytes = fs::read(&engine).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&engine, bytes).unwrap();
    let stale = manifest.check(&out, onnx.path()).unwrap();
    let names: Vec<String> = stale
        .iter()
        .map(|stale| stale.path.file_name().unwrap().display().to_string())
        .collect();
    assert_eq!(
        names,
        ["config.json", "prefill.onnx", "prefill.sm89.engine"]
    );
    assert_eq!(stale[1].found, None);
    assert!(
        stale[0].to_string().contains("expected sha256")
            && stale[0].to_string().contains("mlac build")
    );

    let left: Vec<_> = fs::read_dir(work.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["engines"]);
}

#[test]
fn one_graph_alone_carries_both_profiles() {
    let (onnx, work) = (toy(), tempfile::tempdir().unwrap());
    fs::remove_file(onnx.path().join("prefill.onnx")).unwrap();
    let report = build_engines(
        onnx.path(),
        &work.path().join("out"),
        &options(&["sm89"]),
        &mut |_| {},
    )
    .unwrap();
    let names: Vec<&str> = report.manifest.engines[0]
        .profiles
        .iter()
        .map(|profile| profile.name.as_str())
        .collect();
    assert_eq!(names, ["prefill", "decode"]);
}

#[test]
fn what_cannot_be_built_leaves_nothing_behind() {
    let (onnx, work) = (toy(), tempfile::tempdir().unwrap());
    fs::copy(data("unsupported.onnx"), onnx.path().join("decoder.onnx")).unwrap();
    let out = work.path().join("engines");
    let build = |onnx: &Path, out: &Path, names: &[&str]| {
        build_engines(onnx, out, &options(names), &mut |_| {})
            .err()
            .unwrap()
            .to_string()
    };
    // prefill.onnx is fine and is built first.
    assert!(build(onnx.path(), &out, &["sm89"]).contains("could not parse the ONNX file"));
    assert!(build(onnx.path(), &out, &["sm90"]).contains("enterprise TensorRT"));
    assert!(build(onnx.path(), &out, &[]).contains("at least one"));
    assert!(build(work.path(), &out, &["sm89"]).contains("a folder with decoder.onnx"));
    assert_eq!(fs::read_dir(work.path()).unwrap().count(), 0);
    assert!(build(onnx.path(), work.path(), &["sm89"]).contains("does not exist yet"));
}

#[test]
fn a_manifest_from_elsewhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.json");
    let form = |format: u32, file: &str| {
        format!(
            r#"{{"format":{format},"tool":"t","runtime":"r","verified_on_gpu":false,"targets":[],"cache":[],
            "sources":[{{"file":"{file}","bytes":0,"sha256":""}}],"engines":[]}}"#
        )
    };
    for (text, expected) in [
        ("{".to_owned(), "a manifest that `mlac build` wrote"),
        (form(2, "a"), "format: expected 1, found 2"),
        (form(1, "../../etc/passwd"), "plain file names"),
        (form(1, "/etc/passwd"), "plain file names"),
        (form(1, ".."), "plain file names"),
        (form(1, ""), "plain file names"),
    ] {
        fs::write(&path, text).unwrap();
        let error = Manifest::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    fs::write(&path, form(1, "a.onnx")).unwrap();
    Manifest::read(folder.path()).unwrap();
}
