/* The kernels for x86-64 with AVX2 and FMA. */
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#endif
#include "dirembed.h"

#define KERNELS kernels_avx2
#define NAME "avx2"
#define LANES 8
#define TILE_ROWS 3
#define FUSED(a, b, c) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SMALLER(a, b) ((ints)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#define SUM(a) sum((__m256)(a))
#define PUT_BYTES(p, a) put_bytes(p, (__m256i)(a))

INLINE float sum(__m256 value) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE void put_bytes(uint8_t *to, __m256i value) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64((__m128i *)(void *)to, _mm_packus_epi16(words, words));
}

#include "lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_on_this_cpu;
#endif
