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

#include "unpack_avx512.h"

static void unpack_vectors(const row_class *of, const uint8_t *row, const int8_t *codebook, int8_t *levels) {
    for (int part = 0; part < NUM_WIDTHS; part++) {
        const section *each = &of->sections[part];
        if (each->count == 0) continue;
        const unpacking how = unpacking_of(part, (int)(each->bit & 7), (const uint8_t *)codebook);
        const uint8_t *from = row + (each->bit >> 3);
        int8_t *to = levels;
        for (int64_t left = each->count; left > 0; left -= CHUNK, to += CHUNK, from += 8 * WIDTH_OF(part))
            _mm512_storeu_si512(to, unpack_chunk(&how, from, states_kept(part, left)));
        levels += each->count;
    }
}

#include "lanes.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_on_this_cpu;
#endif
