//! Every command: arguments resolved, the pipeline's step run, the result printed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mlac_converter::{Budget, RankChoice, Recipe};
use mlac_engines::parity::Tolerance;
use mlac_engines::tensorrt::{Profiles, Target};
use mlac_graph::builders::{GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::{Checkpoint, Dtype, Refusal};
use serde::Serialize;

use super::args::{
    BenchArgs, BuildArgs, CalibArgs, Cli, Command, CompileArgs, ConvertArgs, DtypeArg, EvalArgs,
    ExportArgs, GenerateArgs, GqaFormArg, MethodArg, PlanArgs, ProfileArgs, RankArgs, VerifyArgs,
};
use super::units::{show_bytes, show_tokens, table};
use crate::error::Error;
use crate::pipeline::allocate::{self, AllocateRequest};
use crate::pipeline::compile::{CompileRequest, compile};
use crate::pipeline::convert::{
    Calibration, ConvertRequest, LayerPlan, Method, Record, convert, pretty, read_windows,
    statistics_options,
};
use crate::pipeline::export::{ExportOptions, export};
use crate::pipeline::ranks::{RankRequest, cache_plan};
use crate::pipeline::subject::Subject;
use crate::pipeline::{bench, build, evaluate, generate, steps, verify};
use crate::progress::Progress;
use crate::report::data::HEADLINE_CONTEXT;

/// What every command shares.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    json: bool,
    threads: usize,
    progress: Progress,
}

/// Runs a command; `false` when a check said no.
pub fn run(cli: Cli) -> Result<bool, Error> {
    let threads = cli
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    if threads == 0 {
        return Err(
            Refusal::new("--threads", "at least 1", "0", "leave it out for all cores").into(),
        );
    }
    // A pool that exists already (tests) keeps its size.
    let _ = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global();
    let context = Context {
        json: cli.json,
        threads,
        progress: Progress::detect(),
    };
    match cli.command {
        Command::Doctor => doctor(context),
        Command::Plan(args) => plan(&args, context),
        Command::Convert(args) => run_convert(&args, context),
        Command::Export(args) => run_export(&args, context),
        Command::Build(args) => run_build(&args, context),
        Command::Verify(args) => run_verify(&args, context),
        Command::Eval(args) => run_eval(&args, context),
        Command::Generate(args) => run_generate(&args, context),
        Command::Bench(args) => run_bench(&args, context),
        Command::Compile(args) => run_compile(&args, context),
    }
}

impl Context {
    /// Prints the result: JSON when asked, else text.
    #[expect(
        clippy::print_stdout,
        reason = "the result of a command goes to standard output"
    )]
    fn show(self, value: &impl Serialize, text: &str) -> Result<(), Error> {
        if self.json {
            print!("{}", pretty(value)?);
        } else {
            println!("{}", text.trim_end());
        }
        Ok(())
    }
}

fn doctor(context: Context) -> Result<bool, Error> {
    let parts = mlac_engines::doctor::examine();
    let mut text = String::new();
    for part in &parts {
        let _ = writeln!(text, "{}", part.component);
        let _ = writeln!(
            text,
            "  found:  {}",
            part.found.as_deref().unwrap_or("nothing")
        );
        let _ = writeln!(text, "  needed: {}", part.needed);
        if let Some(fix) = &part.fix {
            let _ = writeln!(text, "  fix:    {fix}");
        }
    }
    context.show(&parts, &text)?;
    Ok(parts.iter().all(|p| p.found.is_some() || !p.required))
}

fn request(ranks: &RankArgs, checkpoint: &Checkpoint) -> Result<RankRequest, Error> {
    RankRequest::resolve(
        ranks.budget,
        ranks.kv_lora_rank.as_deref(),
        ranks.rope_dim,
        &ranks.layers,
        ranks.align,
        checkpoint.config(),
    )
}

#[derive(Serialize)]
struct PlanOutput {
    model: String,
    layers: Vec<(usize, RankChoice)>,
    gqa_numbers_per_token: usize,
    mla_numbers_per_token: usize,
    cache: Vec<PlanRow>,
    note: Option<String>,
}

#[derive(Serialize)]
struct PlanRow {
    context: usize,
    gqa_bytes: u64,
    mla_bytes: u64,
    decode_floor_speedup: f64,
}

/// Bytes of weights that a decode step of one sequence reads: of the experts those that are chosen.
fn weights_read(checkpoint: &Checkpoint) -> Result<u64, Error> {
    let mut total = 0.0;
    for info in checkpoint.tensors() {
        let share = match &checkpoint.config().moe {
            Some(moe) if info.name.contains(".mlp.experts.") => {
                moe.experts_per_token as f64 / moe.num_experts as f64
            }
            _ => 1.0,
        };
        total += share * info.byte_len()? as f64;
    }
    Ok(total as u64)
}

fn plan(args: &PlanArgs, context: Context) -> Result<bool, Error> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config();
    let (layers, note) = request(&args.ranks, &checkpoint)?.plan(config)?;
    let cache = cache_plan(config, &layers, args.cache_bytes);
    let numbers = cache.numbers_per_token();
    let weights = weights_read(&checkpoint)?;
    let rows: Vec<PlanRow> = args
        .contexts
        .iter()
        .map(|&tokens| PlanRow {
            context: tokens,
            gqa_bytes: cache.gqa_bytes(tokens),
            mla_bytes: cache.mla_bytes(tokens),
            decode_floor_speedup: cache.decode_speedup(tokens, 1, weights),
        })
        .collect();
    let mut text = format!(
        "{}: {:?}, {} layers, {} query heads, {} KV heads of {}\n",
        args.model.display(),
        config.architecture,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim
    );
    if let Some(first) = layers.first() {
        let _ = writeln!(
            text,
            "{} layers to MLA: latent {} + rotary key {} = {} numbers a token instead of {}",
            layers.len(),
            first.ranks.kv_lora_rank,
            first.ranks.qk_rope_head_dim,
            first.ranks.width(),
            config.gqa_cache_width()
        );
    }
    if let Some(note) = &note {
        let _ = writeln!(text, "note: {note}");
    }
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                show_tokens(r.context),
                show_bytes(r.gqa_bytes),
                show_bytes(r.mla_bytes),
                format!("{:.1} %", 100.0 * r.mla_bytes as f64 / r.gqa_bytes as f64),
                format!("{:.2}", r.decode_floor_speedup),
            ]
        })
        .collect();
    text.push_str(&table(
        &[
            "context",
            "GQA cache",
            "MLA cache",
            "share",
            "decode speed-up, if memory-bound",
        ],
        &cells,
    ));
    let _ = writeln!(
        text,
        "({} bytes a cached number, batch 1; weights and cache read once a step)",
        args.cache_bytes
    );
    let output = PlanOutput {
        model: args.model.display().to_string(),
        layers: layers.iter().map(|l| (l.layer, l.ranks)).collect(),
        gqa_numbers_per_token: numbers.0,
        mla_numbers_per_token: numbers.1,
        cache: rows,
        note,
    };
    context.show(&output, &text)?;
    Ok(true)
}

/// The method, whether calibration is sequential, and whether a budget is distributed by measured
/// loss.
fn method(args: &CalibArgs) -> Result<(Method, bool, bool), Error> {
    let steps = steps::resolve(&args.steps)?;
    if !args.steps.is_empty() && args.method != MethodArg::Recipe {
        return Err(Refusal::new(
            "--steps",
            "--method recipe, whose steps they are",
            format!("--method {:?}", args.method).to_lowercase(),
            "leave one of the two out",
        )
        .into());
    }
    Ok(match args.method {
        MethodArg::Recipe => (
            Method::Recipe(steps.recipe),
            steps.sequential,
            steps.allocation,
        ),
        MethodArg::Transmla => (
            Method::TransMla(mlac_converter::TransMla {
                freqfold: args.freqfold,
            }),
            false,
            false,
        ),
        MethodArg::Svd => (Method::Svd, false, false),
    })
}

fn calibration(args: &CalibArgs, budget: Budget) -> Result<Calibration, Error> {
    match args.calib.as_deref() {
        Some("none") => Ok(Calibration::Weights),
        Some(path) => Ok(Calibration::Text {
            path: PathBuf::from(path),
            windows: args.calib_windows,
            window: args.calib_window,
            seed: args.calib_seed,
            query_rows: args.query_rows,
        }),
        None if budget == Budget::Exact || args.method == MethodArg::Svd => {
            Ok(Calibration::Weights)
        }
        None => Err(Refusal::new(
            "--calib",
            "a calibration text, or none for statistics from the weights alone",
            "nothing",
            "give --calib FILE; --calib none costs much quality",
        )
        .into()),
    }
}

fn model_dtype(dtype: DtypeArg) -> Dtype {
    match dtype {
        DtypeArg::F32 => Dtype::F32,
        DtypeArg::F16 => Dtype::F16,
        DtypeArg::Bf16 => Dtype::BF16,
    }
}

fn convert_request<'a>(
    checkpoint: &'a Checkpoint,
    output: &'a Path,
    ranks: &RankArgs,
    calib: &CalibArgs,
    dtype: DtypeArg,
    max_shard: u64,
    context: Context,
) -> Result<ConvertRequest<'a>, Error> {
    let wanted = request(ranks, checkpoint)?;
    let (even, _) = wanted.plan(checkpoint.config())?;
    let (method, sequential, allocation) = method(calib)?;
    let calibration = calibration(calib, wanted.budget)?;
    let layers = match (&method, wanted.budget) {
        (Method::Recipe(recipe), Budget::Fraction(fraction)) if allocation && fraction < 1.0 => {
            distribute(
                checkpoint,
                &calibration,
                &even,
                fraction,
                recipe,
                wanted.align,
                context,
            )?
        }
        _ => even,
    };
    Ok(ConvertRequest {
        checkpoint,
        output,
        layers,
        method,
        sequential,
        calibration,
        dtype: model_dtype(dtype),
        max_shard,
        threads: context.threads,
    })
}

/// A budget over the layers by measured loss, told before any conversion starts; without
/// calibration there is nothing to measure on, and every layer gets the same.
fn distribute(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    even: &[LayerPlan],
    fraction: f64,
    recipe: &Recipe,
    align: usize,
    context: Context,
) -> Result<Vec<LayerPlan>, Error> {
    let Some(chosen) = read_windows(checkpoint, calibration)? else {
        return Ok(even.to_vec());
    };
    let whole = checkpoint.config().gqa_cache_width() * even.len();
    let request = AllocateRequest {
        checkpoint,
        windows: &chosen.slices(),
        even,
        budget: (fraction * whole as f64 + 1e-9).floor() as usize,
        recipe,
        align,
        statistics: statistics_options(calibration),
        threads: context.threads,
    };
    let plans = allocate::distribute(&request, context.progress)?;
    let ranks = |p: &LayerPlan| format!("{}+{}", p.ranks.kv_lora_rank, p.ranks.qk_rope_head_dim);
    let list: Vec<String> = plans
        .iter()
        .map(|p| format!("{}: {}", p.layer, ranks(p)))
        .collect();
    context
        .progress
        .note(&format!("ranks by layer  {}", list.join(", ")));
    Ok(plans)
}

fn run_convert(args: &ConvertArgs, context: Context) -> Result<bool, Error> {
    crate::staging::refuse_existing(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let request = convert_request(
        &checkpoint,
        &args.output,
        &args.ranks,
        &args.calib,
        args.dtype,
        args.max_shard,
        context,
    )?;
    let record = convert(&request, context.progress)?;
    context.show(&record, &convert_text(&request, &record))?;
    Ok(true)
}

/// Bytes of a cached number in summaries.
const CACHED_BYTES: u64 = 2;

/// The result of a conversion for people.
fn convert_text(request: &ConvertRequest<'_>, record: &Record) -> String {
    let plan = cache_plan(request.checkpoint.config(), &request.layers, CACHED_BYTES);
    let number = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    let rows: Vec<Vec<String>> = record
        .layers
        .iter()
        .map(|l| {
            vec![
                l.layer.to_string(),
                format!("{} + {}", l.kv_lora_rank, l.qk_rope_head_dim),
                format!("{:.2}", l.beta),
                number(l.output_error),
                number(l.refit_error),
                number(l.stream_error),
            ]
        })
        .collect();
    let mut text = table(
        &[
            "layer",
            "r + d_r",
            "balance",
            "output error",
            "after refit",
            "stream error",
        ],
        &rows,
    );
    for layer in &record.layers {
        for note in &layer.notes {
            let _ = writeln!(text, "layer {}: {note}", layer.layer);
        }
    }
    let _ = writeln!(
        text,
        "{}: {} cached at {} tokens instead of {} ({:.1} %), {CACHED_BYTES} bytes a number",
        request.output.display(),
        show_bytes(plan.mla_bytes(HEADLINE_CONTEXT)),
        show_tokens(HEADLINE_CONTEXT),
        show_bytes(plan.gqa_bytes(HEADLINE_CONTEXT)),
        100.0 * plan.mla_bytes(HEADLINE_CONTEXT) as f64
            / plan.gqa_bytes(HEADLINE_CONTEXT).max(1) as f64
    );
    text
}

fn run_export(args: &ExportArgs, context: Context) -> Result<bool, Error> {
    let dtype = match args.dtype {
        DtypeArg::F32 => DType::F32,
        DtypeArg::F16 => DType::F16,
        DtypeArg::Bf16 => {
            return Err(Refusal::new(
                "--dtype",
                "f32 or f16",
                "bf16",
                "ONNX Runtime's CPU kernels take no bf16; export f16 or f32",
            )
            .into());
        }
    };
    let gqa_form = match args.gqa_form {
        GqaFormArg::Primitives => GqaForm::Primitives,
        GqaFormArg::Operator => GqaForm::GroupQueryAttention,
    };
    let runtime = if args.tensorrt {
        Runtime::TensorRt
    } else {
        Runtime::Standard
    };
    let checkpoint = Checkpoint::open(&args.model)?;
    let exported = export(
        &checkpoint,
        &args.output,
        ExportOptions {
            dtype,
            gqa_form,
            runtime,
        },
        context.progress,
    )?;
    let mut text = String::new();
    for (name, bytes) in &exported.files {
        let _ = writeln!(
            text,
            "{}  {}",
            args.output.join(name).display(),
            show_bytes(*bytes)
        );
    }
    context.show(&exported, &text)?;
    Ok(true)
}

fn profiles(args: &ProfileArgs) -> Profiles {
    Profiles {
        max_batch: args.max_batch,
        max_context: args.max_context,
        max_prefill: args.max_prefill.min(args.max_context),
    }
}

fn targets(args: &ProfileArgs) -> Result<Vec<Target>, Error> {
    args.target
        .iter()
        .map(|t| Ok(t.parse::<Target>()?))
        .collect()
}

fn run_build(args: &BuildArgs, context: Context) -> Result<bool, Error> {
    if args.check {
        return check_engines(args, context);
    }
    let targets = targets(&args.profile)?;
    if targets.is_empty() {
        return Err(Refusal::new(
            "--target",
            "at least one GPU architecture",
            "none",
            "give for example --target sm89,sm120",
        )
        .into());
    }
    let report = build::build(
        &args.onnx,
        &args.output,
        &targets,
        profiles(&args.profile),
        context.threads,
        context.progress,
    )?;
    let mut text = String::new();
    for engine in &report.engines {
        let _ = writeln!(
            text,
            "{}  {}  {}  {:.0} s  {}",
            args.output.join(&engine.file).display(),
            engine.target,
            show_bytes(engine.bytes),
            engine.seconds,
            build::attention_text(engine.attention)
        );
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text.push_str("not run on a GPU\n");
    context.show(&report.manifest, &text)?;
    Ok(true)
}

/// `mlac build --check`: whether the engines are those of the ONNX folder.
fn check_engines(args: &BuildArgs, context: Context) -> Result<bool, Error> {
    let stale = build::stale(&args.output, &args.onnx)?;
    let mut text = String::new();
    for file in &stale {
        let _ = writeln!(text, "stale: {file}");
    }
    if stale.is_empty() {
        let _ = writeln!(
            text,
            "{} was built from {}",
            args.output.display(),
            args.onnx.display()
        );
    }
    context.show(&stale, &text)?;
    Ok(stale.is_empty())
}

fn run_verify(args: &VerifyArgs, context: Context) -> Result<bool, Error> {
    let mut a = Subject::open(&args.a, context.threads)?;
    let mut b = Subject::open(&args.b, context.threads)?;
    let tolerance = Tolerance {
        max_abs: args.max_abs,
        max_rel: f64::INFINITY,
        min_cosine: -1.0,
        max_mean_kl: f64::INFINITY,
        min_top1: args.min_top1,
    };
    let result = verify::verify(
        &mut a,
        &mut b,
        args.text.as_deref(),
        args.tokens,
        args.steps,
        &tolerance,
        context.threads,
        context.progress,
    )?;
    let f = &result.figures;
    let mut text = format!(
        "{} tokens, logits of scale {:.3}\nmax abs   {:.3e}\nmax rel   {:.3e}\ncosine    {:.9}\nmean KL   {:.3e}\nmax KL    {:.3e}\ntop-1     {:.2} %\n",
        f.tokens,
        f.scale,
        f.max_abs,
        f.max_rel,
        f.cosine,
        f.mean_kl,
        f.max_kl,
        f.top1 * 100.0
    );
    if let Some(w) = &f.worst {
        let _ = writeln!(
            text,
            "worst     token {}, id {}: {} and {}",
            w.token, w.vocab, w.a, w.b
        );
    }
    for failure in &result.failures {
        let _ = writeln!(
            text,
            "FAILED    {}: limit {}, found {}",
            failure.gate, failure.limit, failure.found
        );
    }
    if result.failures.is_empty() {
        text.push_str("within tolerance\n");
    }
    context.show(&result, &text)?;
    Ok(result.failures.is_empty())
}

fn run_eval(args: &EvalArgs, context: Context) -> Result<bool, Error> {
    let mut subject = Subject::open(&args.model, context.threads)?;
    let result = evaluate::evaluate(
        &mut subject,
        &args.text,
        args.window,
        args.windows,
        context.threads,
        context.progress,
    )?;
    let text = format!(
        "perplexity {:.4} over {} windows of {} tokens ({:.1} s)",
        result.perplexity,
        result.losses.len(),
        result.window,
        result.seconds
    );
    context.show(&result, &text)?;
    Ok(true)
}

fn run_generate(args: &GenerateArgs, context: Context) -> Result<bool, Error> {
    let mut subject = Subject::open(&args.model, context.threads)?;
    let result = generate::generate(&mut subject, &args.prompt, args.max_tokens)?;
    let text = format!(
        "{}{}\n\n({} tokens, {:.1} tokens a second, {} bytes of cache a token)",
        result.prompt,
        result.text,
        result.tokens,
        result.tokens_per_second,
        result.cache_bytes_per_token
    );
    context.show(&result, &text)?;
    Ok(true)
}

fn run_bench(args: &BenchArgs, context: Context) -> Result<bool, Error> {
    let folders: Vec<&Path> = std::iter::once(args.a.as_path())
        .chain(args.b.as_deref())
        .collect();
    let results = bench::bench(
        &folders,
        &args.contexts,
        args.repeats,
        context.threads,
        context.progress,
    )?;
    let mut head = vec!["context", "A ms", "A cache"];
    if args.b.is_some() {
        head.extend(["B ms", "B cache", "A / B"]);
    }
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|r| {
            let mut row = vec![show_tokens(r.context)];
            for (ms, bytes) in r.milliseconds.iter().zip(&r.cache_bytes) {
                row.extend([format!("{ms:.2}"), show_bytes(*bytes as u64)]);
            }
            if let [a, b] = r.milliseconds[..] {
                row.push(format!("{:.2}", a / b));
            }
            row
        })
        .collect();
    context.show(&results, &table(&head, &rows))?;
    Ok(true)
}

fn run_compile(args: &CompileArgs, context: Context) -> Result<bool, Error> {
    crate::staging::refuse_existing(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let staging = crate::staging::Staging::create(&args.output)?;
    let folder = staging.path().join("checkpoint");
    let convert = convert_request(
        &checkpoint,
        &folder,
        &args.ranks,
        &args.calib,
        DtypeArg::F32,
        5 << 30,
        context,
    )?;
    let report = compile(
        &CompileRequest {
            convert,
            staging: staging.path(),
            output: &args.output,
            source: &args.model,
            evaluation: args.eval.as_deref(),
            eval_window: args.eval_window,
            eval_windows: args.eval_windows,
            targets: targets(&args.profile)?,
            profiles: profiles(&args.profile),
            contexts: &args.contexts,
            prompt: &args.prompt,
            command: std::env::args().collect::<Vec<_>>().join(" "),
        },
        context.progress,
    )?;
    staging.finish()?;
    context.show(&report, &super::summary::text(&report, &args.output))?;
    Ok(report.parity.iter().all(|p| p.passed != Some(false)))
}
