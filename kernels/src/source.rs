//! The text that the compiler gets: a generated prologue of constants, then the files of `cuda/`.

use std::fmt::Write as _;

use crate::config::{AttentionConfig, Kernel};
use crate::desc::{Attention, AttentionDesc, CacheDtype, Dtype, Mask};
use crate::layout::Descriptor;

/// The files that `#include` finds.
pub const HEADERS: [(&str, &str); 20] = [
    ("append.cuh", include_str!("../cuda/append.cuh")),
    ("combine.cuh", include_str!("../cuda/combine.cuh")),
    ("common.cuh", include_str!("../cuda/common.cuh")),
    ("fp8.cuh", include_str!("../cuda/fp8.cuh")),
    ("gqa_mma.cuh", include_str!("../cuda/gqa_mma.cuh")),
    ("gqa_sm90.cuh", include_str!("../cuda/gqa_sm90.cuh")),
    ("hopper.cuh", include_str!("../cuda/hopper.cuh")),
    ("matmul.cuh", include_str!("../cuda/matmul.cuh")),
    ("matmul_mma.cuh", include_str!("../cuda/matmul_mma.cuh")),
    ("matmul_sm90.cuh", include_str!("../cuda/matmul_sm90.cuh")),
    ("mla_mma.cuh", include_str!("../cuda/mla_mma.cuh")),
    ("mla_sm90.cuh", include_str!("../cuda/mla_sm90.cuh")),
    ("mma.cuh", include_str!("../cuda/mma.cuh")),
    ("plan.cuh", include_str!("../cuda/plan.cuh")),
    ("ptx.cuh", include_str!("../cuda/ptx.cuh")),
    ("sm90_fp8.cuh", include_str!("../cuda/sm90_fp8.cuh")),
    ("sm90_load.cuh", include_str!("../cuda/sm90_load.cuh")),
    ("sm90_output.cuh", include_str!("../cuda/sm90_output.cuh")),
    ("sm90_tiles.cuh", include_str!("../cuda/sm90_tiles.cuh")),
    ("store.cuh", include_str!("../cuda/store.cuh")),
];

/// A text with the functions it defines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What is compiled; includes [`HEADERS`].
    pub text: String,
    /// The entry points.
    pub functions: Vec<&'static str>,
}

impl Source {
    /// The kernels of one request: decode, plan and combine where the work is divided, append and store for latent caches.
    pub fn of(desc: &AttentionDesc, config: &AttentionConfig) -> Self {
        let mut text = prologue(desc, config);
        let mut functions = vec!["mlac_decode"];
        if config.kernel == Kernel::LatentWgmma {
            text.push_str("\n#include \"hopper.cuh\"\n\n");
            text.push_str(&wgmma_scores(desc.factor(), 64 / config.column_groups));
            let columns = (desc.out_row() / 64).div_ceil(config.column_groups) * 64;
            text.push_str(&if config.column_groups == 2 {
                wgmma_exchanged_values(desc.factor(), columns)
            } else {
                wgmma_values(desc.factor(), columns)
            });
        }
        if config.kernel == Kernel::GroupedWgmma {
            text.push_str("\n#include \"hopper.cuh\"\n\n");
            text.push_str(&wgmma_scores_of_registers(desc.dtype));
            text.push_str(&wgmma_values(desc.dtype, desc.out_row()));
        }
        let _ = writeln!(text, "\n#include \"{}\"", config.kernel.file());
        if config.planned {
            text.push_str("#include \"plan.cuh\"\n#include \"combine.cuh\"\n");
            functions.extend(["mlac_plan", "mlac_combine"]);
        }
        if matches!(desc.attention, Attention::Latent { .. }) {
            text.push_str("#include \"append.cuh\"\n#include \"store.cuh\"\n");
            functions.extend(["mlac_append", "mlac_store"]);
        }
        Self { text, functions }
    }
}

/// The constants that decide what the files of `cuda/` are.
pub fn prologue(desc: &AttentionDesc, config: &AttentionConfig) -> String {
    let (major, minor) = desc.arch.capability();
    let (rank, rope, head_dim, heads) = match desc.attention {
        Attention::Latent {
            kv_lora_rank,
            rope_dim,
        } => (kv_lora_rank, rope_dim, kv_lora_rank, desc.query_heads),
        Attention::Grouped { kv_heads, head_dim } => {
            (head_dim, 0, head_dim, desc.query_heads / kv_heads)
        }
    };
    let mask = match desc.mask {
        Mask::Full => 0,
        Mask::Causal => 1,
        Mask::Tree => 2,
    };
    let mut text = format!("// {desc}\n");
    let _ = writeln!(text, "#define MLAC_ARCH {}", major * 100 + minor * 10);
    let _ = writeln!(
        text,
        "#define MLAC_F16 {}",
        u32::from(desc.dtype == Dtype::F16)
    );
    let _ = writeln!(
        text,
        "#define MLAC_FP8 {}",
        u32::from(desc.cache == CacheDtype::E4m3)
    );
    if config.kernel == Kernel::LatentWgmma {
        let _ = writeln!(
            text,
            "#define MLAC_EXCHANGED {}",
            u32::from(config.column_groups == 2)
        );
    }
    let flags = [
        ("kGqa", matches!(desc.attention, Attention::Grouped { .. })),
        ("kSinks", desc.sinks),
        ("kPlanned", config.planned),
    ];
    for (name, value) in flags {
        let _ = writeln!(text, "constexpr bool {name} = {value};");
    }
    let numbers = [
        ("kHeads", heads),
        ("kKvHeads", desc.kv_heads()),
        ("kRank", rank),
        ("kRope", rope),
        ("kHeadDim", head_dim),
        ("kPage", desc.page),
        ("kQueryTokens", desc.query_tokens),
        ("kWindow", desc.window.unwrap_or(0)),
        ("kMask", mask),
        ("kTile", config.tile),
        ("kHeadTile", config.head_tile),
        ("kGroup", config.group),
        ("kMinSplit", config.min_split),
        ("kStages", config.stages),
        ("kBuffers", config.buffers),
        ("kColumnGroups", config.column_groups),
    ];
    for (name, value) in numbers {
        let _ = writeln!(text, "constexpr int {name} = {value};");
    }
    match config.kernel {
        Kernel::LatentWgmma | Kernel::GroupedWgmma => {
            let _ = writeln!(
                text,
                "constexpr unsigned long long kDescriptorK = {:#x}ull;",
                Descriptor::K_MAJOR.bits()
            );
            let _ = writeln!(
                text,
                "constexpr unsigned long long kDescriptorMn = {:#x}ull;",
                Descriptor::MN_MAJOR.bits()
            );
        }
        Kernel::LatentMma => {}
        Kernel::GroupedMma => {
            let _ = writeln!(text, "constexpr int kWarps = {};", config.streams);
        }
    }
    text
}

fn registers(range: std::ops::Range<u32>) -> String {
    let names: Vec<String> = range.map(|i| format!("%{i}")).collect();
    names.join(", ")
}

fn operands(constraint: &str, name: &str, count: u32) -> String {
    let texts: Vec<String> = (0..count)
        .map(|i| format!("\"{constraint}\"({name}[{i}])"))
        .collect();
    texts.join(", ")
}

/// `d (+)= a * b` with so many tokens: both operands in shared memory, both contiguous along the multiplied dimension.
pub(crate) fn wgmma_scores(dtype: Dtype, tokens: u32) -> String {
    let count = tokens / 2;
    format!(
        "MLAC_DEVICE void wgmma_scores(float (&d)[{count}], u64 a, u64 b, int add) {{\n  asm volatile(\n      \"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{}, 0;\\n\"\n      \
         \"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.{dtype}.{dtype} {{{}}}, %{count}, %{}, p, 1, 1, 0, 0;\\n}}\"\n      : {}\n      \
         : \"l\"(a), \"l\"(b), \"r\"(add));\n}}\n\n",
        count + 2,
        registers(0..count),
        count + 1,
        operands("+f", "d", count),
    )
}

/// The same with the queries in registers.
fn wgmma_scores_of_registers(dtype: Dtype) -> String {
    format!(
        "MLAC_DEVICE void wgmma_scores(float (&d)[32], const u32* a, u64 b, int add) {{\n  asm volatile(\n      \"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %37, 0;\\n\"\n      \
         \"wgmma.mma_async.sync.aligned.m64n64k16.f32.{dtype}.{dtype} {{{}}}, {{{}}}, %36, p, 1, 1, 0;\\n}}\"\n      : {}\n      \
         : {}, \"l\"(b), \"r\"(add));\n}}\n\n",
        registers(0..32),
        registers(32..36),
        operands("+f", "d", 32),
        operands("r", "a", 4),
    )
}

/// `d += a * b` with `columns` of the latent: weights in registers, values in shared memory, contiguous along the columns.
fn wgmma_values(dtype: Dtype, columns: u32) -> String {
    let count = columns / 2;
    format!(
        "MLAC_DEVICE void wgmma_values(float (&d)[{count}], const u32* a, u64 b) {{\n  asm volatile(\n      \
         \"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} {{{}}}, {{{}}}, %{}, 1, 1, 1, 1;\"\n      : {}\n      \
         : {}, \"l\"(b));\n}}\n",
        registers(0..count),
        registers(count..count + 4),
        count + 4,
        operands("+f", "d", count),
        operands("r", "a", 4),
    )
}

/// The same with the weights in shared memory, contiguous along the tokens.
fn wgmma_exchanged_values(dtype: Dtype, columns: u32) -> String {
    let count = columns / 2;
    format!(
        "MLAC_DEVICE void wgmma_values(float (&d)[{count}], u64 a, u64 b) {{\n  asm volatile(\n      \
         \"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} {{{}}}, %{count}, %{}, 1, 1, 1, 0, 1;\"\n      : {}\n      \
         : \"l\"(a), \"l\"(b));\n}}\n",
        registers(0..count),
        count + 1,
        operands("+f", "d", count),
    )
}
