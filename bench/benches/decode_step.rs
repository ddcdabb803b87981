//! Decode step of one attention layer in ONNX Runtime: MLA, in standard operators and as `mlac export --form ort` writes it
//! (`mlac::LatentAttention`, `mlac::Linear16`), against GQA in primitives and by ONNX Runtime's own GroupQueryAttention, with and
//! without `mlac::Linear16`, by context, all in one run. Weights are bf16.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group};
use mlac::pipeline::calibrate::convert_from_weights;
use mlac::pipeline::convert::{LayerPlan, Method, converted_config};
use mlac_bench::random_model::{Random, RandomLlama};
use mlac_bench::{estimates, results};
use mlac_converter::{RankChoice, Recipe};
use mlac_engines::ort::{HostTensor, Kept, OrtSession, SessionOptions, Value};
use mlac_graph::builders::{CacheProduct, StepForm, StepOptions, step_graph};
use mlac_graph::ir::DType;
use mlac_graph::onnx::{MemoryWeights, Overlay, to_bytes};
use mlac_model::tensor::bytes_from_f32;
use mlac_model::{Checkpoint, Dtype};

/// Contexts in tokens; at the first there is nothing but the projections, which all forms share.
const CONTEXTS: [usize; 5] = [1, 1 << 10, 1 << 12, 1 << 14, 1 << 15];

/// A layer and the ranks it is converted to.
struct Case {
    name: &'static str,
    shape: RandomLlama,
    ranks: RankChoice,
}

const CASES: [Case; 2] = [
    Case {
        name: "SmolLM2 9-3 heads of 64, 128 + 64",
        shape: RandomLlama::SMOLLM2,
        ranks: RankChoice {
            kv_lora_rank: 128,
            qk_rope_head_dim: 64,
        },
    },
    Case {
        name: "GPT-OSS 64-8 heads of 64, 256 + 64",
        shape: RandomLlama::GPT_OSS,
        ranks: RankChoice {
            kv_lora_rank: 256,
            qk_rope_head_dim: 64,
        },
    },
];

/// The forms that are timed.
const FORMS: [(&str, StepForm, CacheProduct); 6] = [
    (
        "GQA primitives",
        StepForm::GqaPrimitives,
        CacheProduct::QueryRows,
    ),
    (
        "GQA operator",
        StepForm::GqaOperator,
        CacheProduct::QueryRows,
    ),
    (
        "GQA operator, 16-bit weights",
        StepForm::GqaOperatorStored,
        CacheProduct::QueryRows,
    ),
    ("MLA", StepForm::MlaAbsorbed, CacheProduct::QueryRows),
    (
        "MLA, cache rows first",
        StepForm::MlaAbsorbed,
        CacheProduct::CacheRows,
    ),
    (
        "LatentAttention",
        StepForm::MlaOperator,
        CacheProduct::QueryRows,
    ),
];

/// One form's session with its inputs at one context.
struct Step {
    session: OrtSession,
    inputs: Vec<(String, Value)>,
    /// A cache in place, and its names as input and output.
    kept: Option<(String, String, Value)>,
}

impl Step {
    fn open(
        checkpoint: &Checkpoint,
        case: &Case,
        form: StepForm,
        product: CacheProduct,
        context: usize,
    ) -> Self {
        let plan = LayerPlan {
            layer: 0,
            ranks: case.ranks,
        };
        let converted = convert_from_weights(checkpoint, &plan, &Method::Recipe(Recipe::default()))
            .expect("a conversion");
        let mut top = MemoryWeights::new();
        let mut config = checkpoint.config().clone();
        if matches!(form, StepForm::MlaAbsorbed | StepForm::MlaOperator) {
            config = converted_config(&config, &[plan]);
            for (name, shape, data) in converted.tensors.named() {
                let name = mlac::pipeline::calibrate::tensor_name(0, name);
                if name.ends_with("rotary_inv_freq") {
                    top.insert(name, &shape, data.to_vec())
                        .expect("the tensor's own shape");
                    continue;
                }
                // As `mlac convert --dtype bf16` writes them.
                let bytes = bytes_from_f32(Dtype::BF16, data).expect("a float type");
                top.insert_stored(name, &shape, Dtype::BF16, bytes)
                    .expect("the tensor's own shape");
            }
        }
        let options = StepOptions {
            form,
            dtype: DType::F32,
            product,
        };
        let source = Overlay::new(&top, checkpoint);
        let graph = step_graph(&config, 0, &options, Some(&source)).expect("a graph");
        let bytes = to_bytes(&graph, &source).expect("an ONNX message");
        let session = OrtSession::from_bytes("decode step", &bytes, &SessionOptions::default())
            .expect("a session");
        let mut random = Random(11);
        let mut kept = None;
        let inputs = session
            .inputs()
            .iter()
            .filter_map(|port| {
                let shape: Vec<usize> = port
                    .dims
                    .iter()
                    .map(|d| {
                        d.fixed().unwrap_or_else(|| match d {
                            _ if d.is_capacity() => context + 1,
                            _ if is_past(d) => context,
                            _ => 1,
                        })
                    })
                    .collect();
                let count = shape.iter().product();
                let tensor = if port.name == "position_ids" {
                    HostTensor::i64(shape, vec![context as i64; count])
                } else {
                    HostTensor::f32(shape, random.many(count))
                };
                let value = Value::new(tensor).expect("a tensor");
                if port.dims.iter().any(mlac_engines::ort::Dim::is_capacity) {
                    let value = value.changeable().expect("a tensor of the runtime");
                    let present = port.name.replacen("past", "present", 1);
                    kept = Some((port.name.clone(), present, value));
                    return None;
                }
                Some((port.name.clone(), value))
            })
            .collect();
        Self {
            session,
            inputs,
            kept,
        }
    }

    fn run(&mut self) -> Vec<Value> {
        let inputs: Vec<(&str, &Value)> =
            self.inputs.iter().map(|(n, v)| (n.as_str(), v)).collect();
        match &mut self.kept {
            None => self.session.run(&inputs),
            Some((input, output, value)) => self.session.run_in_place(
                &inputs,
                &mut [Kept {
                    input,
                    output,
                    value,
                }],
            ),
        }
        .expect("a step")
    }
}

fn is_past(dim: &mlac_engines::ort::Dim) -> bool {
    matches!(dim, mlac_engines::ort::Dim::Dynamic(name) if name.contains("past"))
}

fn decode_step(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (i, case) in CASES.iter().enumerate() {
        let checkpoint = open(case, &folder.path().join(i.to_string()));
        let mut group = c.benchmark_group(case.name);
        group.sample_size(20);
        group.warm_up_time(Duration::from_secs(1));
        group.measurement_time(Duration::from_secs(2));
        for context in CONTEXTS {
            for (name, form, product) in FORMS {
                let mut step = Step::open(&checkpoint, case, form, product, context);
                group.bench_function(BenchmarkId::new(name, context), |b| b.iter(|| step.run()));
            }
        }
        group.finish();
    }
}

fn open(case: &Case, folder: &Path) -> Checkpoint {
    case.shape.write(folder, 3).expect("a random checkpoint")
}

criterion_group!(benches, decode_step);

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
    if estimates::is_test_run() {
        return;
    }
    let mut body = String::from(
        "One attention layer (projections, rotation, cache append, softmax, output projection), batch 1, one new token, f32 with weights \
         in bf16, those of the converted layer too, median of criterion's samples in milliseconds. `A / B` above 1 means that B is faster. \
         LatentAttention is what `mlac export --form ort` writes: it keeps its cache in place, all others return a new one, which is what \
         their operators allow; and its projections are Linear16, which read the 16 bits, where the others' casts are folded at load, as in \
         every export, and 32 bits are read. `GQA operator, 16-bit weights` is ONNX Runtime's GroupQueryAttention with Linear16: \
         against `GQA operator` it shows what the weights give, against LatentAttention what the attention gives. At context 1 a step is \
         its projections.\n",
    );
    for case in &CASES {
        let median = |form: &str, context: usize| {
            estimates::median_seconds(case.name, &format!("{form}/{context}"))
                .expect("criterion's figures")
                * 1e3
        };
        let rows: Vec<Vec<String>> = CONTEXTS
            .iter()
            .map(|&context| {
                let times: Vec<f64> = FORMS
                    .iter()
                    .map(|(form, ..)| median(form, context))
                    .collect();
                let mla = times[3].min(times[4]);
                let mut row = vec![context.to_string()];
                row.extend(times.iter().map(|t| format!("{t:.3}")));
                row.push(format!("{:.2}", times[0] / mla));
                row.push(format!("{:.2}", times[1] / mla));
                let ours = [times[0], times[1], times[2], mla];
                row.extend(ours.map(|t| format!("{:.2}", t / times[5])));
                row
            })
            .collect();
        let mut head = vec!["context"];
        head.extend(FORMS.iter().map(|(form, ..)| *form));
        head.extend([
            "primitives / MLA",
            "operator / MLA",
            "primitives / LatentAttention",
            "operator / LatentAttention",
            "operator, 16-bit weights / LatentAttention",
            "MLA / LatentAttention",
        ]);
        let _ = write!(
            body,
            "\n### {}\n\n{}",
            case.name,
            results::table(&head, &rows)
        );
    }
    results::write_section(
        &results::results_file(),
        "Decode step of one attention layer in ONNX Runtime",
        "cargo bench -p mlac-bench --bench decode_step",
        &body,
    )
    .expect("bench/RESULTS.md can be written");
}
