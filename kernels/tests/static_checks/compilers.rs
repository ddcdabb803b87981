//! What holds of both compilers, and nvcc's kernels.

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::{Arch, AttentionDesc, Cache, CompilerName, KernelError, Report, Source};

use super::{check, e4m3, gpt_oss, load};

/// By a compiler that was loaded anew; nvcc in another temporary folder, too.
#[test]
fn two_builds_have_the_same_bytes() {
    let nvrtc = Arch::ALL.map(|arch| (CompilerName::Nvrtc, arch));
    let nvcc = [Arch::Sm80, Arch::Sm90a].map(|arch| (CompilerName::Nvcc, arch));
    for (name, arch) in nvrtc.into_iter().chain(nvcc) {
        let desc = gpt_oss(128, arch);
        let config = AttentionConfig::choose(&desc).unwrap();
        let source = Source::of(&desc, &config);
        let build = || load(name).1.compile("twice", &source, arch).unwrap();
        let first = build();
        assert!(first.cubin.starts_with(b"\x7fELF"));
        assert!(first == build(), "{name}, {arch}: two builds differ");
    }
}

#[test]
fn nvcc_compiles_the_same_kernels() {
    let hopper = [128, 192, 256, 512].map(|rank| gpt_oss(rank, Arch::Sm90a));
    let others = [
        e4m3(gpt_oss(192, Arch::Sm90a)),
        gpt_oss(192, Arch::Sm89),
        AttentionDesc::grouped(64, 8, 64, Arch::Sm90a),
    ];
    check(&[&hopper[..], &others].concat(), CompilerName::Nvcc);
}

/// Neither compiler's cubin is taken for the other's.
#[test]
fn both_compilers_have_entries_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let desc = AttentionDesc::latent(16, 64, 16, Arch::Sm80);
    for built in [true, false] {
        for name in CompilerName::ALL {
            let cubin = cache.get(&desc, &load(name).1).unwrap();
            assert_eq!(cubin.built, built, "{name}");
            let version = cubin.entry.compiler_version();
            assert!(version.starts_with(&format!("{name} 13.")), "{version}");
        }
    }
    assert_eq!(cache.list().unwrap().len(), 2);
}

#[test]
fn the_checks_see_a_spill() {
    // A kernel with an array that is indexed at run time needs local memory.
    let desc = gpt_oss(128, Arch::Sm80);
    let config = AttentionConfig::choose(&desc).unwrap();
    let source = Source {
        text: "extern \"C\" __global__ void mlac_decode(int* p) { int a[64]; for (int i = 0; i < 64; ++i) a[i] = i; \
               for (int i = 0; i < 64; ++i) a[p[i] & 63] += p[i]; p[0] = a[p[1] & 63]; }"
        .to_owned(),
        functions: vec!["mlac_decode"],
    };
    for name in CompilerName::ALL {
        let (toolchain, compiler) = load(name);
        let compiled = compiler.compile("spill", &source, desc.arch).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spill.cubin");
        std::fs::write(&path, compiled.cubin).unwrap();
        let report = Report::of(&toolchain, &path).unwrap();
        let text = report.complaints(&desc, &config, &compiled.log).join("\n");
        for part in [
            "bytes of stack",
            "STL instructions",
            "0 HMMA instructions, expected at least",
            "no function mlac_plan",
        ] {
            assert!(text.contains(part), "{name}: {part} in:\n{text}");
        }
    }
}

#[test]
fn a_source_that_does_not_compile_shows_the_compilers_log() {
    let source = Source {
        text: "extern \"C\" __global__ void broken() { undefined_name = 1; }".to_owned(),
        functions: Vec::new(),
    };
    for name in CompilerName::ALL {
        let error = load(name)
            .1
            .compile("broken", &source, Arch::Sm90a)
            .unwrap_err();
        assert!(matches!(error, KernelError::Compile { .. }));
        let text = error.to_string();
        assert!(
            text.contains(&format!("kernel broken: {name} could not compile"))
                && text.contains("kernel.cu(1): error: identifier \"undefined_name\" is undefined"),
            "{text}"
        );
    }
}

#[test]
fn a_damaged_entry_is_built_again() {
    let (_, compiler) = load(CompilerName::Nvrtc);
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path().join("kernels"));
    assert!(cache.list().unwrap().is_empty());
    let desc = AttentionDesc::latent(16, 64, 16, Arch::Sm80);
    let get = || cache.get(&desc, &compiler).unwrap();
    let first = get();
    assert!(first.built);
    assert!(!get().built);
    let json = first.path.with_extension("json");
    for damage in ["flip", "cut", "gone", "json", "json gone"] {
        match damage {
            "flip" => {
                let mut bytes = first.bytes.clone();
                bytes[1000] ^= 1;
                std::fs::write(&first.path, bytes).unwrap();
            }
            "cut" => std::fs::write(&first.path, &first.bytes[..100]).unwrap(),
            "gone" => std::fs::remove_file(&first.path).unwrap(),
            "json" => std::fs::write(&json, "{").unwrap(),
            _ => std::fs::remove_file(&json).unwrap(),
        }
        if damage != "json gone" {
            let listed = cache.list().unwrap();
            let refusal = listed[0].as_ref().unwrap_err().to_string();
            assert!(refusal.contains("damaged or missing"), "{refusal}");
        }
        let again = get();
        assert!(again.built, "{damage}");
        assert_eq!(again.bytes, first.bytes, "{damage}");
    }
    assert_eq!(
        cache.list().unwrap()[0].as_ref().unwrap().entry,
        first.entry
    );
    // Nothing but the two files of the entry is left behind.
    assert_eq!(std::fs::read_dir(cache.folder()).unwrap().count(), 2);
}
