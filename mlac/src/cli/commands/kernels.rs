//! `mlac kernels build | list | check`.

use std::fmt::Write as _;
use std::time::Instant;

use mlac_kernels::{
    Attention, AttentionDesc, Cache, CacheDtype, Compiler, CompilerName, Cubin, Dtype, Mask,
    Report, Toolchain,
};
use serde::Serialize;

use super::Context;
use crate::cli::args::{CompilerArg, KernelBuildArgs, KernelCacheArgs, KernelCommand, MaskArg};
use crate::cli::units::show_bytes;
use crate::error::Error;

pub(super) fn run(command: &KernelCommand, context: Context) -> Result<bool, Error> {
    match command {
        KernelCommand::Build(args) => build(args, context),
        KernelCommand::List(place) => list(place, context),
        KernelCommand::Check(place) => check(place, context),
    }
}

fn desc(args: &KernelBuildArgs) -> Result<AttentionDesc, Error> {
    let attention = match args.kv_heads {
        Some(kv_heads) => Attention::Grouped {
            kv_heads,
            head_dim: args.head_dim,
        },
        None => Attention::Latent {
            kv_lora_rank: args.kv_lora_rank,
            rope_dim: args.rope_dim,
        },
    };
    Ok(AttentionDesc {
        attention,
        query_heads: args.heads,
        query_tokens: args.query_tokens,
        mask: match args.mask {
            MaskArg::Full => Mask::Full,
            MaskArg::Causal => Mask::Causal,
            MaskArg::Tree => Mask::Tree,
        },
        window: args.window,
        sinks: args.sinks,
        dtype: if args.f16 { Dtype::F16 } else { Dtype::Bf16 },
        cache: if args.fp8 {
            CacheDtype::E4m3
        } else {
            CacheDtype::Same
        },
        page: args.page,
        arch: args.arch.parse()?,
    })
}

/// What is told of one cubin.
#[derive(Debug, Serialize)]
struct Told {
    file: String,
    request: AttentionDesc,
    choice: mlac_kernels::AttentionConfig,
    compiler: String,
    bytes: u64,
    sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<Report>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    complaints: Vec<String>,
    /// No GPU was asked: what is told follows from the cubin alone.
    run_on_a_gpu: bool,
}

impl Told {
    fn of(cubin: &Cubin, report: Option<Report>) -> Self {
        let entry = &cubin.entry;
        let complaints = report.as_ref().map_or_else(Vec::new, |report| {
            report.complaints(&entry.desc, &entry.config, &entry.log)
        });
        Self {
            file: cubin.path.display().to_string(),
            request: entry.desc,
            choice: entry.config.clone(),
            compiler: entry.compiler.clone(),
            bytes: entry.bytes,
            sha256: entry.sha256.clone(),
            report,
            complaints,
            run_on_a_gpu: false,
        }
    }
}

fn build(args: &KernelBuildArgs, context: Context) -> Result<bool, Error> {
    let desc = desc(args)?;
    // Refused before a compiler is looked for.
    desc.check()?;
    let toolchain = Toolchain::find()?;
    let name = match args.compiler {
        CompilerArg::Nvrtc => CompilerName::Nvrtc,
        CompilerArg::Nvcc => CompilerName::Nvcc,
    };
    let compiler = Compiler::load(&toolchain, name)?;
    let started = Instant::now();
    let cubin = cache(&args.place)?.get(&desc, &compiler)?;
    let seconds = started.elapsed().as_secs_f64();
    let told = Told::of(&cubin, Some(Report::of(&toolchain, &cubin.path)?));
    let mut text = format!("{desc}\n{}\n", told.choice);
    let _ = writeln!(
        text,
        "{} ({}), {}",
        told.file,
        show_bytes(told.bytes),
        if cubin.built {
            format!(
                "compiled by {} in {seconds:.2} s",
                cubin.entry.compiler_version()
            )
        } else {
            format!(
                "compiled by {}, from the cache",
                cubin.entry.compiler_version()
            )
        }
    );
    if let Some(report) = &told.report {
        text.push_str(&report.table());
    }
    complain(&mut text, &told);
    text.push_str("not run on a GPU\n");
    context.show(&told, &text)?;
    Ok(told.complaints.is_empty())
}

fn cache(place: &KernelCacheArgs) -> Result<Cache, Error> {
    Ok(match &place.cache {
        Some(folder) => Cache::at(folder),
        None => Cache::of_user()?,
    })
}

fn complain(text: &mut String, told: &Told) {
    for complaint in &told.complaints {
        let _ = writeln!(text, "FAILED         {complaint}");
    }
}

fn list(place: &KernelCacheArgs, context: Context) -> Result<bool, Error> {
    let cache = cache(place)?;
    let mut text = String::new();
    let mut told = Vec::new();
    let mut whole = true;
    for entry in cache.list()? {
        match entry {
            Ok(cubin) => {
                let _ = writeln!(
                    text,
                    "{}  {}, {}, {}",
                    cubin.entry.desc,
                    cubin.entry.config.kernel.file(),
                    cubin.entry.compiler_version(),
                    show_bytes(cubin.entry.bytes)
                );
                told.push(Told::of(&cubin, None));
            }
            Err(refusal) => {
                let _ = writeln!(text, "DAMAGED  {refusal}");
                whole = false;
            }
        }
    }
    let _ = writeln!(
        text,
        "{} kernels in {}",
        told.len(),
        cache.folder().display()
    );
    context.show(&told, &text)?;
    Ok(whole)
}

fn check(place: &KernelCacheArgs, context: Context) -> Result<bool, Error> {
    let cache = cache(place)?;
    let toolchain = Toolchain::find()?;
    let mut text = String::new();
    let mut told = Vec::new();
    let mut good = true;
    for entry in cache.list()? {
        match entry {
            Ok(cubin) => {
                let one = Told::of(&cubin, Some(Report::of(&toolchain, &cubin.path)?));
                let verdict = if one.complaints.is_empty() {
                    "ok    "
                } else {
                    "FAILED"
                };
                good &= one.complaints.is_empty();
                let _ = writeln!(
                    text,
                    "{verdict} {}  {}",
                    one.request,
                    cubin.entry.compiler_version()
                );
                complain(&mut text, &one);
                told.push(one);
            }
            Err(refusal) => {
                let _ = writeln!(text, "FAILED {refusal}");
                good = false;
            }
        }
    }
    let _ = writeln!(
        text,
        "{} kernels in {}: stack, local memory, spills and instructions checked; not run on a GPU",
        told.len(),
        cache.folder().display()
    );
    context.show(&told, &text)?;
    Ok(good)
}
