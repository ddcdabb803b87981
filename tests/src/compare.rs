//! How far computed logits are from expected ones.

use crate::Outcome;

/// The largest difference between two tensors of one shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Largest absolute difference over the largest absolute expected number.
    pub of_scale: f64,
    /// Flat index of it.
    pub worst: usize,
    /// The numbers there: computed, expected.
    pub pair: (f64, f64),
    /// Largest absolute expected number.
    pub scale: f64,
}

/// The largest difference; a NaN or an infinity on either side is refused.
pub fn difference(computed: &[f64], expected: &[f64]) -> Outcome<Difference> {
    if computed.len() != expected.len() || expected.is_empty() {
        return Err(format!(
            "{} numbers computed, {} expected",
            computed.len(),
            expected.len()
        ));
    }
    let bad = |list: &[f64]| list.iter().position(|number| !number.is_finite());
    if let Some(at) = bad(computed).or_else(|| bad(expected)) {
        return Err(format!(
            "number {at} is not finite: computed {}, expected {}",
            computed[at], expected[at]
        ));
    }
    let scale = expected.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
    if scale == 0.0 {
        return Err("every expected number is zero".into());
    }
    let mut found = Difference {
        of_scale: 0.0,
        worst: 0,
        pair: (computed[0], expected[0]),
        scale,
    };
    for (at, (&c, &e)) in computed.iter().zip(expected).enumerate() {
        let of_scale = (c - e).abs() / scale;
        if of_scale > found.of_scale {
            found.of_scale = of_scale;
            found.worst = at;
            found.pair = (c, e);
        }
    }
    Ok(found)
}

/// Requires a difference of at most `tolerance` of the scale. `shape`, outermost axis first, turns
/// the worst number into a coordinate for the message.
pub fn require_close(
    computed: &[f64],
    expected: &[f64],
    shape: &[usize],
    tolerance: f64,
) -> Outcome<Difference> {
    let found = difference(computed, expected)?;
    if found.of_scale <= tolerance {
        return Ok(found);
    }
    let mut rest = found.worst;
    let mut coordinate: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let at = rest % size.max(1);
            rest /= size.max(1);
            at
        })
        .collect();
    coordinate.reverse();
    Err(format!(
        "differs by {:.2e} of the scale {:.3}, allowed {tolerance:.0e}; worst at {coordinate:?} of {shape:?}: \
         computed {:.6}, expected {:.6}",
        found.of_scale, found.scale, found.pair.0, found.pair.1
    ))
}

#[cfg(test)]
mod tests {
    use super::{difference, require_close};

    #[test]
    fn the_largest_difference_is_found_relative_to_the_scale() {
        let found = difference(&[1.0, -2.0, 4.5], &[1.25, -2.0, 4.0]).unwrap();
        assert_eq!((found.worst, found.pair), (2, (4.5, 4.0)));
        assert!((found.of_scale - 0.125).abs() < 1e-15);
        let message = require_close(&[0.0, 0.0, 9.0, 0.0], &[8.0; 4], &[2, 2], 1e-3).unwrap_err();
        assert!(message.contains("worst at [0, 0] of [2, 2]"), "{message}");
    }

    #[test]
    fn nothing_passes_by_accident() {
        for (computed, expected) in [
            (vec![f64::NAN], vec![1.0]),
            (vec![1.0], vec![f64::INFINITY]),
            (vec![], vec![]),
            (vec![1.0], vec![1.0, 1.0]),
            (vec![0.0], vec![0.0]),
        ] {
            assert!(difference(&computed, &expected).is_err());
        }
    }
}
