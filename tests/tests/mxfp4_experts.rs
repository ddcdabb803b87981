//! Problem x backend: everything that computes `mlac::Mxfp4Experts` gives what `docs/mxfp4-experts.md` says, in f64.

use mlac_ort::Isa;
use mlac_tests::cases::Cases;
use mlac_tests::experts::backends::{kernel, lowered, operator};
use mlac_tests::experts::problem::{Problem, Spec};
use mlac_tests::experts::python;
use proptest::prelude::*;

/// One block and several, halves of vectors, one token and more than share a lookup, one expert, all of them, choices that repeat.
fn specs() -> Vec<Spec> {
    let base = Spec::default;
    let of = |tokens: &[usize], chosen, experts, hidden, inner| Spec {
        tokens: tokens.to_vec(),
        chosen,
        experts,
        hidden,
        inner,
        ..base()
    };
    let mut all = vec![
        base(),
        of(&[1], 1, 1, 32, 32),
        of(&[1], 4, 32, 96, 64),
        of(&[2, 3], 4, 4, 160, 32),
        of(&[1, 1], 2, 3, 32, 416),
        of(&[7], 1, 1, 288, 128),
        of(&[40], 3, 4, 64, 192),
        of(&[5, 1, 3], 2, 8, 128, 160),
        of(&[600], 4, 6, 32, 32),
        of(&[4], 3, 2, 64, 64),
        Spec {
            limit: 0.5,
            ..of(&[9], 2, 3, 64, 64)
        },
        Spec {
            limit: f32::INFINITY,
            ..of(&[3], 2, 3, 64, 64)
        },
    ];
    for (seed, spec) in all.iter_mut().enumerate() {
        spec.seed = 1 + seed as u64;
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

/// Every scale byte but those that leave f32's range, NaN among them.
#[test]
fn scales_of_any_size_are_exact() {
    let mut cases = Cases::new();
    for scale in [0_u8, 1, 30, 90, 127, 160, 255] {
        let mut problem = Problem::new(Spec::default());
        // The rows of an output that nothing else disturbs: the second matrix of one expert, one block.
        problem.down.scales[3] = scale;
        for isa in Isa::available() {
            cases.run(format!("{scale} {isa:?}"), || {
                problem.require(&kernel(&problem, isa, 2)?)
            });
        }
        cases.run(format!("{scale} operator"), || {
            problem.require(&operator(&problem)?)
        });
    }
    cases.finish(7 * (Isa::available().len() + 1));
}

#[test]
fn what_is_not_finite_stays_with_its_token() {
    let mut cases = Cases::new();
    for value in [f32::NAN, f32::INFINITY] {
        let mut problem = Problem::new(Spec {
            tokens: vec![9],
            ..Spec::default()
        });
        problem.hidden[4 * problem.spec.hidden + 1] = value;
        problem.weights[7 * problem.spec.chosen] = f32::NAN;
        let expected = problem.reference();
        let bad = expected.chunks(problem.spec.hidden);
        let bad: Vec<usize> = bad
            .enumerate()
            .filter(|(_, row)| row.iter().any(|x| !x.is_finite()))
            .map(|(token, _)| token)
            .collect();
        assert_eq!(bad, [4, 7], "the problem shows nothing");
        for isa in Isa::available() {
            cases.run(format!("{value} {isa:?}"), || {
                let found = kernel(&problem, isa, 2)?;
                let rows = found.chunks(problem.spec.hidden);
                let bad_found: Vec<usize> = rows
                    .enumerate()
                    .filter(|(_, row)| row.iter().any(|x| !x.is_finite()))
                    .map(|(token, _)| token)
                    .collect();
                if bad_found == bad {
                    return Ok(());
                }
                Err(format!(
                    "tokens {bad_found:?} are not finite, expected {bad:?}"
                ))
            });
        }
    }
    cases.finish(2 * Isa::available().len());
}

#[test]
fn what_contradicts_the_specification_is_refused_by_name() {
    let run = |change: &dyn Fn(&mut Problem)| -> String {
        let mut problem = Problem::new(Spec::default());
        change(&mut problem);
        kernel(&problem, Isa::Portable, 1).err().unwrap_or_default()
    };
    assert_eq!(run(&|_| {}), "");
    for expert in [-1, 5, i64::MAX] {
        let refused = run(&|p| p.experts[3] = expert);
        let expected = format!("experts: expected 0 to 4, found {expert} at token 1, choice 1");
        assert!(refused.starts_with(&expected), "{refused}");
    }
    let blocks = run(&|p| p.down.blocks.truncate(7));
    assert!(
        blocks.contains("down_blocks") && blocks.contains("found 7"),
        "{blocks}"
    );
    let size = run(&|p| p.spec.hidden = 48);
    assert!(
        size.starts_with("hidden: expected rows of whole blocks"),
        "{size}"
    );
    let none = run(&|p| p.spec.chosen = 0);
    assert!(none.starts_with("experts: expected 1 choice"), "{none}");
    let limit = run(&|p| p.spec.limit = f32::NAN);
    assert!(
        limit.contains("swiglu_limit: expected a positive number"),
        "{limit}"
    );
    let alpha = run(&|p| p.alpha = f32::INFINITY);
    assert!(alpha.contains("swiglu_alpha"), "{alpha}");
}

/// Errors cross ONNX Runtime as its errors, with the operator's name and message.
#[test]
fn a_refusal_is_an_error_of_the_session() {
    let mut problem = Problem::new(Spec::default());
    problem.experts[0] = 5;
    let error = operator(&problem).err().unwrap();
    assert!(
        error
            .contains("mlac::Mxfp4Experts: experts: expected 0 to 4, found 5 at token 0, choice 0"),
        "{error}"
    );
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let sizes = (1_usize..9, 1_usize..6, 1_usize..12, 1_usize..12);
    let tokens = proptest::collection::vec(1_usize..6, 1..3);
    (tokens, sizes, 0.5_f32..9.0, 1_u64..1_000_000).prop_map(
        |(tokens, (experts, chosen, hidden, inner), limit, seed)| Spec {
            tokens,
            chosen,
            experts,
            hidden: 32 * hidden,
            inner: 32 * inner,
            limit,
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
