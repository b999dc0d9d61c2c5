/* The codec's decoder on a CPU: its transformer's layers, its convolutions, and what lies between them.
 *
 * Owns the order of a layer's work: one call is one job of threads.h, in phases. The arithmetic is that of the headers:
 * codec_matrix.h (products), codec_unit.h (the late residual units), codec_attention.h, codec_vectors.h. Memory is the
 * caller's (../codec_kernel.py and ../codec_parts.py, which mirror the structs). No call checks its arguments.
 * A row is calculated by itself: no bit of it depends on the other streams of a call, nor on the threads; and but for
 * the late units, whose rows come in groups, nor on where in a call it is.
 * Shapes: B streams, T rows, L rows of a window (a tail and then T), C channels, I inputs, O outputs.
 */
#define _GNU_SOURCE
#include "codec_attention.h"
#include "codec_matrix.h"
#include "codec_unit.h"
#include "threads.h"

EXPORT int64_t columns(void) { return COLUMNS; }
EXPORT int64_t lanes(void) { return LANES; }
EXPORT int64_t pool_threads(const struct pool *pool) { return pool->threads; }

EXPORT bool multiplies_narrow(void) {
#ifdef __AVX512BF16__
    return true;
#else
    return false;
#endif
}

/* ---- what a convolution sees ---- */

/* The state of slots, in which each convolution has its tails (R, C), and the slots of a call. */
struct streams {
    float *tails;         /* (slots, size) */
    const int64_t *slots; /* (B,) */
    int64_t size, count;
};

/* Windows (B, L, C) of streams: the tail of each, then its rows x, activated. */
struct windows {
    const float *x;       /* (B, T, C), its streams x_stride floats apart */
    struct streams *state;
    void *out;            /* (B, R + T, C): fp32, or bf16 if narrow */
    struct snake act;     /* frequency NULL: none */
    int64_t x_stride, start, streams, rows, tail, channels; /* start: of the tails in a slot's state */
    bool narrow;
};

INLINE float *tail_of(const struct windows *w, int64_t stream) {
    return w->state->tails + w->state->slots[stream] * w->state->size + w->start;
}

enum { ITEM_FLOATS = 16384 }; /* floats of an item, about: less is not worth sharing */

static int64_t window_parts(const struct windows *w) {
    int64_t rows = w->tail + w->rows, each = ITEM_FLOATS / w->channels + 1;
    return (rows + each - 1) / each;
}

INLINE Floats activated(const struct windows *w, const float *x, int64_t c) {
    if (!w->act.frequency) return load(x + c);
    return snake(load(x + c), load(w->act.frequency + c), load(w->act.height + c));
}

static void fill_window(const struct windows *w, int64_t item) {
    int64_t parts = window_parts(w), stream = item / parts, part = item % parts, rows = w->tail + w->rows;
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
        bool old = row < w->tail;
        const float *x = old ? tail_of(w, stream) + row * w->channels
                             : w->x + stream * w->x_stride + (row - w->tail) * w->channels;
        int64_t at = (stream * rows + row) * w->channels;
        for (int64_t c = 0; c < w->channels; c += LANES) {
            Floats value = old ? load(x + c) : activated(w, x, c);
            if (w->narrow) store_narrow((uint16_t *)w->out + at + c, value);
            else store((float *)w->out + at + c, value);
        }
    }
}

/* The last rows of a stream's window in fp32; a row that stays moves forward, before its place is taken. */
static void keep_tail(const struct windows *w, int64_t stream) {
    float *tail = tail_of(w, stream);
    for (int64_t row = 0; row < w->tail; row++) {
        int64_t from = row + w->rows - w->tail;
        for (int64_t c = 0; c < w->channels; c += LANES)
            store(tail + row * w->channels + c,
                  from < 0 ? load(tail + (row + w->rows) * w->channels + c)
                           : activated(w, w->x + stream * w->x_stride + from * w->channels, c));
    }
}

/* ---- convolutions and residual units ---- */

enum layer_kind { CONVOLUTION, WIDE_UNIT, LATE_UNIT, SOUND };

struct causal {
    int64_t kind, channels, start, tail; /* where a slot's state has the tail, and of how many rows */
    struct snake act;   /* before the convolution */
    struct matrix conv; /* SOUND: weights (taps, C) and one bias */
    struct snake inner; /* WIDE_UNIT: behind the convolution */
    struct matrix mix;
    struct unit unit;   /* LATE_UNIT's, instead of all but `act` */
};

struct causal_call {
    struct job job;
    struct windows windows;
    struct product conv, mix;
    struct unit_call unit;
    const struct causal *layer;
    float *sound;
    int64_t sound_stride;
    bool plain; /* the input is its own window */
};

enum { FILL, KEEP, CONVOLVE, MIX };

static int64_t items_of_causal(const void *job, int64_t phase, int64_t threads) {
    const struct causal_call *call = job;
    switch (phase + (call->plain ? CONVOLVE : FILL)) {
    case FILL: return call->windows.streams * window_parts(&call->windows);
    case KEEP: return call->windows.streams;
    case MIX: return items_of_product(&call->mix, threads);
    }
    if (call->layer->kind == LATE_UNIT) return call->unit.streams * call->unit.parts;
    return call->layer->kind == SOUND ? call->windows.streams * window_parts(&call->windows)
                                      : items_of_product(&call->conv, threads);
}

/* One output: samples between -1 and 1; NaN stays. */
static void sound(const struct causal_call *call, int64_t item) {
    const struct windows *w = &call->windows;
    const struct matrix *m = &call->layer->conv;
    int64_t parts = window_parts(w), stream = item / parts, part = item % parts;
    for (int64_t row = w->rows * part / parts; row < w->rows * (part + 1) / parts; row++) {
        const float *window = (const float *)w->out + (stream * (w->tail + w->rows) + row) * w->channels;
        float sample = dot(window, m->weights, m->taps * w->channels) + *m->bias;
        call->sound[stream * call->sound_stride + row] = sample > 1 ? 1 : sample < -1 ? -1 : sample;
    }
}

static void run_causal(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct causal_call *call = job;
    switch (phase + (call->plain ? CONVOLVE : FILL)) {
    case FILL: fill_window(&call->windows, item); return;
    case KEEP: keep_tail(&call->windows, item); return;
    case MIX: run_product(&call->mix, item, items); return;
    }
    if (call->layer->kind == LATE_UNIT) run_unit(&call->unit, item);
    else if (call->layer->kind == SOUND) sound(call, item);
    else run_product(&call->conv, item, items);
}

static int64_t window_bytes(const struct causal *l, int64_t streams, int64_t rows) {
    return padded(streams * (l->tail + rows) * l->channels * (l->conv.narrow ? 2 : 4), 64);
}

/* Bytes that a call needs beside its input and output. */
EXPORT int64_t causal_scratch(const struct causal *l, int64_t streams, int64_t rows, int64_t threads) {
    int64_t bytes = window_bytes(l, streams, rows);
    if (l->kind == WIDE_UNIT) bytes += streams * rows * l->channels * (l->mix.narrow ? 2 : 4);
    if (l->kind == LATE_UNIT) bytes += padded(4 * threads, 64) + 4 * threads * unit_floats(l->channels);
    return bytes;
}

/* x (B, T, C) -> out (B, T, O), the streams of both so many floats apart; only windows and sound need not be in order.
 * Units add to x, which is their `out`. scratch: on a cache line. */
EXPORT void run_layer(struct pool *pool, const struct causal *l, float *x, int64_t x_stride, float *out,
                      int64_t out_stride, struct streams *state, uint8_t *scratch, int64_t rows) {
    struct causal_call call = {{0, items_of_causal, run_causal}, .layer = l, .sound = out, .sound_stride = out_stride};
    int64_t streams = state->count;
    uint8_t *behind = scratch + window_bytes(l, streams, rows);
    call.plain = !l->tail && !l->act.frequency && !l->conv.narrow;
    call.job.phases = (l->kind == WIDE_UNIT ? 4 : 3) - (call.plain ? CONVOLVE : FILL);
    call.windows = (struct windows){x, state, scratch, l->act, x_stride, l->start, streams, rows, l->tail, l->channels,
                                    l->conv.narrow};
    const void *window = call.plain ? (void *)x : scratch;
    if (l->kind == LATE_UNIT) {
        call.unit = unit_call(&l->unit, window, x, streams, rows);
        call.unit.taken = (atomic_int *)behind;
        call.unit.scratch = (float *)(behind + padded(4 * pool->threads, 64));
        memset(behind, 0, 4 * (size_t)pool->threads);
    } else if (l->kind == WIDE_UNIT) {
        call.conv = (struct product){&l->conv, window, streams, rows, l->tail + rows, behind, ACTIVATED, l->mix.narrow, l->inner};
        call.mix = (struct product){&l->mix, behind, streams, rows, rows, x, ADDED, false, {0}};
    } else {
        call.conv = (struct product){&l->conv, window, streams, rows, l->tail + rows, out, PLAIN, false, {0}};
    }
    run_job(pool, &call.job);
}

/* ---- ConvNeXt blocks ---- */

struct convnext {
    const float *taps, *bias; /* (7, C), (C,): of each channel by itself */
    double epsilon;
    int64_t channels, start;
    struct matrix up, down;   /* the norm's weights are theirs */
};

struct convnext_call {
    struct job job;
    const struct convnext *block;
    struct windows windows;
    struct product up, down;
    float *normed;
};

static int64_t items_of_convnext(const void *job, int64_t phase, int64_t threads) {
    const struct convnext_call *call = job;
    switch (phase) {
    case 0: return call->windows.streams * call->windows.rows;
    case 1: return call->windows.streams;
    default: return items_of_product(phase == 2 ? &call->up : &call->down, threads);
    }
}

/* A row's convolution, less its mean, by its deviation. */
static void normed_row(const struct convnext_call *call, int64_t item) {
    const struct windows *w = &call->windows;
    const struct convnext *b = call->block;
    int64_t stream = item / w->rows, n = w->channels;
    const float *from[TAPS];
    for (int tap = 0; tap < TAPS; tap++) {
        int64_t row = item % w->rows + tap - w->tail;
        from[tap] = row < 0 ? tail_of(w, stream) + (row + w->tail) * n : w->x + (stream * w->rows + row) * n;
    }
    float *out = call->normed + item * n;
    Floats sum = {0}, squares = {0};
    for (int64_t c = 0; c < n; c += LANES) {
        Floats value = {0};
        for (int tap = 0; tap < TAPS; tap++) value += load(from[tap] + c) * load(b->taps + tap * n + c);
        value += load(b->bias + c);
        store(out + c, value);
        sum += value;
    }
    float mean = total(sum) / (float)n;
    for (int64_t c = 0; c < n; c += LANES) squares += (load(out + c) - mean) * (load(out + c) - mean);
    float scale = 1 / sqrtf(total(squares) / (float)n + (float)b->epsilon);
    for (int64_t c = 0; c < n; c += LANES) store(out + c, (load(out + c) - mean) * scale);
}

static void run_convnext_part(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct convnext_call *call = job;
    switch (phase) {
    case 0: normed_row(call, item); break;
    case 1: keep_tail(&call->windows, item); break;
    default: run_product(phase == 2 ? &call->up : &call->down, item, items);
    }
}

EXPORT int64_t convnext_scratch(const struct convnext *b, int64_t streams, int64_t rows) {
    return 4 * streams * rows * (b->channels + b->up.outputs);
}

/* x (B, T, C) += the block of it. */
EXPORT void run_convnext(struct pool *pool, const struct convnext *b, float *x, struct streams *state,
                         uint8_t *scratch, int64_t rows) {
    int64_t streams = state->count;
    struct convnext_call call = {{4, items_of_convnext, run_convnext_part}, .block = b, .normed = (float *)scratch};
    float *hidden = call.normed + streams * rows * b->channels;
    call.windows = (struct windows){x, state, NULL, {0}, rows * b->channels, b->start, streams, rows, TAPS - 1,
                                    b->channels, false};
    call.up = (struct product){&b->up, call.normed, streams, rows, rows, hidden, GELU, false, {0}};
    call.down = (struct product){&b->down, hidden, streams, rows, rows, x, ADDED, false, {0}};
    run_job(pool, &call.job);
}

/* ---- the transformer ---- */

struct attending_call {
    struct job job;
    struct attending attending;
};

static int64_t items_of_layers(const void *job, int64_t phase, int64_t threads) {
    return items_of_attending(&((const struct attending_call *)job)->attending, phase, threads);
}

static void run_layers_part(const void *job, int64_t phase, int64_t item, int64_t items) {
    run_attending(&((const struct attending_call *)job)->attending, phase, item, items);
}

EXPORT void run_layers(struct pool *pool, const struct stack *stack, const struct step *step) {
    struct attending_call call = {{stack->layers * PHASES_OF_LAYER + 1, items_of_layers, run_layers_part}, {0}};
    call.attending = attending(stack, step);
    run_job(pool, &call.job);
}

/* ---- codes ---- */

struct books {
    const float *vectors; /* (G, codes, D) */
    int64_t groups, codes, width, semantic;
};

struct looking {
    struct job job;
    const struct books *books;
    const int64_t *codes;
    float *out;
    int64_t rows;
};

static int64_t items_of_looking(const void *job, int64_t phase, int64_t threads) {
    (void)phase, (void)threads;
    return ((const struct looking *)job)->rows;
}

static void look_up_row(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct looking *call = job;
    const struct books *b = call->books;
    (void)phase, (void)items;
    for (int64_t group = 0; group < b->groups; group++) {
        int64_t code = call->codes[item * b->groups + group];
        const float *vector = b->vectors + (group * b->codes + code) * b->width;
        float *out = call->out + (2 * item + (group >= b->semantic)) * b->width;
        bool first = group == 0 || group == b->semantic;
        for (int64_t c = 0; c < b->width; c += LANES) store(out + c, first ? load(vector + c) : load(out + c) + load(vector + c));
    }
}

/* codes (N, G), each from 0 to `codes` - 1 -> the sums of their vectors (N, 2 D): of the first `semantic`, of the rest. */
EXPORT void look_up(struct pool *pool, const struct books *books, const int64_t *codes, float *out, int64_t rows) {
    struct looking call = {{1, items_of_looking, look_up_row}, books, codes, out, rows};
    run_job(pool, &call.job);
}

/* ---- the activation alone, before products that are torch's ---- */

struct activation {
    struct job job;
    const float *x;
    float *out;
    struct snake act;
    int64_t x_stride, out_stride, streams, rows, channels, parts;
};

static int64_t items_of_activation(const void *job, int64_t phase, int64_t threads) {
    const struct activation *a = job;
    (void)phase, (void)threads;
    return a->streams * a->parts;
}

static void run_activation(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct activation *a = job;
    int64_t stream = item / a->parts, part = item % a->parts;
    (void)phase, (void)items;
    for (int64_t row = a->rows * part / a->parts; row < a->rows * (part + 1) / a->parts; row++) {
        const float *x = a->x + stream * a->x_stride + row * a->channels;
        float *out = a->out + stream * a->out_stride + row * a->channels;
        for (int64_t c = 0; c < a->channels; c += LANES)
            store(out + c, snake(load(x + c), load(a->act.frequency + c), load(a->act.height + c)));
    }
}

/* x (B, T, C) -> out, which may be x; strides in floats from stream to stream. */
EXPORT void activate(struct pool *pool, const float *frequency, const float *height, const float *x, int64_t x_stride,
                     float *out, int64_t out_stride, int64_t streams, int64_t rows, int64_t channels) {
    struct activation a = {{1, items_of_activation, run_activation}, x, out, {frequency, height}, x_stride, out_stride,
                           streams, rows, channels, rows * channels / ITEM_FLOATS + 1};
    run_job(pool, &a.job);
}
