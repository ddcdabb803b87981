//! The experts of one GPT-OSS layer in ONNX Runtime, MXFP4: standard operators against `mlac::Mxfp4Experts`, for one token and for
//! several, and how fast two threads read memory in the same run.

use std::fmt::Write as _;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use mlac_bench::random_model::Random;
use mlac_bench::{estimates, memory, results};
use mlac_engines::ort::{HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::builders::{Runtime, experts_graph};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_model::{Dtype, ModelConfig};
use serde_json::json;

/// A mixture of experts.
struct Case {
    name: &'static str,
    experts: usize,
    chosen: usize,
    hidden: usize,
    inner: usize,
    /// New tokens of a step. Standard operators take minutes for samples of several tokens of the large case.
    tokens: &'static [usize],
}

const CASES: [Case; 2] = [
    Case {
        name: "8 experts of 512 x 512, 2 per token",
        experts: 8,
        chosen: 2,
        hidden: 512,
        inner: 512,
        tokens: &[1, 32],
    },
    Case {
        name: "GPT-OSS-20B 32 experts of 2880 x 2880, 4 per token",
        experts: 32,
        chosen: 4,
        hidden: 2880,
        inner: 2880,
        tokens: &[1],
    },
];

const FORMS: [(&str, Runtime); 2] = [
    ("standard", Runtime::Standard),
    ("Mxfp4Experts", Runtime::OnnxRuntime),
];

/// Different hidden states in turn, so that a step does not find the experts of the one before in a cache.
const VARIANTS: usize = 16;

impl Case {
    fn config(&self) -> ModelConfig {
        let config = json!({
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": 1,
            "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
            "attention_bias": true, "num_local_experts": self.experts,
            "num_experts_per_tok": self.chosen, "layer_types": ["full_attention"],
            "sliding_window": 128, "rope_theta": 150_000, "bos_token_id": 1, "eos_token_id": 2,
            "swiglu_limit": 7.0,
            "quantization_config": {"modules_to_not_convert": [], "quant_method": "mxfp4"},
        });
        ModelConfig::from_json(&config, "config.json").expect("a configuration")
    }

    /// Random tensors of one layer: any code, scales that keep sums near 1.
    fn weights(&self) -> MemoryWeights {
        let mut random = Random(7);
        let mut weights = MemoryWeights::new();
        let (count, hidden, inner) = (self.experts, self.hidden, self.inner);
        let prefix = "model.layers.0.mlp";
        let router = random.many(count * hidden);
        weights
            .insert(format!("{prefix}.router.weight"), &[count, hidden], router)
            .expect("the shape of the numbers");
        weights
            .insert(
                format!("{prefix}.router.bias"),
                &[count],
                random.many(count),
            )
            .expect("the shape of the numbers");
        for (part, out, input) in [
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ] {
            let blocks = input / 32;
            let name = |what: &str| format!("{prefix}.experts.{part}_{what}");
            let scale = 124 - (input as f64).log2().round() as u8 / 2;
            let mut bytes = Vec::with_capacity(count * out * blocks * 16);
            while bytes.len() < count * out * blocks * 16 {
                bytes.extend_from_slice(&random.number().to_bits().to_le_bytes()[..2]);
            }
            weights
                .insert_stored(name("blocks"), &[count, out, blocks, 16], Dtype::U8, bytes)
                .expect("the shape of the bytes");
            let scales = vec![scale; count * out * blocks];
            weights
                .insert_stored(name("scales"), &[count, out, blocks], Dtype::U8, scales)
                .expect("the shape of the bytes");
            weights
                .insert(name("bias"), &[count, out], random.many(count * out))
                .expect("the shape of the numbers");
        }
        weights
    }

    /// Bytes of blocks and scales that a token's experts have.
    fn bytes_per_token(&self) -> f64 {
        (self.chosen * 3 * self.hidden * self.inner) as f64 * (4.25 / 8.0)
    }
}

fn experts(c: &mut Criterion) {
    for case in &CASES {
        let (config, weights) = (case.config(), case.weights());
        let mut group = c.benchmark_group(case.name);
        group.sample_size(10);
        group.warm_up_time(Duration::from_secs(1));
        group.measurement_time(Duration::from_secs(3));
        for (name, runtime) in FORMS {
            let graph = experts_graph(&config, 0, runtime).expect("a graph");
            let bytes = to_bytes(&graph, &weights).expect("an ONNX message");
            let mut session = OrtSession::from_bytes("experts", &bytes, &SessionOptions::default())
                .expect("a session");
            drop(bytes);
            for &tokens in case.tokens {
                let mut random = Random(11);
                let variants: Vec<Value> = (0..VARIANTS)
                    .map(|_| {
                        let numbers = random.many(tokens * case.hidden);
                        Value::new(HostTensor::f32([1, tokens, case.hidden], numbers))
                            .expect("a tensor")
                    })
                    .collect();
                let mut turn = 0;
                group.bench_function(BenchmarkId::new(name, tokens), |b| {
                    b.iter(|| {
                        turn = (turn + 1) % VARIANTS;
                        session.run(&[("hidden", &variants[turn])]).expect("a step")
                    });
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

criterion_group!(benches, experts, reading);

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
        "The experts of one layer with their router, f32 activations, weights MXFP4 as in the checkpoint, other hidden states in \
         every step; median of criterion's samples in milliseconds. `weights` is the bytes of a token's chosen experts by the time of \
         a step with one token; two threads read a buffer of {} MiB at {read:.1} GB/s in the same run.\n",
        memory::BYTES >> 20
    );
    for case in &CASES {
        let rows: Vec<Vec<String>> = case
            .tokens
            .iter()
            .map(|tokens| {
                let times = FORMS.map(|(form, _)| median(case.name, &format!("{form}/{tokens}")));
                let rate = case.bytes_per_token() / times[1] / 1e9;
                let [weights, share] = if *tokens == 1 {
                    [
                        format!("{rate:.1} GB/s"),
                        format!("{:.0} %", 100.0 * rate / read),
                    ]
                } else {
                    [String::new(), String::new()]
                };
                vec![
                    tokens.to_string(),
                    format!("{:.3}", times[0] * 1e3),
                    format!("{:.3}", times[1] * 1e3),
                    format!("{:.1}", times[0] / times[1]),
                    weights,
                    share,
                ]
            })
            .collect();
        let head = [
            "tokens",
            "standard",
            "Mxfp4Experts",
            "standard / Mxfp4Experts",
            "weights",
            "of memory's speed",
        ];
        let table = results::table(&head, &rows);
        let _ = write!(body, "\n### {}\n\n{table}", case.name);
    }
    results::write_section(
        &results::results_file(),
        "Experts of one layer in ONNX Runtime (MXFP4)",
        "cargo bench -p mlac-bench --bench experts",
        &body,
    )
    .expect("bench/RESULTS.md can be written");
}
