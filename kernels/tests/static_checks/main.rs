//! Kernels compiled and looked into: no GPU is needed, the toolchain of `cargo xtask setup` is.
#![allow(
    clippy::unwrap_used,
    clippy::format_push_string,
    clippy::items_after_statements,
    clippy::needless_for_each,
    reason = "a test that cannot go on says why by panicking; its texts are short"
)]

mod choices;
mod compilers;
mod kernels;

use mlac_kernels::{
    Arch, AttentionDesc, Cache, CacheDtype, Compiler, CompilerName, Report, Toolchain,
};

/// A compiler of the toolchain; a missing one fails the test with what was found, what is needed and what to do.
fn load(name: CompilerName) -> (Toolchain, Compiler) {
    let toolchain = Toolchain::find().unwrap_or_else(|refusal| panic!("{refusal}"));
    let compiler = Compiler::load(&toolchain, name).unwrap_or_else(|error| panic!("{error}"));
    (toolchain, compiler)
}

/// Builds all, and fails with everything that any of them is not as it must be.
fn check(descs: &[AttentionDesc], name: CompilerName) {
    let (toolchain, compiler) = load(name);
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let mut complaints = Vec::new();
    for desc in descs {
        let cubin = cache
            .get(desc, &compiler)
            .unwrap_or_else(|error| panic!("{error}"));
        assert!(cubin.built);
        let report = Report::of(&toolchain, &cubin.path).unwrap_or_else(|error| panic!("{error}"));
        for complaint in report.complaints(desc, &cubin.entry.config, &cubin.entry.log) {
            complaints.push(format!("{name}, {desc}: {complaint}"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

fn gpt_oss(rank: u32, arch: Arch) -> AttentionDesc {
    AttentionDesc {
        sinks: true,
        ..AttentionDesc::latent(64, rank, 64, arch)
    }
}

fn e4m3(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        cache: CacheDtype::E4m3,
        ..desc
    }
}
