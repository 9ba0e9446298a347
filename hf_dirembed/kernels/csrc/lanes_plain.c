/* The kernels for any CPU: vectors of four floats are within the base of x86-64, and of 64-bit ARM. */
#include "dirembed.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#define FUSED(a, b, c) ((floats)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif

#define KERNELS kernels_plain
#define NAME "plain"
#define LANES 4
#define TILE_ROWS 2
#define SMALLER(a, b) smaller(a, b)
#define SUM(a) (((a)[0] + (a)[1]) + ((a)[2] + (a)[3]))
#define PUT_BYTES(p, a) put_bytes(p, a)

typedef int32_t four_ints __attribute__((vector_size(16)));

INLINE four_ints smaller(four_ints one, four_ints other) {
    four_ints is_less = one < other;
    return (one & is_less) | (other & ~is_less);
}

INLINE void put_bytes(uint8_t *to, four_ints value) {
    for (int lane = 0; lane < 4; lane++) to[lane] = (uint8_t)value[lane];
}

#include "lanes.h"
