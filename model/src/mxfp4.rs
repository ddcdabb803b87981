//! MXFP4, the experts' number format: blocks of 32 four-bit floats that share a power of two.
//!
//! Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 and 6.3 (block format,
//! conversion), 5.3.3 (FP4 E2M1) and 5.4.1 (E8M0 scale, 255 is NaN). How GPT-OSS stores it: the
//! last axis of `*_blocks` is the [`BLOCK_BYTES`] bytes of a block, low nibble first; `*_scales`
//! has one byte a block.

use crate::Refusal;

/// Numbers that share a scale.
pub const BLOCK: usize = 32;

/// Bytes of a block's numbers, two in a byte.
pub const BLOCK_BYTES: usize = BLOCK / 2;

/// The scale byte of E8M0 that is no number.
pub const SCALE_NAN: u8 = 255;

/// The value of each four-bit code (E2M1: sign, two exponent bits, one mantissa bit).
pub const FP4: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Scale bytes from here on can take a code beyond f32: `6 * 2^126` is more than the largest.
const MAY_OVERFLOW: u8 = 253;

/// `2^(scale - 127)`, exactly; `None` for [`SCALE_NAN`].
pub fn scale(byte: u8) -> Option<f32> {
    match byte {
        SCALE_NAN => None,
        // 2^-127 is below the normal numbers.
        0 => Some(f32::from_bits(1 << 22)),
        exponent => Some(f32::from_bits(u32::from(exponent) << 23)),
    }
}

/// Decodes whole blocks; every number comes out exactly.
///
/// `blocks` holds [`BLOCK_BYTES`] for each byte of `scales`, `out` takes [`BLOCK`] numbers for
/// each. Refused: lengths that do not agree, the scale 255, and a number that f32 cannot hold
/// (scales 253 and 254 with large codes).
pub fn decode(blocks: &[u8], scales: &[u8], out: &mut [f32]) -> Result<(), Refusal> {
    let (whole, rest) = blocks.as_chunks::<BLOCK_BYTES>();
    let (numbers, spare) = out.as_chunks_mut::<BLOCK>();
    if !rest.is_empty()
        || !spare.is_empty()
        || whole.len() != scales.len()
        || numbers.len() != scales.len()
    {
        return Err(Refusal::new(
            "MXFP4 blocks",
            format!(
                "{} bytes and room for {} numbers, as there are {} scales",
                scales.len() * BLOCK_BYTES,
                scales.len() * BLOCK,
                scales.len()
            ),
            format!("{} bytes and room for {}", blocks.len(), out.len()),
            "check that blocks and scales are of the same tensor",
        ));
    }
    for (at, ((block, &byte), numbers)) in whole.iter().zip(scales).zip(numbers).enumerate() {
        let Some(scale) = scale(byte) else {
            return Err(damaged(at, "a scale byte below 255", "255, which is NaN"));
        };
        let values = FP4.map(|value| value * scale);
        for (pair, &byte) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(block) {
            *pair = [
                values[usize::from(byte & 15)],
                values[usize::from(byte >> 4)],
            ];
        }
        if byte >= MAY_OVERFLOW && numbers.iter().any(|x| x.is_infinite()) {
            return Err(damaged(
                at,
                "numbers that f32 can hold",
                &format!("larger ones, scale byte {byte}"),
            ));
        }
    }
    Ok(())
}

fn damaged(block: usize, expected: &str, found: &str) -> Refusal {
    Refusal::new(
        format!("MXFP4 block {block}"),
        expected,
        found,
        "the weights are damaged: get the checkpoint again",
    )
}

/// Encodes a block as the specification's section 6.3 does: the scale takes the largest number to
/// the largest power of two of FP4, numbers round to the nearest code (ties to the even one) and
/// stop at 6. Refuses NaN and infinity.
pub fn encode_block(numbers: &[f32; BLOCK]) -> Result<(u8, [u8; BLOCK_BYTES]), Refusal> {
    if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
        return Err(Refusal::new(
            "MXFP4 encoder",
            "finite numbers",
            format!("{} at {at}", numbers[at]),
            "check where the numbers come from",
        ));
    }
    let largest = numbers.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let byte = match f64::from(largest) {
        0.0 => 0,
        // An f32 is a normal f64, so its exponent field is floor(log2); 4 = 2^2 is FP4's largest power.
        wide => ((wide.to_bits() >> 52) as i64 - 1023 - 2 + 127).clamp(0, 254) as u8,
    };
    let step = (f64::from(byte) - 127.0).exp2();
    let code = |x: f32| {
        let size = (f64::from(x) / step).abs();
        // Upper ends of the codes 0 to 6; an end itself goes to the even neighbour.
        let ends = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
        let magnitude = ends
            .iter()
            .enumerate()
            .take_while(|&(code, &end)| match code % 2 {
                0 => size > end,
                _ => size >= end,
            })
            .count() as u8;
        magnitude | u8::from(x.is_sign_negative()) << 3
    };
    let mut block = [0; BLOCK_BYTES];
    for (byte, &[low, high]) in block.iter_mut().zip(numbers.as_chunks::<2>().0) {
        *byte = code(low) | code(high) << 4;
    }
    Ok((byte, block))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The specification's formula in f64: sign, exponent and mantissa bits of E2M1, then the scale.
    fn naive(nibble: u8, scale: u8) -> f64 {
        let sign = if nibble & 8 == 0 { 1.0 } else { -1.0 };
        let exponent = i32::from(nibble >> 1 & 3);
        let mantissa = f64::from(nibble & 1) / 2.0;
        let magnitude = if exponent == 0 {
            mantissa
        } else {
            (1.0 + mantissa) * 2_f64.powi(exponent - 1)
        };
        sign * magnitude * 2_f64.powi(i32::from(scale) - 127)
    }

    /// All sixteen codes, each twice, low nibbles first.
    const ALL: [u8; BLOCK_BYTES] = [
        0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe, 0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc,
        0xfe,
    ];

    #[test]
    fn codes_come_low_nibble_first() {
        let mut out = [0.0; BLOCK];
        decode(&ALL, &[127], &mut out).unwrap();
        assert_eq!(out.map(f32::to_bits)[..16], FP4.map(f32::to_bits));
        assert_eq!(out[..16], out[16..]);
    }

    #[test]
    fn every_code_is_exact_at_every_scale() {
        for scale in 0..=252 {
            let mut out = [0.0; BLOCK];
            decode(&ALL, &[scale], &mut out).unwrap();
            for (at, &x) in out.iter().enumerate() {
                let wide = naive(at as u8 % 16, scale);
                assert_eq!(f64::from(x).to_bits(), wide.to_bits(), "{at} at {scale}");
            }
        }
    }

    #[test]
    fn what_f32_cannot_hold_is_refused() {
        let mut out = [0.0; BLOCK];
        assert_eq!(decode(&[0x33; 16], &[254], &mut out), Ok(()));
        assert_eq!(f64::from(out[0]).to_bits(), naive(3, 254).to_bits());
        for (scale, code) in [(253, 0x60), (254, 0x40), (254, 0x0c)] {
            let mut block = [0; 32];
            block[30] = code;
            let refusal = decode(&block, &[0, scale], &mut [0.0; 64]).unwrap_err();
            assert_eq!(refusal.subject, "MXFP4 block 1");
            assert!(refusal.found.contains(&scale.to_string()), "{refusal}");
        }
    }

    #[test]
    fn scale_255_is_refused() {
        let refusal = decode(&[0; 48], &[127, 255, 255], &mut [0.0; 96]).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "MXFP4 block 1: expected a scale byte below 255, found 255, which is NaN; fix: the \
             weights are damaged: get the checkpoint again"
        );
    }

    #[test]
    fn lengths_have_to_agree() {
        for (blocks, scales, out) in [(16, 2, 64), (17, 1, 32), (32, 2, 63), (32, 2, 32)] {
            let refused = decode(&vec![0; blocks], &vec![127; scales], &mut vec![0.0; out]);
            assert!(refused.is_err(), "{blocks} {scales} {out}");
        }
        assert_eq!(decode(&[], &[], &mut []), Ok(()));
    }

    #[test]
    fn ties_go_to_the_even_code() {
        let mut numbers = [0.0; BLOCK];
        let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.25, 7.9];
        numbers[..ties.len()].copy_from_slice(&ties);
        let (scale, block) = encode_block(&numbers).unwrap();
        let mut out = [0.0; BLOCK];
        decode(&block, &[scale], &mut out).unwrap();
        assert_eq!(scale, 127);
        assert_eq!(
            out[..ties.len()],
            [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, -0.0, 6.0]
        );
    }

    #[test]
    fn numbers_that_are_none_are_not_encoded() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut numbers = [1.0; BLOCK];
            numbers[5] = bad;
            let refusal = encode_block(&numbers).unwrap_err();
            assert_eq!(refusal.found, format!("{bad} at 5"));
        }
    }

    proptest! {
        #[test]
        fn decodes_as_the_formula(
            (scales, blocks) in prop::collection::vec(0_u8..=252, 0..8).prop_flat_map(|scales| {
                let bytes = scales.len() * BLOCK_BYTES;
                (Just(scales), prop::collection::vec(any::<u8>(), bytes))
            })
        ) {
            let mut out = vec![0.0; scales.len() * BLOCK];
            decode(&blocks, &scales, &mut out).unwrap();
            for (at, &x) in out.iter().enumerate() {
                let nibble = blocks[at / 2] >> (4 * (at % 2)) & 15;
                prop_assert_eq!(
                    f64::from(x).to_bits(),
                    naive(nibble, scales[at / BLOCK]).to_bits()
                );
            }
        }

        #[test]
        fn decoded_blocks_encode_to_the_same_numbers(
            scale in 4_u8..=252, block in any::<[u8; BLOCK_BYTES]>()
        ) {
            let mut out = [0.0; BLOCK];
            decode(&block, &[scale], &mut out).unwrap();
            let (other, encoded) = encode_block(&out).unwrap();
            let mut again = [0.0; BLOCK];
            decode(&encoded, &[other], &mut again).unwrap();
            prop_assert_eq!(again.map(f32::to_bits), out.map(f32::to_bits));
        }

        #[test]
        fn encoding_errs_by_half_a_step(numbers in any::<[u8; BLOCK]>()) {
            let numbers = numbers.map(|byte| f32::from(byte) - 128.0);
            let (scale, block) = encode_block(&numbers).unwrap();
            let mut out = [0.0; BLOCK];
            decode(&block, &[scale], &mut out).unwrap();
            let unit = f64::from(super::scale(scale).unwrap());
            for (x, y) in numbers.iter().zip(out) {
                let size = f64::from(x.abs()) / unit;
                // Half the distance of the codes around; above 6 numbers stop there.
                let bound = match size {
                    s if s <= 2.0 => 0.25,
                    s if s <= 4.0 => 0.5,
                    s if s <= 6.0 => 1.0,
                    _ => 2.0,
                };
                prop_assert!(f64::from((x - y).abs()) <= bound * unit);
            }
        }
    }
}
