//! Eight numbers in an array, in plain Rust: any CPU.

use super::Simd;

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
}
