//! The command line, parsed and nothing more; `commands` resolves and runs it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::units;

/// The MLA compiler: a GQA checkpoint in, a proven MLA engine out.
#[derive(Debug, Parser)]
#[command(name = "mlac", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print the result as JSON on standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// Threads for mathematics and ONNX Runtime [default: all cores].
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say which runtimes and devices were found, what is needed and how to get it.
    #[command(after_help = "Example:\n  mlac doctor")]
    Doctor,
    /// Print layers, ranks and cache bytes by context for a budget, before any work.
    #[command(after_help = "Example:\n  mlac plan SmolLM2.gguf --budget 0.5")]
    Plan(PlanArgs),
    /// Convert a GQA checkpoint to an MLA checkpoint.
    #[command(
        after_help = "Examples:\n  mlac convert model/ -o mla/ --budget 0.5 --calib text.txt\n  mlac convert model/ -o mla/ --kv-lora-rank max"
    )]
    Convert(ConvertArgs),
    /// Write a checkpoint (GQA or MLA) as ONNX.
    #[command(after_help = "Example:\n  mlac export mla/ -o onnx/")]
    Export(ExportArgs),
    /// Build TensorRT engines from an ONNX folder.
    #[command(after_help = "Example:\n  mlac build onnx/ -o engines/ --target sm89,sm120")]
    Build(BuildArgs),
    /// Compare two models' logits: checkpoints, ONNX folders or engines. Exit code 1 beyond tolerance.
    #[command(after_help = "Example:\n  mlac verify model/ mla/")]
    Verify(VerifyArgs),
    /// Perplexity of a checkpoint, an ONNX folder or engines on a text.
    #[command(after_help = "Example:\n  mlac eval mla/ --text test.txt --window 2048 --windows 8")]
    Eval(EvalArgs),
    /// Continue a prompt, so that a person can look.
    #[command(after_help = "Example:\n  mlac generate onnx/ --prompt \"The capital of France is\"")]
    Generate(GenerateArgs),
    /// Time decode steps of ONNX folders or engines by context, in turns.
    #[command(after_help = "Example:\n  mlac bench onnx-gqa/ onnx-mla/ --contexts 1K,4K")]
    Bench(BenchArgs),
    /// CUDA kernels: compile them, list and check what is compiled. None of it needs a GPU.
    #[command(subcommand)]
    Kernels(KernelCommand),
    /// The whole way: convert, export, build, verify, evaluate, benchmark, report.
    #[command(
        after_help = "Example:\n  mlac compile model/ -o out/ --budget 0.5 --calib text.txt --eval test.txt --target sm89,sm120"
    )]
    Compile(CompileArgs),
}

/// How large the MLA cache may be.
#[derive(Debug, Clone, Args)]
pub struct RankArgs {
    /// Share of the GQA cache to keep: 0.5 or 50%.
    #[arg(long, value_parser = units::fraction, conflicts_with_all = ["kv_lora_rank", "rope_dim"])]
    pub budget: Option<f64>,
    /// Numbers in the latent, or `max` for an exact conversion.
    #[arg(long, value_name = "R|max")]
    pub kv_lora_rank: Option<String>,
    /// Numbers in the shared rotary key [with `--kv-lora-rank max`: all of them].
    #[arg(long, value_name = "D")]
    pub rope_dim: Option<usize>,
    /// Ranks are multiples of this (a power of two) where the budget has room for it.
    #[arg(long, default_value_t = 16)]
    pub align: usize,
    /// Which layers to convert: full (those without a sliding window), all, or a list such as 1,3,5.
    #[arg(long, default_value = "full")]
    pub layers: String,
}

/// `mlac plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Ranks.
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Contexts to list.
    #[arg(long, value_delimiter = ',', value_parser = units::tokens, default_value = "4K,32K,128K")]
    pub contexts: Vec<usize>,
    /// Bytes of one cached number.
    #[arg(long, default_value_t = 2)]
    pub cache_bytes: u64,
}

/// Which mathematics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// mlac's recipe.
    Recipe,
    /// TransMLA (RoRoPE, FreqFold, balanced KV), the baseline people know.
    Transmla,
    /// Plain low rank of the weights.
    Svd,
}

/// Type of numbers in written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// 32-bit.
    F32,
    /// 16-bit IEEE.
    F16,
    /// bfloat16.
    Bf16,
}

/// How statistics are gathered.
#[derive(Debug, Clone, Args)]
pub struct CalibArgs {
    /// Calibration text, or `none` for statistics from the weights alone.
    #[arg(long, value_name = "FILE|none")]
    pub calib: Option<String>,
    /// Calibration windows, spread over the text.
    #[arg(long, default_value_t = 16)]
    pub calib_windows: usize,
    /// Tokens in a calibration window; statistics must see long distances.
    #[arg(long, value_parser = units::tokens, default_value = "2048")]
    pub calib_window: usize,
    /// Which windows of the text: 0 spreads them from its start, other numbers shift them.
    #[arg(long, default_value_t = 0)]
    pub calib_seed: u64,
    /// Query rows sampled in a window for attention statistics.
    #[arg(long, default_value_t = 256)]
    pub query_rows: usize,
    /// Method.
    #[arg(long, value_enum, default_value_t = MethodArg::Recipe)]
    pub method: MethodArg,
    /// Steps of the recipe to run, or to leave out with a leading `-`: such as `-refit,-sequential` [default: all].
    #[arg(long, allow_hyphen_values = true, value_delimiter = ',')]
    pub steps: Vec<String>,
    /// File of the gradients that the recipe takes of the model's loss: read where it is there, else written, so that
    /// further budgets of the same model and text need not take them again.
    #[arg(long, value_name = "FILE")]
    pub gradients: Option<PathBuf>,
    /// Gradient steps on every converted layer after the closed forms, to heal it; a killed run takes up
    /// the layers it has done. 0: none, the conversion is free of training.
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    pub refine: usize,
    /// Query rows of one calibration window in a gradient step.
    #[arg(long, value_name = "ROWS", default_value_t = 128)]
    pub refine_rows: usize,
    /// Largest gradient step relative to the size of each matrix.
    #[arg(long, value_name = "RATE", default_value_t = 0.003)]
    pub refine_rate: f64,
    /// Neighbouring frequencies merged by FreqFold (transmla only) [default: the fewest the rotary key allows].
    #[arg(long)]
    pub freqfold: Option<usize>,
}

/// `mlac convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Folder to write; must not exist.
    #[arg(short, long)]
    pub output: PathBuf,
    /// Ranks.
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Statistics.
    #[command(flatten)]
    pub calib: CalibArgs,
    /// Type of the converted tensors; all others are copied as they are.
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub dtype: DtypeArg,
    /// Largest safetensors shard.
    #[arg(long, value_parser = units::bytes, default_value = "5GiB")]
    pub max_shard: u64,
}

/// How GQA layers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GqaFormArg {
    /// Standard operators.
    Primitives,
    /// ONNX Runtime's com.microsoft GroupQueryAttention.
    Operator,
}

/// How converted layers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormArg {
    /// Standard operators: any runtime.
    Standard,
    /// `mlac::LatentAttention` over a cache in place, `mlac::Mxfp4Experts`, `mlac::Linear16` for weights of 16 bits: ONNX Runtime with
    /// `libmlac_ort.so`; mlac's own commands have them in themselves.
    Ort,
    /// `mlac::LatentAttention` with its CUDA kernels, for the GPU that `--target` names: ONNX Runtime's CUDA execution provider with
    /// `libmlac_ort.so`, f16. Not run on a GPU.
    OrtCuda,
    /// The plugin `LatentAttention`: enterprise TensorRT, f16.
    Tensorrt,
}

/// `mlac export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Folder to write; must not exist.
    #[arg(short, long)]
    pub output: PathBuf,
    /// Type of weights, activations and cache: f32 or f16 [default: f32, with `--form ort-cuda` f16].
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Form of layers that are not converted.
    #[arg(long, value_enum, default_value_t = GqaFormArg::Primitives)]
    pub gqa_form: GqaFormArg,
    /// Form of the converted layers.
    #[arg(long, value_enum, default_value_t = FormArg::Standard)]
    pub form: FormArg,
    /// GPU architecture for `--form ort-cuda`: `sm_80`, `sm_86`, `sm_89`, `sm_90a` or `sm_120`.
    #[arg(long)]
    pub target: Option<String>,
    /// Write standard operators for TensorRT for RTX: fused attention where it takes the shape.
    #[arg(long, conflicts_with = "form")]
    pub tensorrt: bool,
}

/// Shapes the engines are optimised for.
#[derive(Debug, Clone, Args)]
pub struct ProfileArgs {
    /// GPU architectures: sm75, sm80, sm86, sm89, sm120, sm121; with `build --backend tensorrt` the GPU of this machine, sm90 among others.
    #[arg(long, value_delimiter = ',')]
    pub target: Vec<String>,
    /// Largest batch.
    #[arg(long, default_value_t = 8)]
    pub max_batch: usize,
    /// Longest context.
    #[arg(long, value_parser = units::tokens, default_value = "8K")]
    pub max_context: usize,
    /// Longest prompt in one prefill.
    #[arg(long, value_parser = units::tokens, default_value = "2K")]
    pub max_prefill: usize,
}

/// Which TensorRT builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    /// TensorRT for RTX: needs no GPU, no plugins.
    TensorrtRtx,
    /// Enterprise TensorRT 11, on the GPU that the engines are for: folders of `mlac export --form tensorrt`.
    Tensorrt,
}

/// `mlac build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// ONNX folder written by `mlac export`.
    pub onnx: PathBuf,
    /// Folder to write; must not exist.
    #[arg(short, long)]
    pub output: PathBuf,
    /// Which TensorRT.
    #[arg(long, value_enum, default_value_t = BackendArg::TensorrtRtx)]
    pub backend: BackendArg,
    /// Profiles.
    #[command(flatten)]
    pub profile: ProfileArgs,
    /// Build nothing: say which digests of the engine folder are stale, exit code 1 if any.
    #[arg(long)]
    pub check: bool,
}

/// `mlac verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Reference: checkpoint, GGUF file, ONNX folder or engines of enterprise TensorRT.
    pub a: PathBuf,
    /// Candidate: checkpoint, GGUF file, ONNX folder or engines of enterprise TensorRT.
    pub b: PathBuf,
    /// Text to run [default: a built-in English text].
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// Tokens of it; the last `--steps` of them one at a time.
    #[arg(long, value_parser = units::tokens, default_value = "256")]
    pub tokens: usize,
    /// Decode steps after the prefill.
    #[arg(long, default_value_t = 32)]
    pub steps: usize,
    /// Largest absolute difference allowed.
    #[arg(long, default_value_t = 1e-3)]
    pub max_abs: f64,
    /// Smallest share of positions with the same most likely token.
    #[arg(long, value_parser = units::fraction, default_value = "100%")]
    pub min_top1: f64,
}

/// `mlac eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Checkpoint, GGUF file, ONNX folder or engines of enterprise TensorRT.
    pub model: PathBuf,
    /// Text to measure on.
    #[arg(long)]
    pub text: PathBuf,
    /// Tokens in a window.
    #[arg(long, value_parser = units::tokens, default_value = "2048")]
    pub window: usize,
    /// Windows from the start of the text [default: all].
    #[arg(long)]
    pub windows: Option<usize>,
}

/// `mlac generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Checkpoint, GGUF file, ONNX folder or engines of enterprise TensorRT.
    pub model: PathBuf,
    /// Text to continue.
    #[arg(long)]
    pub prompt: String,
    /// Most tokens to add.
    #[arg(long, default_value_t = 64)]
    pub max_tokens: usize,
}

/// `mlac bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// ONNX folders, or engines of enterprise TensorRT; the last one is compared with each before it.
    #[arg(required = true)]
    pub models: Vec<PathBuf>,
    /// Cached tokens before the timed step.
    #[arg(long, value_delimiter = ',', value_parser = units::tokens, default_value = "1K,4K")]
    pub contexts: Vec<usize>,
    /// Timed steps at each context.
    #[arg(long, default_value_t = 8)]
    pub repeats: usize,
}

/// How `mlac compile` writes converted layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompileFormArg {
    /// Standard operators: any runtime.
    Standard,
    /// mlac's operators for ONNX Runtime, over a cache in place.
    Ort,
}

/// `mlac compile`.
#[derive(Debug, Args)]
pub struct CompileArgs {
    /// Checkpoint folder or GGUF file.
    pub model: PathBuf,
    /// Folder to write; must not exist.
    #[arg(short, long)]
    pub output: PathBuf,
    /// Ranks.
    #[command(flatten)]
    pub ranks: RankArgs,
    /// Statistics.
    #[command(flatten)]
    pub calib: CalibArgs,
    /// Form of the converted layers in `onnx/`.
    #[arg(long, value_enum, default_value_t = CompileFormArg::Standard)]
    pub form: CompileFormArg,
    /// Evaluation text; without it the report says that quality was not measured.
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// Tokens in an evaluation window.
    #[arg(long, value_parser = units::tokens, default_value = "2048")]
    pub eval_window: usize,
    /// Evaluation windows.
    #[arg(long, default_value_t = 8)]
    pub eval_windows: usize,
    /// Engines; without targets none are built.
    #[command(flatten)]
    pub profile: ProfileArgs,
    /// Cached tokens at which decode steps are timed.
    #[arg(long, value_delimiter = ',', value_parser = units::tokens, default_value = "1K,4K")]
    pub contexts: Vec<usize>,
    /// Prompt continued by the converted engine.
    #[arg(
        long,
        default_value = "The three most important things about a compiler are"
    )]
    pub prompt: String,
}

/// `mlac kernels`.
#[derive(Debug, Subcommand)]
pub enum KernelCommand {
    /// Compile the attention kernels of a layer for a GPU and report registers, stack and instructions.
    #[command(
        after_help = "Examples:\n  mlac kernels build --arch sm_90a --kv-lora-rank 192 --rope-dim 64 --sinks\n  mlac kernels build --arch sm_90a --kv-lora-rank 192 --compiler nvcc"
    )]
    Build(KernelBuildArgs),
    /// List the compiled kernels.
    #[command(after_help = "Example:\n  mlac kernels list")]
    List(KernelCacheArgs),
    /// Check every compiled kernel: digests, stack, spills, instructions. Exit code 1 if any is not as it must be.
    #[command(after_help = "Example:\n  mlac kernels check --cache kernels/")]
    Check(KernelCacheArgs),
}

/// Where compiled kernels are.
#[derive(Debug, Args)]
pub struct KernelCacheArgs {
    /// Folder of compiled kernels [default: `MLAC_KERNEL_CACHE`, else the user's cache folder].
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// Which cached tokens a query token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MaskArg {
    /// All.
    Full,
    /// Those up to its own position.
    Causal,
    /// Of the draft, those whose bit is set.
    Tree,
}

/// Which of CUDA's compilers compiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompilerArg {
    /// The library, which needs no host compiler.
    Nvrtc,
    /// The program, which needs g++ (or what `CXX` names) beside it.
    Nvcc,
}

/// `mlac kernels build`.
#[derive(Debug, Args)]
pub struct KernelBuildArgs {
    /// GPU architecture: `sm_80`, `sm_86`, `sm_89`, `sm_90a` or `sm_120`.
    #[arg(long)]
    pub arch: String,
    /// Numbers in the latent: 64 to 512 in steps of 64.
    #[arg(
        long,
        value_name = "R",
        default_value_t = 512,
        conflicts_with = "kv_heads"
    )]
    pub kv_lora_rank: u32,
    /// Numbers in the shared rotary key: 16 to 128 in steps of 16.
    #[arg(
        long,
        value_name = "D",
        default_value_t = 64,
        conflicts_with = "kv_heads"
    )]
    pub rope_dim: u32,
    /// Query heads.
    #[arg(long, default_value_t = 64)]
    pub heads: u32,
    /// Grouped queries instead of a latent, with so many KV heads.
    #[arg(long)]
    pub kv_heads: Option<u32>,
    /// Numbers in a head of grouped queries.
    #[arg(long, default_value_t = 64, requires = "kv_heads")]
    pub head_dim: u32,
    /// Query tokens of a request: 1 to decode, more to verify a draft.
    #[arg(long, default_value_t = 1)]
    pub query_tokens: u32,
    /// Which cached tokens a query token sees.
    #[arg(long, value_enum, default_value_t = MaskArg::Causal)]
    pub mask: MaskArg,
    /// Sliding window in tokens.
    #[arg(long)]
    pub window: Option<u32>,
    /// Every query head has a sink.
    #[arg(long)]
    pub sinks: bool,
    /// f16 instead of bf16.
    #[arg(long)]
    pub f16: bool,
    /// The latents in the cache are FP8 (e4m3) with a scale for every token.
    #[arg(long, conflicts_with = "kv_heads")]
    pub fp8: bool,
    /// Tokens in a page of the cache.
    #[arg(long, default_value_t = 64)]
    pub page: u32,
    /// Which of CUDA's compilers compiles; neither stands in for the other.
    #[arg(long, value_enum, default_value_t = CompilerArg::Nvrtc)]
    pub compiler: CompilerArg,
    /// Where the compiled kernel goes.
    #[command(flatten)]
    pub place: KernelCacheArgs,
}
