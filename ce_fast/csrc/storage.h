/* Elements of any storage dtype to and from tiles of REAL, included once for each REAL.
 * The 16-bit conversions are integer arithmetic, which every compiler vectorizes and no FTZ/DAZ mode disturbs.
 */
#ifndef CE_STORAGE_COMMON
#define CE_STORAGE_COMMON
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif
#include "ce_fast.h"

CE_INLINE float ce_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
CE_INLINE uint32_t ce_as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

CE_INLINE float ce_from_bfloat16(uint16_t h) { return ce_as_float((uint32_t)h << 16); }

CE_INLINE float ce_from_float16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h & 0x7c00u;
    uint32_t u = ((uint32_t)(h & 0x7fffu) << 13) + (112u << 23);
    uint32_t subnormal = ce_as_bits(ce_as_float(u + (1u << 23)) - ce_as_float(113u << 23));
    u = exponent == 0x7c00u ? u + (112u << 23) : u; /* inf, NaN */
    u = exponent == 0 ? subnormal : u;
    return ce_as_float(u | sign);
}

/* A double to float, towards the one whose last bit is 1 unless it is exact: what is rounded to 16 bits after that is
   as if it had been rounded once. */
CE_INLINE float ce_to_odd(double v)
{
    float f = (float)v;
    double back = (double)f;
    uint32_t u = ce_as_bits(f), down = (v < 0 ? back < v : back > v) ? 1 : 0; /* away from zero: step back */
    u = back == v || v != v ? u : (u - down) | 1;
    return ce_as_float(u);
}

/* n bytes past the caches: lines that are written whole are not read before. A gradient of [100000, 100] float64 takes
   7.4 ms so in place of 12.0; of long rows, which have little to compute between, 25 ms in place of 19. ce_flush must
   follow before another thread reads them. */
CE_INLINE void ce_stream(char *to, const char *from, int64_t n)
{
#ifdef __SSE2__
    int64_t i = (int64_t)(-(uintptr_t)to & 15);
    i = i < n ? i : n;
    memcpy(to, from, (size_t)i);
#ifdef __AVX512F__ /* a line at a time, but for those shared with what comes before and after */
    for (; i + 64 <= n && ((uintptr_t)(to + i) & 63); i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    for (; i + 64 <= n; i += 64)
        _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512(from + i));
#endif
    for (; i + 16 <= n; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    memcpy(to + i, from + i, (size_t)(n - i));
#else
    memcpy(to, from, (size_t)n);
#endif
}

/* what is still to be streamed */
typedef struct {
    char *to;
    const char *from;
    int64_t left; /* bytes */
} ce_waiting;

CE_INLINE void ce_stream_bytes(ce_waiting *w, int64_t n)
{
    ce_stream(w->to, w->from, n);
    w->to += n;
    w->from += n;
    w->left -= n;
}

/* up to where a line begins */
CE_INLINE void ce_stream_head(ce_waiting *w)
{
    int64_t head = (int64_t)(-(uintptr_t)w->to & 63);
    ce_stream_bytes(w, head < w->left ? head : w->left);
}

/* a line, if a whole one is left; after the head */
CE_INLINE void ce_stream_line(ce_waiting *w)
{
    if (w->left < 64)
        return;
#ifdef __AVX512F__
    _mm512_stream_si512((void *)w->to, _mm512_loadu_si512(w->from));
#elif defined(__SSE2__)
    for (int i = 0; i < 64; i += 16)
        _mm_stream_si128((__m128i *)(w->to + i), _mm_loadu_si128((const __m128i *)(w->from + i)));
#else
    memcpy(w->to, w->from, 64);
#endif
    w->to += 64;
    w->from += 64;
    w->left -= 64;
}

CE_INLINE void ce_stream_rest(ce_waiting *w)
{
    if (w->left)
        ce_stream_bytes(w, w->left);
}

CE_INLINE void ce_flush(void)
{
#ifdef __SSE2__
    _mm_sfence();
#endif
}

/* to nearest, ties to even; NaN stays NaN */
CE_INLINE uint16_t ce_to_bfloat16(float f)
{
    uint32_t u = ce_as_bits(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

CE_INLINE uint16_t ce_to_float16(float f)
{
    uint32_t u = ce_as_bits(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    /* adding 0.5 puts the unit of float16's subnormals, 2^-24, in the last place of the sum */
    uint32_t subnormal = ce_as_bits(ce_as_float(u) + 0.5f) - ce_as_bits(0.5f);
    uint32_t big = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t h = u < (113u << 23) ? subnormal : normal;
    h = u >= (143u << 23) ? big : h;
    return (uint16_t)(h | sign);
}
#endif

#define CE_READ(TYPE, CONVERT, STRIDE)                       \
    for (int64_t k = 0; k < n; k++) {                        \
        TYPE v;                                              \
        memcpy(&v, src + k * (int64_t)(STRIDE), sizeof v);   \
        dst[k] = (REAL)CONVERT(v);                           \
    }
#define CE_WRITE(TYPE, CONVERT, STRIDE)                      \
    for (int64_t k = 0; k < n; k++) {                        \
        TYPE v = CONVERT(src[k]);                            \
        memcpy(dst + k * (int64_t)(STRIDE), &v, sizeof v);   \
    }
/* the same loop with the stride known, so that it vectorizes */
#define CE_EACH(LOOP, TYPE, CONVERT)          \
    if (stride == sizeof(TYPE)) {             \
        LOOP(TYPE, CONVERT, sizeof(TYPE))     \
    } else {                                  \
        LOOP(TYPE, CONVERT, stride)           \
    }                                         \
    return;

static void NAME(load)(const char *restrict src, int64_t stride, ce_dtype dtype, int64_t n, REAL *restrict dst)
{
    switch (dtype) {
    case CE_FLOAT64: CE_EACH(CE_READ, double, )
    case CE_FLOAT32: CE_EACH(CE_READ, float, )
    case CE_FLOAT16: CE_EACH(CE_READ, uint16_t, ce_from_float16)
    case CE_BFLOAT16: CE_EACH(CE_READ, uint16_t, ce_from_bfloat16)
    case CE_INT8: CE_EACH(CE_READ, int8_t, )
    case CE_UINT8: CE_EACH(CE_READ, uint8_t, )
    case CE_INT16: CE_EACH(CE_READ, int16_t, )
    case CE_UINT16: CE_EACH(CE_READ, uint16_t, )
    case CE_INT32: CE_EACH(CE_READ, int32_t, )
    case CE_UINT32: CE_EACH(CE_READ, uint32_t, )
    case CE_INT64: CE_EACH(CE_READ, int64_t, )
    case CE_UINT64: CE_EACH(CE_READ, uint64_t, )
    }
}

#if REAL_IS_FLOAT
#define CE_TO_FLOAT16 ce_to_float16
#define CE_TO_BFLOAT16 ce_to_bfloat16
#else
#define CE_TO_FLOAT16(v) ce_to_float16(ce_to_odd(v))
#define CE_TO_BFLOAT16(v) ce_to_bfloat16(ce_to_odd(v))
#endif

static void NAME(store)(char *restrict dst, int64_t stride, ce_dtype dtype, int64_t n, const REAL *restrict src)
{
    switch (dtype) {
    case CE_FLOAT64: CE_EACH(CE_WRITE, double, )
    case CE_FLOAT32: CE_EACH(CE_WRITE, float, )
    case CE_FLOAT16: CE_EACH(CE_WRITE, uint16_t, CE_TO_FLOAT16)
    case CE_BFLOAT16: CE_EACH(CE_WRITE, uint16_t, CE_TO_BFLOAT16)
    default: return; /* no result has an integer dtype */
    }
}

#undef CE_TO_FLOAT16
#undef CE_TO_BFLOAT16
#undef CE_READ
#undef CE_WRITE
#undef CE_EACH
