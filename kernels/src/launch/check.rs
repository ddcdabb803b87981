//! What a launch is called with, and whether the kernel takes it.

use mlac_model::Refusal;

use crate::config::AttentionConfig;
use crate::desc::{Attention, AttentionDesc, Mask};
use crate::params::{Address, AppendParams, DecodeParams, PlanParams};

/// Most CTAs that a plan divides work among: `kMaxParts` of `cuda/combine.cuh`.
pub(super) const MAX_PARTS: u32 = 1024;

/// As many parts as may be, of so many CTAs.
pub(crate) fn most_parts(ctas: u32) -> u32 {
    ctas.min(MAX_PARTS)
}

/// A stretch of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Region {
    address: Address,
    bytes: u64,
}

impl Region {
    /// A stretch that somebody else allocated.
    ///
    /// # Safety
    /// The device memory from `address` on must be `bytes` long, of the context that launches, and stay until the launch is done.
    #[expect(
        unsafe_code,
        reason = "the kernels read and write what this says is there"
    )]
    pub unsafe fn from_raw(address: Address, bytes: u64) -> Self {
        Self { address, bytes }
    }

    pub(crate) fn of(address: Address, bytes: u64) -> Self {
        Self { address, bytes }
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Regions of the workspace begin at multiples of this.
pub(super) const REGION_ALIGNMENT: u64 = 256;

/// A region of the workspace: its size is `fixed + per_request * batch` bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    /// As in [`DecodeParams`] and [`PlanParams`].
    pub(super) name: &'static str,
    pub(super) fixed: u64,
    pub(super) per_request: u64,
}

impl Size {
    fn bytes(self, batch: u32) -> u64 {
        self.fixed + self.per_request * u64::from(batch)
    }
}

/// The regions of the workspace in their order; all empty where nothing is divided.
pub(super) fn sizes(desc: &AttentionDesc, config: &AttentionConfig, parts: u32) -> [Size; 5] {
    let (parts, units) = if config.planned {
        (u64::from(parts), u64::from(config.units(desc)))
    } else {
        (0, 0)
    };
    let rows = 2 * parts * u64::from(config.unit_rows(desc));
    let one = u64::from(config.planned);
    [
        ("bounds", 8 * (parts + one), 0),
        ("owners", 0, 8 * units),
        ("costs", 4 * one, 4 * units),
        ("lse_part", 4 * rows, 0),
        ("out_part", 4 * rows * u64::from(desc.out_row()), 0),
    ]
    .map(|(name, fixed, per_request)| Size {
        name,
        fixed,
        per_request,
    })
}

/// Device memory that divided units need between plan, decode and combine, from one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workspace {
    bounds: u64,
    owners: u64,
    costs: u64,
    lse: u64,
    out: u64,
    bytes: u64,
}

impl Workspace {
    /// The layout for batches up to `batch` on `parts` CTAs.
    pub fn of(desc: &AttentionDesc, config: &AttentionConfig, batch: u32, parts: u32) -> Self {
        let mut next = 0;
        let mut begins = [0; 5];
        for (begin, size) in begins.iter_mut().zip(sizes(desc, config, parts)) {
            *begin = next;
            next = (next + size.bytes(batch)).next_multiple_of(REGION_ALIGNMENT);
        }
        let [bounds, owners, costs, lse, out] = begins;
        Self {
            bounds,
            owners,
            costs,
            lse,
            out,
            bytes: next,
        }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// One attention step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Call {
    /// `[batch, query tokens, query heads, row]`, in the request's type.
    pub q: Region,
    /// Latent `[pages, 64, row]`, for an FP8 cache pages as [`crate::fp8`] says, or keys `[pages, 64, KV heads, head size]`.
    pub cache: Region,
    /// Values as the keys; empty for a latent.
    pub values: Region,
    /// `[batch, query tokens, query heads, out row]`, written.
    pub out: Region,
    /// `[batch, query tokens, query heads]` f32, written.
    pub lse: Region,
    /// `[query heads]` f32; empty without sinks.
    pub sinks: Region,
    /// `[batch]` i32. Their values are on the device and trusted: each at most `page_stride * 64`.
    pub lengths: Region,
    /// `[batch, page_stride]` i32. Trusted: each below the number of pages.
    pub pages: Region,
    /// `[batch, query tokens]` u64; empty without a tree.
    pub tree: Region,
    /// [`Workspace::bytes`].
    pub workspace: Region,
    /// Requests.
    pub batch: u32,
    /// Pages of a request's table.
    pub page_stride: u32,
    /// Of the scores; positive.
    pub scale: f32,
}

/// Everything a launch needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grids {
    /// Parameters of decode and combine.
    pub decode: DecodeParams,
    /// Parameters of the plan.
    pub plan: PlanParams,
    /// CTAs of decode.
    pub decode_blocks: u32,
    /// CTAs of combine; 0 when nothing is divided.
    pub combine_blocks: u32,
    /// Pages in the cache.
    pub cache_pages: u64,
}

impl Call {
    /// Checks sizes, alignments and presence; `parts` is the number of CTAs that run at a time.
    ///
    /// # Errors
    /// Names the argument, what was expected, found, and what to do.
    pub fn check(
        &self,
        desc: &AttentionDesc,
        config: &AttentionConfig,
        parts: u32,
    ) -> Result<Grids, Refusal> {
        desc.check()?;
        let refuse = |name: &str, expected: String, found: String, fix: &str| {
            Err(Refusal::new(
                format!("launch of {}: {name}", desc.slug()),
                expected,
                found,
                fix,
            ))
        };
        if self.batch == 0 || self.batch > 65_535 {
            return refuse(
                "batch",
                "1 to 65535 requests".into(),
                self.batch.to_string(),
                "launch nothing for no requests, and several times for more",
            );
        }
        if !(1..=MAX_PARTS).contains(&parts) {
            return refuse(
                "parts",
                format!("1 to {MAX_PARTS}"),
                parts.to_string(),
                "take the device's number of multiprocessors",
            );
        }
        if self.page_stride == 0 || self.page_stride > (i32::MAX as u32) / desc.page {
            return refuse(
                "page_stride",
                format!("1 to {}", i32::MAX as u32 / desc.page),
                self.page_stride.to_string(),
                "a table of pages has a column for every 64 tokens of the longest request",
            );
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return refuse(
                "scale",
                "a positive number".into(),
                self.scale.to_string(),
                "1 / sqrt(head size) of the original model",
            );
        }
        let rows = u64::from(self.batch) * u64::from(desc.query_tokens * desc.query_heads);
        let batch = u64::from(self.batch);
        let page = desc.page_bytes();
        let workspace = Workspace::of(desc, config, self.batch, parts);
        let grouped = matches!(desc.attention, Attention::Grouped { .. });
        let absent = |wanted: bool, bytes: u64| if wanted { bytes } else { 0 };
        // Name, region, bytes that it must have (0: it must be empty), alignment.
        let regions = [
            ("q", self.q, rows * u64::from(desc.row()) * 2, 16),
            ("cache", self.cache, page, 16),
            ("values", self.values, absent(grouped, page), 16),
            ("out", self.out, rows * u64::from(desc.out_row()) * 2, 16),
            ("lse", self.lse, rows * 4, 4),
            (
                "sinks",
                self.sinks,
                absent(desc.sinks, u64::from(desc.query_heads) * 4),
                4,
            ),
            ("lengths", self.lengths, batch * 4, 4),
            (
                "pages",
                self.pages,
                batch * u64::from(self.page_stride) * 4,
                4,
            ),
            (
                "tree",
                self.tree,
                absent(
                    desc.mask == Mask::Tree,
                    batch * u64::from(desc.query_tokens) * 8,
                ),
                8,
            ),
            ("workspace", self.workspace, workspace.bytes, 256),
        ];
        for (name, region, bytes, align) in regions {
            if bytes == 0 && region.bytes != 0 && name != "workspace" {
                return refuse(
                    name,
                    "nothing: the request has none".into(),
                    format!("{} bytes", region.bytes),
                    "leave it out, or compile the kernel for a request that has it",
                );
            }
            if region.bytes < bytes {
                return refuse(
                    name,
                    format!("at least {bytes} bytes"),
                    format!("{} bytes", region.bytes),
                    "allocate what the shapes in its documentation need",
                );
            }
            if bytes > 0 && (region.address == 0 || !region.address.is_multiple_of(align)) {
                return refuse(
                    name,
                    format!("a device address that is a multiple of {align}"),
                    format!("{:#x}", region.address),
                    "pass the start of an allocation",
                );
            }
        }
        if !self.cache.bytes.is_multiple_of(page)
            || (grouped && self.values.bytes != self.cache.bytes)
        {
            return refuse(
                "cache",
                format!("whole pages of {page} bytes, as many of values as of keys"),
                format!("{} and {} bytes", self.cache.bytes, self.values.bytes),
                "allocate the cache in pages of 64 tokens",
            );
        }
        let cache_pages = self.cache.bytes / page;
        if cache_pages > i32::MAX as u64 {
            return refuse(
                "cache",
                format!("at most {} pages", i32::MAX),
                cache_pages.to_string(),
                "divide the cache",
            );
        }
        let units = config.units(desc) * self.batch;
        let at = |offset: u64| {
            if config.planned {
                self.workspace.address + offset
            } else {
                0
            }
        };
        Ok(Grids {
            decode: DecodeParams {
                q: self.q.address,
                cache: self.cache.address,
                values: self.values.address,
                out: self.out.address,
                lse: self.lse.address,
                out_part: at(workspace.out),
                lse_part: at(workspace.lse),
                sinks: self.sinks.address,
                lengths: self.lengths.address,
                pages: self.pages.address,
                tree: self.tree.address,
                bounds: at(workspace.bounds),
                owners: at(workspace.owners),
                batch: self.batch as i32,
                page_stride: self.page_stride as i32,
                parts: parts as i32,
                scale: self.scale,
            },
            plan: PlanParams {
                lengths: self.lengths.address,
                bounds: at(workspace.bounds),
                owners: at(workspace.owners),
                costs: at(workspace.costs),
                batch: self.batch as i32,
                parts: parts as i32,
            },
            decode_blocks: if config.planned { parts } else { units },
            combine_blocks: if config.planned { rows as u32 } else { 0 },
            cache_pages,
        })
    }
}

/// Rows for the cache of a latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Append {
    /// `[tokens, kv_lora_rank]`.
    pub latent: Region,
    /// `[tokens, rope_dim]`, not rotated.
    pub key: Region,
    /// `[table_rows, rope_dim / 2]` f32.
    pub cosines: Region,
    /// `[table_rows, rope_dim / 2]` f32.
    pub sines: Region,
    /// `[tokens]` i32: rows of the tables.
    pub positions: Region,
    /// `[tokens]` i32: page * 64 + row of the page; negative: none.
    pub slots: Region,
    /// `[pages, 64, row]`, or pages as [`crate::fp8`] says, written.
    pub cache: Region,
    /// Tokens.
    pub tokens: u32,
    /// Rows of the tables.
    pub table_rows: u32,
}

/// Tokens of a CTA of `mlac_append`: `kAppendWarps` of `cuda/append.cuh`.
const APPEND_TOKENS: u32 = 4;

impl Append {
    /// Checks sizes and alignments; the parameters and the number of CTAs.
    ///
    /// # Errors
    /// Names the argument, what was expected, found, and what to do.
    pub fn check(&self, desc: &AttentionDesc) -> Result<(AppendParams, u32), Refusal> {
        desc.check()?;
        let refuse = |name: &str, expected: String, found: String| {
            Err(Refusal::new(
                format!("append for {}: {name}", desc.slug()),
                expected,
                found,
                "pass what the shapes in its documentation need",
            ))
        };
        let Attention::Latent {
            kv_lora_rank,
            rope_dim,
        } = desc.attention
        else {
            return refuse("request", "a latent".into(), "grouped queries".into());
        };
        let limit = i32::MAX as u32 / 2;
        if !(1..=limit).contains(&self.tokens) || !(1..=limit).contains(&self.table_rows) {
            return refuse(
                "tokens and table rows",
                format!("1 to {limit}"),
                format!("{} and {}", self.tokens, self.table_rows),
            );
        }
        let (tokens, rank, rope) = (
            u64::from(self.tokens),
            u64::from(kv_lora_rank),
            u64::from(rope_dim),
        );
        let table = u64::from(self.table_rows) * rope * 2;
        let page = desc.page_bytes();
        for (name, region, bytes, align) in [
            ("latent", self.latent, tokens * rank * 2, 16),
            ("key", self.key, tokens * rope * 2, 2),
            ("cosines", self.cosines, table, 4),
            ("sines", self.sines, table, 4),
            ("positions", self.positions, tokens * 4, 4),
            ("slots", self.slots, tokens * 4, 4),
            ("cache", self.cache, page, 16),
        ] {
            if region.bytes < bytes {
                return refuse(
                    name,
                    format!("at least {bytes} bytes"),
                    format!("{} bytes", region.bytes),
                );
            }
            if region.address == 0 || !region.address.is_multiple_of(align) {
                return refuse(
                    name,
                    format!("a device address that is a multiple of {align}"),
                    format!("{:#x}", region.address),
                );
            }
        }
        let rows = self.cache.bytes / page * u64::from(desc.page);
        if !self.cache.bytes.is_multiple_of(page) || rows > i32::MAX as u64 {
            return refuse(
                "cache",
                format!("whole pages of {page} bytes, at most {} rows", i32::MAX),
                format!("{} bytes", self.cache.bytes),
            );
        }
        Ok((
            AppendParams {
                latent: self.latent.address,
                key: self.key.address,
                cosines: self.cosines.address,
                sines: self.sines.address,
                positions: self.positions.address,
                slots: self.slots.address,
                cache: self.cache.address,
                tokens: self.tokens as i32,
                table_rows: self.table_rows as i32,
                cache_rows: rows as i32,
            },
            self.tokens.div_ceil(APPEND_TOKENS),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arch, CacheDtype};

    type Change = fn(&mut Call);
    type AppendChange = fn(&mut Append);

    fn region(bytes: u64) -> Region {
        Region::of(0x1000_0000, bytes)
    }

    fn call(desc: &AttentionDesc, config: &AttentionConfig) -> Call {
        Call {
            q: region(2 * 64 * 256 * 2),
            cache: region(10 * 64 * 256 * 2),
            values: Region::default(),
            out: region(2 * 64 * 192 * 2),
            lse: region(2 * 64 * 4),
            sinks: region(64 * 4),
            lengths: region(8),
            pages: region(2 * 5 * 4),
            tree: Region::default(),
            workspace: region(Workspace::of(desc, config, 2, 132).bytes()),
            batch: 2,
            page_stride: 5,
            scale: 0.1,
        }
    }

    #[test]
    fn what_fits_is_laid_out_and_what_does_not_is_refused() {
        let desc = AttentionDesc {
            sinks: true,
            ..AttentionDesc::latent(64, 192, 64, Arch::Sm90a)
        };
        let config = AttentionConfig::choose(&desc).unwrap();
        let good = call(&desc, &config);
        let grids = good.check(&desc, &config, 132).unwrap();
        assert_eq!(
            (grids.decode_blocks, grids.combine_blocks, grids.cache_pages),
            (132, 128, 10)
        );
        let end = grids.decode.out_part + 2 * 132 * 64 * 192 * 4;
        assert_eq!(end, good.workspace.address + good.workspace.bytes);
        let changes: [(&str, Change); 13] = [
            ("q: expected at least 65536 bytes", |c| c.q.bytes -= 1),
            ("out: expected at least", |c| c.out.bytes = 0),
            (
                "q: expected a device address that is a multiple of 16",
                |c| c.q.address += 8,
            ),
            ("cache: expected a device address", |c| c.cache.address = 0),
            ("cache: expected whole pages", |c| c.cache.bytes += 2),
            ("values: expected nothing", |c| c.values.bytes = 1),
            ("sinks: expected at least 256 bytes", |c| {
                c.sinks = Region::default();
            }),
            ("tree: expected nothing", |c| c.tree.bytes = 16),
            ("batch: expected 1 to 65535", |c| c.batch = 0),
            ("pages: expected at least 48 bytes", |c| c.page_stride = 6),
            ("page_stride: expected", |c| c.page_stride = 0),
            ("scale: expected a positive number", |c| c.scale = f32::NAN),
            ("workspace: expected at least", |c| c.workspace.bytes -= 256),
        ];
        for (expected, change) in changes {
            let mut bad = good;
            change(&mut bad);
            let text = bad.check(&desc, &config, 132).unwrap_err().to_string();
            assert!(text.contains(expected), "{expected} in: {text}");
        }
        assert!(good.check(&desc, &config, 0).is_err());
        assert!(good.check(&desc, &config, 1025).is_err());
        // An FP8 page is 64 * (192 + 2 * 64 + 4) bytes.
        let e4m3 = AttentionDesc {
            cache: CacheDtype::E4m3,
            ..desc
        };
        let config = AttentionConfig::choose(&e4m3).unwrap();
        let mut fp8 = good;
        fp8.cache = region(3 * 20_736);
        assert_eq!(fp8.check(&e4m3, &config, 132).unwrap().cache_pages, 3);
        fp8.cache = good.cache;
        let text = fp8.check(&e4m3, &config, 132).unwrap_err().to_string();
        assert!(text.contains("whole pages of 20736 bytes"), "{text}");
        let window = AttentionDesc {
            window: Some(128),
            ..desc
        };
        let config = AttentionConfig::choose(&window).unwrap();
        let grids = good.check(&window, &config, 132).unwrap();
        assert_eq!((grids.decode_blocks, grids.combine_blocks), (2, 0));
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let desc = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
        let good = Append {
            latent: region(5 * 192 * 2),
            key: region(5 * 64 * 2),
            cosines: region(100 * 32 * 4),
            sines: region(100 * 32 * 4),
            positions: region(20),
            slots: region(20),
            cache: region(3 * 64 * 256 * 2),
            tokens: 5,
            table_rows: 100,
        };
        let (params, blocks) = good.check(&desc).unwrap();
        assert_eq!((params.cache_rows, blocks), (192, 2));
        let e4m3 = AttentionDesc {
            cache: CacheDtype::E4m3,
            ..desc
        };
        let mut fp8 = good;
        assert!(fp8.check(&e4m3).is_err());
        fp8.cache = region(2 * 20_736);
        assert_eq!(fp8.check(&e4m3).unwrap().0.cache_rows, 128);
        let changes: [(&str, AppendChange); 5] = [
            ("latent: expected at least 1920 bytes", |a| {
                a.latent.bytes -= 1;
            }),
            ("sines: expected at least 12800 bytes", |a| {
                a.sines.bytes = 0;
            }),
            ("cache: expected a device address", |a| a.cache.address = 0),
            ("cache: expected whole pages", |a| a.cache.bytes += 2),
            ("tokens and table rows: expected 1 to", |a| a.tokens = 0),
        ];
        for (expected, change) in changes {
            let mut bad = good;
            change(&mut bad);
            let text = bad.check(&desc).unwrap_err().to_string();
            assert!(text.contains(expected), "{expected} in: {text}");
        }
        let grouped = AttentionDesc::grouped(64, 8, 64, Arch::Sm90a);
        assert!(good.check(&grouped).is_err());
    }
}
