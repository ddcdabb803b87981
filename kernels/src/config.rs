//! What was chosen for a request: kernel, tiles, stages, division of the work, and why.

use std::fmt;

use mlac_model::Refusal;
use serde::{Deserialize, Serialize};

use crate::desc::{Attention, AttentionDesc, CacheDtype};

/// Which source computes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kernel {
    /// `mla_sm90.cuh`: TMA, mbarriers, wgmma.
    LatentWgmma,
    /// `mla_mma.cuh`: cp.async, ldmatrix, mma.sync.
    LatentMma,
    /// `gqa_sm90.cuh`: the baseline, with TMA and wgmma.
    GroupedWgmma,
    /// `gqa_mma.cuh`: the baseline, with mma.sync.
    GroupedMma,
}

impl Kernel {
    /// The file of the source.
    pub fn file(self) -> &'static str {
        match self {
            Self::LatentWgmma => "mla_sm90.cuh",
            Self::LatentMma => "mla_mma.cuh",
            Self::GroupedWgmma => "gqa_sm90.cuh",
            Self::GroupedMma => "gqa_mma.cuh",
        }
    }
}

/// A choice for an [`AttentionDesc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttentionConfig {
    /// The source.
    pub kernel: Kernel,
    /// Cached tokens in a tile.
    pub tile: u32,
    /// Heads in a row tile, of one query token. GQA: query heads of a KV head.
    pub head_tile: u32,
    /// Row tiles that a CTA computes on the same cache tiles.
    pub group: u32,
    /// Independent streams of tiles in a CTA, merged at its end: warpgroups, or warps.
    pub streams: u32,
    /// Warps that divide a row group's tokens and columns (`LatentMma`), warpgroups that divide the columns (`LatentWgmma`).
    pub column_groups: u32,
    /// Tiles in flight in shared memory (`GroupedMma`: of each warp). FP8 caches: as they lie in the cache.
    pub stages: u32,
    /// FP8 caches: dequantised tiles that each set of computing warps turns over; else 0.
    pub buffers: u32,
    /// Threads of a CTA.
    pub threads: u32,
    /// Dynamic shared memory of a CTA, in bytes.
    pub shared_bytes: u32,
    /// Whether a plan divides long caches among CTAs (split KV); else a CTA takes whole units.
    pub planned: bool,
    /// Fewest tiles in a piece of a divided unit.
    pub min_split: u32,
    /// Why, one sentence for each decision.
    pub reasons: Vec<String>,
}

/// Tokens below which a piece of a divided cache is not worth its merge: a guess, which `gpu-check` measures.
pub const MIN_SPLIT_TOKENS: u32 = 512;
const MAX_STAGES: u32 = 8;
/// Factors of a dequantised tile's tokens, and their logarithms.
const SCALES_BYTES: u32 = 64 * 8;

impl AttentionConfig {
    /// Chooses for a request.
    ///
    /// # Errors
    /// When no kernel computes it, or no tile of it fits into shared memory.
    pub fn choose(desc: &AttentionDesc) -> Result<Self, Refusal> {
        desc.check()?;
        let mut config = match desc.attention {
            Attention::Latent { kv_lora_rank, .. } if desc.arch.has_wgmma() => {
                Self::latent_wgmma(desc, kv_lora_rank)
            }
            Attention::Latent { .. } => Self::latent_mma(desc)?,
            Attention::Grouped { kv_heads, head_dim } if desc.arch.has_wgmma() => {
                Self::grouped_wgmma(desc, kv_heads, head_dim)
            }
            Attention::Grouped { kv_heads, head_dim } => {
                Self::grouped_mma(desc, kv_heads, head_dim)
            }
        };
        config.divide(desc);
        let limit = desc.arch.shared_memory();
        if config.shared_bytes > limit {
            return Err(too_large(desc, config.shared_bytes));
        }
        Ok(config)
    }

    fn latent_wgmma(desc: &AttentionDesc, rank: u32) -> Self {
        let row_tiles = desc.query_tokens * desc.query_heads.div_ceil(64);
        let column_groups = if rank > 256 { 2 } else { 1 };
        let group = if row_tiles >= 2 && column_groups == 1 {
            2
        } else {
            1
        };
        let shared = group == 2 || column_groups == 2;
        let limit = desc.arch.shared_memory();
        let tile = latent_tile_bytes(desc);
        // Queries, what lies beside the stages, a stage.
        let bytes = |buffers: u32, stages: u32| {
            let rest = 1024 + 8 * (2 * stages + 2);
            let dequantised = buffers * if shared { 1 } else { 2 };
            let stage = if buffers == 0 {
                tile
            } else {
                desc.page_bytes() as u32
            };
            group * tile + dequantised * (tile + SCALES_BYTES) + stages * stage + rest
        };
        // Dequantised tiles: two where warpgroups share them and there is room, so that the next is made while one is multiplied.
        let buffers = match desc.cache {
            CacheDtype::Same => 0,
            CacheDtype::E4m3 if shared && bytes(2, 2) <= limit => 2,
            CacheDtype::E4m3 => 1,
        };
        let stages = (2..=MAX_STAGES)
            .rev()
            .find(|&stages| bytes(buffers, stages) <= limit)
            .unwrap_or(2);
        let shared_bytes = bytes(buffers, stages);
        let mut reasons = vec![
            "wgmma: the output of 64 heads fits into a warpgroup's registers up to a latent of 256"
                .to_owned(),
        ];
        reasons.push(if column_groups == 2 {
            "beyond that two warpgroups share every cache tile and row tile: each multiplies the scores of half of the tokens and half of the values' columns, and they exchange maxima and weights".to_owned()
        } else if group == 2 {
            format!("{row_tiles} row tiles: two share every cache tile, one for each computing warpgroup")
        } else {
            "one row tile: the two computing warpgroups take alternate cache tiles and merge at the end".to_owned()
        });
        if buffers > 0 {
            reasons.push(format!(
                "e4m3 becomes f16 in shared memory, {} dequantised: {} of {tile} bytes",
                if shared {
                    "each tile once, by both warpgroups,"
                } else {
                    "each tile by the warpgroup that takes it,"
                },
                buffers * if shared { 1 } else { 2 },
            ));
        }
        let stage = if buffers == 0 {
            tile
        } else {
            desc.page_bytes() as u32
        };
        reasons.push(format!(
            "{stages} stages of {stage} bytes: {shared_bytes} of {limit} bytes of shared memory"
        ));
        Self {
            kernel: Kernel::LatentWgmma,
            tile: 64,
            head_tile: 64,
            group,
            streams: if shared { 1 } else { 2 },
            column_groups,
            stages,
            buffers,
            threads: 384,
            shared_bytes,
            planned: true,
            min_split: 1,
            reasons,
        }
    }

    fn latent_mma(desc: &AttentionDesc) -> Result<Self, Refusal> {
        let pitch = (desc.row() + 8) * 2;
        let buffers = u32::from(desc.cache == CacheDtype::E4m3);
        let bytes = |heads: u32, tile: u32, stages: u32, warps: u32| {
            let tiles = if buffers == 0 {
                stages * tile * pitch
            } else {
                // Dequantised, with factor and its logarithm for each token; then as they lie in the cache.
                tile * (pitch + 8) + stages * tile * desc.cache_bytes_per_token() as u32
            };
            heads * pitch + tiles + heads * (tile + 8) * 2 + warps * 16 * 4
        };
        let limit = desc.arch.shared_memory();
        // Head tiles first: each reads the whole cache. Then the tile, then the stages.
        let mut best = None;
        for head_tiles in 1..=8 {
            let heads = desc.query_heads.div_ceil(head_tiles).next_multiple_of(16);
            for tile in [32, 16] {
                let groups = heads / 16;
                let column_groups = if groups <= 2 && tile == 32 { 4 } else { 2 };
                let warps = groups * column_groups;
                let fits = (2..=4)
                    .rev()
                    .find(|&stages| bytes(heads, tile, stages, warps) <= limit);
                if let (Some(stages), None, true) = (fits, &best, heads <= 64) {
                    best = Some((heads, tile, stages, column_groups, warps));
                }
            }
        }
        let Some((heads, tile, stages, column_groups, warps)) = best else {
            return Err(too_large(desc, bytes(16, 16, 2, 2)));
        };
        let shared = bytes(heads, tile, stages, warps);
        let mut reasons = vec![format!("mma.sync: {} has no wgmma", desc.arch)];
        reasons.push(format!(
            "{heads} heads a row tile, tiles of {tile} tokens: the fewest row tiles, then the most tokens, of which two stages fit"
        ));
        if buffers > 0 {
            reasons.push("e4m3 becomes f16 in shared memory, one tile at a time".to_owned());
        }
        reasons.push(format!(
            "{stages} stages: {shared} of {limit} bytes of shared memory"
        ));
        Ok(Self {
            kernel: Kernel::LatentMma,
            tile,
            head_tile: heads,
            group: 1,
            streams: 1,
            column_groups,
            stages,
            buffers,
            threads: warps * 32,
            shared_bytes: shared,
            planned: true,
            min_split: 1,
            reasons,
        })
    }

    fn grouped_wgmma(desc: &AttentionDesc, kv_heads: u32, head_dim: u32) -> Self {
        let heads = desc.query_heads / kv_heads;
        let rows = heads * desc.query_tokens;
        let stage = 2 * 64 * head_dim * 2;
        let limit = desc.arch.shared_memory();
        let bytes = |stages: u32| stages * stage + rows * (head_dim * 4 + 8) + 8 * 2 * stages;
        let stages = (limit - bytes(0)) / (stage + 16);
        let shared_bytes = bytes(stages);
        Self {
            kernel: Kernel::GroupedWgmma,
            tile: 64,
            head_tile: heads,
            group: 1,
            streams: 2,
            column_groups: 1,
            stages,
            buffers: 0,
            threads: 384,
            shared_bytes,
            planned: true,
            min_split: 1,
            reasons: vec![
                format!(
                    "wgmma: {rows} rows of a KV head are padded to 64, and reading the cache still takes the longest"
                ),
                format!(
                    "{stages} stages of {stage} bytes, keys and values of 64 tokens, by TMA: {shared_bytes} of {limit} bytes of shared memory"
                ),
            ],
        }
    }

    fn grouped_mma(desc: &AttentionDesc, kv_heads: u32, head_dim: u32) -> Self {
        let heads = desc.query_heads / kv_heads;
        let blocks = (heads * desc.query_tokens).div_ceil(16);
        let tile = 32;
        let stage = 2 * tile * head_dim * 2;
        let limit = desc.arch.shared_memory();
        let merge = |warps: u32| warps * blocks * 16 * 8;
        let fits = |warps: u32, stages: u32| warps * stages * stage + merge(warps) <= limit;
        // A warp's result takes its ring at the end.
        let least = (blocks * 16 * head_dim * 4).div_ceil(stage).max(2);
        let (warps, stages) = [
            (8, 3),
            (4, 6),
            (4, 5),
            (4, 4),
            (4, 3),
            (8, 2),
            (4, 2),
            (2, 4),
        ]
        .into_iter()
        .map(|(warps, stages): (u32, u32)| (warps, stages.max(least)))
        .find(|&(warps, stages)| fits(warps, stages))
        .unwrap_or((1, least));
        let shared = warps * stages * stage + merge(warps);
        Self {
            kernel: Kernel::GroupedMma,
            tile,
            head_tile: heads,
            group: 1,
            streams: warps,
            column_groups: 1,
            stages,
            buffers: 0,
            threads: warps * 32,
            shared_bytes: shared,
            planned: true,
            min_split: 1,
            reasons: vec![
                format!(
                    "mma.sync: {} rows of a KV head fill {blocks} block{} of 16, and reading the cache is what takes the time",
                    heads * desc.query_tokens,
                    if blocks == 1 { "" } else { "s" }
                ),
                format!(
                    "{warps} warps with {stages} private stages of {stage} bytes: {shared} of {limit} bytes of shared memory"
                ),
            ],
        }
    }

    /// The same with another smallest piece of a divided cache, to measure it; what is undivided stays so.
    #[must_use]
    pub fn with_min_split(mut self, tokens: u32) -> Self {
        if self.planned {
            self.min_split = tokens.div_ceil(self.tile);
            self.reasons.pop();
            self.reasons.push(split_reason(self.min_split * self.tile));
        }
        self
    }

    /// Whether and how finely the cache is divided.
    fn divide(&mut self, desc: &AttentionDesc) {
        self.min_split = MIN_SPLIT_TOKENS.div_ceil(self.tile);
        if let Some(window) = desc.window {
            // A span of n tokens touches at most ceil((n - 1) / tile) + 1 tiles.
            let span = window + desc.query_tokens - 1;
            let tiles = (span - 1).div_ceil(self.tile) + 1;
            if tiles <= self.min_split {
                self.planned = false;
                self.reasons.push(format!(
                    "window {window}: at most {tiles} tiles, one CTA takes them all and nothing is merged"
                ));
                return;
            }
        }
        self.reasons.push(split_reason(self.min_split * self.tile));
    }

    /// Units of work of a request: row-tile groups, or KV heads.
    pub fn units(&self, desc: &AttentionDesc) -> u32 {
        match desc.attention {
            Attention::Latent { .. } => {
                (desc.query_tokens * desc.query_heads.div_ceil(self.head_tile)).div_ceil(self.group)
            }
            Attention::Grouped { kv_heads, .. } => kv_heads,
        }
    }

    /// Rows of a unit in the buffers of divided units.
    pub fn unit_rows(&self, desc: &AttentionDesc) -> u32 {
        match desc.attention {
            Attention::Latent { .. } => self.head_tile * self.group,
            Attention::Grouped { .. } => self.head_tile * desc.query_tokens,
        }
    }

    /// Whether `LatentWgmma` multiplies the scores of a tile while it does the values of the one before.
    fn overlaps(&self) -> bool {
        self.stages > 2 && self.buffers == 0
    }

    /// Tensor-core and TMA instructions that the disassembly of the decode kernel must show.
    pub fn expected_instructions(&self, desc: &AttentionDesc) -> Expected {
        match (self.kernel, desc.attention) {
            (
                Kernel::LatentWgmma,
                Attention::Latent {
                    kv_lora_rank,
                    rope_dim,
                },
            ) => Expected {
                // The first tile's scores and the last tile's values stand outside of the loop that overlaps tiles.
                hgmma: if self.overlaps() { 2 } else { 1 } * ((kv_lora_rank + rope_dim) / 16 + 4),
                // Pages of an FP8 cache are copied whole, without a tensor map.
                utmaldg: (u32::from(self.buffers == 0) + self.group)
                    * (kv_lora_rank / 64 + rope_dim.div_ceil(64)),
                ublkcp: u32::from(self.buffers > 0),
                hmma: 0,
            },
            (Kernel::LatentMma, _) => {
                let scores = self.tile / self.column_groups / 8;
                let values = self.tile / 16 * desc.out_row() / self.column_groups / 8;
                Expected {
                    hgmma: 0,
                    utmaldg: 0,
                    ublkcp: 0,
                    hmma: scores + values,
                }
            }
            (Kernel::GroupedWgmma, _) => Expected {
                hgmma: desc.row() / 16 + 4,
                utmaldg: 2 * (desc.row() / 64),
                ublkcp: 0,
                hmma: 0,
            },
            (Kernel::GroupedMma | Kernel::LatentWgmma, _) => {
                let row = desc.row();
                let blocks = (self.head_tile * desc.query_tokens).div_ceil(16);
                Expected {
                    hgmma: 0,
                    utmaldg: 0,
                    ublkcp: 0,
                    hmma: blocks * (self.tile / 8 * row / 16 + self.tile / 16 * row / 8),
                }
            }
        }
    }
}

/// Instructions of the decode kernel: exactly so many HGMMA, UTMALDG and UBLKCP, at least so many HMMA (loops may be unrolled).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Warpgroup multiplications.
    pub hgmma: u32,
    /// TMA loads of boxes.
    pub utmaldg: u32,
    /// TMA copies of stretches.
    pub ublkcp: u32,
    /// Warp multiplications.
    pub hmma: u32,
}

/// Bytes of one latent tile of 64 tokens in 64-column tiles of 16 bits.
fn latent_tile_bytes(desc: &AttentionDesc) -> u32 {
    match desc.attention {
        Attention::Latent {
            kv_lora_rank,
            rope_dim,
        } => (kv_lora_rank / 64 + rope_dim.div_ceil(64)) * 64 * 128,
        Attention::Grouped { .. } => 0,
    }
}

fn split_reason(tokens: u32) -> String {
    format!("split KV: pieces of at least {tokens} tokens, divided on the device")
}

fn too_large(desc: &AttentionDesc, bytes: u32) -> Refusal {
    Refusal::new(
        format!("kernel for {desc}"),
        format!(
            "at most {} bytes of shared memory",
            desc.arch.shared_memory()
        ),
        format!("{bytes} bytes for its smallest tile"),
        "choose a smaller rank or rotary key",
    )
}

impl fmt::Display for AttentionConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: tiles of {} heads x {} tokens",
            self.kernel.file(),
            self.head_tile,
            self.tile
        )?;
        if self.group > 1 {
            write!(f, ", {} share a cache tile", self.group)?;
        }
        if self.streams > 1 {
            write!(f, ", {} streams", self.streams)?;
        }
        if self.column_groups > 1 {
            write!(f, ", {} column groups", self.column_groups)?;
        }
        write!(
            f,
            ", {} stages, {} threads, {} bytes of shared memory, {}",
            self.stages,
            self.threads,
            self.shared_bytes,
            if self.planned {
                format!("split KV from {} tiles", self.min_split)
            } else {
                "undivided".to_owned()
            }
        )?;
        for reason in &self.reasons {
            write!(f, "\n  - {reason}")?;
        }
        Ok(())
    }
}
