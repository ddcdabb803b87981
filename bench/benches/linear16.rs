//! Linear layers with bf16 weights in ONNX Runtime: its own `MatMul`, for which it folds the casts, against `mlac::Linear16`, for one token
//! and for a prompt, and how fast two threads read memory in the same run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use mlac_bench::random_model::Random;
use mlac_bench::{estimates, memory, results};
use mlac_engines::ort::{HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::ir::{DType, GraphBuilder};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_model::Dtype;
use mlac_model::tensor::bytes_from_f32;

/// A matrix `[output, input]`.
struct Case {
    name: &'static str,
    output: usize,
    input: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "GPT-OSS-20B queries, 2880 to 4096",
        output: 4096,
        input: 2880,
    },
    Case {
        name: "GPT-OSS-20B output, 4096 to 2880",
        output: 2880,
        input: 4096,
    },
    Case {
        name: "SmolLM2 gate, 576 to 1536",
        output: 1536,
        input: 576,
    },
    Case {
        name: "SmolLM2 down, 1536 to 576",
        output: 576,
        input: 1536,
    },
];

/// Name, and whether it multiplies by the stored numbers.
const FORMS: [(&str, bool); 2] = [("MatMul", false), ("Linear16", true)];

const TOKENS: [usize; 2] = [1, 512];

/// Bytes of bf16 weights that a step with one token passes over, so that none is in a cache.
const PASSED: usize = 128 << 20;

impl Case {
    fn bytes(&self) -> usize {
        2 * self.output * self.input
    }

    /// Layers of a session: several for one token.
    fn layers(&self, tokens: usize) -> usize {
        if tokens > 1 {
            1
        } else {
            PASSED.div_ceil(self.bytes())
        }
    }

    /// Layers side by side on one input.
    fn session(&self, stored: bool, layers: usize) -> OrtSession {
        let (output, input) = (self.output, self.input);
        let names: Vec<String> = (0..layers).map(|i| format!("layer.{i}")).collect();
        let weight = |name: &String| format!("{name}.weight");
        let mut b = GraphBuilder::new("linear");
        let kept = names.iter().map(|name| (weight(name), DType::BF16));
        b.keep_stored(kept.collect::<BTreeMap<_, _>>());
        if stored {
            b.multiply_stored();
        }
        let x = b.input("x", DType::F32, vec!["tokens".into(), input.into()]);
        let numbers = Random(7).many(output * input);
        let mut bytes = bytes_from_f32(Dtype::BF16, &numbers).expect("a float type");
        let mut weights = MemoryWeights::new();
        for (i, name) in names.iter().enumerate() {
            let out = b.linear(name, x, name, output, input, false);
            b.output(&format!("out.{i}"), out.expect("a node"));
            // Other numbers in every layer: the runtime computes equal ones once.
            bytes.rotate_left(2);
            let held =
                weights.insert_stored(weight(name), &[output, input], Dtype::BF16, bytes.clone());
            held.expect("the shape of the numbers");
        }
        let graph = b.finish().expect("a graph");
        let bytes = to_bytes(&graph, &weights).expect("an ONNX message");
        OrtSession::from_bytes("linear", &bytes, &SessionOptions::default()).expect("a session")
    }
}

fn linear(c: &mut Criterion) {
    for case in &CASES {
        let mut group = c.benchmark_group(case.name);
        group.sample_size(10);
        group.warm_up_time(Duration::from_secs(1));
        group.measurement_time(Duration::from_secs(3));
        for tokens in TOKENS {
            for (name, stored) in FORMS {
                let mut session = case.session(stored, case.layers(tokens));
                let numbers = Random(11).many(tokens * case.input);
                let x = Value::new(HostTensor::f32([tokens, case.input], numbers));
                let x = x.expect("a tensor");
                group.bench_function(BenchmarkId::new(name, tokens), |b| {
                    b.iter(|| session.run(&[("x", &x)]).expect("a step"));
                });
            }
        }
        group.finish();
    }
}

/// What memory gives.
fn reading(c: &mut Criterion) {
    let numbers = memory::buffer();
    let mut group = c.benchmark_group("memory");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(memory::BYTES as u64));
    group.bench_function("read", |b| b.iter(|| memory::read(&numbers)));
    group.finish();
}

criterion_group!(benches, linear, reading);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    if estimates::is_test_run() {
        return;
    }
    let median =
        |group: &str, id: &str| estimates::median_seconds(group, id).expect("criterion's figures");
    let read = memory::BYTES as f64 / median("memory", "read") / 1e9;
    let mut body = format!(
        "One linear layer, f32 activations, weights bf16 as in the checkpoint; ONNX Runtime folds the casts before its MatMul. With one token \
         a step passes over {} MiB of bf16 weights, as many layers as that is, and a layer's share of its time stands here; with several \
         it is one layer. Medians of criterion's samples in milliseconds. `weights` is the layer's bf16 bytes by that time; two threads read \
         a buffer of {} MiB at {read:.1} GB/s in the same run.\n\n",
        PASSED >> 20,
        memory::BYTES >> 20
    );
    let mut rows = vec![];
    for case in &CASES {
        for tokens in TOKENS {
            let times = FORMS.map(|(form, _)| {
                median(case.name, &format!("{form}/{tokens}")) / case.layers(tokens) as f64
            });
            let rate = case.bytes() as f64 / times[1] / 1e9;
            let speed = 2.0 * (tokens * case.output * case.input) as f64 / times[1] / 1e9;
            let [weights, share, speed] = if tokens == 1 {
                let share = 100.0 * rate / read;
                [
                    format!("{rate:.1} GB/s"),
                    format!("{share:.0} %"),
                    String::new(),
                ]
            } else {
                [String::new(), String::new(), format!("{speed:.0} GFLOP/s")]
            };
            rows.push(vec![
                case.name.to_owned(),
                tokens.to_string(),
                format!("{:.3}", times[0] * 1e3),
                format!("{:.3}", times[1] * 1e3),
                format!("{:.2}", times[0] / times[1]),
                weights,
                share,
                speed,
            ]);
        }
    }
    let head = [
        "layer",
        "tokens",
        "MatMul",
        "Linear16",
        "MatMul / Linear16",
        "weights",
        "of memory's speed",
        "arithmetic",
    ];
    let _ = write!(body, "{}", results::table(&head, &rows));
    results::write_section(
        &results::results_file(),
        "Linear layers with bf16 weights in ONNX Runtime",
        "cargo bench -p mlac-bench --bench linear16",
        &body,
    )
    .expect("bench/RESULTS.md can be written");
}
