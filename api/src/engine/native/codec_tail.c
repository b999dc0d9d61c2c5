/* The codec decoder's residual units of few channels and many rows, and its Snake activation, on a CPU.
 *
 * Owns their arithmetic and the order in which it goes through the caches. Memory is the caller's (codec_tail.py, which
 * mirrors the structs below), and so are the threads: those of torch's own OpenMP runtime, which is in the process, so
 * that the cores have one pool. No call checks its arguments.
 *
 * The convolution of 7 taps is bilinear fast filtering (Toom and Cook; Winograd 1980): 15 products make 4 rows, where 28
 * would. It nests two algorithms. Karatsuba's, on a pair of rows and of taps, adds and subtracts alone. Within it 5
 * products make 2 rows of 4 taps, from the points 0, 1, -1, -1/2 and infinity, chosen as their sums lose
 * about as little as plain ones in fp32. 7 taps are 8 whose oldest is 0.
 * A row is calculated by itself: no bit of it depends on the other streams of a call, nor on the threads.
 * Shapes: B streams, T rows, C channels, D dilation.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

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

enum { POINTS = 5, PRODUCTS = 3 * POINTS, OUTPUTS = 4, INPUTS = 11, TAPS = 7 };
enum { GROUPS = 16 }; /* of an item of work: many enough to share a reading of the weights, and few for the caches */

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct snake { const float *frequency, *height; }; /* (C,) each */

struct unit {
    const float *kernel; /* (PRODUCTS, C / COLUMNS, C inputs, COLUMNS) */
    const float *bias;
    struct snake act;
    const float *mix; /* (C / COLUMNS, C inputs, COLUMNS) */
    const float *mix_bias;
    int64_t channels, dilation;
};

INLINE Floats load(const float *from) { Floats x; memcpy(&x, from, sizeof x); return x; }
INLINE void store(float *to, Floats x) { memcpy(to, &x, sizeof x); }

/* ---- threads ---- */

/* OpenMP's; compilers emit calls of the first for `#pragma omp parallel`, but some for a runtime that is not torch's. */
extern void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);

struct work {
    void (*item)(void *call, int64_t item, int thread);
    void *call;
    int64_t items;
    atomic_int_fast64_t next;
};

static void take_items(void *data) {
    struct work *work = data;
    int thread = omp_get_thread_num();
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (item >= work->items) return;
        work->item(work->call, item, thread);
    }
}

static void share(void (*item)(void *, int64_t, int), void *call, int64_t items, int64_t threads) {
    struct work work = {item, call, items, 0};
    GOMP_parallel(take_items, &work, (unsigned)(threads < items ? threads : items), 0);
}

/* ---- Snake ---- */

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

struct snake_call {
    const float *x;
    float *out;
    struct snake act;
    int64_t x_stride, out_stride, rows, channels, parts;
};

static void snake_part(void *data, int64_t item, int thread) {
    const struct snake_call *call = data;
    int64_t stream = item / call->parts, part = item % call->parts;
    int64_t first = call->rows * part / call->parts, last = call->rows * (part + 1) / call->parts;
    (void)thread;
    for (int64_t row = first; row < last; row++) {
        const float *x = call->x + stream * call->x_stride + row * call->channels;
        float *out = call->out + stream * call->out_stride + row * call->channels;
        for (int64_t c = 0; c < call->channels; c += LANES)
            store(out + c, snake(load(x + c), load(call->act.frequency + c), load(call->act.height + c)));
    }
}

/* x (B, T, C) -> out, which may be x; strides in floats from stream to stream; C a multiple of LANES. */
EXPORT void snake_rows(const float *x, int64_t x_stride, float *out, int64_t out_stride, const float *frequency,
                       const float *height, int64_t streams, int64_t rows, int64_t channels, int64_t threads) {
    int64_t parts = rows * channels < 16384 ? 1 : threads; /* less is not worth a thread's waking */
    struct snake_call call = {x, out, {frequency, height}, x_stride, out_stride, rows, channels, parts};
    share(snake_part, &call, streams * parts, parts == 1 && streams * rows * channels < 16384 ? 1 : threads);
}

/* ---- residual units ---- */

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

/* The inner algorithm: y = SUMS ((FACTORS x) * (weights' factors, which codec_tail.py makes)), scaled by powers of 2 so
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
    float *x, *scratch;
    int64_t rows, groups, parts; /* groups: of OUTPUTS rows each, a dilation apart; parts: items of a stream */
};

/* A thread's own. */
struct scratch { float *factors, *products, *hidden; };

static const int64_t PRODUCT_FLOATS = (int64_t)GROUPS * PRODUCTS * COLUMNS;

EXPORT int64_t scratch_floats(int64_t channels) {
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

static void unit_part(void *data, int64_t item, int thread) {
    const struct unit_call *call = data;
    int64_t channels = call->unit->channels, stream = item / call->parts, begin = item % call->parts * GROUPS;
    int64_t left = call->groups - begin, tiles = ((left < GROUPS ? left : GROUPS) + TILE_ROWS - 1) / TILE_ROWS;
    const float *window = call->window + stream * (call->rows + (TAPS - 1) * call->unit->dilation) * channels;
    float *x = call->x + stream * call->rows * channels, *scratch = call->scratch + thread * scratch_floats(channels);
    struct scratch own = {scratch, scratch + GROUPS * PRODUCTS * channels, 0};
    own.hidden = own.products + PRODUCT_FLOATS;
    for (int64_t group = 0; group < tiles * TILE_ROWS; group++) {
        int64_t place = (group / TILE_ROWS * PRODUCTS * TILE_ROWS + group % TILE_ROWS) * channels;
        factor(call, window, within(begin + group, call->groups), own.factors + place);
    }
    for (int64_t column = 0; column < channels; column += COLUMNS) convolve(call->unit, &own, tiles, column);
    for (int64_t column = 0; column < channels; column += COLUMNS)
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int output = 0; output < OUTPUTS; output++) {
                const float *hidden = own.hidden + (tile * OUTPUTS + output) * TILE_ROWS * channels;
                mix(call, x, hidden, begin + tile * TILE_ROWS, output, column);
            }
}

/* x (B, T, C) += mix(snake(convolution(window))), of window (B, (TAPS - 1) D + T, C). C: a multiple of COLUMNS.
 * scratch: `threads` times scratch_floats, on a cache line. */
EXPORT void residual_unit(const struct unit *unit, const float *window, float *x, float *scratch, int64_t streams,
                          int64_t rows, int64_t threads) {
    int64_t span = OUTPUTS * unit->dilation, groups = (rows + span - 1) / span * unit->dilation;
    struct unit_call call = {unit, window, x, scratch, rows, groups, (groups + GROUPS - 1) / GROUPS};
    share(unit_part, &call, streams * call.parts, threads);
}

EXPORT int64_t columns(void) { return COLUMNS; }
EXPORT int64_t lanes(void) { return LANES; }
