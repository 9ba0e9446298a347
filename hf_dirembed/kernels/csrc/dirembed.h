/* What the files of this library share: a table of packed codes, and the functions that differ from CPU to CPU.
 *
 * A table stands for V rows of `rank` float latents. Each row is a stream of bits, the lowest bit of a byte first: its
 * codes of 4 bits, then those of 3, 2 and 1. What a code stands for depends on 8 bits of the stream, its own and those
 * behind it, called its state: the codebook of its width has a level for each of the 256 states. So neighbouring codes
 * share bits, which is what trellis-coded quantisation is about: few bits of its own choose among many levels. Behind
 * the last code of a width the states have zeros, whatever the stream goes on with.
 *
 *     level = codebook[width][state] + 1/2
 *     latent = 2^(scale of the row / 4) * sum of level * 2^(step of the code / 8), over the codes that add to it
 *
 * Rows are of one to four classes, which differ in how many codes they have of each width, in the latents that these
 * add to, and in their steps. Rows of the first class have the fewest bytes, `shared` of them. These first bytes of all
 * rows are in `weight`; what rows of the other classes have beyond them is in `further`, class after class.
 */
#ifndef DIREMBED_H
#define DIREMBED_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Counted up whenever a function's arguments or a struct change; library.py has the same number. */
#define DIREMBED_INTERFACE 3

#if defined(__GNUC__)
#define EXPORTED __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#else
#error "vector types and their attributes are those of GCC and Clang"
#endif

#define NUM_WIDTHS 4      /* 4, 3, 2 and 1 bits, in this order */
#define NUM_STATES 256    /* of the trellis */
#define MAX_CLASSES 4     /* the lowest two bits of a row's byte */
#define CLASS_BLOCK 64    /* rows; how many of each class come before a block is stored */
#define CHUNK 64          /* codes: buffers have room for so many more, as codes are unpacked by the chunk */
#define READABLE 64       /* bytes behind a row that may be read */
#define WIDTH_OF(part) (NUM_WIDTHS - (part))

/* What functions give back. */
enum { FINE = 0, DAMAGED = 1, NO_SUCH_ID = 2, NO_MEMORY = 3 };

/* The codes of one width: how many there are, the bit that the first begins at, and its number among the row's. */
typedef struct {
    int64_t count, bit, code;
} section;

/* A class: how many rows and a row's bytes and codes, the number of its first code among those of all classes, and
 * where in the further bytes its rows begin. */
typedef struct {
    int64_t rows, bytes, codes, first_code, further;
    section sections[NUM_WIDTHS];
} row_class;

/* reading.py fills this in. */
typedef struct {
    const uint8_t *weight;       /* (num_rows, shared) */
    const int8_t *codebook;      /* (NUM_WIDTHS, NUM_STATES), the levels less 1/2 */
    const int32_t *latents;      /* (num_codes,) the latent that each code adds to, class after class */
    const int8_t *steps;         /* (num_codes,) in eighths of a power of two */
    const uint8_t *row_bytes;    /* (num_rows,) 4 * (scale in quarters of a power of two + 32) + class */
    const int32_t *class_counts; /* (blocks, num_classes - 1) rows of each class but the first before each block */
    const uint8_t *further;
    int64_t num_rows, shared, num_codes, rank, num_classes;
    row_class classes[MAX_CLASSES];
} packed_table;

/* What a search of the trellis is given. */
typedef struct {
    const float *targets;    /* (rows, count) what levels shall approximate */
    const float *importance; /* (count,) what the squared error of each counts, up to 1 */
    const float *levels;     /* (NUM_STATES,) */
    int64_t rows, count, width;
    uint8_t *states;         /* (rows, count) is filled in */
    float *found;            /* (rows, count) is filled in with the levels of the states; or NULL */
} trellis_search;

/* The levels of two neighbouring codes of one width, whose 8 + width bits are the index, as floats; width after width. */
typedef struct {
    float levels[2];
} pair;
#define PAIRS 7680
#define FIRST_PAIR(part) (8192 - (8192 >> (part)))

#define TILE_STATES 4 /* hidden states that are multiplied at a time, where there are several */
#define MOST_LANES 16 /* floats of the widest vectors: buffers are as long as multiples of it */

/* What levels are multiplied by as fixed-point numbers, for one class of rows and TILE_STATES states, or one: see
 * fixed_avx512.c. */
#define FIXED_LANES 16
#define LANE_ROWS (CLASS_BLOCK + 8) /* those behind a block are of tiles that it does not fill */
#define MOST_LIMBS 3
#define MOST_FIXED 8128 /* places of a row: with more, sums of a lane might not fit into 32 bits */
typedef struct {
    int64_t limbs, stride; /* digits of a factor, 2 or 3, the highest first; places of a row, a multiple of CHUNK */
    const int8_t *digits;  /* (states, limbs, stride) */
    const int32_t *starts; /* (states, limbs, FIXED_LANES) what sums begin with, as levels are given 128 too high */
    const float *units;    /* (states, FIXED_LANES) what 1 in the lowest digit stands for */
} fixed_factors;

/* Products in whole numbers. `lanes` are (states, LANE_ROWS, FIXED_LANES) floats, whose sums over the last dimension
 * are the products with the levels less 1/2. */
typedef struct {
    /* Fills in what a `fixed_factors` has of one state, from (stride,) factors, which are finite. */
    void (*make_digits)(const float *factors, int64_t limbs, int64_t stride, int8_t *digits, int32_t *starts,
                        float *units);
    /* Products of packed rows, four of them with one state, or one with TILE_STATES; of three digits. Sections of
     * factors begin at multiples of CHUNK. `books` is the codebook, its levels 128 higher. */
    void (*multiply_packed)(const row_class *of, const uint8_t *const *rows, const uint8_t *books,
                            const fixed_factors *fixed, int64_t states, float *lanes);
    /* Products of (rows, stride) unpacked levels, 128 too high, with TILE_STATES states of two digits, over `count`
     * codes. Rows up to LANE_ROWS may be read, and written to `lanes`. */
    void (*multiply)(const uint8_t *levels, int64_t stride, int64_t rows, const fixed_factors *fixed, int64_t count,
                     float *lanes);
    /* The sums of vectors' lanes; their number is rounded up to FIXED_LANES. */
    void (*add_lanes)(const float *lanes, int64_t vectors, float *totals);
} fixed_kernels;

/* What differs from CPU to CPU; lanes.h has it in terms of vectors. */
typedef struct {
    const char *name;
    /* The levels of a row's codes, less 1/2. It writes up to CHUNK bytes behind the last, any values. */
    void (*unpack)(const row_class *of, const uint8_t *row, const int8_t *codebook, int8_t *levels);
    /* The levels as floats, likewise; `levels` is room for what `unpack` writes, and `pairs` is of the codebook. */
    void (*unpack_wide)(const row_class *of, const uint8_t *row, const int8_t *codebook, const pair *pairs,
                        int8_t *levels, float *wide);
    /* The sums over all codes of one row times factors, num_states of them, which is 1 or TILE_STATES: levels go from
     * the table of pairs to registers. Factors are at the places of the codes; NULL where `unpack_wide` is faster. */
    void (*multiply_packed)(const row_class *of, const uint8_t *row, const pair *pairs, const float *factors,
                            int64_t factor_stride, int64_t num_states, float *totals);
    /* (rows, num_states) sums over `count` codes of rows' levels times factors; num_states is 1 or TILE_STATES. */
    void (*multiply)(const float *levels, int64_t stride, int64_t rows, const float *factors, int64_t factor_stride,
                     int64_t num_states, int64_t count, float *totals);
    /* Finds the states of some rows of a search, at most `lanes`, with as much memory as `search_bytes` says. */
    void (*search)(const trellis_search *search, int64_t first, int64_t rows, void *memory);
    int64_t lanes;
    size_t (*search_bytes)(int64_t count, int64_t width);
    const fixed_kernels *fixed; /* NULL where floats are faster */
} cpu_kernels;

extern const cpu_kernels kernels_plain;
#if defined(__x86_64__)
extern const cpu_kernels kernels_avx2, kernels_avx512;
extern const fixed_kernels fixed_avx512;
#endif
const cpu_kernels *chosen_kernels(void);

/* Does work on parts of a range, in several threads where there are any: gives the highest of what the parts gave. */
typedef int (*part_work)(void *context, int64_t first, int64_t last);
int share_out(part_work work, void *context, int64_t length, int64_t step, int64_t threads);

/* Memory that begins on a cache line; to be freed. NULL where there is none. */
void *room_for(size_t bytes);

/* Bytes at any address as a number, the first in the lowest bits. */
INLINE uint64_t load_word(const uint8_t *address) {
    uint64_t word;
    memcpy(&word, address, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* 2^(exponent / 2^shift), rounded once: the float of the fraction, its exponent moved. Within the normal floats. */
INLINE float root_power(int exponent, int shift) {
    static const float eighths[8] = {0x1p0f,        0x1.172b84p0f, 0x1.306fe0p0f, 0x1.4bfdaep0f,
                                     0x1.6a09e6p0f, 0x1.8ace54p0f, 0x1.ae89fap0f, 0x1.d5818ep0f};
    int fraction = (exponent & ((1 << shift) - 1)) << (3 - shift);
    union {
        float value;
        int32_t bits;
    } power = {eighths[fraction]};
    power.bits += (exponent >> shift) * (1 << 23);
    return power.value;
}

INLINE float code_step(int8_t exponent) { return root_power(exponent, 3); }
INLINE float row_scale(uint8_t row_byte) { return root_power((row_byte >> 2) - 32, 2); }
INLINE int class_of(uint8_t row_byte) { return row_byte & (MAX_CLASSES - 1); }
/* Where a row's codes are multiplied as they are unpacked, sections begin at multiples of PLACES, or of CHUNK, and
 * factors are 0 between them: places of a class, or of its sections before one. */
#define PLACES 32
INLINE int64_t places_before(const row_class *of, int part, int64_t multiple) {
    int64_t places = 0;
    for (int before = 0; before < part; before++)
        places += (of->sections[before].count + multiple - 1) / multiple * multiple;
    return places;
}

INLINE int64_t padded(int64_t count) { return (count + CHUNK - 1) / CHUNK * CHUNK; }

/* How many rows of its class, which is not the first, come before a row. */
INLINE int64_t slot_of(const packed_table *table, int64_t row, int number) {
    int64_t block = row / CLASS_BLOCK, slot = table->class_counts[block * (table->num_classes - 1) + number - 1];
    for (int64_t other = block * CLASS_BLOCK; other < row; other++) slot += class_of(table->row_bytes[other]) == number;
    return slot;
}

/* The most bytes that a row of any class has. */
INLINE int64_t most_bytes(const packed_table *table) {
    int64_t most = 0;
    for (int number = 0; number < table->num_classes; number++)
        if (table->classes[number].bytes > most) most = table->classes[number].bytes;
    return most;
}

INLINE int64_t most_places(const packed_table *table, int64_t multiple) {
    int64_t most = 0;
    for (int number = 0; number < table->num_classes; number++) {
        int64_t places = places_before(&table->classes[number], NUM_WIDTHS, multiple);
        if (places > most) most = places;
    }
    return most;
}

INLINE int64_t most_codes(const packed_table *table) {
    int64_t most = 0;
    for (int number = 0; number < table->num_classes; number++)
        if (table->classes[number].codes > most) most = table->classes[number].codes;
    return most;
}

/* Where all bytes of a row are together, with READABLE bytes behind. That is in the table, or, where the row has two
 * parts or is at the table's end, a copy in `scratch`, of most_bytes and READABLE. It is NULL where the class has no
 * such slot: a damaged table must not make us read what is not its own. */
INLINE const uint8_t *address_of(const packed_table *table, int64_t row, int number, int64_t slot, uint8_t *scratch) {
    if (number >= table->num_classes) return NULL;
    const row_class *of = &table->classes[number];
    if (number > 0 && (slot < 0 || slot >= of->rows)) return NULL;
    const uint8_t *address = table->weight + row * table->shared;
    int64_t own = of->bytes - table->shared;
    if (own > 0 || (table->num_rows - row) * table->shared < table->shared + READABLE) {
        memcpy(scratch, address, (size_t)table->shared);
        if (own > 0) memcpy(scratch + table->shared, table->further + of->further + slot * own, (size_t)own);
        address = scratch;
    }
    return address;
}

#endif
