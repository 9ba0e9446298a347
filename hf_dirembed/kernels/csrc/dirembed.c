/* Which functions run on this CPU, and how work is shared out among threads. */
#include "dirembed.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#ifndef DIREMBED_SOURCES
#define DIREMBED_SOURCES 0 /* a checksum of the files that this was built from; setup.py says which */
#endif
#define MOST_THREADS 256

EXPORTED int64_t dirembed_interface(void) { return DIREMBED_INTERFACE; }
EXPORTED int64_t dirembed_table_bytes(void) { return (int64_t)sizeof(packed_table); }
EXPORTED int64_t dirembed_sources(void) { return DIREMBED_SOURCES; }

/* The kernels that this CPU can run, the best first; NULL behind the last. */
static const cpu_kernels *const *runnable(void) {
    static const cpu_kernels *found[5];
    static cpu_kernels with_vnni;
    static _Atomic int done;
    if (!atomic_load(&done)) { /* two threads at once write the same */
        int number = 0;
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vbmi")) {
            if (__builtin_cpu_supports("avx512vnni")) {
                with_vnni = kernels_avx512;
                with_vnni.name = "avx512vnni";
                with_vnni.fixed = &fixed_avx512;
                found[number++] = &with_vnni;
            }
            found[number++] = &kernels_avx512;
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[number++] = &kernels_avx2;
#endif
        found[number] = &kernels_plain;
        atomic_store(&done, 1);
    }
    return found;
}

static _Atomic(const cpu_kernels *) chosen;

const cpu_kernels *chosen_kernels(void) {
    const cpu_kernels *kernels = atomic_load(&chosen);
    return kernels ? kernels : runnable()[0];
}

/* The name of the kernels of a number, 0 for the best that the CPU can run; NULL where there are no more. */
EXPORTED const char *dirembed_kernels_name(int64_t number) {
    const cpu_kernels *const *each = runnable();
    for (; number > 0 && *each; number--) each++;
    return *each ? (*each)->name : NULL;
}

/* Makes the process run other kernels than the best, by their number. */
EXPORTED void dirembed_choose(int64_t number) { atomic_store(&chosen, runnable()[number]); }

void *room_for(size_t bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, bytes ? bytes : 64) ? NULL : memory;
}

typedef struct {
    part_work work;
    void *context;
    int64_t length, step;
    _Atomic int64_t next;
    _Atomic int worst;
} shared_work;

/* Takes one part after the other, until there are none: who is held up leaves more to the others. */
static void *take_parts(void *given) {
    shared_work *shared = given;
    for (;;) {
        int64_t first = atomic_fetch_add(&shared->next, shared->step);
        if (first >= shared->length) return NULL;
        int64_t last = first + shared->step < shared->length ? first + shared->step : shared->length;
        int found = shared->work(shared->context, first, last), worst = atomic_load(&shared->worst);
        while (found > worst && !atomic_compare_exchange_weak(&shared->worst, &worst, found)) {
        }
    }
}

static void take_parts_of_pool(void *given) { take_parts(given); }

typedef void (*pool)(void (*work)(void *), void *context, unsigned threads, unsigned flags);
static _Atomic(pool) chosen_pool;

/* Makes the process share work out among the threads of OpenMP, by its `GOMP_parallel`; with NULL, no longer. Torch's
 * threads are these: they wait busily for the next operation, for some milliseconds, and others would wait for them. */
EXPORTED void dirembed_share_by(pool parallel) { atomic_store(&chosen_pool, parallel); }

/* Without a pool, threads are made for one call and gone when it ends: a fork finds none missing. Where no more can be
 * made, those that there are do the work. */
int share_out(part_work work, void *context, int64_t length, int64_t step, int64_t threads) {
    shared_work shared = {.work = work, .context = context, .length = length, .step = step};
    pool parallel = atomic_load(&chosen_pool);
    if (parallel && threads > 1 && length > step) {
        parallel(take_parts_of_pool, &shared, (unsigned)threads, 0); /* of all sizes but this teams are made anew */
        return atomic_load(&shared.worst);
    }

    pthread_t others[MOST_THREADS];
    int64_t parts = (length + step - 1) / step, made = 0;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > parts) threads = parts;
    while (made < threads - 1 && pthread_create(&others[made], NULL, take_parts, &shared) == 0) made++;
    take_parts(&shared);
    while (made > 0) pthread_join(others[--made], NULL);
    return atomic_load(&shared.worst);
}
