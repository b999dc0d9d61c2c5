/* Products by packed weights in fp32 or bf16, whose rows are windows of a stream: convolutions, without gathering taps.
 *
 * A row is calculated by itself, and its sums have one order: no bit of it depends on the rows beside it.
 * Shapes: B streams, T rows of output, L rows of a window, I inputs, O outputs, a multiple of LANES. */
#ifndef CODEC_MATRIX_H
#define CODEC_MATRIX_H

#include "codec_vectors.h"

struct matrix {
    const void *weights; /* (blocks, taps, I, COLUMNS) in fp32; in bf16 (blocks, taps, I / 2, COLUMNS, 2) */
    const float *bias;   /* (O,) or NULL */
    int64_t narrow;      /* weights and rows are bf16 */
    int64_t taps, dilation, inputs, outputs;
};

enum after { PLAIN, ADDED, ACTIVATED, GELU };

struct product {
    const struct matrix *matrix;
    const void *window;               /* (B, L, I) */
    int64_t streams, rows, length;    /* B, T, L */
    void *out;                        /* (B, T, O): fp32, or bf16 if narrow_out */
    enum after after;                 /* ADDED: to what is in `out`; ACTIVATED: by `act` */
    bool narrow_out;
    struct snake act;
};

enum { AHEAD = 4096 }; /* bytes of weights asked for early */

/* sums (count, TILE_VECTORS) of the windows x[r]. Each tap is summed by itself: fewer terms, less rounding. */
INLINE void sum_floats(const struct matrix *m, const float *weights, const float *const *x, int count,
                       Floats sums[][TILE_VECTORS]) {
    int64_t inputs = m->inputs;
    for (int64_t tap = 0; tap < m->taps; tap++) {
        Floats kept[TILE_ROWS][TILE_VECTORS];
        const float *at[TILE_ROWS];
        UNROLL for (int r = 0; r < count; r++) {
            at[r] = x[r] + tap * m->dilation * inputs;
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) kept[r][v] = (Floats){0};
        }
        for (int64_t i = 0; i < inputs; i++, weights += COLUMNS) {
            Floats weight[TILE_VECTORS];
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
                weight[v] = load(weights + v * LANES);
                __builtin_prefetch((const char *)(weights + v * LANES) + AHEAD, 0, 2);
            }
            UNROLL for (int r = 0; r < count; r++)
                UNROLL for (int v = 0; v < TILE_VECTORS; v++) kept[r][v] += at[r][i] * weight[v];
        }
        UNROLL for (int r = 0; r < count; r++)
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) sums[r][v] = tap ? sums[r][v] + kept[r][v] : kept[r][v];
    }
}

/* The same in bf16, two inputs at a time. */
INLINE void sum_narrow(const struct matrix *m, const uint16_t *weights, const uint16_t *const *x, int count,
                       Floats sums[][TILE_VECTORS]) {
#ifdef __AVX512BF16__
    int64_t inputs = m->inputs;
    for (int64_t tap = 0; tap < m->taps; tap++) {
        __m512 kept[TILE_ROWS][TILE_VECTORS];
        const uint16_t *at[TILE_ROWS];
        UNROLL for (int r = 0; r < count; r++) {
            at[r] = x[r] + tap * m->dilation * inputs;
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) kept[r][v] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < inputs; i += 2, weights += 2 * COLUMNS) {
            __m512bh weight[TILE_VECTORS];
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) {
                memcpy(&weight[v], weights + 2 * v * LANES, sizeof weight[v]);
                __builtin_prefetch((const char *)(weights + 2 * v * LANES) + AHEAD, 0, 2);
            }
            UNROLL for (int r = 0; r < count; r++) {
                int32_t pair;
                memcpy(&pair, at[r] + i, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                    kept[r][v] = _mm512_dpbf16_ps(kept[r][v], weight[v], both);
            }
        }
        UNROLL for (int r = 0; r < count; r++)
            UNROLL for (int v = 0; v < TILE_VECTORS; v++)
                sums[r][v] = tap ? sums[r][v] + (Floats)kept[r][v] : (Floats)kept[r][v];
    }
#else
    (void)m, (void)weights, (void)x, (void)count, (void)sums;
#endif
}

#define BY_COUNT(sum, m, weights, x, count, sums)                  \
    switch (count) {                                               \
    case 8: sum(m, weights, x, TILE_ROWS, sums); break;            \
    case 4: sum(m, weights, x, 4, sums); break;                    \
    case 2: sum(m, weights, x, 2, sums); break;                    \
    default: sum(m, weights, x, 1, sums); break;                   \
    }

/* LANES of a row's sums to where they go, from output `column` on. */
INLINE void finish(const struct product *p, int64_t row, int64_t column, Floats sum) {
    int64_t at = row * p->matrix->outputs + column;
    if (p->matrix->bias) sum += load(p->matrix->bias + column);
    if (p->after == ACTIVATED) sum = snake(sum, load(p->act.frequency + column), load(p->act.height + column));
    else if (p->after == GELU) sum = gelu(sum);
    else if (p->after == ADDED) sum += load((float *)p->out + at);
    if (p->narrow_out) store_narrow((uint16_t *)p->out + at, sum);
    else store((float *)p->out + at, sum);
}

static int64_t blocks_of(const struct matrix *m) { return padded(m->outputs, COLUMNS) / COLUMNS; }

enum { SHARES = 6, ROW_BYTES = 1 << 18 }; /* items for each thread, at least; of an item's rows, at most: for its cache */

/* Rows of an item. */
static int64_t rows_of_item(const struct product *p, int64_t threads) {
    int64_t n = p->streams * p->rows, most = ROW_BYTES / ((p->matrix->narrow ? 2 : 4) * p->matrix->inputs);
    int64_t wanted = (SHARES * threads + blocks_of(p->matrix) - 1) / blocks_of(p->matrix);
    int64_t rows = padded((n + wanted - 1) / wanted, TILE_ROWS);
    most = most < TILE_ROWS ? TILE_ROWS : most / TILE_ROWS * TILE_ROWS;
    return rows < most ? rows : most;
}

static int64_t items_of_product(const struct product *p, int64_t threads) {
    int64_t rows = rows_of_item(p, threads);
    return blocks_of(p->matrix) * ((p->streams * p->rows + rows - 1) / rows);
}

/* `count` rows from `first` on, by a block of outputs. */
INLINE void multiply_tile(const struct product *p, int64_t block, int64_t first, int64_t count) {
    const struct matrix *m = p->matrix;
    int64_t column = block * COLUMNS, panel = column * m->taps * m->inputs;
    Floats sums[TILE_ROWS][TILE_VECTORS];
    const char *x[TILE_ROWS];
    for (int64_t r = 0; r < count; r++) {
        int64_t row = (first + r) / p->rows * p->length + (first + r) % p->rows;
        x[r] = (const char *)p->window + row * m->inputs * (m->narrow ? 2 : 4);
    }
    if (m->narrow) {
        BY_COUNT(sum_narrow, m, (const uint16_t *)m->weights + panel, (const uint16_t *const *)x, count, sums)
    } else {
        BY_COUNT(sum_floats, m, (const float *)m->weights + panel, (const float *const *)x, count, sums)
    }
    for (int64_t r = 0; r < count; r++)
        for (int64_t v = 0; v < TILE_VECTORS && column + v * LANES < m->outputs; v++)
            finish(p, first + r, column + v * LANES, sums[r][v]);
}

static void run_product(const struct product *p, int64_t item, int64_t items) {
    int64_t blocks = blocks_of(p->matrix), parts = items / blocks, n = p->streams * p->rows;
    int64_t each = padded((n + parts - 1) / parts, TILE_ROWS);
    int64_t row = item % parts * each, end = smaller(n, row + each);
    while (row < end) {
        int64_t left = end - row, count = left >= TILE_ROWS ? TILE_ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        multiply_tile(p, item / parts, row, count);
        row += count;
    }
}

#endif
