//! The FP8 cache: e4m3 latents, one scale a token, the rotated key in f16; and the quantisation that `cuda/append.cuh` does.
//!
//! A page holds three planes, one behind the other, so that it is one stretch of memory whose parts are all aligned:
//!
//! ```text
//! codes  [64, kv_lora_rank]   e4m3 (OCP 8-bit floating point: 4 bits of exponent, bias 7, 3 of mantissa, largest 448)
//! keys   [64, qk_rope_head_dim] f16
//! scales [64]                 f32, positive
//! ```
//!
//! A token's row is `scale * [codes | keys]`. One scale, not one for every 128 numbers: it then is one factor of a column of the
//! scores and of a weight, and never touches a column of the output. e4m3 is a floating-point type, so a finer scale would
//! not make its steps smaller, it would only lift numbers that are `2^-15` of the token's largest out of the subnormals. For the same
//! reason append writes powers of two: they lose nothing of the relative step, and dividing by them is exact.

/// Largest number of e4m3.
pub const LARGEST: f32 = 448.0;
/// Exponent of the smallest scale that is written: `1 / scale` of many tokens must add up in f32.
pub const LEAST_EXPONENT: i32 = -64;

/// The number of a code: its definition. Codes 0x7f and 0xff are NaN.
pub fn value(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(code >> 3 & 15);
    let mantissa = f32::from(code & 7);
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    sign * if exponent == 0 {
        mantissa / 8.0 * 2.0_f32.powi(-6)
    } else {
        (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7)
    }
}

/// The code nearest to a number of at most [`LARGEST`]; halfway goes to the even one. Greater numbers become the largest.
pub fn code(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24 & 0x80) as u8;
    let size = x.abs();
    let magnitude = if size < 2.0_f32.powi(-6) {
        // Beside 2^14 the step of f32 is 2^-9, that of e4m3's subnormals.
        (size + 16_384.0).to_bits() - 16_384.0_f32.to_bits()
    } else {
        let bits = size.to_bits();
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    sign | magnitude.min(0x7e) as u8
}

/// The scale of a row: the smallest power of two by which its largest latent comes to at most 448 and its largest rotated key below
/// 32768, and at least `2^-64`; NaN when one of them is not finite.
pub fn scale(latent: &[f32], key: &[f32]) -> f32 {
    let largest = |numbers: &[f32]| {
        numbers
            .iter()
            .map(|x| x.to_bits() & 0x7fff_ffff)
            .max()
            .unwrap_or(0)
    };
    let (latent, key) = (largest(latent), largest(key));
    if latent.max(key) >= f32::INFINITY.to_bits() {
        return f32::NAN;
    }
    let exponent = |bits: u32| (bits >> 23) as i32 - 127;
    // 448 is 1.75 * 2^8.
    let beyond = i32::from(latent & 0x7f_ffff > 0x60_0000);
    let exponent = (exponent(latent) - 8 + beyond)
        .max(exponent(key) - 14)
        .max(LEAST_EXPONENT);
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// A row quantised: scale, numbers of the codes, numbers of the keys; the row is scale times these.
pub fn quantise(latent: &[f32], key: &[f32]) -> (f32, Vec<f32>, Vec<f32>) {
    let scale = scale(latent, key);
    let codes = latent.iter().map(|x| value(code(x / scale))).collect();
    let keys = key
        .iter()
        .map(|x| half::f16::from_f32(x / scale).to_f32())
        .collect();
    (scale, codes, keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The nearest of all codes, by looking at each; of two equally near ones the even one.
    fn nearest(x: f32) -> u8 {
        let far = |code: u8| (f64::from(value(code)) - f64::from(x)).abs();
        let signed = if x.is_sign_negative() { 0x80 } else { 0 };
        (0..0x7f)
            .map(|code| code | signed)
            .min_by(|&a, &b| far(a).total_cmp(&far(b)).then((a & 1).cmp(&(b & 1))))
            .unwrap()
    }

    #[test]
    fn codes_and_numbers_belong_together() {
        for code_of in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(code(value(code_of)), code_of);
        }
        assert_eq!((value(0x7e), value(1)), (LARGEST, 1.0 / 512.0));
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
        // Halfway between neighbours, and a little to each side.
        for low in 0..0x7e_u8 {
            let middle = f32::midpoint(value(low), value(low + 1));
            for x in [middle, middle.next_up(), middle.next_down()] {
                for x in [x, -x] {
                    assert_eq!(code(x), nearest(x), "{x}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rounding_is_to_the_nearest(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            prop_assume!(x.abs() <= LARGEST);
            prop_assert_eq!(code(x), nearest(x));
        }

        #[test]
        fn a_row_is_off_by_half_a_step(
            latent in prop::collection::vec(-1e3_f32..1e3, 64),
            key in prop::collection::vec(-1e3_f32..1e3, 16),
            exponent in -40_i32..40,
            silent in any::<bool>(),
        ) {
            let factor = 2.0_f32.powi(exponent);
            let latent: Vec<f32> = latent.iter().map(|x| if silent { 0.0 } else { x * factor }).collect();
            let (scale, codes, keys) = quantise(&latent, &key);
            prop_assert!(scale.is_normal() && scale.to_bits().trailing_zeros() >= 23, "{}", scale);
            for (x, code) in latent.iter().zip(&codes) {
                let apart = (x - code * scale).abs();
                prop_assert!(apart <= (x.abs() / 16.0).max(scale / 1024.0), "{} became {}", x, code * scale);
            }
            for (x, key) in key.iter().zip(&keys) {
                let apart = (x - key * scale).abs();
                prop_assert!(apart <= (x.abs() / 2048.0).max(scale * 2.0_f32.powi(-25)), "{} became {}", x, key * scale);
            }
        }
    }

    #[test]
    fn scales_at_their_edges() {
        let is = |latent: f32, key: f32, expected: f32| {
            assert_eq!(scale(&[latent], &[key]).to_bits(), expected.to_bits());
        };
        is(448.0, 0.0, 1.0);
        is(448.0_f32.next_up(), 0.0, 2.0);
        is(224.0, 0.0, 0.5);
        is(0.0, 0.0, 2.0_f32.powi(LEAST_EXPONENT));
        // The rotated key stays within f16 when the latent is small.
        is(0.0, 1.0, 2.0_f32.powi(-14));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(scale(&[1.0, bad], &[1.0]).is_nan() && scale(&[1.0], &[bad]).is_nan());
        }
    }
}
