//! Problem x backend: everything that computes `mlac::Linear16` gives what `docs/linear16.md` says, in f64.

use mlac_ort::Isa;
use mlac_tests::cases::Cases;
use mlac_tests::linear::backends::{kernel, lowered, operator, sizes};
use mlac_tests::linear::problem::{Kind, Problem, Spec};
use mlac_tests::linear::python;
use proptest::prelude::*;

/// One number and several vectors, halves of vectors, one row and several panels, one token, as many as are few, many, and more than
/// one task takes.
fn specs() -> Vec<Spec> {
    let of = |tokens: &[usize], input, output| Spec {
        tokens: tokens.to_vec(),
        input,
        output,
        ..Spec::default()
    };
    let shapes = vec![
        Spec::default(),
        of(&[1], 1, 1),
        of(&[1], 64, 64),
        of(&[1, 1], 576, 192),
        of(&[1], 15, 130),
        of(&[1], 2880, 33),
        of(&[2], 32, 5),
        of(&[3], 48, 66),
        of(&[2, 2], 17, 9),
        of(&[5], 100, 31),
        of(&[7], 130, 12),
        of(&[12], 40, 70),
        of(&[13], 128, 64),
        of(&[4, 1, 5], 129, 65),
        of(&[31], 300, 200),
        of(&[2, 100], 70, 130),
        of(&[385], 24, 40),
    ];
    let mut all = Vec::new();
    for spec in shapes {
        for kind in [Kind::Bf16, Kind::F16] {
            let seed = 1 + all.len() as u64;
            all.push(Spec {
                kind,
                bias: !seed.is_multiple_of(3),
                seed,
                ..spec.clone()
            });
        }
    }
    all
}

fn problems() -> Vec<Problem> {
    specs().into_iter().map(Problem::new).collect()
}

#[test]
fn the_kernel_computes_the_specification() {
    let mut cases = Cases::new();
    let (problems, isas) = (problems(), Isa::available());
    for problem in &problems {
        for &isa in &isas {
            cases.run(format!("{isa:?} {}", problem.name()), || {
                let one = kernel(problem, isa, 1)?;
                problem.require(&one)?;
                let bits = |out: &[f32]| out.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                if bits(&one) == bits(&kernel(problem, isa, 3)?) {
                    return Ok(());
                }
                Err("three threads give other bits than one".into())
            });
        }
    }
    cases.finish(isas.len() * problems.len());
}

#[test]
fn the_operator_and_its_lowering_compute_the_specification() {
    let mut cases = Cases::new();
    let problems = problems();
    for problem in &problems {
        cases.run(format!("operator {}", problem.name()), || {
            problem.require(&operator(problem)?)
        });
        cases.run(format!("lowered {}", problem.name()), || {
            problem.require(&lowered(problem)?)
        });
    }
    cases.finish(2 * problems.len());
}

#[test]
fn the_operator_in_python_computes_the_specification() {
    let mut cases = Cases::new();
    let problems = problems();
    let scratch = tempfile::tempdir().unwrap();
    let answers = python::answers(&problems, scratch.path()).unwrap();
    for (problem, answer) in problems.iter().zip(&answers) {
        cases.run(problem.name(), || problem.require(answer));
    }
    cases.finish(problems.len());
}

/// One weight at a time, by one token and by many: every number of 16 bits is taken as it is, those below the normal ones too.
#[test]
fn every_weight_is_exact() {
    let mut cases = Cases::new();
    for kind in [Kind::Bf16, Kind::F16] {
        for tokens in [1, 20] {
            let mut problem = Problem::new(Spec {
                tokens: vec![tokens],
                input: 1,
                output: 1 << 16,
                kind,
                bias: false,
                seed: 1,
            });
            for bits in 0..=u16::MAX {
                let x = match kind {
                    Kind::Bf16 => half::bf16::from_bits(bits).to_f32(),
                    Kind::F16 => half::f16::from_bits(bits).to_f32(),
                };
                problem.weight.set(usize::from(bits), x);
            }
            problem.x.fill(1.0);
            for isa in Isa::available() {
                cases.run(format!("{kind:?} {tokens} {isa:?}"), || {
                    let found = kernel(&problem, isa, 2)?;
                    let bits = |x: f32| (x + 0.0).to_bits();
                    let wrong = found.iter().enumerate().find(|(at, x)| {
                        let expected = problem.weight.get(at % (1 << 16)) as f32;
                        // Zeros of both signs are equal.
                        bits(**x) != bits(expected) && !(x.is_nan() && expected.is_nan())
                    });
                    wrong.map_or(Ok(()), |wrong| Err(format!("{wrong:?}")))
                });
            }
        }
    }
    cases.finish(4 * Isa::available().len());
}

#[test]
fn what_is_not_finite_stays_with_its_token_and_its_row() {
    let mut cases = Cases::new();
    for tokens in [1, 9, 40] {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut problem = Problem::new(Spec {
                tokens: vec![tokens],
                ..Spec::default()
            });
            let (token, row) = (tokens / 2, 5);
            problem.x[token * problem.spec.input + 69] = value;
            problem.weight.set(row * problem.spec.input + 3, value);
            let bad =
                |at: usize| at / problem.spec.output == token || at % problem.spec.output == row;
            let expected = problem.reference();
            let shows = (0..expected.len()).all(|at| expected[at].0.is_finite() != bad(at));
            assert!(shows, "the problem shows nothing");
            for isa in Isa::available() {
                cases.run(format!("{tokens} {value} {isa:?}"), || {
                    problem.require(&kernel(&problem, isa, 2)?)
                });
            }
        }
    }
    cases.finish(9 * Isa::available().len());
}

#[test]
fn no_tokens_and_no_numbers_are_no_mistake() {
    for (tokens, input, output) in [(0, 8, 4), (3, 0, 4), (20, 0, 70), (3, 8, 0)] {
        let problem = Problem::new(Spec {
            tokens: vec![tokens],
            input,
            output,
            ..Spec::default()
        });
        for isa in Isa::available() {
            problem.require(&kernel(&problem, isa, 2).unwrap()).unwrap();
        }
    }
}

#[test]
fn what_contradicts_the_specification_is_refused_by_name() {
    let run = |change: &dyn Fn(&mut Problem)| -> String {
        let mut problem = Problem::new(Spec::default());
        change(&mut problem);
        kernel(&problem, Isa::Portable, 1).err().unwrap_or_default()
    };
    assert_eq!(run(&|_| {}), "");
    let x = run(&|p| p.x.truncate(7));
    assert!(x.starts_with("x: expected 210 elements, found 7"), "{x}");
    let weight = run(&|p| p.spec.output = 38);
    assert!(
        weight.starts_with("weight: expected 2660 elements, found 2590"),
        "{weight}"
    );
    let bias = run(&|p| p.bias = Some(vec![0.0; 2]));
    assert!(
        bias.starts_with("bias: expected 37 elements, found 2"),
        "{bias}"
    );
}

/// Errors cross ONNX Runtime as its errors, with the operator's name and message.
#[test]
fn a_refusal_is_an_error_of_the_session() {
    assert_eq!(sizes(6, 6).unwrap(), [0.0; 8]);
    let error = sizes(6, 5).err().unwrap();
    assert!(
        error.contains("mlac::Linear16: weight: expected [out, 6], found [4, 5]"),
        "{error}"
    );
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let tokens = proptest::collection::vec(1_usize..9, 1..3);
    let kind = prop_oneof![Just(Kind::Bf16), Just(Kind::F16)];
    let sizes = (1_usize..300, 1_usize..150);
    (tokens, sizes, kind, any::<bool>(), 1_u64..1_000_000).prop_map(
        |(tokens, (input, output), kind, bias, seed)| Spec {
            tokens,
            input,
            output,
            kind,
            bias,
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn any_call_is_the_specifications(spec in any_spec()) {
        let problem = Problem::new(spec);
        for isa in Isa::available() {
            let found = kernel(&problem, isa, 2).map_err(TestCaseError::fail)?;
            problem.require(&found).map_err(TestCaseError::fail)?;
        }
    }
}
