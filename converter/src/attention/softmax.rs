//! Softmax of f32 rows, written so that the compiler vectorises it on any x86-64 or Arm.

use std::ops::Range;

const LANES: usize = 16;

/// Sum with independent lanes.
pub(crate) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Inner product with independent lanes.
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let n = x.len() / LANES * LANES;
    for (a, b) in x[..n].chunks_exact(LANES).zip(y[..n].chunks_exact(LANES)) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = x[n..].iter().zip(&y[n..]).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Largest magnitude, or `None` when an element is NaN or infinite.
pub(crate) fn max_abs_finite(x: &[f32]) -> Option<f32> {
    // Magnitudes order like their bits, and the bits of NaN and infinity are the largest.
    let bits = x
        .iter()
        .fold(0u32, |most, v| most.max(v.to_bits() & 0x7fff_ffff));
    let most = f32::from_bits(bits);
    most.is_finite().then_some(most)
}

fn maximum(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks
        .remainder()
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().copied().fold(rest, f32::max)
}

/// `e^x` for `x <= 0` to about 2 ulp: `2^n * p(f)` with `n = round(x / ln 2)`, `f = x - n ln 2`
/// (ln 2 in two parts, so that f keeps its digits) and a degree-6 polynomial.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    /// Adding and subtracting this rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let f = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.0
        + f * (1.0
            + f * (0.5
                + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0 + f * (1.0 / 720.0))))));
    let power =
        f32::from_bits(((shifted.to_bits() as i32 - ROUND.to_bits() as i32 + 127) << 23) as u32);
    p * power
}

/// Softmax over `row[visible]` and the sink, whose share is dropped; zero elsewhere.
pub(crate) fn softmax_row(row: &mut [f32], visible: Range<usize>, sink: Option<f32>) {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let row = &mut row[visible];
    let sink = sink.unwrap_or(f32::NEG_INFINITY);
    let most = maximum(row).max(sink);
    for x in row.iter_mut() {
        *x = exp_nonpositive(*x - most);
    }
    let scale = 1.0 / (sum(row) + (sink - most).exp());
    for x in row.iter_mut() {
        *x *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_matches_libm() {
        for i in 0..20_000 {
            let x = -0.004 * i as f32;
            let (found, expected) = (f64::from(exp_nonpositive(x)), f64::from(x).exp());
            assert!(
                (found - expected).abs() <= 1e-6 * expected.max(1e-37),
                "e^{x}: {found} against {expected}"
            );
        }
    }

    #[test]
    fn softmax_sees_only_the_visible_keys() {
        let mut row: Vec<f32> = (0..40).map(|i| (i % 7) as f32).collect();
        check(&mut row.clone(), None);
        for sink in [-30.0, 2.5, 6.0, 11.0] {
            check(&mut row, Some(sink));
            row = (0..40).map(|i| (i % 7) as f32).collect();
        }
    }

    fn check(row: &mut [f32], sink: Option<f32>) {
        softmax_row(row, 3..37, sink);
        let total: f64 = (3..37).map(|i| f64::from(i % 7).exp()).sum();
        let total = total + sink.map_or(0.0, |s| f64::from(s).exp());
        for (i, p) in row.iter().enumerate() {
            let expected = if (3..37).contains(&i) {
                f64::from(i as u32 % 7).exp() / total
            } else {
                0.0
            };
            assert!(
                (f64::from(*p) - expected).abs() < 1e-6,
                "p[{i}] = {p}, expected {expected}"
            );
        }
    }

    #[test]
    fn non_finite_values_are_seen() {
        assert_eq!(max_abs_finite(&[1.0, -3.0]), Some(3.0));
        assert_eq!(max_abs_finite(&[1.0, f32::NAN]), None);
        assert_eq!(max_abs_finite(&[f32::NEG_INFINITY]), None);
    }
}
