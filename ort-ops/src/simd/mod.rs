//! Vectors of f32 in the widths that CPUs have, behind one trait, so that each product is written once.
//!
//! The methods are `inline(always)` and hold single instructions; they become instructions of the wide kind
//! only inside a function that enables the CPU's feature ([`crate::products`] has one per width).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Bits of `2^-127`, which is below the normal numbers; with an infinity's they are those of a NaN.
const HALF_OF_LEAST: i32 = 1 << 22;

/// What the codes of FP4 (E2M1) without a sign mean; the bit above is the sign.
const FP4_MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Operations on a vector of `LANES` numbers.
///
/// # Safety
/// Every method needs a CPU with the features of the implementing type; those that take a pointer read or write
/// `LANES` (or `count`) numbers there, without alignment.
pub(crate) trait Simd: Copy {
    /// The vector.
    type V: Copy;
    /// As many words of 32 bits.
    type Words: Copy;
    /// Vectors of half the width, or the same where there are none.
    type Half: Simd;
    /// Numbers in a vector.
    const LANES: usize;
    /// Vectors side by side in a product, as many as the registers hold with six rows.
    const WIDE: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// The first `count < LANES` numbers, zeros behind them; nothing beyond is read.
    unsafe fn load_first(from: *const f32, count: usize) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The nearest whole numbers.
    unsafe fn round(x: Self::V) -> Self::V;
    /// `x * 2^n` for whole `n <= 0`; 0 below `n = -126`.
    unsafe fn times_pow2(x: Self::V, n: Self::V) -> Self::V;
    /// The sum of all lanes.
    unsafe fn sum(x: Self::V) -> f32;
    /// `LANES` numbers of 16 bits, the upper halves of f32.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// `LANES` numbers of IEEE half precision.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    /// The lanes of both by turns: `a0 b0 a1 b1 ..`, in two vectors.
    unsafe fn zip(a: Self::V, b: Self::V) -> (Self::V, Self::V);

    /// Asks for the cache line at an address, which need not exist.
    unsafe fn prefetch(at: *const u8);
    /// `LANES` words of 32 bits: eight FP4 numbers each, the first in the lowest bits.
    unsafe fn words(from: *const u8) -> Self::Words;
    /// The first `count < LANES` words, zeros behind them; nothing beyond is read.
    unsafe fn first_words(from: *const u8, count: usize) -> Self::Words;
    /// The FP4 number in the lowest bits of every word.
    unsafe fn fp4(words: Self::Words) -> Self::V;
    /// Moves the next number of every word to the lowest bits.
    unsafe fn next_fp4(words: Self::Words) -> Self::Words;
    /// E8M0 scales of the `LANES / 4` blocks that the words are of, each in the four lanes of its block; the first scale
    /// is in the lowest byte. 255 is NaN.
    unsafe fn block_scales(bytes: u32) -> Self::V;

    /// `2^x` for `x <= 0` (and the rounding errors above it): to a unit in the last place or two, 0 far below, NaN for NaN.
    ///
    /// `x = n + f` with whole `n` and `|f| <= 1/2`; `2^f` by its Taylor series, whose eighth term is below 6e-9.
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        const SERIES: [f32; 7] = [
            1.525_273_4e-5,
            1.540_353e-4,
            1.333_355_8e-3,
            9.618_129e-3,
            5.550_411e-2,
            0.240_226_5,
            std::f32::consts::LN_2,
        ];
        // SAFETY: the caller's promise.
        unsafe {
            let x = Self::max(Self::splat(-200.0), x);
            let n = Self::round(x);
            let f = Self::fma(n, Self::splat(-1.0), x);
            let mut y = Self::splat(SERIES[0]);
            for &term in &SERIES[1..] {
                y = Self::fma(y, f, Self::splat(term));
            }
            Self::times_pow2(Self::fma(y, f, Self::splat(1.0)), n)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Portable, Simd};

    /// `2^x` of one number in every lane.
    ///
    /// # Safety
    /// As for the methods of [`Simd`].
    #[inline(always)]
    unsafe fn exp2<S: Simd>(x: f32) -> f32 {
        let mut out = [0.0; 16];
        // SAFETY: the caller's promise; sixteen numbers are enough for any width.
        unsafe { S::store(out.as_mut_ptr(), S::exp2(S::splat(x))) };
        out[S::LANES - 1]
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn avx512(x: f32) -> f32 {
        // SAFETY: the caller's CPU.
        unsafe { exp2::<super::Avx512>(x) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(x: f32) -> f32 {
        // SAFETY: the caller's CPU.
        unsafe { exp2::<super::Avx2>(x) }
    }

    /// All widths that this CPU has.
    fn every(x: f32) -> Vec<f32> {
        use crate::Isa;
        let one = |isa: &Isa| {
            // SAFETY: only what is available is called.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => avx512(x),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => avx2(x),
                    _ => exp2::<Portable>(x),
                }
            }
        };
        Isa::available().iter().map(one).collect()
    }

    #[test]
    fn powers_of_two_are_good_to_two_units_in_the_last_place() {
        for i in 0..100_000 {
            let x = -(i as f32) * 1.25e-3;
            let expected = f64::from(x).exp2();
            for found in every(x) {
                let off = (f64::from(found) - expected).abs() / expected;
                assert!(off < 2.4e-7, "2^{x}: {found}, expected {expected}");
            }
        }
        assert!(every(0.0).iter().all(|x| x.to_bits() == 1.0_f32.to_bits()));
    }

    /// Numbers of the words `0x7654_3210` and `0xfedc_ba98` by turns, at the scales `1 2 3 4` of a vector's blocks.
    ///
    /// # Safety
    /// As for the methods of [`Simd`].
    #[inline(always)]
    unsafe fn numbers<S: Simd>(count: usize, scales: [u8; 4]) -> Vec<Vec<f32>> {
        let bytes: Vec<u8> = (0..8_u8)
            .flat_map(|_| [0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe])
            .collect();
        let mut out = Vec::new();
        // SAFETY: the caller's promise; there are sixteen words.
        unsafe {
            let mut words = if count < S::LANES {
                S::first_words(bytes.as_ptr(), count)
            } else {
                S::words(bytes.as_ptr())
            };
            for _ in 0..8 {
                let mut lanes = vec![0.0; S::LANES];
                let scales = S::block_scales(u32::from_le_bytes(scales));
                S::store(lanes.as_mut_ptr(), S::mul(S::fp4(words), scales));
                words = S::next_fp4(words);
                out.push(lanes);
            }
        }
        out
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
    unsafe fn numbers_avx512(count: usize, scales: [u8; 4]) -> Vec<Vec<f32>> {
        // SAFETY: the caller's CPU.
        unsafe { numbers::<super::Avx512>(count, scales) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn numbers_avx2(count: usize, scales: [u8; 4]) -> Vec<Vec<f32>> {
        // SAFETY: the caller's CPU.
        unsafe { numbers::<super::Avx2>(count, scales) }
    }

    /// `2^(byte - 127)` in f64.
    fn power(byte: u8) -> f64 {
        if byte == 255 {
            f64::NAN
        } else {
            (f64::from(byte) - 127.0).exp2()
        }
    }

    #[test]
    fn every_code_and_scale_of_mxfp4_is_exact() {
        const FP4: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for first in 0..=255_u8 {
            let scales = [first, first ^ 255, 127, first / 2];
            for count in [16, 8, 4, 3, 0] {
                let mut found = Vec::new();
                for isa in crate::Isa::available() {
                    use crate::Isa;
                    // SAFETY: only what is available is called.
                    found.push(unsafe {
                        match isa {
                            #[cfg(target_arch = "x86_64")]
                            Isa::Avx512 => numbers_avx512(count, scales),
                            #[cfg(target_arch = "x86_64")]
                            Isa::Avx2 => numbers_avx2(count, scales),
                            _ => numbers::<Portable>(count, scales),
                        }
                    });
                }
                for vectors in found {
                    for (number, lanes) in vectors.iter().enumerate() {
                        for (lane, x) in lanes.iter().enumerate() {
                            let sign = if lane % 2 == 0 { 1.0 } else { -1.0 };
                            let code = if lane < count {
                                FP4[number] * sign
                            } else {
                                0.0
                            };
                            let expected = (code * power(scales[lane / 4])) as f32;
                            // Zero times infinity does not occur: the largest scale is finite. Zeros of both signs are equal.
                            let bits = |x: f32| (x + 0.0).to_bits();
                            let same =
                                bits(expected) == bits(*x) || (expected.is_nan() && x.is_nan());
                            assert!(
                                same,
                                "scales {scales:?} {count} words, number {number} of lane {lane}: {x}, expected {expected}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_ends_are_zero_and_nan_stays() {
        for x in [f32::NEG_INFINITY, -1.0e30, -250.0, f32::MIN] {
            assert!(every(x).iter().all(|y| *y == 0.0), "{x}: {:?}", every(x));
        }
        assert!(every(f32::NAN).iter().all(|y| y.is_nan()));
    }
}
