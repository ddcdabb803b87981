//! The check that goes to a GPU: a folder with one program and cubins that needs nothing but an NVIDIA driver.
//!
//! [`pack()`] fills the folder where the toolchain is; [`self_test`] checks it on any CPU; [`run()`] checks and times it on a GPU.

mod pack;
mod run;

pub use pack::{Pack, Packed, self_test};
pub use run::{Bench, Options, Parity, Results, run};

use crate::desc::{Attention, AttentionDesc, Dtype, Mask};
use crate::{Arch, Result};

/// Every request that is packed for an architecture: GPT-OSS's attention as MLA and as GQA.
pub fn requests(arch: Arch) -> Vec<AttentionDesc> {
    let mut requests = Vec::new();
    let gqa = AttentionDesc {
        sinks: true,
        ..AttentionDesc::grouped(64, 8, 64, arch)
    };
    requests.push(gqa);
    requests.push(AttentionDesc {
        query_tokens: 4,
        ..gqa
    });
    requests.push(AttentionDesc {
        window: Some(128),
        ..gqa
    });
    for rank in [128, 192, 256, 384, 512] {
        let mla = AttentionDesc {
            sinks: true,
            ..AttentionDesc::latent(64, rank, 64, arch)
        };
        requests.push(mla);
        if rank <= 256 {
            requests.extend([
                AttentionDesc {
                    query_tokens: 2,
                    ..mla
                },
                AttentionDesc {
                    query_tokens: 4,
                    mask: Mask::Tree,
                    ..mla
                },
                AttentionDesc {
                    query_tokens: 8,
                    ..mla
                },
            ]);
        }
    }
    let mla = AttentionDesc {
        sinks: true,
        ..AttentionDesc::latent(64, 192, 64, arch)
    };
    requests.extend([
        AttentionDesc {
            window: Some(128),
            ..mla
        },
        AttentionDesc {
            dtype: Dtype::F16,
            ..mla
        },
        AttentionDesc {
            attention: Attention::Latent {
                kv_lora_rank: 64,
                rope_dim: 32,
            },
            query_heads: 9,
            sinks: false,
            ..mla
        },
        AttentionDesc {
            query_heads: 128,
            mask: Mask::Full,
            ..mla
        },
    ]);
    requests
}

/// Compiles every request of these architectures into `folder`, and puts the running program beside them.
///
/// # Errors
/// Without the toolchain, or when a static check says no.
pub fn pack(folder: &std::path::Path, archs: &[Arch]) -> Result<Pack> {
    pack::pack(folder, archs)
}
