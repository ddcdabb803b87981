//! Every kernel compiled for every architecture, and looked into: no GPU is needed, the toolchain of `cargo xtask setup` is.
#![allow(
    clippy::unwrap_used,
    clippy::format_push_string,
    clippy::items_after_statements,
    clippy::needless_for_each,
    reason = "a test that cannot go on says why by panicking; its texts are short"
)]

use mlac_kernels::config::AttentionConfig;
use mlac_kernels::matmul::Matmul;
use mlac_kernels::{
    Arch, Attention, AttentionDesc, Cache, CacheDtype, Compiler, Dtype, KernelError, Mask, Report,
    Source, Toolchain,
};

/// The toolchain; a missing one fails the test with what was found, what is needed and what to do.
fn toolchain() -> (Toolchain, Compiler) {
    let toolchain = Toolchain::find().unwrap_or_else(|refusal| panic!("{refusal}"));
    let compiler = Compiler::load(&toolchain).unwrap_or_else(|error| panic!("{error}"));
    (toolchain, compiler)
}

/// Builds all, and fails with everything that any of them is not as it must be.
fn check(descs: &[AttentionDesc]) {
    let (toolchain, compiler) = toolchain();
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
            complaints.push(format!("{desc}: {complaint}"));
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

#[test]
fn latent_decode_of_every_rank_on_hopper() {
    let descs: Vec<AttentionDesc> = mlac_kernels::desc::RANKS
        .iter()
        .map(|&rank| gpt_oss(rank, Arch::Sm90a))
        .collect();
    check(&descs);
}

#[test]
fn latent_decode_on_the_other_architectures() {
    let descs: Vec<AttentionDesc> = [Arch::Sm80, Arch::Sm86, Arch::Sm89, Arch::Sm120]
        .into_iter()
        .flat_map(|arch| [128, 192, 256, 512].map(|rank| gpt_oss(rank, arch)))
        .collect();
    check(&descs);
}

fn e4m3(desc: AttentionDesc) -> AttentionDesc {
    AttentionDesc {
        cache: CacheDtype::E4m3,
        ..desc
    }
}

#[test]
fn fp8_caches_on_hopper() {
    let mut descs: Vec<AttentionDesc> = mlac_kernels::desc::RANKS
        .iter()
        .map(|&rank| e4m3(gpt_oss(rank, Arch::Sm90a)))
        .collect();
    descs.extend([
        AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..e4m3(gpt_oss(192, Arch::Sm90a))
        },
        AttentionDesc {
            query_tokens: 8,
            dtype: Dtype::F16,
            ..e4m3(gpt_oss(256, Arch::Sm90a))
        },
        AttentionDesc {
            window: Some(128),
            ..e4m3(AttentionDesc::latent(9, 192, 112, Arch::Sm90a))
        },
    ]);
    check(&descs);
}

#[test]
fn fp8_caches_on_the_other_architectures() {
    let descs: Vec<AttentionDesc> = [Arch::Sm80, Arch::Sm86, Arch::Sm89, Arch::Sm120]
        .into_iter()
        .flat_map(|arch| [192, 512].map(|rank| e4m3(gpt_oss(rank, arch))))
        .collect();
    check(&descs);
}

#[test]
fn verification_windows_types_and_odd_shapes() {
    let base = gpt_oss(192, Arch::Sm90a);
    let tree = |query_tokens, rank| AttentionDesc {
        mask: Mask::Tree,
        query_tokens,
        ..gpt_oss(rank, Arch::Sm90a)
    };
    check(&[
        AttentionDesc {
            dtype: Dtype::F16,
            ..base
        },
        AttentionDesc {
            window: Some(128),
            ..base
        },
        AttentionDesc {
            window: Some(4096),
            mask: Mask::Full,
            sinks: false,
            ..base
        },
        AttentionDesc {
            query_tokens: 3,
            query_heads: 128,
            ..base
        },
        AttentionDesc {
            query_tokens: 8,
            ..gpt_oss(256, Arch::Sm90a)
        },
        tree(2, 128),
        tree(8, 256),
        AttentionDesc {
            window: Some(128),
            ..tree(4, 192)
        },
        AttentionDesc::latent(9, 64, 32, Arch::Sm90a),
        AttentionDesc::latent(9, 192, 96, Arch::Sm90a),
        AttentionDesc::latent(9, 192, 96, Arch::Sm89),
        AttentionDesc {
            dtype: Dtype::F16,
            ..AttentionDesc::latent(40, 384, 128, Arch::Sm80)
        },
        AttentionDesc {
            dtype: Dtype::F16,
            ..tree(8, 512)
        },
    ]);
}

#[test]
fn grouped_decode() {
    let mut descs = Vec::new();
    for arch in Arch::ALL {
        let desc = AttentionDesc {
            sinks: true,
            ..AttentionDesc::grouped(64, 8, 64, arch)
        };
        descs.push(desc);
        descs.push(AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..desc
        });
    }
    let hopper = AttentionDesc {
        sinks: true,
        ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
    };
    descs.push(AttentionDesc {
        window: Some(128),
        ..hopper
    });
    descs.push(AttentionDesc {
        query_tokens: 4,
        dtype: Dtype::F16,
        ..hopper
    });
    descs.push(AttentionDesc {
        query_tokens: 4,
        ..AttentionDesc::grouped(32, 8, 128, Arch::Sm90a)
    });
    descs.push(AttentionDesc {
        query_tokens: 8,
        mask: Mask::Tree,
        ..hopper
    });
    descs.push(AttentionDesc {
        dtype: Dtype::F16,
        ..AttentionDesc::grouped(64, 1, 128, Arch::Sm90a)
    });
    descs.push(AttentionDesc {
        query_tokens: 4,
        ..AttentionDesc::grouped(32, 8, 128, Arch::Sm80)
    });
    descs.push(AttentionDesc::grouped(9, 3, 64, Arch::Sm86));
    check(&descs);
}

#[test]
fn the_dense_product() {
    let (toolchain, compiler) = toolchain();
    let folder = tempfile::tempdir().unwrap();
    let mut complaints = Vec::new();
    for arch in Arch::ALL {
        let matmul = Matmul::of(arch);
        let compiled = compiler
            .compile("matmul", &matmul.source(), arch)
            .unwrap_or_else(|error| panic!("{error}"));
        let path = folder.path().join(format!("{arch}.cubin"));
        std::fs::write(&path, compiled.cubin).unwrap();
        let report = Report::of(&toolchain, &path).unwrap();
        for complaint in report.against(
            &[Matmul::FUNCTION],
            matmul.threads,
            matmul.expected_instructions(),
            &compiled.log,
        ) {
            complaints.push(format!("{arch}: {complaint}"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// On every architecture, by a compiler that was loaded anew.
#[test]
fn two_builds_have_the_same_bytes() {
    for arch in Arch::ALL {
        let desc = gpt_oss(128, arch);
        let config = AttentionConfig::choose(&desc).unwrap();
        let source = Source::of(&desc, &config);
        let build = || toolchain().1.compile("twice", &source, arch).unwrap().cubin;
        let first = build();
        assert!(first.starts_with(b"\x7fELF"));
        assert!(first == build(), "{arch}: two builds differ");
    }
}

#[test]
fn the_checks_see_a_spill() {
    // A kernel with an array that is indexed at run time needs local memory.
    let (toolchain, compiler) = toolchain();
    let desc = gpt_oss(128, Arch::Sm80);
    let config = AttentionConfig::choose(&desc).unwrap();
    let source = Source {
        text: "extern \"C\" __global__ void mlac_decode(int* p) { int a[64]; for (int i = 0; i < 64; ++i) a[i] = i; \
               for (int i = 0; i < 64; ++i) a[p[i] & 63] += p[i]; p[0] = a[p[1] & 63]; }"
        .to_owned(),
        functions: vec!["mlac_decode"],
    };
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
        assert!(text.contains(part), "{part} in:\n{text}");
    }
}

#[test]
fn a_source_that_does_not_compile_shows_the_compilers_log() {
    let source = Source {
        text: "extern \"C\" __global__ void broken() { undefined_name = 1; }".to_owned(),
        functions: Vec::new(),
    };
    let error = toolchain()
        .1
        .compile("broken", &source, Arch::Sm90a)
        .unwrap_err();
    assert!(matches!(error, KernelError::Compile { .. }));
    let text = error.to_string();
    assert!(
        text.contains("kernel broken: NVRTC could not compile")
            && text.contains("identifier \"undefined_name\" is undefined"),
        "{text}"
    );
}

#[test]
fn a_damaged_entry_is_built_again() {
    let (_, compiler) = toolchain();
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

#[test]
fn requests_choices_and_prologues() {
    let hopper = gpt_oss(192, Arch::Sm90a);
    let mut text = String::new();
    for desc in [
        gpt_oss(128, Arch::Sm90a),
        hopper,
        gpt_oss(256, Arch::Sm90a),
        gpt_oss(512, Arch::Sm90a),
        AttentionDesc {
            query_tokens: 4,
            mask: Mask::Tree,
            ..hopper
        },
        AttentionDesc {
            window: Some(128),
            ..hopper
        },
        gpt_oss(512, Arch::Sm80),
        gpt_oss(512, Arch::Sm89),
        gpt_oss(192, Arch::Sm120),
        AttentionDesc::latent(9, 192, 96, Arch::Sm86),
        AttentionDesc {
            sinks: true,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
        },
        AttentionDesc::grouped(64, 8, 64, Arch::Sm89),
        e4m3(hopper),
        e4m3(gpt_oss(512, Arch::Sm90a)),
        AttentionDesc {
            query_tokens: 4,
            ..e4m3(hopper)
        },
        e4m3(gpt_oss(512, Arch::Sm89)),
    ] {
        let config = AttentionConfig::choose(&desc).unwrap();
        text.push_str(&format!("{desc}\n{}\n{config}\n\n", desc.slug()));
    }
    insta::assert_snapshot!("choices", text);
    let config = AttentionConfig::choose(&hopper).unwrap();
    insta::assert_snapshot!("source", Source::of(&hopper, &config).text);
}

#[test]
fn what_no_kernel_computes_is_refused() {
    let base = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
    let rank = |kv_lora_rank, rope_dim| AttentionDesc {
        attention: Attention::Latent {
            kv_lora_rank,
            rope_dim,
        },
        ..base
    };
    let mut text = String::new();
    for desc in [
        rank(100, 64),
        rank(576, 64),
        rank(192, 24),
        AttentionDesc { page: 16, ..base },
        AttentionDesc {
            query_heads: 0,
            ..base
        },
        AttentionDesc {
            query_heads: 129,
            ..base
        },
        AttentionDesc {
            query_tokens: 17,
            ..base
        },
        AttentionDesc {
            window: Some(0),
            ..base
        },
        AttentionDesc {
            window: Some(32),
            mask: Mask::Tree,
            ..base
        },
        AttentionDesc::grouped(64, 7, 64, Arch::Sm90a),
        AttentionDesc::grouped(64, 8, 80, Arch::Sm90a),
        AttentionDesc {
            query_tokens: 16,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)
        },
        AttentionDesc {
            query_tokens: 5,
            ..AttentionDesc::grouped(64, 8, 64, Arch::Sm80)
        },
        e4m3(AttentionDesc::grouped(64, 8, 64, Arch::Sm90a)),
    ] {
        text.push_str(&format!(
            "{}\n",
            AttentionConfig::choose(&desc).unwrap_err()
        ));
    }
    insta::assert_snapshot!(text);
}
