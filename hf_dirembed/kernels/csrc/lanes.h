/* The kernels in terms of vectors of LANES floats; each lanes_*.c says what these are on its CPUs, and includes this.
 *
 * It names:  KERNELS          the struct that is filled in, and NAME what it is called;
 *            LANES            floats of a vector;
 *            FUSED(a, b, c)   a * b + c of float vectors, rounded once where the CPU can;
 *            SMALLER(a, b)    the smaller of each two 32-bit integers;
 *            SUM(a)           of a float vector's lanes;
 *            PUT_BYTES(p, a)  the lowest byte of each integer, to memory;
 *            TILE_ROWS        rows that are multiplied with TILE_STATES states at a time, as many as registers hold;
 *            UNPACK           a function of its own, where `unpack_words` is not the fastest, and looking levels up in
 *                             pairs is not either.
 */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE floats load(const float *from) { return *(const loose_floats *)from; }
INLINE void store(float *to, floats value) { *(loose_floats *)to = value; }

/* ---- unpacking ---- */

/* Codes whose states are all in a word of 64 bits, at any offset within a byte; whole bytes of them. */
#define CODES_OF_WORD(width) ((width) == 4 ? 8 : (width) == 1 ? 32 : 16)

#ifndef UNPACK
#define UNPACK unpack_words
INLINE int8_t *unpack_section(const uint8_t *row, int64_t bit, int64_t count, int width, const int8_t *book,
                              int8_t *levels) {
    const int codes = CODES_OF_WORD(width);
    const uint8_t *from = row + (bit >> 3);
    for (int64_t left = count; left > 0; left -= codes, from += codes * width / 8) {
        uint64_t word = load_word(from) >> (bit & 7);
        if (left * width < 64) word &= ((uint64_t)1 << (left * width)) - 1; /* behind the last code there are zeros */
        _Pragma("GCC unroll 32") for (int code = 0; code < codes; code++) levels[code] = book[(word >> (code * width)) & 255];
        levels += left < codes ? left : codes;
    }
    return levels;
}

static void unpack_words(const row_class *of, const uint8_t *row, const int8_t *codebook, int8_t *levels) {
    levels = unpack_section(row, of->sections[0].bit, of->sections[0].count, 4, codebook, levels);
    levels = unpack_section(row, of->sections[1].bit, of->sections[1].count, 3, codebook + NUM_STATES, levels);
    levels = unpack_section(row, of->sections[2].bit, of->sections[2].count, 2, codebook + 2 * NUM_STATES, levels);
    unpack_section(row, of->sections[3].bit, of->sections[3].count, 1, codebook + 3 * NUM_STATES, levels);
}

INLINE float *widen_section(const uint8_t *row, int64_t bit, int64_t count, int width, const pair *pairs, float *wide) {
    const uint64_t mask = (NUM_STATES << width) - 1;
    const int codes = CODES_OF_WORD(width);
    const uint8_t *from = row + (bit >> 3);
    for (int64_t left = count; left > 0; left -= codes, from += codes * width / 8) {
        uint64_t word = load_word(from) >> (bit & 7);
        if (left * width < 64) word &= ((uint64_t)1 << (left * width)) - 1;
        _Pragma("GCC unroll 16") for (int code = 0; code < codes; code += 2)
            memcpy(wide + code, &pairs[(word >> (code * width)) & mask], sizeof(pair));
        wide += left < codes ? left : codes;
    }
    return wide;
}

static void unpack_wide(const row_class *of, const uint8_t *row, const int8_t *codebook, const pair *pairs,
                        int8_t *levels, float *wide) {
    (void)codebook, (void)levels;
    wide = widen_section(row, of->sections[0].bit, of->sections[0].count, 4, pairs + FIRST_PAIR(0), wide);
    wide = widen_section(row, of->sections[1].bit, of->sections[1].count, 3, pairs + FIRST_PAIR(1), wide);
    wide = widen_section(row, of->sections[2].bit, of->sections[2].count, 2, pairs + FIRST_PAIR(2), wide);
    wide = widen_section(row, of->sections[3].bit, of->sections[3].count, 1, pairs + FIRST_PAIR(3), wide);
    for (int code = 0; code < CHUNK; code++) wide[code] = 0; /* what is multiplied by 0 must be finite */
}

typedef uint64_t longs __attribute__((vector_size(4 * LANES)));

/* The levels of LANES codes of a word, from the first on. */
INLINE floats look_up(uint64_t word, int first, int width, const pair *pairs) {
    const uint64_t mask = (NUM_STATES << width) - 1;
    uint64_t found[LANES / 2];
    _Pragma("GCC unroll 4") for (int each = 0; each < LANES / 2; each++)
        memcpy(&found[each], &pairs[(word >> ((first + 2 * each) * width)) & mask], sizeof(pair));
#if LANES == 8
    return (floats)(longs){found[0], found[1], found[2], found[3]};
#else
    return (floats)(longs){found[0], found[1]};
#endif
}

/* With one state a row has several sums, as each addition would wait for the one before. */
INLINE const float *multiply_section(const uint8_t *row, int64_t bit, int64_t count, int width, const pair *pairs,
                                     const float *factors, int64_t stride, const int states, floats *sums) {
    const int codes = CODES_OF_WORD(width), several = states == 1 ? 4 : 1;
    const uint8_t *from = row + (bit >> 3);
    int64_t left = count;
    for (; left > 0; left -= codes, from += codes * width / 8, factors += codes) {
        uint64_t word = load_word(from) >> (bit & 7);
        if (left * width < 64) word &= ((uint64_t)1 << (left * width)) - 1;
        _Pragma("GCC unroll 8") for (int first = 0; first < codes; first += LANES) {
            floats levels = look_up(word, first, width, pairs);
            _Pragma("GCC unroll 4") for (int state = 0; state < states; state++) {
                floats *sum = &sums[state + first / LANES % several];
                *sum = FUSED(levels, load(factors + state * stride + first), *sum);
            }
        }
    }
    return factors + (count + PLACES - 1) / PLACES * PLACES - (count + codes - 1) / codes * codes;
}

INLINE void multiply_row(const row_class *of, const uint8_t *row, const pair *pairs, const float *factors,
                         int64_t stride, const int states, float *totals) {
    floats sums[TILE_STATES] = {{0}};
    const section *each = of->sections;
    factors = multiply_section(row, each[0].bit, each[0].count, 4, pairs + FIRST_PAIR(0), factors, stride, states, sums);
    factors = multiply_section(row, each[1].bit, each[1].count, 3, pairs + FIRST_PAIR(1), factors, stride, states, sums);
    factors = multiply_section(row, each[2].bit, each[2].count, 2, pairs + FIRST_PAIR(2), factors, stride, states, sums);
    multiply_section(row, each[3].bit, each[3].count, 1, pairs + FIRST_PAIR(3), factors, stride, states, sums);
    if (states == 1)
        totals[0] = SUM((sums[0] + sums[1]) + (sums[2] + sums[3]));
    else
        _Pragma("GCC unroll 4") for (int state = 0; state < states; state++) totals[state] = SUM(sums[state]);
}

static void multiply_packed(const row_class *of, const uint8_t *row, const pair *pairs, const float *factors,
                            int64_t factor_stride, int64_t num_states, float *totals) {
    if (num_states == 1)
        multiply_row(of, row, pairs, factors, factor_stride, 1, totals);
    else
        multiply_row(of, row, pairs, factors, factor_stride, TILE_STATES, totals);
}
#else
#define multiply_packed NULL
static void unpack_wide(const row_class *of, const uint8_t *row, const int8_t *codebook, const pair *pairs,
                        int8_t *levels, float *wide) {
    (void)pairs;
    UNPACK(of, row, codebook, levels);
    for (int64_t code = 0; code < padded(of->codes); code++) wide[code] = (float)levels[code] + 0.5f;
}
#endif

/* ---- products ---- */

/* Sums over `count` codes for so many rows and states, both known where this is compiled. With one state, a row has
 * several sums, as each addition would wait for the one before. */
INLINE void multiply_tile(const float *levels, int64_t stride, const int rows, const float *factors,
                          int64_t factor_stride, const int states, int64_t count, float *totals) {
    floats sums[8][TILE_STATES] = {{{0}}};
    for (int64_t code = 0; code < count; code += LANES) {
        floats level[8];
        _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++) level[row] = load(levels + row * stride + code);
        _Pragma("GCC unroll 4") for (int state = 0; state < states; state++) {
            floats factor = load(factors + state * factor_stride + code);
            _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++)
                sums[row][state] = FUSED(level[row], factor, sums[row][state]);
        }
    }
    _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++)
        _Pragma("GCC unroll 4") for (int state = 0; state < states; state++)
            totals[row * states + state] = SUM(sums[row][state]);
}

static void multiply(const float *levels, int64_t stride, int64_t rows, const float *factors, int64_t factor_stride,
                     int64_t num_states, int64_t count, float *totals) {
    int64_t row = 0;
    if (num_states == 1) {
        for (; row + 8 <= rows; row += 8)
            multiply_tile(levels + row * stride, stride, 8, factors, factor_stride, 1, count, totals + row);
        for (; row < rows; row++)
            multiply_tile(levels + row * stride, stride, 1, factors, factor_stride, 1, count, totals + row);
        return;
    }
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        multiply_tile(levels + row * stride, stride, TILE_ROWS, factors, factor_stride, TILE_STATES, count,
                      totals + row * TILE_STATES);
    for (; row < rows; row++)
        multiply_tile(levels + row * stride, stride, 1, factors, factor_stride, TILE_STATES, count,
                      totals + row * TILE_STATES);
}

/* ---- the search of the trellis ----
 *
 * A state is 8 bits of the stream. The next state keeps all of them but the oldest symbol; what it keeps is called its
 * past, and there are NUM_STATES >> width pasts. The search goes through the stream symbol by symbol, which is from the
 * last code of a row to the first, and knows of each past the cost of the cheapest way there. At each step every past
 * goes on with every symbol to a state, which costs the squared error of that state's level; of the states with the
 * same new past only the cheapest survives. Which one, its oldest symbol says: this is noted, and followed back from
 * the cheapest end. Rows are searched in step, one in each lane of a vector. */

#define SMALLEST 1e-3f     /* added to each step's costs: they must stay positive, as their bits are compared */
#define UNREACHABLE 1e30f  /* the cost of pasts that the stream cannot start on */
#define DEAREST INT32_MAX

/* One step. Costs are positive floats, whose order is that of their bits; so each carries its oldest symbol in its
 * lowest bits, and one minimum finds cost and symbol. */
INLINE void survive(const float *before, floats target, const float *levels, const int width, float *after,
                    uint8_t *survivors) {
    const int fan = 1 << width, pasts = NUM_STATES >> width, groups = pasts >> width;
    for (int group = 0; group < groups; group++) { /* new pasts that come from the same old ones */
        floats known[16];
        _Pragma("GCC unroll 16") for (int oldest = 0; oldest < fan; oldest++)
            known[oldest] = load(before + (oldest * groups + group) * LANES);
        for (int past = group * fan; past < (group + 1) * fan; past++) {
            ints cheapest = (ints){0} + DEAREST;
            _Pragma("GCC unroll 16") for (int oldest = 0; oldest < fan; oldest++) {
                floats error = target - levels[oldest * pasts + past];
                floats cost = FUSED(error, error, known[oldest]);
                cheapest = SMALLER(cheapest, ((ints)cost & -fan) | oldest);
            }
            store(after + past * LANES, (floats)cheapest + SMALLEST);
            PUT_BYTES(survivors + past * LANES, cheapest & (fan - 1));
        }
    }
}

/* The states from the end of the stream to its begin, of all rows in step: each waits for memory, together they do
 * not. */
INLINE void trace_back(const trellis_search *search, int64_t first, int64_t rows, const float *costs,
                       const uint8_t *survivors, const int width) {
    const int pasts = NUM_STATES >> width;
    int past[LANES] = {0};
    for (int64_t row = 0; row < rows; row++)
        for (int each = 1; each < pasts; each++)
            if (costs[each * LANES + row] < costs[past[row] * LANES + row]) past[row] = each;
    for (int64_t code = 0; code < search->count; code++) {
        const uint8_t *of_step = survivors + (search->count - 1 - code) * pasts * LANES;
        uint8_t *states = search->states + first * search->count + code;
        for (int64_t row = 0; row < rows; row++) {
            int state = of_step[past[row] * LANES + row] * pasts + past[row];
            states[row * search->count] = (uint8_t)state;
            if (search->found) search->found[(first + row) * search->count + code] = search->levels[state];
            past[row] = state >> width;
        }
    }
}

INLINE void search_rows(const trellis_search *search, int64_t first, int64_t rows, void *memory, const int width) {
    const int pasts = NUM_STATES >> width;
    float *costs = memory, *scaled = costs + 2 * pasts * LANES, *target = scaled + NUM_STATES;
    uint8_t *survivors = (uint8_t *)(target + LANES);

    for (int place = 0; place < pasts * LANES; place++) costs[place] = place < LANES ? SMALLEST : UNREACHABLE;
    for (int lane = 0; lane < LANES; lane++) target[lane] = 0;
    for (int64_t step = 0; step < search->count; step++) {
        int64_t code = search->count - 1 - step;
        float root = __builtin_sqrtf(search->importance[code]);
        const float *targets = search->targets + first * search->count + code;
        for (int state = 0; state < NUM_STATES; state++) scaled[state] = search->levels[state] * root;
        for (int64_t row = 0; row < rows; row++) target[row] = targets[row * search->count] * root;
        float *before = costs + (step & 1) * pasts * LANES, *after = costs + (1 - (step & 1)) * pasts * LANES;
        survive(before, load(target), scaled, width, after, survivors + step * pasts * LANES);
    }
    trace_back(search, first, rows, costs + (search->count & 1) * pasts * LANES, survivors, width);
}

static void search_any(const trellis_search *search, int64_t first, int64_t rows, void *memory) {
    if (search->width == 4)
        search_rows(search, first, rows, memory, 4);
    else if (search->width == 3)
        search_rows(search, first, rows, memory, 3);
    else if (search->width == 2)
        search_rows(search, first, rows, memory, 2);
    else
        search_rows(search, first, rows, memory, 1);
}

static size_t search_bytes(int64_t count, int64_t width) {
    size_t pasts = NUM_STATES >> width;
    return (2 * pasts * LANES + NUM_STATES + LANES) * sizeof(float) + (size_t)count * pasts * LANES;
}

const cpu_kernels KERNELS = {NAME, UNPACK, unpack_wide, multiply_packed, multiply, search_any, LANES, search_bytes,
                             NULL};
