//! A step as a text that code in other languages follows: workspace, kernels in order, and every field of their arguments.
//!
//! The layout of the arguments is known once, in [`crate::params`]; here it becomes data. Whoever follows a recipe brings the
//! tensors of `mlac::LatentAttention` by name and needs to know nothing of the kernels. One word a field, one fact a line:
//!
//! | line | |
//! |---|---|
//! | `mlac-recipe 1` | the first; version of this form |
//! | `kernel SLUG` | the request |
//! | `capability MAJOR MINOR` | the GPU must have exactly this |
//! | `dtype bf16\|f16`, `heads N`, `query_tokens N`, `kv_lora_rank N`, `rope_dim N`, `mask causal\|tree`, `window N`, `sinks 0\|1`, `page N` | the request's parts; window 0 is none |
//! | `region NAME FIXED REQUEST ENTRY` | a region of the workspace, `FIXED + REQUEST * batch + ENTRY * batch * page_stride` bytes, beginning at the next multiple of 256 |
//! | `launch FUNCTION THREADS SHARED DEPENDENT FIXED REQUEST DIVISOR` | a kernel on `ceil((FIXED + REQUEST * batch) / DIVISOR)` CTAs with `SHARED` bytes of dynamic shared memory; `DEPENDENT` 1: may start while the one before still runs (programmatic stream serialisation) |
//! | `block BYTES` | an argument: zeros, filled by the lines that follow |
//! | `pointer OFFSET NAME` | the address of a tensor or region; an absent tensor's is null |
//! | `number OFFSET NAME` | 4 bytes: `batch`, `page_stride`, `cache_pages` (i32) or `scale` (f32) |
//! | `constant OFFSET VALUE` | 4 bytes, i32 |
//! | `map NAME TYPE INTERLEAVE SWIZZLE PROMOTION FILL BOX0 BOX1 BOX2 EXTENT0 EXTENT1 REQUEST PAGE` | an argument: a tensor map of three dimensions without gaps, of 2-byte elements; the third extent is `REQUEST * batch + PAGE * cache_pages`; the words before `BOX0` are `cuTensorMapEncodeTiled`'s numbers |
//!
//! Tensors are `query`, `new_rows`, `cache`, `past_lengths`, `page_table`, `sinks`, `tree_mask`, `sums`, `lse`; `pages` is the page
//! table, given or made in the region of that name.

use std::fmt::{self, Write as _};
use std::mem::offset_of;

use cudarc::driver::sys;
use mlac_model::Refusal;

use super::check::{MAX_PARTS, sizes};
use crate::config::{AttentionConfig, Kernel};
use crate::desc::{Attention, AttentionDesc, Dtype, Mask};
use crate::params::{DecodeParams, PlanParams, StoreParams};

/// Threads of `mlac_plan`.
pub(super) const PLAN_THREADS: u32 = 1024;
/// Threads of `mlac_combine`.
pub(super) const COMBINE_THREADS: u32 = 256;
/// Threads and tokens of a CTA of `mlac_store`: `kStoreWarps` of `cuda/store.cuh`.
const STORE_THREADS: u32 = 128;
const STORE_TOKENS: u32 = 4;
/// Columns, rows and matrices of what TMA loads at once.
pub(super) const MAP_BOX: [u32; 3] = [64, 64, 1];

/// How the driver is to describe queries and cache to TMA.
pub(super) struct TensorMap;

impl TensorMap {
    pub(super) const INTERLEAVE: sys::CUtensorMapInterleave =
        sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE;
    pub(super) const SWIZZLE: sys::CUtensorMapSwizzle =
        sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B;
    pub(super) const PROMOTION: sys::CUtensorMapL2promotion =
        sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    pub(super) const FILL: sys::CUtensorMapFloatOOBfill =
        sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;

    pub(super) fn data_type(dtype: Dtype) -> sys::CUtensorMapDataType {
        match dtype {
            Dtype::Bf16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::F16 => sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        }
    }
}

/// One step of `mlac::LatentAttention` on one GPU, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    desc: AttentionDesc,
    text: String,
}

/// What a field of a block of arguments holds.
enum Field {
    Pointer(&'static str),
    Null,
    Number(&'static str),
    Constant(u32),
}

use Field::{Constant, Null, Number, Pointer};

/// The fields of a structure of parameters, with their offsets.
macro_rules! block {
    ($params:ty { $($field:ident: $value:expr),* $(,)? }) => {
        (size_of::<$params>(), vec![$((offset_of!($params, $field), $value)),*])
    };
}

type Block = (usize, Vec<(usize, Field)>);

impl Recipe {
    /// The step of a request whose long caches are divided among `parts` CTAs.
    ///
    /// # Errors
    /// When the request is no latent, has a mask that the operator has not, or `parts` is out of range.
    pub fn of(desc: &AttentionDesc, config: &AttentionConfig, parts: u32) -> Result<Self, Refusal> {
        desc.check()?;
        let refuse = |name: &str, expected: String, found: String| {
            Err(Refusal::new(
                format!("recipe of {}: {name}", desc.slug()),
                expected,
                found,
                "describe a step of mlac::LatentAttention",
            ))
        };
        let Attention::Latent { .. } = desc.attention else {
            return refuse("request", "a latent".into(), "grouped queries".into());
        };
        if desc.mask == Mask::Full {
            return refuse("mask", "causal or tree".into(), "every cached token".into());
        }
        if !(1..=MAX_PARTS).contains(&parts) {
            return refuse("parts", format!("1 to {MAX_PARTS}"), parts.to_string());
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write(&mut text, desc, config, parts);
        Ok(Self { desc: *desc, text })
    }

    /// The request.
    pub fn desc(&self) -> &AttentionDesc {
        &self.desc
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn write(
    text: &mut String,
    desc: &AttentionDesc,
    config: &AttentionConfig,
    parts: u32,
) -> fmt::Result {
    let (major, minor) = desc.arch.capability();
    let (tokens, heads) = (desc.query_tokens, desc.query_heads);
    let rope = desc.row() - desc.out_row();
    writeln!(text, "mlac-recipe 1\nkernel {}", desc.slug())?;
    writeln!(text, "capability {major} {minor}\ndtype {}", desc.dtype)?;
    writeln!(text, "heads {heads}\nquery_tokens {tokens}")?;
    writeln!(text, "kv_lora_rank {}\nrope_dim {rope}", desc.out_row())?;
    writeln!(
        text,
        "mask {}\nwindow {}",
        desc.mask,
        desc.window.unwrap_or(0)
    )?;
    writeln!(text, "sinks {}\npage {}", u32::from(desc.sinks), desc.page)?;

    for size in sizes(desc, config, parts) {
        writeln!(
            text,
            "region {} {} {} 0",
            size.name, size.fixed, size.per_request
        )?;
    }
    writeln!(text, "region lengths 0 4 0\nregion pages 0 0 4")?;

    let dependent = u32::from(config.planned && desc.arch.has_wgmma());
    writeln!(
        text,
        "launch mlac_store {STORE_THREADS} 0 0 0 {tokens} {STORE_TOKENS}"
    )?;
    write_block(text, &store())?;
    if config.planned {
        writeln!(text, "launch mlac_plan {PLAN_THREADS} 0 0 1 0 1")?;
        write_block(text, &plan(parts))?;
    }
    let (fixed, per_request) = if config.planned {
        (parts, 0)
    } else {
        (0, config.units(desc))
    };
    writeln!(
        text,
        "launch mlac_decode {} {} {dependent} {fixed} {per_request} 1",
        config.threads, config.shared_bytes
    )?;
    write_block(text, &decode(desc, config, parts))?;
    if config.kernel == Kernel::LatentWgmma {
        write_map(text, desc, "query", [desc.row(), heads, tokens, 0])?;
        write_map(text, desc, "cache", [desc.row(), desc.page, 0, 1])?;
    }
    if config.planned {
        writeln!(
            text,
            "launch mlac_combine {COMBINE_THREADS} 0 {dependent} 0 {} 1",
            tokens * heads
        )?;
        write_block(text, &decode(desc, config, parts))?;
    }
    Ok(())
}

fn store() -> Block {
    block!(StoreParams {
        rows: Pointer("new_rows"),
        cache: Pointer("cache"),
        past: Pointer("past_lengths"),
        table: Pointer("page_table"),
        lengths: Pointer("lengths"),
        pages: Pointer("pages"),
        batch: Number("batch"),
        page_stride: Number("page_stride"),
        cache_pages: Number("cache_pages"),
    })
}

fn plan(parts: u32) -> Block {
    block!(PlanParams {
        lengths: Pointer("lengths"),
        bounds: Pointer("bounds"),
        owners: Pointer("owners"),
        costs: Pointer("costs"),
        batch: Number("batch"),
        parts: Constant(parts),
    })
}

fn decode(desc: &AttentionDesc, config: &AttentionConfig, parts: u32) -> Block {
    let when = |there: bool, name: &'static str| if there { Pointer(name) } else { Null };
    block!(DecodeParams {
        q: Pointer("query"),
        cache: Pointer("cache"),
        values: Null,
        out: Pointer("sums"),
        lse: Pointer("lse"),
        out_part: when(config.planned, "out_part"),
        lse_part: when(config.planned, "lse_part"),
        sinks: when(desc.sinks, "sinks"),
        lengths: Pointer("lengths"),
        pages: Pointer("pages"),
        tree: when(desc.mask == Mask::Tree, "tree_mask"),
        bounds: when(config.planned, "bounds"),
        owners: when(config.planned, "owners"),
        batch: Number("batch"),
        page_stride: Number("page_stride"),
        parts: Constant(parts),
        scale: Number("scale"),
    })
}

fn write_block(text: &mut String, (bytes, fields): &Block) -> fmt::Result {
    writeln!(text, "block {bytes}")?;
    for (offset, field) in fields {
        match field {
            Pointer(name) => writeln!(text, "pointer {offset} {name}")?,
            Null => {}
            Number(name) => writeln!(text, "number {offset} {name}")?,
            Constant(value) => writeln!(text, "constant {offset} {value}")?,
        }
    }
    Ok(())
}

fn write_map(
    text: &mut String,
    desc: &AttentionDesc,
    name: &str,
    extents: [u32; 4],
) -> fmt::Result {
    let [b0, b1, b2] = MAP_BOX;
    let [e0, e1, per_request, per_page] = extents;
    writeln!(
        text,
        "map {name} {} {} {} {} {} {b0} {b1} {b2} {e0} {e1} {per_request} {per_page}",
        TensorMap::data_type(desc.dtype) as u32,
        TensorMap::INTERLEAVE as u32,
        TensorMap::SWIZZLE as u32,
        TensorMap::PROMOTION as u32,
        TensorMap::FILL as u32,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arch;

    fn recipe(desc: &AttentionDesc) -> Recipe {
        Recipe::of(desc, &AttentionConfig::choose(desc).unwrap(), 132).unwrap()
    }

    #[test]
    fn a_step_on_hopper() {
        let desc = AttentionDesc {
            sinks: true,
            ..AttentionDesc::latent(64, 192, 64, Arch::Sm90a)
        };
        insta::assert_snapshot!(recipe(&desc));
    }

    #[test]
    fn an_undivided_step_has_one_launch_after_the_store() {
        let desc = AttentionDesc {
            window: Some(128),
            ..AttentionDesc::latent(64, 128, 64, Arch::Sm80)
        };
        let text = recipe(&desc).to_string();
        let launches: Vec<&str> = text.lines().filter(|l| l.starts_with("launch")).collect();
        assert_eq!(launches.len(), 2, "{text}");
        assert!(
            text.contains("region bounds 0 0 0") && !text.contains("map "),
            "{text}"
        );
    }

    #[test]
    fn the_fields_of_every_block_are_all_of_its_structure() {
        let desc = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
        let config = AttentionConfig::choose(&desc).unwrap();
        for (bytes, fields) in [store(), plan(7), decode(&desc, &config, 7)] {
            let mut at = 0;
            for (offset, field) in fields {
                assert_eq!(offset, at);
                at += if matches!(field, Pointer(_) | Null) {
                    8
                } else {
                    4
                };
            }
            assert_eq!(bytes, at.next_multiple_of(8));
        }
    }

    #[test]
    fn what_the_operator_has_not_is_refused() {
        let latent = AttentionDesc::latent(64, 192, 64, Arch::Sm90a);
        let config = AttentionConfig::choose(&latent).unwrap();
        let full = AttentionDesc {
            mask: Mask::Full,
            ..latent
        };
        let grouped = AttentionDesc::grouped(64, 8, 64, Arch::Sm90a);
        for (desc, parts, expected) in [
            (full, 1, "mask: expected causal or tree"),
            (grouped, 1, "request: expected a latent"),
            (latent, 0, "parts: expected 1 to 1024"),
            (latent, 1025, "parts: expected 1 to 1024"),
        ] {
            let error = Recipe::of(&desc, &config, parts).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
