//! AVX-512: sixteen numbers a vector, 32 registers.

use std::arch::x86_64::{
    __m512, __m512i, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0, _mm_add_epi32,
    _mm_cvtepu8_epi32, _mm_cvtsi32_si128, _mm_mask_or_epi32, _mm_prefetch, _mm_set1_epi32,
    _mm_slli_epi32, _mm_testn_epi32_mask, _mm256_loadu_si256, _mm512_add_ps,
    _mm512_castsi128_si512, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi32,
    _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_permutex2var_ps,
    _mm512_permutexvar_epi32, _mm512_permutexvar_ps, _mm512_reduce_add_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setr_ps, _mm512_slli_epi32,
    _mm512_srli_epi32, _mm512_storeu_ps,
};

use super::{Avx2, FP4_MAGNITUDES as FP4, HALF_OF_LEAST, Simd};

/// Needs avx512f, avx512vl and what [`Avx2`] needs.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    type Words = __m512i;
    type Half = Avx2;
    const LANES: usize = 16;
    const WIDE: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: the caller has AVX-512, as for every method here.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: as above; sixteen numbers are there.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> __m512 {
        // SAFETY: as above; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps((1 << count) - 1, from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        // SAFETY: as above; sixteen numbers fit there.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    unsafe fn times_pow2(x: __m512, n: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_scalef_ps(x, n) }
    }

    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m512 {
        // SAFETY: as above; sixteen numbers are there.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        // SAFETY: as above; sixteen numbers are there.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn zip(a: __m512, b: __m512) -> (__m512, __m512) {
        // SAFETY: as above.
        unsafe {
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high =
                _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (
                _mm512_permutex2var_ps(a, low, b),
                _mm512_permutex2var_ps(a, high, b),
            )
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn words(from: *const u8) -> __m512i {
        // SAFETY: as above; sixteen words are there.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn first_words(from: *const u8, count: usize) -> __m512i {
        // SAFETY: as above; masked words are not read.
        unsafe { _mm512_maskz_loadu_epi32((1 << count) - 1, from.cast()) }
    }

    #[inline(always)]
    unsafe fn fp4(words: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let table = _mm512_setr_ps(
                FP4[0], FP4[1], FP4[2], FP4[3], FP4[4], FP4[5], FP4[6], FP4[7], -FP4[0], -FP4[1],
                -FP4[2], -FP4[3], -FP4[4], -FP4[5], -FP4[6], -FP4[7],
            );
            // Only the lowest four bits of an index count.
            _mm512_permutexvar_ps(words, table)
        }
    }

    #[inline(always)]
    unsafe fn next_fp4(words: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_srli_epi32::<4>(words) }
    }

    #[inline(always)]
    unsafe fn block_scales(bytes: u32) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let bytes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes as i32));
            // 0 and 255 are no exponents of f32.
            let ends = _mm_testn_epi32_mask(
                _mm_add_epi32(bytes, _mm_set1_epi32(1)),
                _mm_set1_epi32(0xfe),
            );
            let scales = _mm_slli_epi32::<23>(bytes);
            let scales = _mm_mask_or_epi32(scales, ends, scales, _mm_set1_epi32(HALF_OF_LEAST));
            let block = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let scales = _mm512_castsi128_si512(scales);
            _mm512_castsi512_ps(_mm512_permutexvar_epi32(block, scales))
        }
    }
}
