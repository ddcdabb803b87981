//! Gradient steps on converted layers: what they lower, what they leave alone, what they refuse.

mod common;

use common::{
    Case, Qkv, Rows, gather, gqa, mla, narrow, normal, qkv, random_layer, random_matrix, rng,
};
use mlac_converter::refine::{
    RefineOptions, RefineReport, RefineWindows, Refined, TakeWindow, divide, refine,
};
use mlac_converter::{
    Error, LayerFactors, LayerStatistics, LayerWeights, OutputRefit, RankChoice, Recipe,
    RefitOptions, StatisticsOptions, WindowActivations, compose, convert_layer,
};
use mlac_model::MlaEncoder;

/// Hidden states whose variance falls along directions that all seeds share.
fn hidden_states(hidden: usize, tokens: usize, seed: u64) -> Rows {
    let basis = random_matrix(&mut rng(1000), hidden, hidden, (hidden as f64).powf(-0.5));
    let rng = &mut rng(seed);
    (0..tokens)
        .map(|_| {
            let z: Vec<f64> = (0..hidden)
                .map(|i| normal(rng) * 4.0 / (1.0 + i as f64 / 4.0))
                .collect();
            (0..hidden)
                .map(|j| (0..hidden).map(|i| z[i] * f64::from(basis[(i, j)])).sum())
                .collect()
        })
        .collect()
}

/// Activations of windows and what the original layer puts out.
struct Windows(Vec<[Vec<f32>; 4]>);

impl RefineWindows for Windows {
    type Error = Error;

    fn count(&self) -> usize {
        self.0.len()
    }

    fn visit(&self, window: usize, take: &mut TakeWindow<'_>) -> Result<(), Error> {
        let [q, k, v, target] = &self.0[window];
        let tokens = TOKENS;
        take(&WindowActivations { tokens, q, k, v }, target)
    }
}

const TOKENS: usize = 96;
const WINDOWS: u64 = 16;

struct Layer {
    weights: LayerWeights,
    statistics: LayerStatistics,
    windows: Windows,
}

fn layer(case: Case, seed: u64) -> Layer {
    let weights = random_layer(case, seed);
    let states: Vec<Rows> = (0..WINDOWS)
        .map(|w| hidden_states(case.hidden, TOKENS, 100 + w))
        .collect();
    let windows = states.iter().map(|x| {
        let Qkv { q, k, v } = qkv(&weights, x);
        let target = gqa(&weights, x).output;
        [narrow(&q), narrow(&k), narrow(&v), narrow(&target)]
    });
    let windows = Windows(windows.collect());
    Layer {
        statistics: gather(&weights, &states, StatisticsOptions::default()),
        weights,
        windows,
    }
}

impl Layer {
    fn convert(&self, ranks: RankChoice) -> LayerFactors {
        convert_layer(&self.weights, &self.statistics, ranks, &Recipe::default())
            .expect("converts")
            .0
    }

    fn refine(&self, factors: &LayerFactors, options: RefineOptions) -> Result<Refined, Error> {
        refine(
            &self.weights,
            &self.statistics,
            factors,
            false,
            &self.windows,
            &options,
            &mut |_| {},
        )
    }

    /// Relative squared error of the composed tensors by the f64 reference, on a window of its own.
    fn error(&self, factors: &LayerFactors) -> f64 {
        let x = hidden_states(self.weights.attention.shape.hidden, TOKENS, 7);
        let tensors = compose(&self.weights, factors).expect("composes");
        let expected = gqa(&self.weights, &x).output;
        let found = mla(&self.weights.attention, &tensors, &x).output;
        let square = |rows: &Rows| rows.iter().flatten().map(|x| x * x).sum::<f64>();
        let difference: Rows = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| a.iter().zip(b).map(|(a, b)| a - b).collect())
            .collect();
        square(&difference) / square(&expected)
    }
}

fn ranks(kv_lora_rank: usize, qk_rope_head_dim: usize) -> RankChoice {
    RankChoice {
        kv_lora_rank,
        qk_rope_head_dim,
    }
}

fn steps(steps: usize) -> RefineOptions {
    RefineOptions {
        steps,
        rows: 32,
        ..RefineOptions::default()
    }
}

const PLAIN: Case = Case::plain(4, 2, 8, 24);

const CASES: [(&str, Case); 6] = [
    ("hidden", PLAIN),
    (
        "hidden with biases",
        Case {
            bias: true,
            attention_factor: 1.35,
            ..PLAIN
        },
    ),
    (
        "kept query",
        Case {
            encoder: MlaEncoder::KeptQuery,
            bias: true,
            ..PLAIN
        },
    ),
    (
        "normed key",
        Case {
            qk_norm: true,
            window: Some(9),
            ..PLAIN
        },
    ),
    (
        "sinks",
        Case {
            sinks: true,
            ..PLAIN
        },
    ),
    (
        "everything GPT-OSS has",
        Case {
            encoder: MlaEncoder::KeptQuery,
            bias: true,
            sinks: true,
            window: Some(9),
            attention_factor: 1.3466,
            ..PLAIN
        },
    ),
];

#[test]
fn every_kind_of_layer_gets_better_where_nothing_was_trained() {
    let (mut fresh, mut failures) = (0.0, Vec::new());
    for (i, (name, case)) in CASES.into_iter().enumerate() {
        let layer = layer(case, 31);
        let mut factors = layer.convert(ranks(8, 4));
        let refitted = i % 2 == 1;
        if refitted {
            factors.o = Some(layer.weights.o.weight.cast());
        }
        let refined = layer.refine(&factors, steps(60)).expect("refines");
        let report = refined.report;
        assert_eq!((report.windows, report.held_out), (14, 2));
        let Some(refined) = refined.factors else {
            failures.push(format!("{name}: {report:?}"));
            continue;
        };
        assert!(report.error_after < report.error_before && report.note.is_none());
        assert_eq!(refined.o.is_some(), refitted);
        // On a window of its own, by the f64 reference of the composed tensors.
        let (before, after) = (layer.error(&factors), layer.error(&refined));
        println!("{name}: {report:?}; fresh window {before:.4} to {after:.4}");
        fresh += (after / before).ln() / CASES.len() as f64;
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(fresh < -0.01, "mean logarithm of the ratio {fresh}");
}

#[test]
fn nothing_moves_without_steps_or_without_an_error() {
    let layer = layer(CASES[5].1, 32);
    let lossy = layer.convert(ranks(8, 4));
    let zero = layer.refine(&lossy, steps(0)).expect("nothing to do");
    assert!(zero.factors.is_none() && zero.report.note.is_none());
    assert!(zero.report.error_before > 0.0 && zero.report.steps == 0);

    let exact = layer.convert(RankChoice::exact(&layer.weights.attention.shape));
    let full = layer.refine(&exact, steps(20)).expect("nothing to do");
    assert!(full.factors.is_none(), "{:?}", full.report);
    assert!(full.report.error_before < 1e-9 && full.report.steps == 0);
    assert!(full.report.note.expect("says so").contains("exact"));
}

#[test]
fn a_step_too_large_is_not_taken() {
    let layer = layer(PLAIN, 33);
    let factors = layer.convert(ranks(16, 8));
    let wild = RefineOptions {
        rate: 0.1,
        rows: 1,
        ..steps(8)
    };
    let Refined {
        factors: refined,
        report,
    } = layer.refine(&factors, wild).expect("refines");
    assert!(report.error_after <= report.error_before, "{report:?}");
    assert_eq!(refined.is_none(), report.note.is_some(), "{report:?}");
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let layer = layer(CASES[2].1, 34);
    let factors = layer.convert(ranks(8, 4));
    let run = |seed: u64| {
        let options = RefineOptions { seed, ..steps(12) };
        layer.refine(&factors, options).expect("refines")
    };
    let pool = |threads: usize| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("pool")
    };
    let first = run(0);
    assert!(first.factors.is_some());
    assert!(first == run(0), "twice");
    assert!(first == pool(1).install(|| run(0)), "one thread");
    assert!(first == pool(3).install(|| run(0)), "three threads");
    assert!(first != run(1), "another seed, other rows");
}

/// An output projection fitted in closed form is moved together with the rest.
#[test]
fn a_refitted_projection_gets_better_still() {
    let layer = layer(CASES[1].1, 39);
    let mut factors = layer.convert(ranks(8, 4));
    let tensors = compose(&layer.weights, &factors).expect("composes");
    let shape = layer.weights.attention.shape;
    let mut refit = OutputRefit::new(3, &shape);
    // Head outputs are the layer's output with an identity for o_proj.
    let identity = mlac_converter::Projection {
        weight: mlac_converter::Matrix::identity(shape.query_width()),
        bias: None,
    };
    let heads = mlac_converter::MlaTensors {
        o_proj: identity,
        ..tensors
    };
    let (_, training) = divide(layer.windows.count());
    for w in training {
        let x = hidden_states(shape.hidden, TOKENS, 100 + w as u64);
        let found = narrow(&mla(&layer.weights.attention, &heads, &x).output);
        refit
            .accumulate(TOKENS, &found, &layer.windows.0[w][3])
            .expect("finite");
    }
    let options = RefitOptions {
        fit_bias: true,
        ..RefitOptions::default()
    };
    let refitted = refit.solve(&layer.weights.o, options).expect("solves");
    factors.o = Some(refitted.o);
    factors.o_bias = refitted.bias;
    let refined = refine(
        &layer.weights,
        &layer.statistics,
        &factors,
        true,
        &layer.windows,
        &steps(60),
        &mut |_| {},
    );
    let refined = refined.expect("refines");
    println!("{:?}", refined.report);
    let refined = refined.factors.expect("better");
    assert!(refined.o != factors.o && refined.o_bias != factors.o_bias);
    assert!(layer.error(&refined) < layer.error(&factors));
}

#[test]
fn progress_counts_every_step() {
    let layer = layer(PLAIN, 36);
    let factors = layer.convert(ranks(8, 4));
    let mut seen = Vec::new();
    let report: RefineReport = refine(
        &layer.weights,
        &layer.statistics,
        &factors,
        false,
        &layer.windows,
        &steps(5),
        &mut |p| seen.push((p.step, p.steps, p.error.is_finite())),
    )
    .expect("refines")
    .report;
    let expected: Vec<_> = (1..=5).map(|step| (step, 5, true)).collect();
    assert_eq!((seen, report.steps), (expected, 5));
}

#[test]
fn bad_input_is_refused_by_name() {
    let refused = |layer: &Layer, factors: &LayerFactors, options: RefineOptions| {
        let error = layer.refine(factors, options).expect_err("refused");
        error.to_string()
    };
    let mut layer = layer(PLAIN, 37);
    let factors = layer.convert(ranks(8, 4));
    for (options, word) in [
        (
            RefineOptions {
                rows: 0,
                ..steps(2)
            },
            "--refine-rows",
        ),
        (
            RefineOptions {
                rate: 0.0,
                ..steps(2)
            },
            "--refine-rate",
        ),
        (
            RefineOptions {
                rate: f64::NAN,
                ..steps(2)
            },
            "--refine-rate",
        ),
    ] {
        let message = refused(&layer, &factors, options);
        assert!(message.contains(word), "{message}");
    }
    for broken in [f32::NAN, f32::INFINITY] {
        // Wherever it stands: on a held-out window or on one that is trained on.
        for window in 0..layer.windows.count() {
            let good = std::mem::replace(&mut layer.windows.0[window][3][5], broken);
            let message = refused(&layer, &factors, steps(20));
            assert!(
                message.contains("attention outputs of layer 3"),
                "{message}"
            );
            layer.windows.0[window][3][5] = good;
        }
        let good = std::mem::replace(&mut layer.windows.0[4][1][40], broken);
        let message = refused(&layer, &factors, steps(20));
        assert!(message.contains("keys of layer 3"), "{message}");
        layer.windows.0[4][1][40] = good;
    }
    layer.windows.0.truncate(1);
    let message = refused(&layer, &factors, steps(2));
    assert!(message.contains("--calib-windows"), "{message}");
}
