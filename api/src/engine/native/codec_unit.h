/* The codec decoder's residual units of few channels and many rows, by fewer operations than a convolution's.
 *
 * The convolution of 7 taps is bilinear fast filtering (Toom and Cook; Winograd 1980): 15 products make 4 rows, where 28
 * would. It nests two algorithms. Karatsuba's, on a pair of rows and of taps, adds and subtracts alone. Within it 5
 * products make 2 rows of 4 taps, from the points 0, 1, -1, -1/2 and infinity, chosen as their sums lose
 * about as little as plain ones in fp32. 7 taps are 8 whose oldest is 0.
 * A row is calculated by itself: no bit of it depends on the other streams of a call, nor on the threads.
 * Shapes: B streams, T rows, C channels, D dilation.
 */
#ifndef CODEC_UNIT_H
#define CODEC_UNIT_H

#include <stdatomic.h>

#include "codec_vectors.h"

enum { POINTS = 5, PRODUCTS = 3 * POINTS, OUTPUTS = 4, INPUTS = 11, TAPS = 7 };
enum { GROUPS = 16 }; /* of an item of work: many enough to share a reading of the weights, and few for the caches */


struct unit {
    const float *kernel; /* (PRODUCTS, C / COLUMNS, C inputs, COLUMNS) */
    const float *bias;
    struct snake act;
    const float *mix; /* (C / COLUMNS, C inputs, COLUMNS) */
    const float *mix_bias;
    int64_t channels, dilation;
};

/* rows (TILE_ROWS, inputs) by weights (inputs, COLUMNS). */
INLINE void multiply(const float *rows, const float *weights, int64_t inputs, Floats sums[TILE_ROWS][TILE_VECTORS]) {
    Floats kept[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    for (int64_t i = 0; i < inputs; i++) {
        Floats weight[TILE_VECTORS];
        UNROLL for (int v = 0; v < TILE_VECTORS; v++) weight[v] = load(weights + i * COLUMNS + v * LANES);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            float x = rows[r * inputs + i];
            UNROLL for (int v = 0; v < TILE_VECTORS; v++) kept[r][v] += x * weight[v];
        }
    }
    memcpy(sums, kept, sizeof kept);
}

/* The inner algorithm: y = SUMS ((FACTORS x) * (weights' factors, which codec_parts.py makes)), scaled by powers of 2 so
 * that all factors of x are about as large as x. */
static const float FACTORS[POINTS][POINTS] = {
    {-0.25f, -0.5f, 0.25f, 0.5f, 0},
    {0, 0.25f, 0.75f, 0.5f, 0},
    {0, -0.5f, -0.5f, 1, 0},
    {0, -0.5f, 0, 0.5f, 0},
    {0, -0.25f, -0.5f, 0.25f, 0.5f},
};
static const float SUMS[OUTPUTS / 2][POINTS] = {{1, 1, 1, 1, 0}, {0, 1, -1, -0.5f, 1}};

/* sum of row[i] * x[i * step], without its zeros. */
INLINE Floats combined(const float row[POINTS], const Floats *x, int step) {
    Floats sum = {0};
    UNROLL for (int i = 0; i < POINTS; i++)
        if (row[i] != 0) sum += row[i] * x[i * step];
    return sum;
}

struct unit_call {
    const struct unit *unit;
    const float *window;
    float *x, *scratch; /* scratch: unit_floats for each thread */
    atomic_int *taken;  /* (threads,): whose scratch is in use */
    int64_t streams, rows, groups, parts; /* groups: of OUTPUTS rows each, a dilation apart; parts: items of a stream */
};

/* A thread's own. */
struct scratch { float *factors, *products, *hidden; };

static const int64_t PRODUCT_FLOATS = (int64_t)GROUPS * PRODUCTS * COLUMNS;

static int64_t unit_floats(int64_t channels) {
    return GROUPS * (PRODUCTS + OUTPUTS) * channels + PRODUCT_FLOATS;
}

/* The first row of a group: d groups after one another interleave their rows, and the next d come behind them. */
INLINE int64_t first_row(int64_t group, int64_t dilation) {
    return group / dilation * OUTPUTS * dilation + group % dilation;
}

INLINE int64_t within(int64_t row, int64_t rows) { return row < 0 ? 0 : row < rows ? row : rows - 1; }

/* The factors of a group's rows of the window, to (PRODUCTS, TILE_ROWS, C), of which it is one of TILE_ROWS.
 * The oldest of 11 rows may lie before the window, as its tap is 0, and the last ones behind it, for rows that are not
 * kept: any other row serves. */
static void factor(const struct unit_call *call, const float *window, int64_t group, float *to) {
    int64_t channels = call->unit->channels, dilation = call->unit->dilation;
    int64_t first = first_row(group, dilation) - dilation, rows = call->rows + (TAPS - 1) * dilation;
    const float *from[INPUTS];
    for (int i = 0; i < INPUTS; i++) from[i] = window + within(first + i * dilation, rows) * channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        Floats x[INPUTS], differences[2 * POINTS];
        UNROLL for (int i = 0; i < INPUTS; i++) x[i] = load(from[i] + c);
        UNROLL for (int i = 0; i < POINTS; i++) {
            differences[2 * i] = x[2 * i] - x[2 * i + 1];
            differences[2 * i + 1] = x[2 * i + 2] - x[2 * i + 1];
        }
        UNROLL for (int p = 0; p < POINTS; p++) {
            float *place = to + p * TILE_ROWS * channels + c;
            store(place, combined(FACTORS[p], differences, 2));
            store(place + POINTS * TILE_ROWS * channels, combined(FACTORS[p], x + 1, 2));
            store(place + 2 * POINTS * TILE_ROWS * channels, combined(FACTORS[p], differences + 1, 2));
        }
    }
}

/* Of a tile's group, LANES of its products (PRODUCTS, TILE_ROWS, COLUMNS) to those of the four rows it makes, activated,
 * in hidden (OUTPUTS, TILE_ROWS, C). */
INLINE void combine(const float *products, float *hidden, int64_t channels, Floats bias, Floats frequency, Floats height) {
    Floats product[PRODUCTS];
    UNROLL for (int p = 0; p < PRODUCTS; p++) product[p] = load(products + p * TILE_ROWS * COLUMNS);
    UNROLL for (int pair = 0; pair < OUTPUTS / 2; pair++) {
        Floats middle = bias + combined(SUMS[pair], product + POINTS, 1);
        Floats first = middle + combined(SUMS[pair], product, 1);
        Floats second = middle + combined(SUMS[pair], product + 2 * POINTS, 1);
        store(hidden + 2 * pair * TILE_ROWS * channels, snake(first, frequency, height));
        store(hidden + (2 * pair + 1) * TILE_ROWS * channels, snake(second, frequency, height));
    }
}

/* COLUMNS of all tiles from `factors` to `hidden`. Each weight is read once for all of them. */
static void convolve(const struct unit *unit, const struct scratch *own, int64_t tiles, int64_t column) {
    int64_t channels = unit->channels;
    for (int64_t p = 0; p < PRODUCTS; p++) {
        const float *weights = unit->kernel + p * channels * channels + column * channels;
        for (int64_t tile = 0; tile < tiles; tile++) {
            Floats sums[TILE_ROWS][TILE_VECTORS];
            multiply(own->factors + (tile * PRODUCTS + p) * TILE_ROWS * channels, weights, channels, sums);
            memcpy(own->products + (tile * PRODUCTS + p) * TILE_ROWS * COLUMNS, sums, sizeof sums);
        }
    }
    for (int64_t c = 0; c < COLUMNS; c += LANES) {
        Floats bias = load(unit->bias + column + c);
        Floats frequency = load(unit->act.frequency + column + c), height = load(unit->act.height + column + c);
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int64_t row = 0; row < TILE_ROWS; row++) {
                const float *products = own->products + (tile * PRODUCTS * TILE_ROWS + row) * COLUMNS + c;
                float *hidden = own->hidden + (tile * OUTPUTS * TILE_ROWS + row) * channels + column + c;
                combine(products, hidden, channels, bias, frequency, height);
            }
    }
}

/* x += hidden by the pointwise weights, COLUMNS of a tile's rows, those of output `output` of its groups. */
static void mix(const struct unit_call *call, float *x, const float *hidden, int64_t group, int output, int64_t column) {
    const struct unit *unit = call->unit;
    Floats sums[TILE_ROWS][TILE_VECTORS];
    multiply(hidden, unit->mix + column * unit->channels, unit->channels, sums);
    for (int64_t row = 0; row < TILE_ROWS && group + row < call->groups; row++) {
        int64_t at = first_row(group + row, unit->dilation) + output * unit->dilation;
        if (at >= call->rows) continue;
        float *out = x + at * unit->channels + column;
        for (int64_t v = 0; v < TILE_VECTORS; v++, out += LANES)
            store(out, load(out) + (sums[row][v] + load(unit->mix_bias + column + v * LANES)));
    }
}

/* The first place that nobody has; there are as many as threads. */
static int64_t take_place(atomic_int *taken) {
    for (int64_t place = 0;; place++)
        if (!atomic_exchange_explicit(taken + place, 1, memory_order_acquire)) return place;
}

static void run_unit(const struct unit_call *call, int64_t item) {
    int64_t channels = call->unit->channels, stream = item / call->parts, begin = item % call->parts * GROUPS;
    int64_t left = call->groups - begin, tiles = ((left < GROUPS ? left : GROUPS) + TILE_ROWS - 1) / TILE_ROWS;
    const float *window = call->window + stream * (call->rows + (TAPS - 1) * call->unit->dilation) * channels;
    int64_t place = take_place(call->taken);
    float *x = call->x + stream * call->rows * channels, *scratch = call->scratch + place * unit_floats(channels);
    struct scratch own = {scratch, scratch + GROUPS * PRODUCTS * channels, 0};
    own.hidden = own.products + PRODUCT_FLOATS;
    for (int64_t group = 0; group < tiles * TILE_ROWS; group++) {
        int64_t at = (group / TILE_ROWS * PRODUCTS * TILE_ROWS + group % TILE_ROWS) * channels;
        factor(call, window, within(begin + group, call->groups), own.factors + at);
    }
    for (int64_t column = 0; column < channels; column += COLUMNS) convolve(call->unit, &own, tiles, column);
    for (int64_t column = 0; column < channels; column += COLUMNS)
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int output = 0; output < OUTPUTS; output++) {
                const float *hidden = own.hidden + (tile * OUTPUTS + output) * TILE_ROWS * channels;
                mix(call, x, hidden, begin + tile * TILE_ROWS, output, column);
            }
    atomic_store_explicit(call->taken + place, 0, memory_order_release);
}

static struct unit_call unit_call(const struct unit *unit, const float *window, float *x, int64_t streams, int64_t rows) {
    int64_t span = OUTPUTS * unit->dilation, groups = (rows + span - 1) / span * unit->dilation;
    return (struct unit_call){unit, window, x, NULL, NULL, streams, rows, groups, (groups + GROUPS - 1) / GROUPS};
}

#endif
