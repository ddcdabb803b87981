//! Problem x backend: everything that computes `mlac::LatentAttention` gives what `docs/latent-attention.md` says, in f64.

use mlac_engines::ort::{Dim, HostTensor, OrtSession, SessionOptions, Value};
use mlac_graph::onnx::{MemoryWeights, to_bytes};
use mlac_kernels::arch::Arch;
use mlac_ort::Isa;
use mlac_tests::cases::Cases;
use mlac_tests::latent::backends::{emulator, graph, kernel, operator};
use mlac_tests::latent::problem::{Kind, Problem, Spec};
use mlac_tests::latent::python;
use mlac_tests::latent::standard::{self, standard};
use mlac_tests::{Outcome, text};
use proptest::prelude::*;

/// Ranks, heads, lengths, windows and their edges, sinks, several tokens, trees, masks, rings and pages.
fn specs() -> Vec<Spec> {
    let base = Spec::default;
    let mut all = vec![
        Spec {
            past: vec![0],
            ..base()
        },
        Spec {
            past: vec![1],
            ..base()
        },
        Spec {
            past: vec![47],
            ..base()
        },
        Spec {
            past: vec![48, 0, 131],
            ..base()
        },
        Spec {
            heads: 1,
            rank: 1,
            rope: 0,
            ..base()
        },
        Spec {
            heads: 5,
            rank: 17,
            rope: 2,
            past: vec![60],
            ..base()
        },
        Spec {
            heads: 9,
            rank: 128,
            rope: 64,
            past: vec![200],
            sinks: true,
            ..base()
        },
        Spec {
            heads: 14,
            rank: 40,
            rope: 8,
            past: vec![100],
            ..base()
        },
        Spec {
            heads: 64,
            rank: 256,
            rope: 64,
            past: vec![97],
            sinks: true,
            scale: 0.1,
            ..base()
        },
        Spec {
            heads: 70,
            rank: 24,
            rope: 8,
            past: vec![33],
            ..base()
        },
        Spec {
            heads: 2,
            past: vec![1000],
            scale: 4.0,
            ..base()
        },
        Spec {
            query_tokens: 7,
            past: vec![0, 5],
            ..base()
        },
        Spec {
            query_tokens: 70,
            heads: 4,
            past: vec![30],
            sinks: true,
            ..base()
        },
        Spec {
            query_tokens: 130,
            heads: 1,
            past: vec![0],
            ..base()
        },
        Spec {
            window: Some(1),
            ..base()
        },
        Spec {
            window: Some(10),
            past: vec![9, 10, 11],
            ..base()
        },
        Spec {
            window: Some(64),
            past: vec![200],
            sinks: true,
            ..base()
        },
        Spec {
            window: Some(16),
            query_tokens: 40,
            past: vec![7, 100],
            ..base()
        },
        Spec {
            window: Some(8),
            ring: true,
            past: vec![7, 8, 21],
            ..base()
        },
        Spec {
            window: Some(8),
            ring: true,
            query_tokens: 20,
            past: vec![3, 50],
            ..base()
        },
        Spec {
            tree: true,
            query_tokens: 6,
            past: vec![0, 40],
            ..base()
        },
        Spec {
            tree: true,
            query_tokens: 64,
            heads: 2,
            past: vec![70],
            sinks: true,
            ..base()
        },
        Spec {
            tree: true,
            query_tokens: 5,
            window: Some(20),
            past: vec![60],
            ..base()
        },
        Spec {
            key_mask: true,
            past: vec![0, 90],
            ..base()
        },
        Spec {
            key_mask: true,
            query_tokens: 9,
            window: Some(30),
            past: vec![80, 3],
            ..base()
        },
        Spec {
            page: Some(64),
            past: vec![0, 63, 64, 200],
            ..base()
        },
        Spec {
            page: Some(5),
            query_tokens: 8,
            past: vec![0, 33],
            sinks: true,
            ..base()
        },
        Spec {
            page: Some(16),
            window: Some(20),
            past: vec![100, 3],
            key_mask: true,
            ..base()
        },
        Spec {
            page: Some(8),
            tree: true,
            query_tokens: 10,
            past: vec![30],
            ..base()
        },
    ];
    for (i, spec) in all.clone().into_iter().enumerate() {
        let kind = if i % 2 == 0 { Kind::F16 } else { Kind::Bf16 };
        all.push(Spec { kind, ..spec });
    }
    for (seed, spec) in all.iter_mut().enumerate() {
        spec.seed = seed as u64;
    }
    all
}

/// Whether mlac's graphs have the problem: one contiguous cache, no tree, and a type that graphs have.
fn in_graphs(spec: &Spec) -> bool {
    spec.page.is_none() && !spec.tree && spec.kind != Kind::Bf16
}

/// Whether the CUDA kernels have its shapes.
fn in_kernels(spec: &Spec) -> bool {
    spec.page == Some(64)
        && spec.kind != Kind::F32
        && !spec.key_mask
        && spec.rank.is_multiple_of(64)
        && spec.query_tokens <= 16
}

#[test]
fn the_kernel_computes_the_specification() {
    let mut cases = Cases::new();
    let (specs, isas) = (specs(), Isa::available());
    for spec in &specs {
        let problem = Problem::new(spec.clone());
        for &isa in &isas {
            for threads in [1, 3] {
                let name = format!("{isa:?} {threads} {}", problem.name());
                cases.run(name, || {
                    problem.require(&kernel(&problem, isa, threads)?, 1.0)
                });
            }
        }
    }
    cases.finish(2 * isas.len() * specs.len());
}

#[test]
fn the_operator_computes_the_specification() {
    let mut cases = Cases::new();
    let specs: Vec<Spec> = specs().into_iter().filter(in_graphs).collect();
    for spec in &specs {
        let problem = Problem::new(spec.clone());
        for in_place in [false, true] {
            cases.run(format!("in place {in_place} {}", problem.name()), || {
                problem.require(&operator(&problem, in_place)?, 1.0)
            });
        }
    }
    cases.finish(2 * specs.len());
}

/// What the decoder's standard form is made of, by the same table: one description of attention in operators.
#[test]
fn standard_operators_compute_the_specification() {
    let mut cases = Cases::new();
    let specs: Vec<Spec> = specs().into_iter().filter(standard::has).collect();
    for spec in &specs {
        let problem = Problem::new(spec.clone());
        for form in standard::FORMS {
            cases.run(format!("{form:?} {}", problem.name()), || {
                // MLAS multiplies f16 in f16, and so do its intermediate results.
                let slack = if spec.kind == Kind::F16 { 4.0 } else { 1.0 };
                problem.require(&standard(&problem, form)?, slack)
            });
        }
    }
    cases.finish(standard::FORMS.len() * specs.len());
}

#[test]
fn the_operator_in_python_computes_the_specification() {
    let mut cases = Cases::new();
    let problems: Vec<Problem> = specs().into_iter().map(Problem::new).collect();
    let scratch = tempfile::tempdir().unwrap();
    let answers = python::answers(&problems, scratch.path()).unwrap();
    for (problem, answer) in problems.iter().zip(&answers) {
        cases.run(problem.name(), || problem.require(answer, 1.0));
    }
    cases.finish(problems.len());
}

/// Axes that vary keep their names; of a shape with an axis that has neither size nor name nothing is said.
#[test]
fn the_runtime_knows_the_shapes_behind_the_operator() {
    let shapes = python::shapes().unwrap();
    for case in ["required", "half", "left_out"] {
        assert_eq!(
            shapes[case],
            serde_json::json!({"behind": [3, "batch", "seq", 8], "cache_out": ["batch", "capacity", 12]}),
            "{case}"
        );
    }
    // The transposition of a tensor of unknown shape is one.
    assert_eq!(shapes["unnamed"]["behind"], serde_json::json!([]));
    assert_eq!(
        shapes["unnamed"]["cache_out"],
        serde_json::json!(["batch", "capacity", 12])
    );
}

#[test]
fn the_emulated_kernels_compute_the_specification() {
    let mut cases = Cases::new();
    let base = || Spec {
        kind: Kind::Bf16,
        rank: 64,
        rope: 64,
        page: Some(64),
        scale: 0.1,
        ..Spec::default()
    };
    let specs = [
        Spec {
            past: vec![0, 63, 64, 300],
            ..base()
        },
        Spec {
            past: vec![1500],
            heads: 64,
            rank: 128,
            sinks: true,
            ..base()
        },
        Spec {
            past: vec![90],
            query_tokens: 4,
            kind: Kind::F16,
            ..base()
        },
        Spec {
            past: vec![400],
            window: Some(128),
            sinks: true,
            ..base()
        },
        Spec {
            past: vec![10, 130],
            query_tokens: 8,
            tree: true,
            ..base()
        },
    ];
    for spec in &specs {
        assert!(in_kernels(spec), "{spec:?}");
        let problem = Problem::new(spec.clone());
        for arch in [Arch::Sm80, Arch::Sm90a] {
            cases.run(format!("{arch} {}", problem.name()), || {
                // Weights are rounded to the type too, before they meet the latents.
                problem.require(&emulator(&problem, arch, 7)?, 2.5)
            });
        }
        cases.run(format!("CPU {}", problem.name()), || {
            problem.require(&kernel(&problem, Isa::available()[0], 2)?, 1.0)
        });
    }
    cases.finish(3 * specs.len());
}

#[test]
fn sinks_of_any_size_and_infinity_join_once() {
    let mut cases = Cases::new();
    let sinks = [f32::NEG_INFINITY, f32::INFINITY, 0.0, 80.0, -80.0, f32::NAN];
    let spec = Spec {
        heads: sinks.len(),
        past: vec![500],
        sinks: true,
        ..Spec::default()
    };
    let mut problem = Problem::new(spec);
    problem.sinks = Some(sinks.to_vec());
    for isa in Isa::available() {
        cases.run(format!("{isa:?}"), || {
            problem.require(&kernel(&problem, isa, 2)?, 1.0)
        });
    }
    cases.run("operator", || {
        problem.require(&operator(&problem, true)?, 1.0)
    });
    cases.finish(Isa::available().len() + 1);
}

/// A row of NaN among the new tokens: seen by later tokens only.
#[test]
fn what_is_not_finite_reaches_those_who_see_it() {
    let mut cases = Cases::new();
    let isas = Isa::available();
    for value in [f32::NAN, f32::INFINITY] {
        for tree in [false, true] {
            let spec = Spec {
                query_tokens: 6,
                past: vec![30],
                tree,
                ..Spec::default()
            };
            let mut problem = Problem::new(spec);
            let width = problem.width();
            // Only in the latent, so that the score of infinity is not the question.
            problem.new_rows[3 * width] = f32::NAN;
            problem.new_rows[3 * width + 1] = value;
            for &isa in &isas {
                cases.run(format!("{value} tree {tree} {isa:?}"), || {
                    let answer = kernel(&problem, isa, 1)?;
                    let expected = problem.reference();
                    let finite = |sums: &[f32]| {
                        let rows = sums.chunks(problem.spec.rank);
                        rows.map(|row| row.iter().all(|x| x.is_finite()))
                            .collect::<Vec<_>>()
                    };
                    let (found, expected) = (finite(&answer.sums), finite(&expected.sums));
                    let untouched = expected.iter().filter(|x| **x).count();
                    if untouched == 0 || untouched == expected.len() {
                        return Err("the problem shows nothing".into());
                    }
                    if found != expected {
                        return Err(format!("{found:?}, expected {expected:?}"));
                    }
                    Ok(())
                });
            }
        }
    }
    cases.finish(4 * isas.len());
}

#[test]
fn what_contradicts_the_specification_is_refused_by_name() {
    let run = |change: &dyn Fn(&mut Problem)| -> String {
        let spec = Spec {
            page: Some(8),
            past: vec![20],
            key_mask: true,
            ..Spec::default()
        };
        let mut problem = Problem::new(spec);
        change(&mut problem);
        kernel(&problem, Isa::Portable, 1).err().unwrap_or_default()
    };
    assert_eq!(run(&|_| {}), "");
    let page = run(&|p| p.page_table.as_mut().unwrap()[1] = 99);
    assert!(page.contains("page_table") && page.contains("99"), "{page}");
    let long = run(&|p| p.spec.past[0] = 1000);
    assert!(long.contains("page_table: expected room"), "{long}");
    let mask = run(&|p| p.key_mask.as_mut().unwrap().truncate(4));
    assert!(
        mask.contains("key_mask") && mask.contains("4 columns"),
        "{mask}"
    );
    let rank = run(&|p| p.spec.rank = 0);
    assert!(
        rank.contains("kv_lora_rank") || rank.contains("query"),
        "{rank}"
    );
    let scale = run(&|p| p.spec.scale = f32::NAN);
    assert!(
        scale.contains("scale: expected a positive number"),
        "{scale}"
    );
    let sinks = run(&|p| p.sinks = Some(vec![0.0]));
    assert!(sinks.contains("sinks: expected 3 elements"), "{sinks}");
}

/// Errors cross ONNX Runtime as its errors, with the operator's message; nothing of the cache is changed.
#[test]
fn a_refusal_is_an_error_of_the_session() {
    let problem = Problem::new(Spec::default());
    let bytes = to_bytes(&graph(&problem).unwrap(), &MemoryWeights::new()).unwrap();
    let mut session =
        OrtSession::from_bytes("refusal", &bytes, &SessionOptions::default()).unwrap();
    let values: Outcome<Vec<(String, Value)>> = session
        .inputs()
        .iter()
        .map(|port| {
            let shape: Vec<usize> = port.dims.iter().filter_map(Dim::fixed).collect();
            let mut tensor = HostTensor::zeros(port.element, shape);
            if port.name == "past" {
                tensor = HostTensor::i64([1], vec![14]);
            }
            Ok((port.name.clone(), Value::new(tensor).map_err(text)?))
        })
        .collect();
    let values = values.unwrap();
    let inputs: Vec<(&str, &Value)> = values.iter().map(|(n, v)| (n.as_str(), v)).collect();
    let error = session.run(&inputs).err().unwrap().to_string();
    assert!(
        error.contains("cache: expected room for the tokens, capacity 14")
            && error.contains("15 tokens in sequence 0"),
        "{error}"
    );
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let sizes = (1_usize..12, 1_usize..40, 0_usize..20, 1_usize..9);
    let past = proptest::collection::vec(0_usize..160, 1..3);
    let place = (
        proptest::option::of(1_usize..40),
        proptest::option::of(1_usize..70),
        0_usize..4,
        any::<bool>(),
    );
    let masks = (any::<bool>(), any::<bool>(), any::<bool>());
    let rest = (0_usize..3, 0.05_f32..2.0, any::<u64>());
    (sizes, past, place, masks, rest).prop_map(
        |(
            (heads, rank, rope, query_tokens),
            past,
            (page, window, spare, ring),
            (sinks, tree, key_mask),
            (kind, scale, seed),
        )| Spec {
            kind: [Kind::F32, Kind::F16, Kind::Bf16][kind],
            heads,
            rank,
            rope,
            query_tokens,
            past,
            page,
            spare,
            // A ring has no trees.
            ring: ring && !tree && page.is_none(),
            window,
            sinks,
            tree,
            key_mask,
            scale,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_step_is_the_specifications(spec in any_spec()) {
        let problem = Problem::new(spec);
        for isa in Isa::available() {
            let answer = kernel(&problem, isa, 2).map_err(TestCaseError::fail)?;
            problem.require(&answer, 1.0).map_err(TestCaseError::fail)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_step_of_a_graph_is_the_specifications(spec in any_spec()) {
        let spec = Spec { page: None, tree: false, kind: Kind::F32, ..spec };
        let problem = Problem::new(spec);
        let answer = operator(&problem, true).map_err(TestCaseError::fail)?;
        problem.require(&answer, 1.0).map_err(TestCaseError::fail)?;
        let spec = Spec { rope: 2 * (problem.spec.rope / 2 + 1), ..problem.spec };
        let problem = Problem::new(spec);
        for form in standard::FORMS {
            let answer = standard(&problem, form).map_err(TestCaseError::fail)?;
            problem.require(&answer, 1.0).map_err(TestCaseError::fail)?;
        }
    }
}
