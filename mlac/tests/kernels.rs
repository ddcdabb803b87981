//! `mlac kernels`: builds without a GPU, refuses what no kernel computes, and sees a damaged cubin.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn mlac(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mlac"))
        .arg("kernels")
        .args(args)
        .env("MLAC_KERNEL_CACHE", folder.join("cache"))
        .output()
        .expect("mlac runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_kernel_is_built_listed_checked_and_its_damage_seen() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let build = [
        "build",
        "--arch",
        "sm_90a",
        "--kv-lora-rank",
        "192",
        "--sinks",
    ];
    let first = mlac(folder.path(), &build);
    let out = text(&first.stdout);
    assert!(first.status.success(), "{}{out}", text(&first.stderr));
    for part in [
        "MLA, latent 192 + rotated key 64, 64 heads",
        "compiled by NVRTC 13.0 in",
        "mlac_decode",
        "stack 0, local 0",
        "40 HGMMA, 8 UTMALDG, 0 UBLKCP, 0 HMMA, 0 LDL, 0 STL",
        "not run on a GPU",
    ] {
        assert!(out.contains(part), "{part} in:\n{out}");
    }
    let again = text(&mlac(folder.path(), &build).stdout);
    assert!(again.contains("from the cache"), "{again}");
    let list = mlac(folder.path(), &["list", "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
    assert_eq!(told[0]["request"]["query_heads"], 64);
    assert_eq!(told[0]["run_on_a_gpu"], false);
    assert_eq!(mlac(folder.path(), &["check"]).status.code(), Some(0));

    let file = told[0]["file"].as_str().expect("a file").to_owned();
    let mut bytes = fs::read(&file).expect("the cubin");
    bytes[2000] ^= 1;
    fs::write(&file, bytes).expect("the cubin");
    let check = mlac(folder.path(), &["check"]);
    assert_eq!(check.status.code(), Some(1));
    assert!(text(&check.stdout).contains("damaged or missing"));
}

#[test]
fn fp8_kernels_go_into_a_folder_of_ones_own() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let own = folder.path().join("own");
    let own = own.to_str().expect("a name");
    let build = [
        "build",
        "--arch",
        "sm_80",
        "--kv-lora-rank",
        "64",
        "--fp8",
        "--cache",
        own,
    ];
    let built = mlac(folder.path(), &build);
    let out = text(&built.stdout);
    assert!(built.status.success(), "{}{out}", text(&built.stderr));
    assert!(
        out.contains("bf16 on an e4m3 cache") && out.contains("e4m3 becomes f16"),
        "{out}"
    );
    for command in ["list", "check"] {
        let there = mlac(folder.path(), &[command, "--cache", own]);
        assert!(there.status.success());
        assert!(text(&there.stdout).contains("1 kernels in"));
        let elsewhere = mlac(folder.path(), &[command]);
        assert!(text(&elsewhere.stdout).contains("0 kernels in"));
    }
    let refused = mlac(
        folder.path(),
        &["build", "--arch", "sm_80", "--kv-heads", "8", "--fp8"],
    );
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn nvcc_compiles_where_it_is_asked_for_and_takes_no_flags_from_outside() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let build = |compiler: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_mlac"))
            .args([
                "kernels",
                "build",
                "--arch",
                "sm_80",
                "--compiler",
                compiler,
            ])
            .args(["--kv-lora-rank", "64"])
            .env("MLAC_KERNEL_CACHE", folder.path().join("cache"))
            .env("NVCC_APPEND_FLAGS", "--no-such-flag")
            .output()
            .expect("mlac runs");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    for how in [" in ", ", from the cache"] {
        for (compiler, name) in [("nvcc", "nvcc 13.0.88"), ("nvrtc", "NVRTC 13.0")] {
            let out = build(compiler);
            assert!(out.contains(&format!("compiled by {name}{how}")), "{out}");
        }
    }
    for command in ["list", "check"] {
        let told = text(&mlac(folder.path(), &[command]).stdout);
        assert!(
            told.contains("nvcc 13.0.88")
                && told.contains("NVRTC 13.0")
                && told.contains("2 kernels in"),
            "{told}"
        );
    }
}

#[test]
fn what_no_kernel_computes_is_refused_with_what_there_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (args, parts) in [
        (
            ["--arch", "sm_90a", "--kv-lora-rank", "100"],
            "expected one of 64, 128, 192, 256, 320, 384, 448, 512, found 100",
        ),
        (
            ["--arch", "sm_75", "--kv-lora-rank", "128"],
            "expected one of sm_80, sm_86, sm_89, sm_90a, sm_120",
        ),
    ] {
        let refused = mlac(folder.path(), &[&["build"], &args[..]].concat());
        assert_eq!(refused.status.code(), Some(2));
        let err = text(&refused.stderr);
        assert!(err.contains(parts) && err.contains("fix:"), "{err}");
    }
    assert!(!folder.path().join("cache").exists());
}

#[test]
fn a_missing_compiler_is_told() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let build = |compiler: &str| {
        let refused = Command::new(env!("CARGO_BIN_EXE_mlac"))
            .args([
                "kernels",
                "build",
                "--arch",
                "sm_90a",
                "--compiler",
                compiler,
            ])
            .env("MLAC_KERNEL_CACHE", folder.path())
            .env("MLAC_CUDA", folder.path())
            .output()
            .expect("mlac runs");
        assert_eq!(refused.status.code(), Some(2));
        text(&refused.stderr)
    };
    let err = build("nvrtc");
    assert!(
        err.contains("MLAC_CUDA") && err.contains("without lib/libnvrtc.so.13"),
        "{err}"
    );
    // NVRTC is there, and does not stand in for nvcc.
    for file in [
        "lib/libnvrtc.so.13",
        "lib/libnvrtc-builtins.so.13.0",
        "bin/cuobjdump",
        "bin/nvdisasm",
    ] {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, "").expect("a file");
    }
    let err = build("nvcc");
    assert!(
        err.contains("nvcc: expected a folder with bin/nvcc")
            && err.contains("without bin/nvcc, ")
            && err.contains("fix:"),
        "{err}"
    );
}
