/* The product of hidden states with the latents of all rows, straight from packed codes: a language model's head. */
#include "dirembed.h"

#include <math.h>
#include <stdlib.h>

#define PART_ROWS (4 * CLASS_BLOCK)
#define PARTS 4 /* that a thread takes at a time */
#define FEW_ROWS 8 /* with few states so many rows are unpacked before they are multiplied, else a block's */

typedef struct {
    const packed_table *table;
    const cpu_kernels *kernels;
    const pair *pairs;
    const float *factors; /* (classes, padded states, stride) what each code's level is multiplied by */
    const float *offsets; /* (num_states,) or NULL */
    void *out;
    int64_t num_states, padded_states, group, stride, bytes, narrow;
    int straight; /* whether rows are multiplied as they are unpacked */

    /* where products are of whole numbers */
    const fixed_kernels *fixed;
    const uint8_t *books; /* the codebook, 128 higher */
    const float *halves;  /* (classes, padded states) half the sums of the factors */
    int64_t limbs;
    const int8_t *digits; /* each (classes, padded states, ...), as a `fixed_factors` has them */
    const int32_t *starts;
    const float *units;
} product;

/* What the codes of each class are multiplied by, for each state: its number for the code's latent, times the code's
 * step. Behind the codes, between sections, and for states that only fill groups up, it is 0. */
static int make_factors(const product *work, const float *states, float *factors) {
    const packed_table *table = work->table;
    memset(factors, 0, (size_t)(table->num_classes * work->padded_states * work->stride) * sizeof *factors);
    for (int64_t code = 0; code < table->num_codes; code++)
        if (table->latents[code] < 0 || table->latents[code] >= table->rank) return DAMAGED;
    for (int64_t number = 0; number < table->num_classes; number++) {
        const row_class *of = &table->classes[number];
        const int32_t *latents = table->latents + of->first_code;
        const int8_t *steps = table->steps + of->first_code;
        for (int64_t state = 0; state < work->num_states; state++) {
            const float *of_state = states + state * table->rank;
            for (int part = 0; part < NUM_WIDTHS; part++) {
                int64_t first = of->sections[part].code;
                float *mine = factors + (number * work->padded_states + state) * work->stride +
                              (work->straight ? places_before(of, part, work->fixed ? CHUNK : PLACES) : first);
                for (int64_t code = 0; code < of->sections[part].count; code++)
                    mine[code] = of_state[latents[first + code]] * code_step(steps[first + code]);
            }
        }
    }
    return FINE;
}

/* Made at each call anew: it takes microseconds, and what is not kept cannot be out of date. */
static void make_pairs(const int8_t *codebook, pair *to) {
    for (int part = 0; part < NUM_WIDTHS; part++) {
        const int8_t *book = codebook + part * NUM_STATES;
        for (int window = 0; window < NUM_STATES << WIDTH_OF(part); window++, to++) {
            to->levels[0] = (float)book[window & (NUM_STATES - 1)] + 0.5f;
            to->levels[1] = (float)book[window >> WIDTH_OF(part)] + 0.5f;
        }
    }
}

/* A float rounded to the nearest of 16 bits, to even ones between two. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* What a thread has for itself. */
typedef struct {
    uint8_t *scratch; /* of one row, or of CLASS_BLOCK where products are of whole numbers */
    int8_t *levels;   /* of one row, or of LANE_ROWS where products are of whole numbers */
    float *wide;      /* of several rows: 1/2 more, as floats */
    float *lanes;     /* (TILE_STATES, LANE_ROWS, FIXED_LANES) */
    float *totals;    /* of CLASS_BLOCK rows and a group of states */
    float *results;   /* (padded states, PART_ROWS) what is written, when all classes have been multiplied */
} room;

/* Puts the totals of some rows of a class and one group of states where the part has them, which begins at `first`. */
static void collect(const product *work, int64_t state, const room *at, const int64_t *rows, int64_t count,
                    int64_t first) {
    for (int64_t other = 0; other < work->group; other++) {
        float *results = at->results + (state + other) * PART_ROWS;
        for (int64_t each = 0; each < count; each++)
            results[rows[each] - first] = at->totals[each * work->group + other];
    }
}

/* The same of lanes, which are added up, and of half the factors, as levels were 1/2 too low. */
static void collect_lanes(const product *work, int number, int64_t state, const room *at, const int64_t *rows,
                          int64_t count, int64_t first) {
    const float *halves = work->halves + number * work->padded_states + state;
    for (int64_t other = 0; other < work->group; other++) {
        float *results = at->results + (state + other) * PART_ROWS;
        work->fixed->add_lanes(at->lanes + other * LANE_ROWS * FIXED_LANES, count, at->totals);
        for (int64_t each = 0; each < count; each++) results[rows[each] - first] = at->totals[each] + halves[other];
    }
}

/* Asks for the row that the next part has in the place of this one: as classes are read one after the other, the CPU
 * sees no order in it. */
INLINE void prefetch_next(const packed_table *table, int64_t row) {
    if (row + PART_ROWS >= table->num_rows) return;
    for (int64_t byte = 0; byte < table->shared; byte += 64)
        __builtin_prefetch(table->weight + (row + PART_ROWS) * table->shared + byte, 0, 3);
}

static fixed_factors fixed_of(const product *work, int number, int64_t state) {
    int64_t before = number * work->padded_states + state;
    return (fixed_factors){work->limbs, work->stride, work->digits + before * work->limbs * work->stride,
                           work->starts + before * work->limbs * FIXED_LANES, work->units + before * FIXED_LANES};
}

/* The products of some rows of one class in whole numbers, at most CLASS_BLOCK; FINE or DAMAGED. */
static int multiply_fixed(const product *work, int number, int64_t before, const int64_t *rows, int64_t count,
                          int64_t first, const room *at) {
    const packed_table *table = work->table;
    const row_class *of = &table->classes[number];
    fixed_factors fixed = fixed_of(work, number, 0);

    /* All rows are found before the first is read: what has just been copied takes long to read. */
    const uint8_t *addresses[CLASS_BLOCK + 4];
    for (int64_t each = 0; each < count; each++) {
        addresses[each] = address_of(table, rows[each], number, before + each, at->scratch + each * work->bytes);
        if (!addresses[each]) return DAMAGED;
    }
    for (int64_t behind = count; behind < count + 4; behind++) addresses[behind] = addresses[count - 1];

    int64_t together = work->straight && work->group == 1 ? 4 : 1;
    for (int64_t each = 0; each < count; each += together) {
        for (int64_t row = each; row < each + together && row < count; row++) prefetch_next(table, rows[row]);
        if (work->straight)
            work->fixed->multiply_packed(of, addresses + each, work->books, &fixed, work->group,
                                         at->lanes + each * FIXED_LANES);
        else
            work->kernels->unpack(of, addresses[each], (const int8_t *)work->books, at->levels + each * work->stride);
    }
    if (work->straight) collect_lanes(work, number, 0, at, rows, count, first);
    for (int64_t state = 0; state < work->num_states && !work->straight; state += work->group) {
        fixed = fixed_of(work, number, state);
        work->fixed->multiply((const uint8_t *)at->levels, work->stride, count, &fixed, of->codes, at->lanes);
        collect_lanes(work, number, state, at, rows, count, first);
    }
    return FINE;
}

/* The products of some rows of one class, `before` of which come before them in the table; FINE or DAMAGED. */
static int multiply_rows(const product *work, int number, int64_t before, const int64_t *rows, int64_t count,
                         int64_t first, const room *at) {
    const packed_table *table = work->table;
    const row_class *of = &table->classes[number];
    for (int64_t each = 0; each < count; each++) {
        const uint8_t *address = address_of(table, rows[each], number, before + each, at->scratch);
        if (!address) return DAMAGED;
        prefetch_next(table, rows[each]);
        if (work->straight)
            work->kernels->multiply_packed(of, address, work->pairs,
                                           work->factors + number * work->padded_states * work->stride, work->stride,
                                           work->group, at->totals + each * work->group);
        else
            work->kernels->unpack_wide(of, address, table->codebook, work->pairs, at->levels,
                                       at->wide + each * work->stride);
    }
    if (work->straight) collect(work, 0, at, rows, count, first);
    for (int64_t state = 0; state < work->num_states && !work->straight; state += work->group) {
        const float *factors = work->factors + (number * work->padded_states + state) * work->stride;
        work->kernels->multiply(at->wide, work->stride, count, factors, work->stride, work->group, padded(of->codes),
                                at->totals);
        collect(work, state, at, rows, count, first);
    }
    return FINE;
}

/* Writes the products of all rows of a part: scaled, with the offsets, rounded once. */
static void write_out(const product *work, const room *at, int64_t first, int64_t last) {
    const packed_table *table = work->table;
    float scales[PART_ROWS];
    for (int64_t row = first; row < last; row++) scales[row - first] = row_scale(table->row_bytes[row]);
    for (int64_t state = 0; state < work->num_states; state++) {
        const float *results = at->results + state * PART_ROWS;
        float offset = work->offsets ? work->offsets[state] : 0.0f;
        int64_t place = state * table->num_rows + first;
        if (work->narrow)
            for (int64_t row = 0; row < last - first; row++)
                ((uint16_t *)work->out)[place + row] = to_bfloat16(results[row] * scales[row] + offset);
        else
            for (int64_t row = 0; row < last - first; row++)
                ((float *)work->out)[place + row] = results[row] * scales[row] + offset;
    }
}

/* A part begins at a multiple of CLASS_BLOCK. */
static int multiply_all(const product *work, int64_t first, int64_t last, const room *at) {
    const packed_table *table = work->table;
    int64_t most = work->num_states > TILE_STATES || work->fixed ? CLASS_BLOCK : FEW_ROWS, seen = 0;
    for (int number = 0; number < table->num_classes; number++) {
        int64_t rows[PART_ROWS + 1], count = 0, before = 0;
        const int32_t *counts = table->class_counts + number - 1; /* before each block; the first class has none */
        if (number > 0) before = counts[first / CLASS_BLOCK * (table->num_classes - 1)];
        for (int64_t row = first; row < last; row++) {
            if (number > 0 && row % CLASS_BLOCK == 0 &&
                counts[row / CLASS_BLOCK * (table->num_classes - 1)] != before + count)
                return DAMAGED;
            rows[count] = row;
            count += class_of(table->row_bytes[row]) == number;
        }
        for (int64_t done = 0; done < count; done += most) {
            int64_t some = count - done < most ? count - done : most;
            int found = (work->fixed ? multiply_fixed : multiply_rows)(work, number, before + done, rows + done, some,
                                                                       first, at);
            if (found != FINE) return found;
        }
        seen += count;
    }
    if (seen != last - first) return DAMAGED; /* a row names a class that there is not */
    write_out(work, at, first, last);
    return FINE;
}

/* Room in memory that is taken piece by piece, each from a cache line on; the first time, with no memory, to count. */
static void *piece(uint8_t *memory, size_t *taken, size_t bytes) {
    uint8_t *found = memory ? memory + *taken : NULL;
    *taken += (bytes + CHUNK - 1) / CHUNK * CHUNK;
    return found;
}

static size_t furnish(const product *work, uint8_t *memory, room *at) {
    size_t taken = 0, stride = (size_t)work->stride, rows = LANE_ROWS;
    at->scratch = piece(memory, &taken, (size_t)(work->bytes * (work->fixed ? CLASS_BLOCK : 1)));
    at->levels = piece(memory, &taken, (work->fixed && !work->straight ? rows * stride : stride) + CHUNK);
    at->wide = piece(memory, &taken, work->fixed ? 0 : (CLASS_BLOCK * stride + CHUNK) * sizeof(float));
    at->lanes = piece(memory, &taken, work->fixed ? TILE_STATES * LANE_ROWS * FIXED_LANES * sizeof(float) : 0);
    at->totals = piece(memory, &taken, CLASS_BLOCK * TILE_STATES * sizeof(float));
    at->results = piece(memory, &taken, (size_t)work->padded_states * PART_ROWS * sizeof(float));
    return taken;
}

static int multiply_parts(void *context, int64_t first, int64_t last) {
    const product *work = context;
    room at;
    size_t bytes = furnish(work, NULL, &at);
    uint8_t *memory = room_for(bytes);
    if (!memory) return NO_MEMORY;
    furnish(work, memory, &at);
    memset(memory, 0, (size_t)((uint8_t *)at.results - memory)); /* what is read beyond rows must be finite */
    int found = FINE;
    for (int64_t part = first; part < last && found == FINE; part += PART_ROWS)
        found = multiply_all(work, part, part + PART_ROWS < last ? part + PART_ROWS : last, &at);
    free(memory);
    return found;
}

static int all_finite(const float *values, int64_t count) {
    for (int64_t each = 0; each < count; each++)
        if (!isfinite(values[each])) return 0;
    return 1;
}

/* Chooses how to multiply. Whole numbers are faster with few states, and with more where two digits will do, which is
 * 16 bits. Rows must not be too long for them, and what is infinite only floats can say. */
static void choose(product *work, const float *states) {
    const packed_table *table = work->table;
    int few = work->num_states <= TILE_STATES;
    work->fixed = few || work->narrow ? work->kernels->fixed : NULL;
    if (work->fixed && (most_places(table, CHUNK) > MOST_FIXED || !all_finite(states, work->num_states * table->rank)))
        work->fixed = NULL;
    work->straight = few && (work->fixed || work->kernels->multiply_packed);
    work->limbs = few ? 3 : 2;
    work->stride = padded(work->straight ? most_places(table, work->fixed ? CHUNK : PLACES) : most_codes(table));
}

/* What all threads read: the states in the form that they are multiplied in. */
typedef struct {
    float *factors, *halves, *units;
    pair *pairs;
    uint8_t *books;
    int8_t *digits;
    int32_t *starts;
} forms;

static size_t furnish_forms(const product *work, uint8_t *memory, forms *at) {
    size_t taken = 0, states = (size_t)(work->table->num_classes * work->padded_states);
    size_t fixed = work->fixed ? states : 0;
    size_t lanes = (size_t)work->limbs * FIXED_LANES * sizeof(int32_t);
    at->factors = piece(memory, &taken, states * (size_t)work->stride * sizeof(float));
    at->pairs = piece(memory, &taken, work->fixed ? 0 : PAIRS * sizeof(pair));
    at->books = piece(memory, &taken, work->fixed ? NUM_WIDTHS * NUM_STATES : 0);
    at->halves = piece(memory, &taken, fixed * sizeof(float));
    at->units = piece(memory, &taken, fixed * FIXED_LANES * sizeof(float));
    at->starts = piece(memory, &taken, fixed * lanes);
    at->digits = piece(memory, &taken, fixed * (size_t)(work->limbs * work->stride));
    return taken;
}

/* The factors as digits, and the codebook 128 higher. */
static void make_fixed(const product *work, const forms *at) {
    for (int place = 0; place < NUM_WIDTHS * NUM_STATES; place++)
        at->books[place] = (uint8_t)(work->table->codebook[place] + 128);
    for (int64_t each = 0; each < work->table->num_classes * work->padded_states; each++) {
        const float *factors = at->factors + each * work->stride;
        double sum = 0;
        for (int64_t place = 0; place < work->stride; place++) sum += (double)factors[place];
        at->halves[each] = (float)(sum / 2);
        work->fixed->make_digits(factors, work->limbs, work->stride, at->digits + each * work->limbs * work->stride,
                                 at->starts + each * work->limbs * FIXED_LANES, at->units + each * FIXED_LANES);
    }
}

/* Multiplies states with the latents of all rows: (num_states, num_rows), sums in float32 or, of whole numbers, exact.
 *
 * states:  (num_states, rank).
 * offsets: (num_states,) is added to the products of each, or NULL.
 * out:     (num_states, num_rows) float32 or, where `narrow` is not 0, bfloat16.
 * threads: how many may take part.
 */
EXPORTED int dirembed_multiply(const packed_table *table, const float *states, int64_t num_states,
                               const float *offsets, void *out, int64_t narrow, int64_t threads) {
    int64_t group = num_states > 1 ? TILE_STATES : 1;
    product work = {.table = table,
                    .kernels = chosen_kernels(),
                    .offsets = offsets,
                    .out = out,
                    .num_states = num_states,
                    .padded_states = (num_states + group - 1) / group * group,
                    .group = group,
                    .bytes = most_bytes(table) + READABLE,
                    .narrow = narrow};
    choose(&work, states);
    forms at;
    size_t bytes = furnish_forms(&work, NULL, &at);
    uint8_t *memory = room_for(bytes);
    if (!memory) return NO_MEMORY;
    furnish_forms(&work, memory, &at);
    work.factors = at.factors, work.pairs = at.pairs, work.books = at.books, work.halves = at.halves;
    work.digits = at.digits, work.starts = at.starts, work.units = at.units;

    int found = make_factors(&work, states, at.factors);
    if (found == FINE) {
        if (work.fixed)
            make_fixed(&work, &at);
        else
            make_pairs(table->codebook, at.pairs);
        found = share_out(multiply_parts, &work, table->num_rows, PARTS * PART_ROWS, threads);
    }
    free(memory);
    return found;
}
