/* What the codec's layers do to vectors of floats: the widths that suit the processor, Snake, GELU, and bf16.
 *
 * Shapes: C channels. */
#ifndef CODEC_VECTORS_H
#define CODEC_VECTORS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* The registers hold a tile of sums, TILE_ROWS x TILE_VECTORS of LANES floats, beside what is multiplied. */
enum { TILE_VECTORS = 3 };
#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8 };
#elif defined(__AVX2__)
enum { LANES = 8, TILE_ROWS = 4 };
#else
enum { LANES = 4, TILE_ROWS = 4 };
#endif
enum { COLUMNS = TILE_VECTORS * LANES };

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

struct snake { const float *frequency, *height; }; /* (C,) each */

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE Floats load(const float *from) { Floats x; memcpy(&x, from, sizeof x); return x; }
INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }
INLINE Floats spread(float x) { return x - (Floats){0}; }
INLINE Floats pick(Ints where, Floats yes, Floats no) { return (Floats)(((Ints)yes & where) | ((Ints)no & ~where)); }

INLINE float total(Floats x) {
    float out[LANES];
    memcpy(out, &x, sizeof out);
    UNROLL for (int step = LANES / 2; step; step /= 2) UNROLL for (int i = 0; i < step; i++) out[i] += out[i + step];
    return out[0];
}

/* Of n floats each, n a multiple of LANES. */
INLINE float dot(const float *a, const float *b, int64_t n) {
    Floats sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
    return total(sum);
}

/* To the nearest bf16, as bf16. Only called where the processor has bf16. */
INLINE void store_narrow(uint16_t *to, Floats x) {
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &narrow, sizeof narrow);
#else
    (void)to, (void)x;
#endif
}

static const float ROUNDER = 12582912.0f;        /* 1.5 * 2^23: added, it leaves the nearest integer */
static const float PER_PI = 0.318309886183790671f;
static const float PI_PARTS[] = {3.140625f, 9.67502593994140625e-4f, 1.509957990978376432e-7f}; /* pi, cut for exact products */
static const float SINE[] = {-0.16666661202907562f, 0.008333087898790836f, -0.00019811108359135687f, 2.60892420556047e-06f};
/* SINE: sin z = z + z^3 (s0 + s1 z^2 + ...) up to pi / 2, least largest relative error: 5e-9. */
static const float LIMIT = 2097152.0f; /* 2^21: from there on a float says little of its place in a period; no wave then */

/* x + height sin(x frequency)^2; the square is within 1.5e-7. */
INLINE Floats snake(Floats x, Floats frequency, Floats height) {
    Floats angle = x * frequency;
    Floats turns = (angle * PER_PI + ROUNDER) - ROUNDER; /* a half turn changes the sine's sign alone */
    Floats rest = angle - turns * PI_PARTS[0] - turns * PI_PARTS[1] - turns * PI_PARTS[2];
    Ints inside = (angle < LIMIT) & (angle > -LIMIT);
    rest = (Floats)((Ints)rest & inside);
    Floats square = rest * rest;
    Floats sine = SINE[0] + square * (SINE[1] + square * (SINE[2] + square * SINE[3]));
    sine = rest + rest * (square * sine);
    return x + height * (sine * sine);
}

/* e^x for x from -87 to 88, which others become; NaN stays. The polynomial is Cephes' expf (Moshier). */
INLINE Floats exponential(Floats x) {
    x = pick(x < -87.0f, spread(-87.0f), pick(x > 88.0f, spread(88.0f), x));
    Floats shifted = x * 1.44269504f + ROUNDER, power = shifted - ROUNDER;
    Floats r = x - power * 0.693359375f + power * 2.12194440e-4f;
    Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1;
    Ints exponent = (Ints)shifted - (Ints)spread(ROUNDER) + 127;
    return sum * (Floats)((Bits)exponent << 23);
}

/* e^(z^2) erfc(z) / t by t = 1 / (1 + 0.4 z), for z from 0 to 14: a least squares fit of relative error 2e-8. */
static const float TAIL[] = {2.256908796e-01f, 2.252773759e-01f,  2.121135830e-01f, 1.431877188e-01f,  2.319599679e-01f,
                             -2.080247562e-01f, 4.540156611e-01f, -4.277477003e-01f, 1.674387013e-01f, -2.391141667e-02f};

/* x times the normal distribution's share below x. */
INLINE Floats gelu(Floats x) {
    Floats z = pick(x < 0, -x, x) * 0.70710678118654752f, t = 1 / (1 + 0.4f * z), sum = spread(TAIL[9]);
    UNROLL for (int i = 8; i >= 0; i--) sum = sum * t + TAIL[i];
    Floats beyond = 0.5f * t * sum * exponential(-z * z);
    return x * pick(x < 0, beyond, 1 - beyond);
}

#endif
