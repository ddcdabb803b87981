//! Every kernel compiled for every architecture, and looked into.

use mlac_kernels::desc::RANKS;
use mlac_kernels::matmul::Matmul;
use mlac_kernels::{Arch, AttentionDesc, CompilerName, Dtype, Mask, Report};

use super::{e4m3, gpt_oss, load};

fn check(descs: &[AttentionDesc]) {
    super::check(descs, CompilerName::Nvrtc);
}

#[test]
fn latent_decode_of_every_rank_on_hopper() {
    let descs: Vec<AttentionDesc> = RANKS
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

#[test]
fn fp8_caches_on_hopper() {
    let mut descs: Vec<AttentionDesc> = RANKS
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
    let (toolchain, compiler) = load(CompilerName::Nvrtc);
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
