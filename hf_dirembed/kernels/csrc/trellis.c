/* Finds the cheapest paths through the trellis: Viterbi's algorithm (1967), for the compressor. */
#include "dirembed.h"

#include <stdlib.h>

#define GROUPS_OF_PART 4 /* as many rows as vectors have lanes, each */

typedef struct {
    const trellis_search *search;
    const cpu_kernels *kernels;
} searching;

static int search_part(void *context, int64_t first, int64_t last) {
    const searching *work = context;
    void *memory = room_for(work->kernels->search_bytes(work->search->count, work->search->width));
    if (!memory) return NO_MEMORY;
    for (int64_t row = first; row < last; row += work->kernels->lanes) {
        int64_t rows = last - row < work->kernels->lanes ? last - row : work->kernels->lanes;
        work->kernels->search(work->search, row, rows, memory);
    }
    free(memory);
    return FINE;
}

/* The states of the cheapest path of each row, that whose levels have the least weighted squared error.
 *
 * targets:    (rows, count) what the levels shall approximate.
 * importance: (count,) what the squared error of each counts, up to 1.
 * levels:     (NUM_STATES,) of the trellis's states.
 * width:      bits of a symbol: 4, 3, 2 or 1.
 * states:     (rows, count) is filled in. A state has its own symbol in its lowest bits, and those behind it above.
 * found:      (rows, count) is filled in with the levels of the states, where it is not NULL.
 */
EXPORTED int dirembed_search(const float *targets, const float *importance, const float *levels, int64_t rows,
                             int64_t count, int64_t width, uint8_t *states, float *found, int64_t threads) {
    trellis_search search = {targets, importance, levels, rows, count, width, states, found};
    searching work = {&search, chosen_kernels()};
    if (rows == 0 || count == 0) return FINE;
    return share_out(search_part, &work, rows, GROUPS_OF_PART * work.kernels->lanes, threads);
}
