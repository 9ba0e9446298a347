/* Reads the latents of rows from their packed codes. */
#include "dirembed.h"

#include <math.h>
#include <stdlib.h>

#define PART_ROWS 256

typedef struct {
    const packed_table *table;
    const float *powers; /* of all latents, or NULL */
    const int64_t *ids;
    float *out;
    int64_t bytes, codes; /* the most of any class */
} reading;

/* What a thread has for itself: a row's bytes, levels and values, and of each class that it met what the levels are
 * multiplied by. */
typedef struct {
    uint8_t *scratch;
    int8_t *levels;
    float *values, *factors; /* of all codes of all classes */
    int met[MAX_CLASSES];
} room;

/* The factors of a class; 0 where one of its codes adds to a latent that the table has not. */
static int meet(const packed_table *table, int number, room *at) {
    const row_class *of = &table->classes[number];
    int fine = 1;
    for (int64_t code = of->first_code; code < of->first_code + of->codes; code++) {
        at->factors[code] = code_step(table->steps[code]);
        fine &= table->latents[code] >= 0 && table->latents[code] < table->rank;
    }
    return at->met[number] = fine;
}

/* Every product and sum is rounded as torch's plain operations round it, in their order: nothing may be fused here. */
static void read_row(const reading *work, const row_class *of, const uint8_t *address, float scale, const room *at,
                     float *out) {
    const packed_table *table = work->table;
    const float *factors = at->factors + of->first_code;
    const int32_t *latents = table->latents + of->first_code;
    int8_t *levels = at->levels;
    float *values = at->values;

    chosen_kernels()->unpack(of, address, table->codebook, levels);
    for (int64_t code = 0; code < of->codes; code++) values[code] = ((float)levels[code] + 0.5f) * factors[code];

    memset(out, 0, (size_t)table->rank * sizeof *out);
    for (int64_t code = 0; code < of->codes; code++) out[latents[code]] += values[code];
    for (int64_t latent = 0; latent < table->rank; latent++) out[latent] *= scale;
    if (work->powers)
        for (int64_t latent = 0; latent < table->rank; latent++) out[latent] *= work->powers[latent];
}

static int read_part(void *context, int64_t first, int64_t last) {
    const reading *work = context;
    const packed_table *table = work->table;
    size_t bytes = (size_t)padded(work->bytes + READABLE), codes = (size_t)padded(work->codes) + CHUNK;
    uint8_t *memory = room_for(bytes + codes * (1 + sizeof(float)) + (size_t)table->num_codes * sizeof(float));
    if (!memory) return NO_MEMORY;
    float *values = (float *)(memory + bytes + codes);
    room at = {memory, (int8_t *)memory + bytes, values, values + codes, {0}};
    memset(memory, 0, bytes);

    int found = FINE;
    for (int64_t place = first; place < last && found == FINE; place++) {
        int64_t row = work->ids[place];
        if (row < 0 || row >= table->num_rows) {
            found = NO_SUCH_ID;
            break;
        }
        uint8_t row_byte = table->row_bytes[row];
        int number = class_of(row_byte);
        int64_t slot = number > 0 && number < table->num_classes ? slot_of(table, row, number) : 0;
        const uint8_t *address = address_of(table, row, number, slot, at.scratch);
        if (!address || !(at.met[number] || meet(table, number, &at)))
            found = DAMAGED;
        else
            read_row(work, &table->classes[number], address, row_scale(row_byte), &at, work->out + place * table->rank);
    }
    free(memory);
    return found;
}

/* Reads the latents of rows, (count, rank).
 *
 * table:     the codes; `exponents`, (rank,) or NULL, are of powers of two that latents are multiplied by, too.
 * ids:       (count,) the numbers of the rows.
 * threads:   how many may take part.
 */
EXPORTED int dirembed_read(const packed_table *table, const int8_t *exponents, const int64_t *ids, int64_t count,
                           float *out, int64_t threads) {
    float *powers = exponents ? room_for((size_t)table->rank * sizeof *powers) : NULL;
    if (exponents && !powers) return NO_MEMORY;
    for (int64_t latent = 0; exponents && latent < table->rank; latent++) powers[latent] = ldexpf(1, exponents[latent]);

    reading work = {table, powers, ids, out, most_bytes(table), most_codes(table)};
    int found = share_out(read_part, &work, count, PART_ROWS, threads);
    free(powers);
    return found;
}

/* Puts rows that are kept as they are in the place of what the codes stand for.
 *
 * out:       (count, row_bytes) bytes, the rows of the table that `ids` names.
 * rows:      (num_rows,) ascending, the numbers of the rows that are kept; (num_rows, row_bytes) `kept` has them.
 * zero_row:  the number of a row that is all zeros; -1 for none.
 */
EXPORTED void dirembed_patch(uint8_t *out, const int64_t *ids, int64_t count, int64_t row_bytes, const int32_t *rows,
                             const uint8_t *kept, int64_t num_rows, int64_t zero_row) {
    for (int64_t place = 0; place < count; place++) {
        int64_t id = ids[place], low = 0, high = num_rows;
        while (low < high) { /* the first that is not below */
            int64_t middle = low + (high - low) / 2;
            if (rows[middle] < id)
                low = middle + 1;
            else
                high = middle;
        }
        if (low < num_rows && rows[low] == id)
            memcpy(out + place * row_bytes, kept + low * row_bytes, (size_t)row_bytes);
        if (id == zero_row) memset(out + place * row_bytes, 0, (size_t)row_bytes);
    }
}
