/* Unpacking with AVX-512 and its byte permutations (VBMI), 64 codes at a time; of files that are compiled for both.
 *
 * A permutation brings the bytes of each eight codes together, a multi-shift takes 8 bits at any offset of these eight
 * times; the codebook's 256 levels are in four registers, which permutations look up.
 */
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

/* What is the same for all chunks of a section. */
typedef struct {
    __m512i bytes, shifts, book[4];
} unpacking;

INLINE unpacking unpacking_of(int part, int bit, const uint8_t *codebook) {
    const uint8_t *book = codebook + part * NUM_STATES;
    unpacking how;
    how.bytes = _mm512_loadu_si512(word_bytes[part]);
    how.shifts = _mm512_add_epi8(_mm512_loadu_si512(word_shifts[part]), _mm512_set1_epi8((char)bit));
    _Pragma("GCC unroll 4") for (int each = 0; each < 4; each++) how.book[each] = _mm512_loadu_si512(book + 64 * each);
    return how;
}

/* The bits that states of the next 64 codes have, of which `left` are: behind the last there are zeros. */
INLINE __m512i states_kept(int part, int64_t left) {
    if (left >= CHUNK + 8) return _mm512_set1_epi8(-1);
    const __m512i numbers = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928,
                                             0x2726252423222120, 0x1f1e1d1c1b1a1918, 0x1716151413121110,
                                             0x0f0e0d0c0b0a0908, 0x0706050403020100);
    __m512i behind = _mm512_subs_epu8(_mm512_set1_epi8((char)left), numbers);
    __m512i known = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)bits_left[part]));
    return _mm512_shuffle_epi8(known, _mm512_min_epu8(behind, _mm512_set1_epi8(8)));
}

INLINE __m512i unpack_chunk(const unpacking *how, const uint8_t *from, __m512i kept) {
    __m512i words = _mm512_permutexvar_epi8(how->bytes, _mm512_loadu_si512(from));
    __m512i states = _mm512_and_si512(_mm512_multishift_epi64_epi8(how->shifts, words), kept);
    __m512i low = _mm512_permutex2var_epi8(how->book[0], states, how->book[1]);
    __m512i high = _mm512_permutex2var_epi8(how->book[2], states, how->book[3]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(states), low, high);
}
