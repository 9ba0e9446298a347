/* The product of hidden states with the latents of all rows, straight from packed codes: a language model's head. */
#include "dirembed.h"

#include <stdlib.h>

#define BLOCKS_OF_PART 4
#define FEW_ROWS 8 /* with few states so many rows are unpacked before they are multiplied, else a block's */

typedef struct {
    const packed_table *table;
    const cpu_kernels *kernels;
    const pair *pairs;
    const float *factors; /* (classes, padded states, stride) what each code's level is multiplied by */
    const float *offsets; /* (num_states,) or NULL */
    void *out;
    int64_t num_states, padded_states, group, stride, bytes, narrow;
    int straight; /* whether rows are multiplied one by one, from the table of pairs */
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
                              (work->straight ? places_before(of, part) : first);
                for (int64_t code = 0; code < of->sections[part].count; code++)
                    mine[code] = of_state[latents[first + code]] * code_step(steps[first + code]);
            }
        }
    }
    return FINE;
}

/* Made at each call anew: it takes microseconds, and what is not kept cannot be out of date. */
static const pair *make_pairs(const int8_t *codebook, pair *pairs) {
    pair *to = pairs;
    for (int part = 0; part < NUM_WIDTHS; part++) {
        const int8_t *book = codebook + part * NUM_STATES;
        for (int window = 0; window < NUM_STATES << WIDTH_OF(part); window++, to++) {
            to->levels[0] = (float)book[window & (NUM_STATES - 1)] + 0.5f;
            to->levels[1] = (float)book[window >> WIDTH_OF(part)] + 0.5f;
        }
    }
    return pairs;
}

/* A float rounded to the nearest of 16 bits, to even ones between two. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* Writes the products of some rows of a class with one group of states. */
static void put(const product *work, int64_t state, const float *totals, const int64_t *rows, int64_t count) {
    const packed_table *table = work->table;
    for (int64_t other = state; other < state + work->group && other < work->num_states; other++) {
        float offset = work->offsets ? work->offsets[other] : 0.0f;
        for (int64_t each = 0; each < count; each++) {
            float scale = row_scale(table->row_bytes[rows[each]]);
            float value = totals[each * work->group + other - state] * scale + offset;
            if (work->narrow)
                ((uint16_t *)work->out)[other * table->num_rows + rows[each]] = to_bfloat16(value);
            else
                ((float *)work->out)[other * table->num_rows + rows[each]] = value;
        }
    }
}

typedef struct {
    uint8_t *scratch;
    int8_t *levels; /* of one row */
    float *wide;    /* of several rows: 1/2 more, as floats */
    float *totals;
} room;

/* The products of some rows of one class, `before` of which come before them in the table; FINE or DAMAGED. */
static int multiply_rows(const product *work, int number, int64_t before, const int64_t *rows, int64_t count,
                         room *at) {
    const packed_table *table = work->table;
    const row_class *of = &table->classes[number];
    for (int64_t each = 0; each < count; each++) {
        const uint8_t *address = address_of(table, rows[each], number, before + each, at->scratch);
        if (!address) return DAMAGED;
        if (work->straight)
            work->kernels->multiply_packed(of, address, work->pairs, work->factors + number * work->padded_states * work->stride,
                                           work->stride, work->group, at->totals + each * work->group);
        else
            work->kernels->unpack_wide(of, address, table->codebook, work->pairs, at->levels,
                                   at->wide + each * work->stride);
    }
    if (work->straight) put(work, 0, at->totals, rows, count);
    for (int64_t state = 0; state < work->num_states && !work->straight; state += work->group) {
        const float *factors = work->factors + (number * work->padded_states + state) * work->stride;
        work->kernels->multiply(at->wide, work->stride, count, factors, work->stride, work->group, padded(of->codes),
                                at->totals);
        put(work, state, at->totals, rows, count);
    }
    return FINE;
}

static int multiply_block(const product *work, int64_t block, int64_t last, room *at) {
    const packed_table *table = work->table;
    int64_t most = work->num_states > TILE_STATES ? CLASS_BLOCK : FEW_ROWS, seen = 0;
    for (int number = 0; number < table->num_classes; number++) {
        int64_t rows[CLASS_BLOCK], count = 0, before = 0;
        if (number > 0) before = table->class_counts[block / CLASS_BLOCK * (table->num_classes - 1) + number - 1];
        for (int64_t row = block; row < last; row++) {
            rows[count] = row;
            count += class_of(table->row_bytes[row]) == number;
        }
        for (int64_t done = 0; done < count; done += most) {
            int64_t some = count - done < most ? count - done : most;
            if (multiply_rows(work, number, before + done, rows + done, some, at) != FINE) return DAMAGED;
        }
        seen += count;
    }
    return seen == last - block ? FINE : DAMAGED; /* a row names a class that there is not */
}

static int multiply_part(void *context, int64_t first, int64_t last) {
    const product *work = context;
    size_t scratch = (size_t)padded(work->bytes + READABLE), levels = (size_t)work->stride + CHUNK;
    size_t wide = (size_t)(CLASS_BLOCK * work->stride + CHUNK) * sizeof(float);
    uint8_t *memory = room_for(scratch + levels + wide + CLASS_BLOCK * TILE_STATES * sizeof(float));
    if (!memory) return NO_MEMORY;
    memset(memory, 0, scratch + levels);
    float *at_wide = (float *)(memory + scratch + levels);
    room at = {memory, (int8_t *)memory + scratch, at_wide, at_wide + CLASS_BLOCK * work->stride + CHUNK};

    int found = FINE;
    for (int64_t block = first; block < last && found == FINE; block += CLASS_BLOCK)
        found = multiply_block(work, block, block + CLASS_BLOCK < last ? block + CLASS_BLOCK : last, &at);
    free(memory);
    return found;
}

/* Multiplies states with the latents of all rows: (num_states, num_rows), sums in float32.
 *
 * states:  (num_states, rank).
 * offsets: (num_states,) is added to the products of each, or NULL.
 * out:     (num_states, num_rows) float32 or, where `narrow` is not 0, bfloat16.
 * threads: how many may take part.
 */
EXPORTED int dirembed_multiply(const packed_table *table, const float *states, int64_t num_states,
                               const float *offsets, void *out, int64_t narrow, int64_t threads) {
    int64_t group = num_states > 1 ? TILE_STATES : 1, padded_states = (num_states + group - 1) / group * group;
    product work = {.table = table,
                    .kernels = chosen_kernels(),
                    .offsets = offsets,
                    .out = out,
                    .num_states = num_states,
                    .padded_states = padded_states,
                    .group = group,
                    .bytes = most_bytes(table),
                    .narrow = narrow,
                    .straight = num_states <= TILE_STATES && chosen_kernels()->multiply_packed != NULL};
    for (int number = 0; number < table->num_classes; number++) {
        const row_class *of = &table->classes[number];
        int64_t places = padded(work.straight ? places_before(of, NUM_WIDTHS) : of->codes);
        if (places > work.stride) work.stride = places;
    }
    size_t pairs = PAIRS * sizeof(pair);
    float *factors = room_for((size_t)(table->num_classes * padded_states * work.stride) * sizeof *factors + pairs);
    if (!factors) return NO_MEMORY;
    work.factors = factors;
    work.pairs = make_pairs(table->codebook, (pair *)(factors + table->num_classes * padded_states * work.stride));

    int found = make_factors(&work, states, factors);
    if (found == FINE)
        found = share_out(multiply_part, &work, table->num_rows, BLOCKS_OF_PART * CLASS_BLOCK, threads);
    free(factors);
    return found;
}
