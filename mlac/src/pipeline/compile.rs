//! The whole way, top to bottom.

use std::path::Path;
use std::time::Instant;

use mlac_engines::tensorrt::{EngineReport, Product, Profiles, Target};
use mlac_graph::builders::{GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::Checkpoint;

use super::convert::{CARD, ConvertRequest, LayerPlan, Record, convert, source_name};
use super::export::{ExportOptions, export};
use super::ranks::cache_plan;
use super::subject::Subject;
use super::{build, evidence, generate};
use crate::error::Error;
use crate::progress::Progress;
use crate::release::{Card, Quality};
use crate::report::data::{CachePoint, EngineRow, Form, PerplexityRow, Report, StageTime};
use crate::report::html;

/// Contexts in the report's table of cache sizes.
const CACHE_CONTEXTS: [usize; 6] = [1 << 10, 1 << 12, 1 << 13, 1 << 15, 1 << 16, 1 << 17];
const GENERATED_TOKENS: usize = 48;

/// The converted model's graphs.
pub(super) const ONNX: &str = "onnx";
/// The source's, in standard operators.
pub(super) const GQA: &str = "onnx-gqa";
/// The source's with ONNX Runtime's own operator of attention.
pub(super) const GQA_OPERATOR: &str = "onnx-gqa-operator";

/// What to compile.
pub struct CompileRequest<'a> {
    /// The conversion; its output lies in the staging folder.
    pub convert: ConvertRequest<'a>,
    /// Folder to fill.
    pub staging: &'a Path,
    /// Its final name, for the commands in the report.
    pub output: &'a Path,
    /// The source as the user named it.
    pub source: &'a Path,
    /// How the converted layers are written in `onnx/`.
    pub form: Form,
    /// Evaluation text.
    pub evaluation: Option<&'a Path>,
    /// Tokens in an evaluation window.
    pub eval_window: usize,
    /// Evaluation windows.
    pub eval_windows: usize,
    /// GPU architectures to build engines for.
    pub targets: Vec<Target>,
    /// Shapes they are optimised for.
    pub profiles: Profiles,
    /// Contexts of the decode timing.
    pub contexts: &'a [usize],
    /// Prompt to continue.
    pub prompt: &'a str,
    /// The command as given.
    pub command: String,
}

/// Seconds of the stages so far.
struct Clock {
    times: Vec<StageTime>,
    last: Instant,
}

impl Clock {
    fn lap(&mut self, stage: &str) {
        let seconds = self.last.elapsed().as_secs_f64();
        self.times.push(StageTime {
            stage: stage.to_owned(),
            seconds,
        });
        self.last = Instant::now();
    }
}

/// Converts, exports, builds, verifies, evaluates, times, generates and reports.
pub fn compile(request: &CompileRequest<'_>, progress: Progress) -> Result<Report, Error> {
    let threads = request.convert.threads;
    let mut clock = Clock {
        times: Vec::new(),
        last: Instant::now(),
    };
    let at = |name: &str| request.staging.join(name);

    // Checkpoint -> statistics -> MLA checkpoint.
    let record = convert(&request.convert, progress)?;
    let converted = Checkpoint::open(at("checkpoint"))?;
    clock.lap("calibrate and convert");

    // MLA checkpoint -> ONNX; the source too, as the baselines of timing.
    export_all(request, &converted, progress)?;
    clock.lap("export ONNX");

    // ONNX -> engines.
    let engines = build_engines(request, &converted, progress)?;
    if !request.targets.is_empty() {
        clock.lap("build engines");
    }

    // Verify at every arrow.
    let parity = evidence::verify_all(request, progress)?;
    clock.lap("verify");

    let perplexity = evidence::measure_quality(request, progress)?;
    if let Some(row) = &perplexity {
        write_card(request, &converted, &record, row)?;
        clock.lap("evaluate");
    }

    let decode = evidence::time_decode(request, progress)?;
    clock.lap("time decode steps");

    let mut subject = Subject::open(&at(ONNX), threads)?;
    refuse_wrong_cache(request, &subject)?;
    let generation = generate::generate(&mut subject, request.prompt, GENERATED_TOKENS)?;
    clock.lap("generate");

    let report = Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        command: request.command.clone(),
        source: request.source.display().to_string(),
        shape: shape_line(request),
        form: request.form,
        gqa_cache_numbers: record.gqa_cache_numbers,
        mla_cache_numbers: record.mla_cache_numbers,
        cache_dtype_bytes: 2,
        cache: cache_points(request),
        layers: record.layers.clone(),
        perplexity,
        decode,
        decode_command: evidence::decode_command(request),
        operator_left_out: evidence::operator_left_out(request),
        parity,
        engines,
        prompt: generation.prompt,
        generated: generation.text,
        times: clock.times,
        peak_memory: peak_memory(),
    };
    write_report(request.staging, &report)?;
    Ok(report)
}

/// Writes the graphs: of the converted model in the form that was asked for, of the source in both of its forms.
fn export_all(
    request: &CompileRequest<'_>,
    converted: &Checkpoint,
    progress: Progress,
) -> Result<(), Error> {
    let source = request.convert.checkpoint;
    let primitives = ExportOptions {
        dtype: DType::F32,
        gqa_form: GqaForm::Primitives,
        runtime: Runtime::Standard,
        arch: None,
    };
    let of_form = ExportOptions {
        runtime: match request.form {
            Form::Standard => Runtime::Standard,
            Form::Ort => Runtime::OnnxRuntime,
        },
        ..primitives
    };
    let operator = ExportOptions {
        gqa_form: GqaForm::GroupQueryAttention,
        ..primitives
    };
    let at = |name: &str| request.staging.join(name);
    export(converted, &at(ONNX), of_form, progress)?;
    export(source, &at(GQA), primitives, progress)?;
    if operator.gqa_form.takes(source.config()) {
        export(source, &at(GQA_OPERATOR), operator, progress)?;
    }
    Ok(())
}

/// The emitted graph's cache must be what the plan said, at every context. A cache in place has no size of its own: with room for
/// `context` rows, and of a ring for its window's, it must hold what is planned for `context` tokens.
fn refuse_wrong_cache(request: &CompileRequest<'_>, emitted: &Subject) -> Result<(), Error> {
    let convert = &request.convert;
    let plan = cache_plan(convert.checkpoint.config(), &convert.layers, 1);
    for context in CACHE_CONTEXTS {
        let (planned, found) = (plan.mla_bytes(context), emitted.cache_numbers(context));
        if planned != found {
            let tokens = match request.form {
                Form::Standard => "tokens",
                Form::Ort => "rows of capacity",
            };
            return Err(mlac_model::Refusal::new(
                format!("cache of the emitted graph at {context} {tokens}"),
                format!("{planned} numbers, as planned"),
                found.to_string(),
                "report this as a defect of mlac",
            )
            .into());
        }
    }
    Ok(())
}

fn shape_line(request: &CompileRequest<'_>) -> String {
    let config = request.convert.checkpoint.config();
    let layers = &request.convert.layers;
    let range = |of: fn(&LayerPlan) -> usize| {
        let (least, most) = (layers.iter().map(of).min(), layers.iter().map(of).max());
        match (least, most) {
            (Some(least), Some(most)) if least < most => format!("{least} to {most}"),
            (least, _) => least.unwrap_or(0).to_string(),
        }
    };
    format!(
        "{:?}, {} layers, hidden size {}, {} query heads, {} KV heads of {}; {} layers converted to latent {} + rotary key {}",
        config.architecture,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        layers.len(),
        range(|l| l.ranks.kv_lora_rank),
        range(|l| l.ranks.qk_rope_head_dim),
    )
}

fn cache_points(request: &CompileRequest<'_>) -> Vec<CachePoint> {
    let plan = cache_plan(
        request.convert.checkpoint.config(),
        &request.convert.layers,
        2,
    );
    CACHE_CONTEXTS
        .iter()
        .map(|&context| CachePoint {
            context,
            gqa_bytes: plan.gqa_bytes(context),
            mla_bytes: plan.mla_bytes(context),
        })
        .collect()
}

fn build_engines(
    request: &CompileRequest<'_>,
    converted: &Checkpoint,
    progress: Progress,
) -> Result<Vec<EngineRow>, Error> {
    if request.targets.is_empty() {
        return Ok(Vec::new());
    }
    let options = ExportOptions {
        dtype: DType::F16,
        gqa_form: GqaForm::Primitives,
        runtime: Runtime::TensorRt,
        arch: None,
    };
    let onnx = request.staging.join("onnx-tensorrt");
    export(converted, &onnx, options, progress)?;
    let folder = request.staging.join("engines");
    let report = build::build(
        &onnx,
        &folder,
        Product::Rtx,
        &request.targets,
        request.profiles,
        request.convert.threads,
        progress,
    )?;
    Ok(report.engines.iter().map(engine_row).collect())
}

fn engine_row(engine: &EngineReport) -> EngineRow {
    EngineRow {
        file: engine.file.clone(),
        target: engine.target.to_string(),
        bytes: engine.bytes,
        seconds: engine.seconds,
        attention: build::attention_text(engine.attention),
        ran: "not run on a GPU".to_owned(),
    }
}

/// The checkpoint's model card once more, with the quality that was measured.
fn write_card(
    request: &CompileRequest<'_>,
    converted: &Checkpoint,
    record: &Record,
    row: &PerplexityRow,
) -> Result<(), Error> {
    let quality = Quality {
        text: Path::new(&row.text)
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        windows: (row.windows, row.window),
        original: row.original,
        converted: row.converted,
    };
    let card = Card {
        source: &source_name(request.convert.checkpoint),
        config: converted.config(),
        record,
        quality: Some(&quality),
    };
    let path = request.staging.join("checkpoint").join(CARD);
    std::fs::write(&path, card.markdown()).map_err(|e| Error::io(path, e))
}

fn write_report(folder: &Path, report: &Report) -> Result<(), Error> {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|e| Error::io(path, e))
    };
    write("report.json", &super::convert::pretty(report)?)?;
    write("report.html", &html::page(report))
}

/// Peak resident memory of this process in bytes; 0 where the system does not say.
pub fn peak_memory() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|l| l.strip_prefix("VmHWM:"))
                .and_then(|v| v.split_whitespace().next())
                .and_then(|v| v.parse::<u64>().ok())
        })
        .map_or(0, |kib| kib * 1024)
}
