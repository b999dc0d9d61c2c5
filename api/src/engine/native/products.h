/* Products by packed weights, a block of outputs at a time, and what they read of their rows.
 *
 * A row is calculated by itself: no bit of it depends on the rows beside it. Integer sums are exact; sums of floats
 * have one order whatever the number of rows.
 * Shapes: N rows, I inputs, O outputs. */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
enum { LANES = 16 }; /* outputs of a block */
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

enum kind { INT8, FINE, EXACT }; /* rows rounded to 8 bits, to 16, or not at all by weights in bf16 */

struct matrix {
    const void *weights;   /* packed; see pack_int8 and pack_exact */
    const float *scales;   /* INT8, FINE: of each output */
    const int32_t *shifts; /* INT8, FINE: 128 * the sum of an output's codes */
    int64_t kind, outputs, inputs;
};

/* What a product reads of its rows: codes + 128 with their scales, two of them if FINE, or floats. */
struct rows {
    uint8_t *codes; /* (N or 2 N, stride) */
    float *scales;  /* (N,) */
    float *floats;  /* (N, I) */
};

/* quantised.py's: from 0 to a row's largest value; and of FINE's second code, in one step of its first. */
static const float STEPS = 127.5f;
static const float FINER = 2 * 127.5f * (1 - 1.0f / 1024);
static const float ROUNDER = 12582912.0f; /* 1.5 * 2^23: added, it leaves the nearest integer */

INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE Floats load(const float *from) { Floats x; memcpy(&x, from, sizeof x); return x; }
INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }
INLINE Floats spread(float x) { return x - (Floats){0}; }

INLINE float total(Floats x) {
    struct { Eight low, high; } eights;
    struct { Four low, high; } fours;
    memcpy(&eights, &x, sizeof x);
    eights.low += eights.high;
    memcpy(&fours, &eights.low, sizeof fours);
    fours.low += fours.high;
    return (fours.low[0] + fours.low[2]) + (fours.low[1] + fours.low[3]);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
    Floats sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    float out = total(sum);
    for (; i < n; i++) out += a[i] * b[i];
    return out;
}

/* Codes of weights (O, I) are packed in blocks of 16 outputs. With VNNI a block has 4 inputs of all 16 after one
 * another, which are one instruction's operand; plain C keeps the rows, whose dot products compilers know. */
#ifdef __AVX512VNNI__
enum { BY_FOUR = 1, WHOLE = LANES };
#else
enum { BY_FOUR = 0, WHOLE = 64 }; /* rows begin on a cache line */
#endif

/* The most rows of codes, and of floats, that share one reading of a block: as many as there are registers for sums. */
#ifdef __AVX512F__
enum { CODE_GROUP = 16, FLOAT_GROUP = 8 };
#else
enum { CODE_GROUP = 8, FLOAT_GROUP = 2 };
#endif

INLINE int64_t code_stride(int64_t inputs) { return padded(inputs, WHOLE); }

EXPORT int64_t packed_bytes(int64_t kind, int64_t outputs, int64_t inputs) {
    return padded(outputs, LANES) * (kind == EXACT ? 2 * padded(inputs, 2) : code_stride(inputs));
}

EXPORT void pack_int8(const int8_t *codes, int64_t outputs, int64_t inputs, int8_t *packed, int32_t *shifts) {
    int64_t stride = code_stride(inputs);
    memset(packed, 0, (size_t)packed_bytes(INT8, outputs, inputs));
    for (int64_t o = 0; o < outputs; o++) {
        int8_t *block = packed + o / LANES * LANES * stride;
        int32_t sum = 0;
        for (int64_t i = 0; i < inputs; i++) {
            int64_t place = BY_FOUR ? (i / 4 * LANES + o % LANES) * 4 + i % 4 : o % LANES * stride + i;
            block[place] = codes[o * inputs + i];
            sum += codes[o * inputs + i];
        }
        shifts[o] = 128 * sum;
    }
}

/* Whether products of floats are as fast as others' here: without such registers, compilers keep the sums in memory. */
EXPORT bool multiplies_floats(void) {
#ifdef __AVX512F__
    return true;
#else
    return false;
#endif
}

/* Whether all n numbers in fp32 are bf16 numbers. */
EXPORT bool fits_bf16(const uint32_t *numbers, int64_t n) {
    uint32_t lost = 0;
    for (int64_t i = 0; i < n; i++) lost |= numbers[i] & 0xffff;
    return !lost;
}

/* weights (O, I), of bf16 numbers -> blocks of 16 outputs; two inputs of an output are one word, the first one low. */
EXPORT void pack_exact(const uint32_t *weights, int64_t outputs, int64_t inputs, uint32_t *packed) {
    int64_t pairs = padded(inputs, 2) / 2;
    memset(packed, 0, (size_t)packed_bytes(EXACT, outputs, inputs));
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++) {
            uint32_t weight = weights[o * inputs + i];
            packed[(o / LANES * pairs + i / 2) * LANES + o % LANES] |= i % 2 ? weight & 0xffff0000 : weight >> 16;
        }
}

/* ---- rounding a row ---- */

/* The largest absolute value; infinite or NaN if any is: as integers, the bits of these are the largest. */
static float largest(const float *x, int64_t n) {
    uint32_t best = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        best = bits > best ? bits : best;
    }
    float out;
    memcpy(&out, &best, 4);
    return out;
}

/* The nearest code that a product of bytes takes, of x from -127.5 to 127.5. */
INLINE float nearest(float x) {
    x = x + ROUNDER - ROUNDER;
    return x > 127 ? 127 : x < -127 ? -127 : x;
}

/* x (I,) as row `row` of `into`, in the form that a product of that kind reads; with NaN or infinity it becomes NaN. */
static void prepare(int64_t kind, const float *restrict x, int64_t n, int64_t row, const struct rows *into) {
    if (kind == EXACT) {
        if (x != into->floats + row * n) memcpy(into->floats + row * n, x, 4 * (size_t)n);
        return;
    }
    int64_t stride = code_stride(n), codes_of_row = kind == FINE ? 2 : 1;
    uint8_t *restrict first = into->codes + row * codes_of_row * stride, *restrict second = first + stride;
    float most = largest(x, n);
    into->scales[row] = isfinite(most) ? most / STEPS : NAN;
    memset(first, 128, (size_t)(stride * codes_of_row));
    if (!(most > 0) || !isfinite(most)) return;
    if (kind == INT8)
        for (int64_t i = 0; i < n; i++) {
            first[i] = (uint8_t)((int32_t)nearest(x[i] / most * STEPS) + 128);
        }
    else
        for (int64_t i = 0; i < n; i++) {
            float value = x[i] / most * STEPS, code = nearest(value);
            first[i] = (uint8_t)((int32_t)code + 128);
            second[i] = (uint8_t)((int32_t)nearest((value - code) * FINER) + 128);
        }
}

/* ---- products ---- */

enum { AHEAD = 8192 }; /* bytes of weights asked for early, into the second cache: as measured, from 2048 to 16384 */

/* sums[r] of (code + 128) * weight of `rows` rows, which are a constant: a block of 16 outputs. */
#ifdef __AVX512VNNI__
INLINE void sum_codes(const int8_t *block, const uint8_t *codes, int64_t stride, int rows, Ints *sums) {
    __m512i sum[CODE_GROUP]; /* one of each row; four of a single one, as an instruction takes four cycles */
    UNROLL for (int i = 0; i < CODE_GROUP; i++) sum[i] = _mm512_setzero_si512();
    for (int64_t i = 0; i < stride; i += LANES) {
        UNROLL for (int j = 0; j < LANES; j += 4) {
            const int8_t *at = block + (i + j) * LANES;
            __builtin_prefetch(at + AHEAD, 0, 2);
            __m512i weights = _mm512_loadu_si512(at);
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t quad;
                memcpy(&quad, codes + r * stride + i + j, 4);
                int chain = rows == 1 ? j / 4 : r;
                sum[chain] = _mm512_dpbusd_epi32(sum[chain], _mm512_set1_epi32(quad), weights);
            }
        }
    }
    if (rows == 1) sum[0] = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
    UNROLL for (int r = 0; r < rows; r++) memcpy(sums + r, sum + r, sizeof *sums);
}
#else
INLINE void sum_codes(const int8_t *block, const uint8_t *codes, int64_t stride, int rows, Ints *sums) {
    for (int o = 0; o < LANES; o++, block += stride) {
        int32_t sum[CODE_GROUP] = {0};
        for (int64_t i = 0; i < stride; i++) {
            int16_t weight = block[i]; /* two products of 16 bits are one instruction on all processors */
            UNROLL for (int r = 0; r < rows; r++) sum[r] += (int16_t)codes[r * stride + i] * weight;
        }
        UNROLL for (int r = 0; r < rows; r++) sums[r][o] = sum[r];
    }
}
#endif

/* The same in fp32 of weights in bf16. Two sums of each output, whatever the rows: their order must not change. */
INLINE void sum_floats(const uint32_t *block, const float *x, int64_t inputs, int rows, Floats *sums) {
    Floats first[FLOAT_GROUP], second[FLOAT_GROUP];
    UNROLL for (int r = 0; r < rows; r++) first[r] = second[r] = (Floats){0};
    for (int64_t i = 0; i < inputs; i += 2, block += LANES) {
        Bits pair;
        memcpy(&pair, block, sizeof pair);
        __builtin_prefetch((const uint8_t *)block + AHEAD, 0, 2);
        Floats low = (Floats)(pair << 16), high = (Floats)(pair & 0xffff0000);
        bool last = i + 1 == inputs;
        UNROLL for (int r = 0; r < rows; r++) {
            first[r] += low * x[r * inputs + i];
            second[r] += high * (last ? 0 : x[r * inputs + i + 1]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) sums[r] = first[r] + second[r];
}

#define OF(sum, count) case count: sum(block, x, stride, count, sums); break;
#define OF_FEW(sum) OF(sum, 1) OF(sum, 2) OF(sum, 3) OF(sum, 4) OF(sum, 5) OF(sum, 6) OF(sum, 7) OF(sum, 8)
#define OF_MORE(sum) OF(sum, 9) OF(sum, 10) OF(sum, 11) OF(sum, 12) OF(sum, 13) OF(sum, 14) OF(sum, 15) OF(sum, 16)

static void sum_codes_of(const int8_t *block, const uint8_t *x, int64_t stride, int64_t rows, Ints *sums) {
    switch (rows) {
        OF_FEW(sum_codes)
#ifdef __AVX512F__
        OF_MORE(sum_codes)
#endif
    }
}

static void sum_floats_of(const uint32_t *block, const float *x, int64_t stride, int64_t rows, Floats *sums) {
    switch (rows) {
        OF(sum_floats, 1) OF(sum_floats, 2)
#ifdef __AVX512F__
        OF(sum_floats, 3) OF(sum_floats, 4) OF(sum_floats, 5) OF(sum_floats, 6) OF(sum_floats, 7) OF(sum_floats, 8)
#endif
    }
}

/* A block of outputs, of all n rows: out (N, O), or added to it. */
static void multiply_block(const struct matrix *m, const struct rows *x, int64_t n, int64_t block, float *out,
                           bool add) {
    int64_t first = block * LANES, width = m->outputs - first < LANES ? m->outputs - first : LANES;
    int64_t stride = code_stride(m->inputs), each = m->kind == FINE ? 2 : 1, count;
    Ints sums[CODE_GROUP], shifts = {0};
    Floats made[CODE_GROUP], scales = {0};
    if (m->kind != EXACT) {
        memcpy(&shifts, m->shifts + first, 4 * (size_t)width);
        memcpy(&scales, m->scales + first, 4 * (size_t)width);
    }
    for (int64_t r = 0; r < n; r += count) { /* rows that share a reading; the later ones find it in a cache */
        int64_t most = m->kind == EXACT ? FLOAT_GROUP : CODE_GROUP / each;
        count = n - r < most ? n - r : most;
        if (m->kind == EXACT) {
            const uint32_t *weights = (const uint32_t *)m->weights + first * padded(m->inputs, 2) / 2;
            sum_floats_of(weights, x->floats + r * m->inputs, m->inputs, count, made);
        } else {
            const int8_t *weights = (const int8_t *)m->weights + first * stride;
            sum_codes_of(weights, x->codes + r * each * stride, stride, count * each, sums);
            for (int64_t i = 0; i < count; i++) {
                Floats sum = __builtin_convertvector(sums[i * each] - shifts, Floats);
                if (each == 2) sum += __builtin_convertvector(sums[2 * i + 1] - shifts, Floats) * (1 / FINER);
                made[i] = sum * (scales * x->scales[r + i]);
            }
        }
        for (int64_t i = 0; i < count; i++) {
            float *to = out + (r + i) * m->outputs + first;
            if (width == LANES) store(to, add ? load(to) + made[i] : made[i]);
            else for (int64_t o = 0; o < width; o++) to[o] = (add ? to[o] : 0) + made[i][o];
        }
    }
}

/* Of a product: a long stream of weights for each thread, then short ones, so that all end at the same time. */
enum { SHORT = 8 };
static int64_t product_items(int64_t threads) { return (1 + SHORT) * threads; }

static int64_t first_block(int64_t blocks, int64_t item, int64_t items) {
    int64_t threads = items / (1 + SHORT), half = blocks / 2;
    return item < threads ? item * half / threads : half + (item - threads) * (blocks - half) / (SHORT * threads);
}

static void multiply_part(const struct matrix *m, const struct rows *x, int64_t n, float *out, bool add, int64_t item,
                          int64_t items) {
    int64_t blocks = padded(m->outputs, LANES) / LANES;
    int64_t end = first_block(blocks, item + 1, items);
    for (int64_t block = first_block(blocks, item, items); block < end; block++)
        multiply_block(m, x, n, block, out, add);
}

#endif
