//! The check that goes to a GPU: a folder with one program and cubins that needs nothing but an NVIDIA driver.
//!
//! [`pack()`] fills the folder where the toolchain is; [`self_test`] checks it on any CPU; [`run()`] checks and times it on a GPU.

mod bench;
mod matmul;
mod pack;
mod parity;
mod peers;
mod results;
mod run;
mod sanitize;
mod svg;

pub use pack::{Pack, Packed, PackedProduct, self_test};
pub use peers::Peer;
pub use results::{AppendParity, Bench, Parity, Product, Results, Split};
pub use run::{Options, run};
pub use sanitize::Sanitized;

use crate::desc::{Attention, AttentionDesc, CacheDtype, Dtype, Mask};
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
        requests.push(AttentionDesc {
            cache: CacheDtype::E4m3,
            ..mla
        });
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
        AttentionDesc {
            cache: CacheDtype::E4m3,
            query_tokens: 4,
            ..mla
        },
        AttentionDesc {
            sinks: false,
            ..AttentionDesc::grouped(32, 8, 128, arch)
        },
    ]);
    requests
}

/// Requests whose smallest piece of a divided cache is tried, and the sizes in tokens.
pub fn split_requests(arch: Arch) -> (Vec<AttentionDesc>, [u32; 5]) {
    let mla = AttentionDesc {
        sinks: true,
        ..AttentionDesc::latent(64, 192, 64, arch)
    };
    let gqa = AttentionDesc {
        sinks: true,
        ..AttentionDesc::grouped(64, 8, 64, arch)
    };
    (vec![mla, gqa], [128, 256, 512, 1024, 2048])
}

/// Compiles every request of these architectures into `folder`, and puts the running program beside them.
///
/// # Errors
/// Without the toolchain, or when a static check says no.
pub fn pack(folder: &std::path::Path, archs: &[Arch]) -> Result<Pack> {
    pack::pack(folder, archs)
}
