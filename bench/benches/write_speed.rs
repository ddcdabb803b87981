//! How fast checkpoints and ONNX folders are written, against `cp` of the same bytes.

use std::fs;
use std::path::Path;
use std::process::Command;

use criterion::{BatchSize, Criterion, criterion_group};
use mlac::pipeline::convert::{Calibration, ConvertRequest, LayerPlan, Method, convert};
use mlac::pipeline::export::{ExportOptions, export};
use mlac::progress::Progress;
use mlac_bench::random_model::RandomLlama;
use mlac_bench::{estimates, results};
use mlac_converter::{AttentionShape, RankChoice, Recipe};
use mlac_graph::builders::{GqaForm, Runtime};
use mlac_graph::ir::DType;
use mlac_model::{Checkpoint, Dtype};

const MODEL: RandomLlama = RandomLlama {
    layers: 8,
    hidden: 1024,
    heads: 16,
    kv_heads: 4,
    head_dim: 64,
    intermediate: 4096,
    vocab: 32000,
    gpt_oss: false,
    dtype: Dtype::F32,
};

fn convert_to(checkpoint: &Checkpoint, output: &Path) {
    let ranks = RankChoice::exact(&AttentionShape::of(checkpoint.config()));
    let layers = (0..MODEL.layers)
        .map(|layer| LayerPlan { layer, ranks })
        .collect();
    let request = ConvertRequest {
        gradients: None,
        refine: None,
        checkpoint,
        output,
        layers,
        method: Method::Recipe(Recipe::default()),
        sequential: false,
        calibration: Calibration::Weights,
        dtype: Dtype::F32,
        max_shard: 5 << 30,
        threads: 0,
    };
    convert(&request, Progress::Silent).expect("a conversion");
}

fn write_speed(c: &mut Criterion) {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../target")
        .expect("a temporary folder");
    let model = folder.path().join("model");
    let checkpoint = MODEL.write(&model, 1).expect("a random checkpoint");
    let out = folder.path().join("out");
    let clear = || {
        if out.exists() {
            fs::remove_dir_all(&out).expect("the output can be removed");
        }
    };
    let cp = |sync: bool| {
        let done = Command::new("cp")
            .arg("-r")
            .arg(&model)
            .arg(&out)
            .status()
            .expect("cp runs");
        assert!(done.success(), "cp failed");
        if sync {
            for file in fs::read_dir(&out).expect("the copy") {
                let path = file.expect("an entry").path();
                fs::File::open(path)
                    .and_then(|f| f.sync_all())
                    .expect("sync");
            }
        }
    };
    let options = ExportOptions {
        dtype: DType::F32,
        gqa_form: GqaForm::Primitives,
        runtime: Runtime::Standard,
        arch: None,
    };
    let mut group = c.benchmark_group("write");
    group.sample_size(10);
    group.bench_function("cp", |b| {
        b.iter_batched(clear, |()| cp(false), BatchSize::PerIteration);
    });
    group.bench_function("cp and sync", |b| {
        b.iter_batched(clear, |()| cp(true), BatchSize::PerIteration);
    });
    group.bench_function("onnx", |b| {
        b.iter_batched(
            clear,
            |()| export(&checkpoint, &out, options, Progress::Silent).expect("an export"),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("checkpoint", |b| {
        b.iter_batched(
            clear,
            |()| convert_to(&checkpoint, &out),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, write_speed);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    if estimates::is_test_run() {
        return;
    }
    let median = |id| estimates::median_seconds("write", id).expect("criterion's figures");
    let (cp, synced) = (median("cp"), median("cp and sync"));
    let row = |what: &str, seconds: f64| {
        vec![
            what.to_owned(),
            format!("{seconds:.2}"),
            format!("{:.0} %", 100.0 * cp / seconds),
            format!("{:.0} %", 100.0 * synced / seconds),
        ]
    };
    let rows = vec![
        row("`cp -r`", cp),
        row("`cp -r` and sync", synced),
        row("ONNX export (transposes, writes, no sync)", median("onnx")),
        row(
            "conversion at full rank (digests, checks, factors, writes, syncs)",
            median("checkpoint"),
        ),
    ];
    results::write_section(
        &results::results_file(),
        "Write speed (random Llama, f32, 8 layers of 1024, vocabulary 32000)",
        "cargo bench -p mlac-bench --bench write_speed",
        &results::table(
            &["what", "median s", "speed of cp", "speed of cp and sync"],
            &rows,
        ),
    )
    .expect("bench/RESULTS.md can be written");
}
