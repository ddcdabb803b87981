//! Naive readings of GGUF's block formats, from ggml's `ggml-quants.c`, one number at a time in f64.

use half::f16;

fn half(bytes: &[u8]) -> f64 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f64()
}

/// Number `at` of a block of 32.
pub(super) fn simple(kind: &str, block: &[u8], at: usize) -> f64 {
    let nibble = |quants: &[u8]| f64::from((quants[at % 16] >> (4 * (at / 16))) & 15);
    match kind {
        "Q8_0" => half(block) * f64::from(block[2 + at] as i8),
        "Q4_0" => half(block) * (nibble(&block[2..]) - 8.0),
        "Q4_1" => half(block) * nibble(&block[4..]) + half(&block[2..]),
        other => panic!("{other}"),
    }
}

/// Number `at` of a block of 256: `d, dmin, 12 bytes of 6-bit scales and minima, 128 of quants`.
pub(super) fn q4_k(block: &[u8], at: usize) -> f64 {
    let (scales, quants) = (&block[4..16], &block[16..]);
    let group = at / 32;
    let (scale, minimum) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        (
            (scales[group + 4] & 15) | ((scales[group - 4] >> 6) << 4),
            (scales[group + 4] >> 4) | ((scales[group] >> 6) << 4),
        )
    };
    let quant = (quants[group / 2 * 32 + at % 32] >> (4 * (group % 2))) & 15;
    half(block) * f64::from(scale) * f64::from(quant) - half(&block[2..]) * f64::from(minimum)
}

/// Number `at` of a block of 256: 128 bytes of low nibbles, 64 of high pairs, 16 scales, `d`.
pub(super) fn q6_k(block: &[u8], at: usize) -> f64 {
    let (low, high, scales, d) = (
        &block[..128],
        &block[128..192],
        &block[192..208],
        &block[208..],
    );
    let (half_block, place) = (at / 128, at % 128);
    let nibble = (low[half_block * 64 + place % 64] >> (4 * (place / 64))) & 15;
    let pair = (high[half_block * 32 + place % 32] >> (2 * (place / 32))) & 3;
    let quant = i32::from(nibble | (pair << 4)) - 32;
    half(d) * f64::from(scales[at / 16] as i8) * f64::from(quant)
}
