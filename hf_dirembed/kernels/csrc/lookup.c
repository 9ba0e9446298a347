/* Reads the latents of rows from their packed codes. */
#include "dirembed.h"

#include <math.h>
#include <stdlib.h>

#define MOST_ROWS 64 /* in a part of the work */

typedef struct {
    const packed_table *table;
    const float *factors, *powers; /* of all codes, and of all latents or NULL */
    const int64_t *ids;
    float *out;
    int64_t bytes, codes; /* the most of any class */
} reading;

/* What each code's level is multiplied by; 0 where there is a latent that the table has not. */
static int make_factors(const packed_table *table, float *factors) {
    int fine = 1;
    for (int64_t code = 0; code < table->num_codes; code++) {
        factors[code] = code_step(table->steps[code]);
        fine &= table->latents[code] >= 0 && table->latents[code] < table->rank;
    }
    return fine;
}

/* Every product and sum is rounded as torch's plain operations round it, in their order: nothing may be fused here. */
static void read_row(const reading *work, const row_class *of, const uint8_t *address, float scale, int8_t *levels,
                     float *values, float *out) {
    const packed_table *table = work->table;
    const float *factors = work->factors + of->first_code;
    const int32_t *latents = table->latents + of->first_code;

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
    size_t scratch_bytes = (size_t)padded(work->bytes + READABLE), level_bytes = (size_t)padded(work->codes) + CHUNK;
    uint8_t *scratch = room_for(scratch_bytes + level_bytes * (1 + sizeof(float)));
    if (!scratch) return NO_MEMORY;
    int8_t *levels = (int8_t *)scratch + scratch_bytes;
    float *values = (float *)(levels + level_bytes);
    memset(scratch, 0, scratch_bytes);

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
        const uint8_t *address = address_of(table, row, number, slot, scratch);
        if (!address)
            found = DAMAGED;
        else
            read_row(work, &table->classes[number], address, row_scale(row_byte), levels, values,
                     work->out + place * table->rank);
    }
    free(scratch);
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
    size_t codes = (size_t)padded(table->num_codes), latents = exponents ? (size_t)table->rank : 0;
    float *factors = room_for((codes + latents) * sizeof(float)), *powers = factors + codes;
    if (!factors) return NO_MEMORY;
    for (size_t latent = 0; latent < latents; latent++) powers[latent] = ldexpf(1.0f, exponents[latent]);

    int found = DAMAGED;
    if (make_factors(table, factors)) {
        reading work = {table, factors, exponents ? powers : NULL, ids, out, most_bytes(table), most_codes(table)};
        found = share_out(read_part, &work, count, threads > 1 ? MOST_ROWS : count > 0 ? count : 1, threads);
    }
    free(factors);
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
