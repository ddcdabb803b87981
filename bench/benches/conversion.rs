//! Conversion of one layer of SmolLM2's shape: statistics of one window, and the factors.

use std::hint::black_box;

use criterion::{Criterion, criterion_group};
use mlac_bench::random_model::{Random, RandomLlama};
use mlac_bench::{estimates, results};
use mlac_converter::{
    LayerStatistics, RankChoice, Recipe, StatisticsOptions, WindowActivations, compose,
    convert_layer,
};
use mlac_model::Dtype;

const TOKENS: usize = 2048;
const WINDOWS: usize = 16;

fn conversion(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shape = RandomLlama {
        dtype: Dtype::F32,
        ..RandomLlama::SMOLLM2
    };
    let checkpoint = shape
        .write(&folder.path().join("model"), 1)
        .expect("a random checkpoint");
    let weights =
        mlac::pipeline::calibrate::layer_weights(&checkpoint, 0).expect("the layer's weights");
    let mut random = Random(7);
    let q = random.many(TOKENS * shape.heads * shape.head_dim);
    let k = random.many(TOKENS * shape.kv_heads * shape.head_dim);
    let v = random.many(TOKENS * shape.kv_heads * shape.head_dim);
    let window = WindowActivations {
        tokens: TOKENS,
        q: &q,
        k: &k,
        v: &v,
    };
    let empty = || {
        LayerStatistics::new(
            0,
            &weights.attention,
            &weights.o.weight,
            StatisticsOptions::default(),
        )
        .expect("statistics of a sound layer")
    };
    let mut full = empty();
    full.accumulate(&window).expect("a sound window");

    let mut group = c.benchmark_group("conversion");
    group.sample_size(10);
    group.bench_function("statistics of a window of 2048 tokens", |b| {
        b.iter(|| {
            let mut statistics = empty();
            statistics
                .accumulate(black_box(&window))
                .expect("a sound window");
            statistics
        });
    });
    let ranks = RankChoice {
        kv_lora_rank: 128,
        qk_rope_head_dim: 64,
    };
    group.bench_function("factors and tensors at 128 + 64", |b| {
        b.iter(|| {
            let (factors, _) = convert_layer(&weights, black_box(&full), ranks, &Recipe::default())
                .expect("factors");
            compose(&weights, &factors).expect("tensors")
        });
    });
    group.finish();
}

criterion_group!(benches, conversion);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    if estimates::is_test_run() {
        return;
    }
    let median = |id| estimates::median_seconds("conversion", id).expect("criterion's figures");
    let statistics = median("statistics of a window of 2048 tokens");
    let factors = median("factors and tensors at 128 + 64");
    let rows = vec![
        vec![
            "statistics of one window of 2048 tokens, 256 query rows".into(),
            format!("{:.1}", statistics * 1e3),
        ],
        vec![
            "factors (with the balance search) and tensors at 128 + 64".into(),
            format!("{:.1}", factors * 1e3),
        ],
        vec![
            format!("one layer with {WINDOWS} windows, the sum"),
            format!("{:.1}", (statistics * WINDOWS as f64 + factors) * 1e3),
        ],
    ];
    results::write_section(
        &results::results_file(),
        "Conversion per layer (SmolLM2's shape)",
        "cargo bench -p mlac-bench --bench conversion",
        &results::table(&["step", "median ms"], &rows),
    )
    .expect("bench/RESULTS.md can be written");
}
