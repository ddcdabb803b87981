//! What a caller wants: the attention of one layer kind, its cache, its masks, its GPU.

use std::fmt;

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use crate::arch::Arch;

/// Tokens in a page of every cache.
pub const PAGE: u32 = 64;

/// Type of queries and output, and of the cache unless that is [`CacheDtype::E4m3`]; all arithmetic between is in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// 16-bit IEEE.
    F16,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

/// Type of the latents in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheDtype {
    /// As queries and output.
    Same,
    /// e4m3 with one f32 scale a token; the rotated key is f16 in units of that scale ([`crate::fp8`]). All multiplications are of f16.
    E4m3,
}

/// Which cached tokens a query token sees, apart from the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mask {
    /// All.
    Full,
    /// Those up to its own position; the query tokens are the last of the cache.
    Causal,
    /// All before the query tokens, and of these the ones whose bit is set in a word of its own (speculative decoding).
    Tree,
}

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "full",
            Self::Causal => "causal",
            Self::Tree => "tree",
        })
    }
}

/// What is cached for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// Multi-head latent attention, absorbed: one row `[latent | rotated key]` shared by all query heads; the values are the latent.
    Latent {
        /// `kv_lora_rank`: numbers in the latent.
        kv_lora_rank: u32,
        /// `qk_rope_head_dim`: numbers in the rotated key.
        rope_dim: u32,
    },
    /// Grouped queries: a key and a value for each KV head.
    Grouped {
        /// KV heads.
        kv_heads: u32,
        /// Numbers in a head.
        head_dim: u32,
    },
}

/// A request for an attention kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttentionDesc {
    /// What is cached.
    pub attention: Attention,
    /// Query heads.
    pub query_heads: u32,
    /// Query tokens of a request: 1 for decode, more to verify a draft.
    pub query_tokens: u32,
    /// Which tokens they see.
    pub mask: Mask,
    /// Sliding window: a token sees itself and the `window - 1` before.
    pub window: Option<u32>,
    /// Whether every query head has a sink, a logit that joins the denominator.
    pub sinks: bool,
    /// Type of queries and output.
    pub dtype: Dtype,
    /// Type of the latents in the cache.
    pub cache: CacheDtype,
    /// Tokens in a page of the cache.
    pub page: u32,
    /// The GPU.
    pub arch: Arch,
}

/// Latent ranks that a kernel exists for.
pub const RANKS: [u32; 8] = [64, 128, 192, 256, 320, 384, 448, 512];
const ROPES: [u32; 8] = [16, 32, 48, 64, 80, 96, 112, 128];
const HEAD_DIMS: [u32; 2] = [64, 128];
/// Most query tokens of a request.
pub const MAX_QUERY_TOKENS: u32 = 16;

/// Most query heads of one KV head times query tokens: the rows of a wgmma, or what a warp's registers hold of output and queries.
const fn grouped_rows(arch: Arch, head_dim: u32) -> u32 {
    match (arch.has_wgmma(), head_dim) {
        (true, _) => 64,
        (false, 64) => 32,
        (false, _) => 16,
    }
}

fn list(values: &[u32]) -> String {
    let texts: Vec<String> = values.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

impl AttentionDesc {
    /// MLA decode of one token, bf16, causal, without sinks and window.
    pub fn latent(query_heads: u32, kv_lora_rank: u32, rope_dim: u32, arch: Arch) -> Self {
        Self {
            attention: Attention::Latent {
                kv_lora_rank,
                rope_dim,
            },
            query_heads,
            query_tokens: 1,
            mask: Mask::Causal,
            window: None,
            sinks: false,
            dtype: Dtype::Bf16,
            cache: CacheDtype::Same,
            page: PAGE,
            arch,
        }
    }

    /// GQA decode of one token, bf16, causal, without sinks and window.
    pub fn grouped(query_heads: u32, kv_heads: u32, head_dim: u32, arch: Arch) -> Self {
        Self {
            attention: Attention::Grouped { kv_heads, head_dim },
            ..Self::latent(query_heads, 64, 64, arch)
        }
    }

    /// Refuses what no kernel computes.
    ///
    /// # Errors
    /// Names the number, what is taken, and what to do.
    pub fn check(&self) -> Result<(), Refusal> {
        let refuse = |what: &str, expected: String, found: u32, fix: &str| {
            Err(Refusal::new(what, expected, found.to_string(), fix))
        };
        match self.attention {
            Attention::Latent {
                kv_lora_rank,
                rope_dim,
            } => {
                if !RANKS.contains(&kv_lora_rank) {
                    return refuse(
                        "kernel kv_lora_rank",
                        format!("one of {}", list(&RANKS)),
                        kv_lora_rank,
                        "convert with --align 64, or with a --kv-lora-rank of that list",
                    );
                }
                if !ROPES.contains(&rope_dim) {
                    return refuse(
                        "kernel qk_rope_head_dim",
                        format!("one of {}", list(&ROPES)),
                        rope_dim,
                        "convert with a --rope-dim of that list",
                    );
                }
            }
            Attention::Grouped { kv_heads, head_dim } => {
                if !HEAD_DIMS.contains(&head_dim) {
                    return refuse(
                        "kernel head size",
                        format!("one of {}", list(&HEAD_DIMS)),
                        head_dim,
                        "run this layer's graph in another runtime",
                    );
                }
                if self.cache == CacheDtype::E4m3 {
                    return Err(Refusal::new(
                        "kernel cache type",
                        "the type of the queries for grouped queries",
                        "e4m3",
                        "leave the cache of this layer in 16 bits; FP8 is for latents",
                    ));
                }
                if kv_heads == 0 || !self.query_heads.is_multiple_of(kv_heads) {
                    return refuse(
                        "kernel KV heads",
                        format!("a divisor of {} query heads", self.query_heads),
                        kv_heads,
                        "correct num_key_value_heads",
                    );
                }
                let rows = self.query_heads / kv_heads * self.query_tokens;
                let most = grouped_rows(self.arch, head_dim);
                if rows > most {
                    return refuse(
                        "kernel query heads of a KV head times query tokens",
                        format!("at most {most} for heads of {head_dim} on {}", self.arch),
                        rows,
                        "verify fewer query tokens at a time",
                    );
                }
            }
        }
        if !(1..=128).contains(&self.query_heads) {
            return refuse(
                "kernel query heads",
                "1 to 128".into(),
                self.query_heads,
                "divide the heads among several launches",
            );
        }
        if !(1..=MAX_QUERY_TOKENS).contains(&self.query_tokens) {
            return refuse(
                "kernel query tokens",
                format!("1 to {MAX_QUERY_TOKENS}"),
                self.query_tokens,
                "verify fewer tokens at a time; prompts are for the prefill graph",
            );
        }
        if self.page != PAGE {
            return refuse(
                "kernel page size",
                format!("{PAGE} tokens"),
                self.page,
                "lay the cache out in pages of 64 tokens",
            );
        }
        if let Some(window) = self.window {
            if window == 0 {
                return refuse(
                    "kernel window",
                    "at least 1 token".into(),
                    window,
                    "leave the window out",
                );
            }
            if self.mask == Mask::Tree && window < 64 {
                return refuse(
                    "kernel window with a tree mask",
                    "at least 64 tokens, so that every draft token is within it".into(),
                    window,
                    "use the causal mask",
                );
            }
        }
        Ok(())
    }

    /// Numbers in a query row and in a key row: `kv_lora_rank + rope_dim`, or the head size.
    pub fn row(&self) -> u32 {
        match self.attention {
            Attention::Latent {
                kv_lora_rank,
                rope_dim,
            } => kv_lora_rank + rope_dim,
            Attention::Grouped { head_dim, .. } => head_dim,
        }
    }

    /// Numbers in an output row: `kv_lora_rank`, or the head size.
    pub fn out_row(&self) -> u32 {
        match self.attention {
            Attention::Latent { kv_lora_rank, .. } => kv_lora_rank,
            Attention::Grouped { head_dim, .. } => head_dim,
        }
    }

    /// KV heads; 1 for a latent.
    pub fn kv_heads(&self) -> u32 {
        match self.attention {
            Attention::Latent { .. } => 1,
            Attention::Grouped { kv_heads, .. } => kv_heads,
        }
    }

    /// Bytes that a token takes in the cache.
    pub fn cache_bytes_per_token(&self) -> u64 {
        match self.attention {
            Attention::Latent {
                kv_lora_rank,
                rope_dim,
            } if self.cache == CacheDtype::E4m3 => u64::from(kv_lora_rank + 2 * rope_dim + 4),
            Attention::Latent { .. } => u64::from(self.row()) * 2,
            Attention::Grouped { kv_heads, head_dim } => u64::from(kv_heads * head_dim) * 4,
        }
    }

    /// Bytes of a page: of the latent cache, or of keys (values take as many again).
    pub fn page_bytes(&self) -> u64 {
        let halves = match self.attention {
            Attention::Latent { .. } => 1,
            Attention::Grouped { .. } => 2,
        };
        u64::from(self.page) * self.cache_bytes_per_token() / halves
    }

    /// Type of the multiplications' factors.
    pub fn factor(&self) -> Dtype {
        match self.cache {
            CacheDtype::Same => self.dtype,
            CacheDtype::E4m3 => Dtype::F16,
        }
    }

    /// Floating-point operations for a cached token that is seen by all query tokens.
    pub fn operations_per_token(&self) -> u64 {
        2 * u64::from(self.query_heads * self.query_tokens) * u64::from(self.row() + self.out_row())
    }

    /// A name without spaces, for files.
    pub fn slug(&self) -> String {
        let shape = match self.attention {
            Attention::Latent {
                kv_lora_rank,
                rope_dim,
            } => format!("mla-r{kv_lora_rank}-d{rope_dim}-h{}", self.query_heads),
            Attention::Grouped { kv_heads, head_dim } => {
                format!("gqa-d{head_dim}-h{}-g{kv_heads}", self.query_heads)
            }
        };
        let window = self.window.map(|w| format!("-w{w}")).unwrap_or_default();
        let sinks = if self.sinks { "-sinks" } else { "" };
        let cache = match self.cache {
            CacheDtype::Same => "",
            CacheDtype::E4m3 => "-fp8",
        };
        format!(
            "{shape}-q{}-{}{window}{sinks}-{}{cache}-{}",
            self.query_tokens, self.mask, self.dtype, self.arch
        )
    }
}

impl fmt::Display for AttentionDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attention {
            Attention::Latent {
                kv_lora_rank,
                rope_dim,
            } => write!(
                f,
                "MLA, latent {kv_lora_rank} + rotated key {rope_dim}, {} heads",
                self.query_heads
            )?,
            Attention::Grouped { kv_heads, head_dim } => write!(
                f,
                "GQA, {} heads of {head_dim} on {kv_heads} KV heads",
                self.query_heads
            )?,
        }
        write!(
            f,
            ", {} query token{}, {} mask",
            self.query_tokens,
            if self.query_tokens == 1 { "" } else { "s" },
            self.mask
        )?;
        if let Some(window) = self.window {
            write!(f, ", window {window}")?;
        }
        write!(
            f,
            ", {}, {}{}, pages of {}, {}",
            if self.sinks { "sinks" } else { "no sinks" },
            self.dtype,
            match self.cache {
                CacheDtype::Same => "",
                CacheDtype::E4m3 => " on an e4m3 cache",
            },
            self.page,
            self.arch
        )
    }
}
