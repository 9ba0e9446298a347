/* Products in whole numbers, for x86-64 with AVX-512, VBMI and VNNI: Intel since 2019, AMD since Zen 4.
 *
 * A level is a byte and 1/2, and a factor, which is a hidden state's number times a code's step, is a fixed-point
 * number of two or three signed bytes, called its digits. So one instruction multiplies 64 levels with as many digits
 * and adds the products to 16 sums, called lanes, of four neighbours each. The sums are exact. Each lane has a unit of
 * its own, as some factors are many times as large as all others.
 */
#if defined(__x86_64__)
#define FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma"
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target(FEATURES))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma")
#include <immintrin.h>
#endif
#include "dirembed.h"
#include "unpack_avx512.h"

#define SMALLEST_UNIT 1e-35f /* lanes whose factors are below that are 0 */

/* The places of a lane: four of each chunk. */
#define FOR_PLACES_OF(lane, place)                         \
    for (int64_t chunk = 0; chunk < stride; chunk += CHUNK) \
        for (int64_t place = chunk + 4 * (lane); place < chunk + 4 * (lane) + 4; place++)

static void make_digits(const float *factors, int64_t limbs, int64_t stride, int8_t *digits, int32_t *starts,
                        float *units) {
    const float largest = limbs == 2 ? 32600.0f : 8355000.0f; /* below 127 in each digit */
    for (int lane = 0; lane < FIXED_LANES; lane++) {
        float most = 0;
        FOR_PLACES_OF(lane, place) most = __builtin_fmaxf(most, __builtin_fabsf(factors[place]));
        float per_unit = most < SMALLEST_UNIT ? 0 : largest / most;
        units[lane] = most < SMALLEST_UNIT ? 0 : most / largest;

        int32_t sums[MOST_LIMBS] = {0};
        FOR_PLACES_OF(lane, place) {
            int32_t number = (int32_t)__builtin_rintf(factors[place] * per_unit);
            for (int64_t limb = limbs - 1; limb >= 0; limb--) {
                int8_t digit = (int8_t)(number & 255);
                digits[limb * stride + place] = digit;
                sums[limb] += digit;
                number = (number - digit) >> 8;
            }
        }
        for (int64_t limb = 0; limb < limbs; limb++) starts[limb * FIXED_LANES + lane] = -128 * sums[limb];
    }
}

INLINE __m512i load_start(const fixed_factors *fixed, int state, int limb) {
    return _mm512_loadu_si512(fixed->starts + (state * fixed->limbs + limb) * FIXED_LANES);
}

/* The lanes of a row and a state as floats. Two digits are put together as whole numbers: they have room in 32 bits, as
 * rows have at most MOST_FIXED places. */
INLINE void store_lanes(const __m512i *sums, const int limbs, const float *units, float *lanes) {
    __m512i low = _mm512_add_epi32(_mm512_slli_epi32(sums[limbs - 2], 8), sums[limbs - 1]);
    __m512 value = _mm512_cvtepi32_ps(low);
    if (limbs == 3) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), _mm512_set1_ps(65536.0f), value);
    _mm512_storeu_ps(lanes, _mm512_mul_ps(value, _mm512_loadu_ps(units)));
}

INLINE void multiply_some(const row_class *of, const uint8_t *const *rows, const uint8_t *books,
                          const fixed_factors *fixed, const int num_rows, const int states, float *lanes) {
    __m512i sums[4][TILE_STATES][MOST_LIMBS];
    _Pragma("GCC unroll 4") for (int row = 0; row < num_rows; row++)
        _Pragma("GCC unroll 4") for (int state = 0; state < states; state++)
            _Pragma("GCC unroll 3") for (int limb = 0; limb < 3; limb++)
                sums[row][state][limb] = load_start(fixed, state, limb);

    const int8_t *digits = fixed->digits;
    for (int part = 0; part < NUM_WIDTHS; part++) {
        const section *each = &of->sections[part];
        if (each->count == 0) continue;
        const unpacking how = unpacking_of(part, (int)(each->bit & 7), books);
        int64_t byte = each->bit >> 3;
        for (int64_t left = each->count; left > 0; left -= CHUNK, byte += 8 * WIDTH_OF(part), digits += CHUNK) {
            __m512i kept = states_kept(part, left);
            _Pragma("GCC unroll 4") for (int row = 0; row < num_rows; row++) {
                __m512i levels = unpack_chunk(&how, rows[row] + byte, kept);
                _Pragma("GCC unroll 4") for (int state = 0; state < states; state++)
                    _Pragma("GCC unroll 3") for (int limb = 0; limb < 3; limb++)
                        sums[row][state][limb] = _mm512_dpbusd_epi32(
                            sums[row][state][limb], levels,
                            _mm512_loadu_si512(digits + (state * 3 + limb) * fixed->stride));
            }
        }
    }
    _Pragma("GCC unroll 4") for (int row = 0; row < num_rows; row++)
        _Pragma("GCC unroll 4") for (int state = 0; state < states; state++)
            store_lanes(sums[row][state], 3, fixed->units + state * FIXED_LANES,
                        lanes + (state * LANE_ROWS + row) * FIXED_LANES);
}

static void multiply_packed_fixed(const row_class *of, const uint8_t *const *rows, const uint8_t *books,
                                  const fixed_factors *fixed, int64_t states, float *lanes) {
    if (states == 1)
        multiply_some(of, rows, books, fixed, 4, 1, lanes);
    else
        multiply_some(of, rows, books, fixed, 1, TILE_STATES, lanes);
}

#define ROWS 6 /* that are multiplied with two states at a time, each of two digits: as many as registers hold */

INLINE void multiply_tile(const uint8_t *levels, int64_t stride, const fixed_factors *fixed, int first, int64_t count,
                          float *lanes) {
    __m512i sums[ROWS][2][2];
    const int8_t *digits = fixed->digits + first * 2 * fixed->stride;
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 2") for (int state = 0; state < 2; state++)
            _Pragma("GCC unroll 2") for (int limb = 0; limb < 2; limb++)
                sums[row][state][limb] = load_start(fixed, first + state, limb);
    for (int64_t place = 0; place < count; place += CHUNK) {
        __m512i level[ROWS];
        _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
            level[row] = _mm512_loadu_si512(levels + row * stride + place);
        _Pragma("GCC unroll 2") for (int state = 0; state < 2; state++)
            _Pragma("GCC unroll 2") for (int limb = 0; limb < 2; limb++) {
                __m512i digit = _mm512_loadu_si512(digits + (state * 2 + limb) * fixed->stride + place);
                _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
                    sums[row][state][limb] = _mm512_dpbusd_epi32(sums[row][state][limb], level[row], digit);
            }
    }
    _Pragma("GCC unroll 8") for (int row = 0; row < ROWS; row++)
        _Pragma("GCC unroll 2") for (int state = 0; state < 2; state++)
            store_lanes(sums[row][state], 2, fixed->units + (first + state) * FIXED_LANES,
                        lanes + ((first + state) * LANE_ROWS + row) * FIXED_LANES);
}

/* Rows are filled up to tiles, whose results nobody reads. */
static void multiply_fixed(const uint8_t *levels, int64_t stride, int64_t rows, const fixed_factors *fixed,
                           int64_t count, float *lanes) {
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int state = 0; state < TILE_STATES; state += 2)
            multiply_tile(levels + row * stride, stride, fixed, state, count, lanes + row * FIXED_LANES);
}

/* The sums of vectors' lanes, FIXED_LANES vectors at a time: halves of two are added until one vector has all. */
static void add_lanes(const float *lanes, int64_t vectors, float *totals) {
    for (int64_t first = 0; first < vectors; first += FIXED_LANES, lanes += FIXED_LANES * FIXED_LANES) {
        __m512 four[4], eight[2];
        _Pragma("GCC unroll 4") for (int each = 0; each < 4; each++) {
            const float *from = lanes + 4 * each * FIXED_LANES;
            __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + FIXED_LANES);
            __m512 c = _mm512_loadu_ps(from + 2 * FIXED_LANES), d = _mm512_loadu_ps(from + 3 * FIXED_LANES);
            __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
            __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
            four[each] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        }
        _Pragma("GCC unroll 2") for (int each = 0; each < 2; each++) {
            __m512 a = four[2 * each], b = four[2 * each + 1];
            eight[each] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        }
        _mm512_storeu_ps(totals + first, _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                                                       _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd)));
    }
}

const fixed_kernels fixed_avx512 = {make_digits, multiply_packed_fixed, multiply_fixed, add_lanes};

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
typedef int nothing_on_this_cpu;
#endif
