/* Packs symbols of rows into streams of bits, and unpacks them with the levels that they stand for: for the compressor. */
#include "dirembed.h"

#define PART_ROWS 256

typedef struct {
    const row_class *of;
    uint8_t *packed, *symbols; /* (rows, bytes) and (rows, codes) */
    const float *books;        /* (NUM_WIDTHS, NUM_STATES) */
    float *levels;             /* (rows, codes) */
} packing;

static int pack_part(void *context, int64_t first, int64_t last) {
    const packing *work = context;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *symbols = work->symbols + row * work->of->codes;
        uint8_t *to = work->packed + row * work->of->bytes;
        uint64_t word = 0; /* bits that wait to be written, `bits` of them */
        int bits = 0;
        for (int part = 0; part < NUM_WIDTHS; part++) {
            for (int64_t code = work->of->sections[part].count; code > 0; code--) {
                word |= (uint64_t)*symbols++ << bits;
                bits += WIDTH_OF(part);
                for (; bits >= 8; bits -= 8, word >>= 8) *to++ = (uint8_t)word;
            }
        }
        if (bits > 0) *to = (uint8_t)word;
    }
    return FINE;
}

/* The stream from a byte on, and zeros behind the row's end. */
INLINE uint64_t word_within(const uint8_t *from, const uint8_t *end) {
    uint8_t bytes[8] = {0};
    if (end - from >= 8) return load_word(from);
    memcpy(bytes, from, (size_t)(end - from));
    return load_word(bytes);
}

static int unpack_part(void *context, int64_t first, int64_t last) {
    const packing *work = context;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *packed = work->packed + row * work->of->bytes, *end = packed + work->of->bytes;
        uint8_t *symbols = work->symbols + row * work->of->codes;
        float *levels = work->levels + row * work->of->codes;
        for (int part = 0; part < NUM_WIDTHS; part++) {
            const float *book = work->books + part * NUM_STATES;
            const int width = WIDTH_OF(part);
            int64_t bit = work->of->sections[part].bit;
            for (int64_t left = work->of->sections[part].count; left > 0; left -= 8, bit += 8 * width) {
                uint64_t word = word_within(packed + (bit >> 3), end) >> (bit & 7);
                if (left * width < 64) word &= ((uint64_t)1 << (left * width)) - 1;
                for (int64_t code = left < 8 ? left : 8; code > 0; code--, word >>= width) {
                    *levels++ = book[word & (NUM_STATES - 1)];
                    *symbols++ = word & ((1 << width) - 1);
                }
            }
        }
    }
    return FINE;
}

/* Packs symbols, (rows, codes), each below two to the power of its width, into (rows, bytes) `packed`. */
EXPORTED int dirembed_pack(const row_class *of, uint8_t *symbols, int64_t rows, uint8_t *packed, int64_t threads) {
    packing work = {of, packed, symbols, NULL, NULL};
    return share_out(pack_part, &work, rows, PART_ROWS, threads);
}

/* Unpacks (rows, bytes) `packed` to symbols and levels, (rows, codes) each; `books`, (NUM_WIDTHS, NUM_STATES), has the
 * levels of the trellis's states. */
EXPORTED int dirembed_unpack(const row_class *of, uint8_t *packed, int64_t rows, const float *books, uint8_t *symbols,
                             float *levels, int64_t threads) {
    packing work = {of, packed, symbols, books, levels};
    return share_out(unpack_part, &work, rows, PART_ROWS, threads);
}
