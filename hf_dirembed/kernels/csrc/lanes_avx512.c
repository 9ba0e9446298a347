/* The kernels for x86-64 with AVX-512 and its byte permutations (VBMI): Intel since 2019, AMD since Zen 4. */
#if defined(__x86_64__)
#define FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma"
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target(FEATURES))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma")
#include <immintrin.h>
#endif
#include "dirembed.h"

#define KERNELS kernels_avx512
#define NAME "avx512"
#define LANES 16
#define TILE_ROWS 6
#define UNPACK unpack_vectors
#define FUSED(a, b, c) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SMALLER(a, b) ((ints)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#define SUM(a) _mm512_reduce_add_ps((__m512)(a))
#define PUT_BYTES(p, a) _mm_storeu_si128((__m128i *)(void *)(p), _mm512_cvtepi32_epi8((__m512i)(a)))

#define EIGHT(first, step)                                                                                       \
    (first), (first) + (step), (first) + 2 * (step), (first) + 3 * (step), (first) + 4 * (step), (first) + 5 * (step), \
        (first) + 6 * (step), (first) + 7 * (step)
#define BYTES_OF(w)                                                                                             \
    {                                                                                                           \
        EIGHT(0, 1), EIGHT(w, 1), EIGHT(2 * w, 1), EIGHT(3 * w, 1), EIGHT(4 * w, 1), EIGHT(5 * w, 1),           \
            EIGHT(6 * w, 1), EIGHT(7 * w, 1)                                                                    \
    }
#define SHIFTS_OF(w) \
    { EIGHT(0, w), EIGHT(0, w), EIGHT(0, w), EIGHT(0, w), EIGHT(0, w), EIGHT(0, w), EIGHT(0, w), EIGHT(0, w) }

/* Of 64 codes, each eight are in eight bytes from a multiple of the width on, one behind the other. */
static const uint8_t word_bytes[NUM_WIDTHS][64] = {BYTES_OF(4), BYTES_OF(3), BYTES_OF(2), BYTES_OF(1)};
static const uint8_t word_shifts[NUM_WIDTHS][64] = {SHIFTS_OF(4), SHIFTS_OF(3), SHIFTS_OF(2), SHIFTS_OF(1)};
/* The bits that states have, by how many codes of the width are left, themselves counted. */
static const uint8_t bits_left[NUM_WIDTHS][16] = {
    {0, 15, 255, 255, 255, 255, 255, 255, 255},
    {0, 7, 63, 255, 255, 255, 255, 255, 255},
    {0, 3, 15, 63, 255, 255, 255, 255, 255},
    {0, 1, 3, 7, 15, 31, 63, 127, 255},
};

/* Unpacks 64 codes at a time. A permutation brings the bytes of each eight codes together, a multi-shift takes 8 bits
 * at any offset of these eight times; the codebook's 256 levels are in four registers, which permutations look up. */
static void unpack_vectors(const row_class *of, const uint8_t *row, const int8_t *codebook, int8_t *levels) {
    const __m512i numbers = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928,
                                             0x2726252423222120, 0x1f1e1d1c1b1a1918, 0x1716151413121110,
                                             0x0f0e0d0c0b0a0908, 0x0706050403020100);
    for (int part = 0; part < NUM_WIDTHS; part++) {
        int64_t left = of->sections[part].count, bit = of->sections[part].bit;
        if (left == 0) continue;
        const uint8_t *from = row + (bit >> 3);
        const int8_t *book = codebook + part * NUM_STATES;
        __m512i bytes = _mm512_loadu_si512(word_bytes[part]);
        __m512i shifts = _mm512_add_epi8(_mm512_loadu_si512(word_shifts[part]), _mm512_set1_epi8((char)(bit & 7)));
        __m512i book0 = _mm512_loadu_si512(book), book1 = _mm512_loadu_si512(book + 64);
        __m512i book2 = _mm512_loadu_si512(book + 128), book3 = _mm512_loadu_si512(book + 192);

        for (int8_t *to = levels; left > 0; left -= CHUNK, to += CHUNK, from += 8 * WIDTH_OF(part)) {
            __m512i words = _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(from));
            __m512i states = _mm512_multishift_epi64_epi8(shifts, words);
            if (left < CHUNK + 8) { /* behind the last code there are zeros */
                __m512i behind = _mm512_subs_epu8(_mm512_set1_epi8((char)left), numbers);
                __m512i known = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)bits_left[part]));
                __m512i kept = _mm512_shuffle_epi8(known, _mm512_min_epu8(behind, _mm512_set1_epi8(8)));
                states = _mm512_and_si512(states, kept);
            }
            __m512i low = _mm512_permutex2var_epi8(book0, states, book1);
            __m512i high = _mm512_permutex2var_epi8(book2, states, book3);
            _mm512_storeu_si512(to, _mm512_mask_blend_epi8(_mm512_movepi8_mask(states), low, high));
        }
        levels += of->sections[part].count;
    }
}

#include "lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_on_this_cpu;
#endif
