//! The forward and its gradient against the reference of [`crate::error_eval`].

use candle_core::{DType, Device};
use mlac_model::MlaEncoder;

use super::coordinates::{Coordinates, Deltas};
use super::objective::Objective;
use super::{error, output};
use crate::attention::RotationTable;
use crate::error_eval::converted_heads;
use crate::layer::{
    Attention, AttentionShape, LayerFactors, LayerWeights, Projection, RankChoice, Rotary,
};
use crate::linalg::Matrix;
use crate::statistics::{
    LayerStatistics, StatisticsOptions, WindowActivations, WindowSample, split_mix,
    stratified_positions,
};

const SHAPE: AttentionShape = AttentionShape {
    hidden: 12,
    query_heads: 4,
    kv_heads: 2,
    head_dim: 6,
};
const RANKS: RankChoice = RankChoice {
    kv_lora_rank: 7,
    qk_rope_head_dim: 4,
};
const TOKENS: usize = 40;

fn numbers(count: usize, seed: u64, size: f32) -> Vec<f32> {
    (0..count as u64)
        .map(|n| ((split_mix((seed << 32) + n) >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size)
        .collect()
}

fn random(rows: usize, cols: usize, seed: u64, size: f32) -> Matrix<f32> {
    Matrix::from_vec(rows, cols, numbers(rows * cols, seed, size))
}

#[derive(Debug, Clone, Copy)]
struct Variant {
    window: Option<usize>,
    sinks: bool,
    attention_factor: f64,
    output_bias: bool,
    refitted: bool,
}

const PLAIN: Variant = Variant {
    window: None,
    sinks: false,
    attention_factor: 1.0,
    output_bias: false,
    refitted: false,
};

const VARIANTS: [Variant; 6] = [
    PLAIN,
    Variant {
        window: Some(9),
        ..PLAIN
    },
    Variant {
        sinks: true,
        ..PLAIN
    },
    Variant {
        refitted: true,
        ..PLAIN
    },
    Variant {
        attention_factor: 1.3466,
        output_bias: true,
        ..PLAIN
    },
    Variant {
        window: Some(9),
        sinks: true,
        attention_factor: 1.3466,
        output_bias: true,
        refitted: true,
    },
];

/// A layer, its statistics, random factors, and one window with targets.
fn layer(variant: Variant) -> (LayerWeights, LayerStatistics, LayerFactors, WindowSample) {
    let (n, d) = (SHAPE.kv_width(), SHAPE.head_dim);
    let projection = |out: usize, input: usize, seed: u64| Projection {
        weight: random(out, input, seed, 0.5),
        bias: None,
    };
    let weights = LayerWeights {
        layer: 5,
        attention: Attention {
            shape: SHAPE,
            rotary: Rotary {
                inv_freq: vec![1.0, 0.3, 0.05],
                attention_factor: variant.attention_factor,
            },
            scale: 0.5,
            sliding_window: variant.window,
            sinks: variant.sinks.then(|| vec![0.5, -1.0, 2.0, 1.0]),
        },
        encoder: MlaEncoder::KeptQuery,
        q: projection(24, 12, 1),
        k: projection(n, 12, 2),
        v: projection(n, 12, 3),
        o: Projection {
            bias: variant.output_bias.then(|| numbers(12, 40, 0.5)),
            ..projection(12, 24, 4)
        },
        input_norm: None,
        q_norm: None,
        k_norm: None,
    };
    let (q, k, v) = (
        numbers(TOKENS * 24, 5, 1.5),
        numbers(TOKENS * n, 6, 1.0),
        numbers(TOKENS * n, 7, 1.0),
    );
    let window = WindowActivations {
        tokens: TOKENS,
        q: &q,
        k: &k,
        v: &v,
    };
    let mut statistics = LayerStatistics::new(
        5,
        &weights.attention,
        &weights.o.weight,
        StatisticsOptions::default(),
    )
    .unwrap();
    statistics.accumulate(&window).unwrap();
    let sample = WindowSample::new(
        &window,
        &SHAPE,
        stratified_positions(TOKENS, 17, 3),
        Some(&numbers(TOKENS * 12, 8, 1.0)),
    );
    let list = |rows: usize, cols: usize, seed: u64| {
        (0..4)
            .map(|h| random(rows, cols, seed + h, 0.6).cast())
            .collect()
    };
    let (r, d_r) = (RANKS.kv_lora_rank, RANKS.qk_rope_head_dim);
    let factors = LayerFactors {
        shape: SHAPE,
        ranks: RANKS,
        encoder: random(r + d_r, 2 * n, 9, 0.5).cast(),
        w_uk: list(d, r, 10),
        w_uv: list(d, r, 20),
        q_rope: list(d_r, d, 30),
        inv_freq: vec![0.7, 0.1],
        o: variant.refitted.then(|| random(12, 24, 41, 0.5).cast()),
        o_bias: (variant.refitted && variant.output_bias)
            .then(|| numbers(12, 42, 0.5).iter().map(|&x| f64::from(x)).collect()),
    };
    (weights, statistics, factors, sample)
}

/// Parameters and objective in f64, so that only the reference rounds.
const ON: (DType, &Device) = (DType::F64, &Device::Cpu);

#[test]
fn the_forward_is_the_reference() {
    for variant in VARIANTS {
        let (weights, statistics, factors, sample) = layer(variant);
        let heads = converted_heads(&weights.attention, &factors, &sample);
        let coordinates =
            Coordinates::new(&statistics, &factors, std::slice::from_ref(&heads)).unwrap();
        let (o, bias) = output(&weights, &factors);
        let parameters = coordinates
            .parameters(&weights, &factors, (&o, bias.as_deref()), true, ON)
            .unwrap();
        let objective = Objective::new(&weights.attention, RANKS.kv_lora_rank, ON).unwrap();
        let table = RotationTable::new(&factors.inv_freq, TOKENS);
        let batch = objective.batch(&sample, &table).unwrap();
        let tensors = parameters.layer().unwrap();
        let found = objective.output(&tensors, &batch).unwrap();
        let found = found.to_vec2::<f64>().unwrap();
        let expected = heads.times_transposed(&o);
        for (t, row) in found.iter().enumerate() {
            for (j, x) in row.iter().enumerate() {
                let b = bias.as_ref().map_or(0.0, |b| b[j]);
                let y = f64::from(expected[(t, j)] + b);
                assert!(
                    (x - y).abs() < 2e-5,
                    "{variant:?}: {x} against {y} at [{t}, {j}]"
                );
            }
        }
        let value = objective.error(&tensors, &batch).unwrap();
        let value = value.to_scalar::<f64>().unwrap();
        let reference = error(&weights, &factors, std::slice::from_ref(&sample));
        assert!(
            (value - reference).abs() < 1e-5 * reference,
            "{variant:?}: {value} against {reference}"
        );
    }
}

/// Every parameter, in its coordinates, against central differences of the reference.
#[test]
fn the_gradient_is_that_of_the_reference() {
    const STEP: f64 = 5e-3;
    for variant in VARIANTS {
        let (weights, statistics, factors, sample) = layer(variant);
        let heads = converted_heads(&weights.attention, &factors, &sample);
        let coordinates = Coordinates::new(&statistics, &factors, &[heads]).unwrap();
        let (o, bias) = output(&weights, &factors);
        let parameters = coordinates
            .parameters(&weights, &factors, (&o, bias.as_deref()), true, ON)
            .unwrap();
        let objective = Objective::new(&weights.attention, RANKS.kv_lora_rank, ON).unwrap();
        let table = RotationTable::new(&factors.inv_freq, TOKENS);
        let batch = objective.batch(&sample, &table).unwrap();
        let value = objective.error(&parameters.layer().unwrap(), &batch);
        let gradients = value.unwrap().backward().unwrap();
        let zero = parameters.deltas().unwrap();
        let moving = parameters.moving();
        let expected = match (variant.refitted, variant.output_bias) {
            (false, _) => 4,
            (true, bias) => 5 + usize::from(bias),
        };
        assert_eq!(moving.len(), expected, "{variant:?}");
        for (i, parameter) in moving.iter().enumerate() {
            let gradient = gradients.get(parameter).expect("a gradient");
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let direction = numbers(gradient.len(), 50 + i as u64, 1.0);
            let moved = |by: f64| {
                let mut deltas = zero.clone();
                for (x, y) in part(&mut deltas, i).into_iter().zip(&direction) {
                    *x += by * f64::from(*y);
                }
                let moved = coordinates.moved(&weights, &factors, &deltas);
                error(&weights, &moved, std::slice::from_ref(&sample))
            };
            let measured = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
            let slope: f64 = gradient
                .iter()
                .zip(&direction)
                .map(|(g, d)| g * f64::from(*d))
                .sum();
            let size = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!(size > 0.0, "{variant:?}, parameter {i}: no gradient");
            assert!(
                (measured - slope).abs() < 0.01 * size,
                "{variant:?}, parameter {i}: differences {measured}, gradient {slope} of size {size}"
            );
        }
    }
}

/// The numbers of parameter `i` in the order of `Parameters::moving`.
fn part(deltas: &mut Deltas, i: usize) -> Vec<&mut f64> {
    let list = match i {
        0 => return deltas.encoder.data_mut().iter_mut().collect(),
        1 => &mut deltas.w_uk,
        2 => &mut deltas.w_uv,
        3 => &mut deltas.q_rope,
        4 => &mut deltas.output,
        _ => return deltas.bias.iter_mut().flatten().collect(),
    };
    list.iter_mut().flat_map(Matrix::data_mut).collect()
}
