//! Eight numbers in an array, in plain Rust: any CPU.

use half::f16;

use super::{FP4_MAGNITUDES, HALF_OF_LEAST, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (lane, x) in out.iter_mut().enumerate() {
        *x = f(lane);
    }
    out
}

impl Simd for Portable {
    type V = [f32; LANES];
    type Words = [u32; LANES];
    type Half = Self;
    const LANES: usize = LANES;
    const WIDE: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller has LANES numbers there.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self::V {
        let mut out = [0.0; LANES];
        for (lane, x) in out.iter_mut().take(count).enumerate() {
            // SAFETY: the caller has `count` numbers there.
            *x = unsafe { from.add(lane).read() };
        }
        out
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        // SAFETY: the caller has room for LANES numbers there.
        unsafe { to.cast::<Self::V>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }

    // Two roundings: a fused multiplication without its instruction is a call of a slow function.
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn round(x: Self::V) -> Self::V {
        each(|i| x[i].round_ties_even())
    }

    #[inline(always)]
    unsafe fn times_pow2(x: Self::V, n: Self::V) -> Self::V {
        each(|i| {
            let scale = if n[i] < -126.0 {
                0.0
            } else {
                f32::from_bits(((n[i] as i32 + 127) << 23) as u32)
            };
            x[i] * scale
        })
    }

    #[inline(always)]
    unsafe fn sum(x: Self::V) -> f32 {
        x.iter().sum()
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::V {
        // SAFETY: the caller has LANES numbers there.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        // SAFETY: the caller has LANES numbers there.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn zip(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let both = |i: usize| {
            if i.is_multiple_of(2) {
                a[i / 2]
            } else {
                b[i / 2]
            }
        };
        (each(both), each(|i| both(LANES + i)))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn words(from: *const u8) -> Self::Words {
        // SAFETY: the caller has LANES words there.
        let bytes = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        bytes.map(u32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn first_words(from: *const u8, count: usize) -> Self::Words {
        let mut out = [0; LANES];
        for (lane, word) in out.iter_mut().take(count).enumerate() {
            // SAFETY: the caller has `count` words there.
            let bytes = unsafe { from.cast::<[u8; 4]>().add(lane).read_unaligned() };
            *word = u32::from_le_bytes(bytes);
        }
        out
    }

    #[inline(always)]
    unsafe fn fp4(words: Self::Words) -> Self::V {
        each(|i| {
            let number = FP4_MAGNITUDES[words[i] as usize % 8];
            f32::from_bits(number.to_bits() | (words[i] & 8) << 28)
        })
    }

    #[inline(always)]
    unsafe fn next_fp4(words: Self::Words) -> Self::Words {
        words.map(|word| word >> 4)
    }

    #[inline(always)]
    unsafe fn block_scales(bytes: u32) -> Self::V {
        each(|i| {
            let byte = bytes.to_le_bytes()[i / 4];
            let half = if matches!(byte, 0 | 255) {
                HALF_OF_LEAST
            } else {
                0
            };
            f32::from_bits(u32::from(byte) << 23 | half as u32)
        })
    }
}
