//! AVX2 with FMA and F16C: eight numbers a vector, 16 registers.

use std::arch::x86_64::{
    __m256, __m256i, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T0,
    _mm_add_epi32, _mm_add_ps, _mm_add_ss, _mm_and_si128, _mm_cmpeq_epi32, _mm_cvtepu8_epi32,
    _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_loadu_si128, _mm_movehdup_ps, _mm_movehl_ps,
    _mm_or_si128, _mm_prefetch, _mm_set1_epi32, _mm_setzero_si128, _mm_slli_epi32,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps, _mm256_andnot_ps, _mm256_castps256_ps128,
    _mm256_castsi128_si256, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cmpgt_epi32,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_extractf128_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_maskload_epi32,
    _mm256_maskload_ps, _mm256_max_ps, _mm256_mul_ps, _mm256_or_ps, _mm256_permute2f128_ps,
    _mm256_permutevar8x32_epi32, _mm256_permutevar8x32_ps, _mm256_round_ps, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setr_epi32, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::{FP4_MAGNITUDES, HALF_OF_LEAST, Simd};

/// Needs avx2, fma and f16c.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    type Words = __m256i;
    type Half = Self;
    const LANES: usize = 8;
    const WIDE: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: the caller has AVX2 and FMA, as for every method here.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: as above; eight numbers are there.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> __m256 {
        // SAFETY: as above; masked lanes are not read.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane);
            _mm256_maskload_ps(from, mask)
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m256) {
        // SAFETY: as above; eight numbers fit there.
        unsafe { _mm256_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn round(x: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    unsafe fn times_pow2(x: __m256, n: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(bits));
            let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(n, _mm256_set1_ps(-126.0));
            _mm256_mul_ps(x, _mm256_andnot_ps(tiny, scale))
        }
    }

    #[inline(always)]
    unsafe fn sum(x: __m256) -> f32 {
        // SAFETY: as above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m256 {
        // SAFETY: as above; eight numbers are there.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m256 {
        // SAFETY: as above; eight numbers are there.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn zip(a: __m256, b: __m256) -> (__m256, __m256) {
        // SAFETY: as above.
        unsafe {
            let (even, odd) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            (
                _mm256_permute2f128_ps::<0x20>(even, odd),
                _mm256_permute2f128_ps::<0x31>(even, odd),
            )
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn words(from: *const u8) -> __m256i {
        // SAFETY: as above; eight words are there.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn first_words(from: *const u8, count: usize) -> __m256i {
        // SAFETY: as above; masked words are not read.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lane);
            _mm256_maskload_epi32(from.cast(), mask)
        }
    }

    #[inline(always)]
    unsafe fn fp4(words: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe {
            // Only the lowest three bits of an index count; the fourth is the sign.
            let magnitudes = _mm256_loadu_ps(FP4_MAGNITUDES.as_ptr());
            let numbers = _mm256_permutevar8x32_ps(magnitudes, words);
            let signs = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(words));
            _mm256_or_ps(numbers, _mm256_and_ps(signs, _mm256_set1_ps(-0.0)))
        }
    }

    #[inline(always)]
    unsafe fn next_fp4(words: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_srli_epi32::<4>(words) }
    }

    #[inline(always)]
    unsafe fn block_scales(bytes: u32) -> __m256 {
        // SAFETY: as above.
        unsafe {
            let bytes = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes as i32));
            // 0 and 255 are no exponents of f32.
            let next = _mm_add_epi32(bytes, _mm_set1_epi32(1));
            let high = _mm_and_si128(next, _mm_set1_epi32(0xfe));
            let ends = _mm_cmpeq_epi32(high, _mm_setzero_si128());
            let half = _mm_and_si128(ends, _mm_set1_epi32(HALF_OF_LEAST));
            let scales = _mm_or_si128(_mm_slli_epi32::<23>(bytes), half);
            let block = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
            let scales = _mm256_castsi128_si256(scales);
            _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(scales, block))
        }
    }
}
