/* The codec's transformer: layers over a window of positions, for new rows of several streams.
 *
 * Keys and values are those of codec_window.py's ring: position p of a slot lies in row p modulo R.
 * Shapes: B streams of T new rows each, N = B * T, H hidden, Q query heads, K key-value heads, D head_dim. */
#ifndef CODEC_ATTENTION_H
#define CODEC_ATTENTION_H

#include "codec_matrix.h"

struct window_layer { struct matrix qkv, o, gate_up, down; }; /* with the norms' weights and the layers' scales */

struct stack {
    const struct window_layer *layer; /* (layers,) */
    int64_t layers, hidden, queries, keys, head_dim, inner, ring, window;
    double epsilon;
};

struct step {
    int64_t streams, rows;            /* B, T */
    const int64_t *slots, *positions; /* (B,), and each one's first new position (B,) */
    float *x;                         /* (N, H): the input; overwritten */
    float *cache;                     /* (layers, slots, R, 2, K, D) */
    int64_t slots_of_layer;
    const float *cos, *sin;           /* (N, D); the first half of sin is negated */
    float *out;                       /* (N, H): normed */
    uint8_t *scratch;                 /* layers_scratch bytes, on a cache line */
};

/* A call in work. */
struct attending {
    const struct stack *stack;
    const struct step *step;
    float *normed, *heads, *attended, *gated, *active, *scores;
};

enum layer_phase { INPUT_NORM, QKV, ATTEND, OUTPUT, POST_NORM, GATE_UP, SWIGLU, DOWN, PHASES_OF_LAYER };

INLINE float *take(float **rest, int64_t floats) {
    float *taken = *rest;
    *rest += padded(floats, 16);
    return taken;
}

static int64_t lay_out(const struct stack *s, int64_t n, float *scratch, struct attending *a) {
    float *rest = scratch;
    a->normed = take(&rest, n * s->hidden);
    a->heads = take(&rest, n * (s->queries + 2 * s->keys) * s->head_dim);
    a->attended = take(&rest, n * s->queries * s->head_dim);
    a->gated = take(&rest, n * 2 * s->inner);
    a->active = take(&rest, n * s->inner);
    a->scores = take(&rest, n * s->queries * padded(s->window, LANES));
    return 4 * (rest - scratch);
}

EXPORT int64_t layers_scratch(const struct stack *s, int64_t n) {
    static float none[1];
    struct attending a;
    return lay_out(s, n, none, &a);
}

static struct attending attending(const struct stack *stack, const struct step *step) {
    struct attending a = {stack, step, NULL, NULL, NULL, NULL, NULL, NULL};
    lay_out(stack, step->streams * step->rows, (float *)step->scratch, &a);
    return a;
}

static void rms_norm(const float *x, int64_t n, double epsilon, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + (float)epsilon);
    for (int64_t i = 0; i < n; i += LANES) store(out + i, load(x + i) * scale);
}

static void swiglu(const float *gated, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        Floats gate = load(gated + i);
        store(out + i, gate / (1 + exponential(-gate)) * load(gated + n + i));
    }
}

/* A head (D,), rotated; `out` may be the head itself. */
static void turn(const float *head, const float *cos, const float *sin, int64_t n, float *out) {
    for (int64_t i = 0; i < n / 2; i++) {
        float here = head[i], there = head[i + n / 2];
        out[i] = here * cos[i] + there * sin[i];
        out[i + n / 2] = there * cos[i + n / 2] + here * sin[i + n / 2];
    }
}

/* scores (n,), with room up to a multiple of LANES -> their exponentials; the sum of these. */
static float soften(float *scores, int64_t n) {
    float most = scores[0];
    Floats sum = {0};
    for (int64_t i = 1; i < n; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = n; i < padded(n, LANES); i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        Floats share = exponential(load(scores + i) - most);
        store(scores + i, share);
        sum += share;
    }
    return total(sum);
}

/* One query (D,) at `position` over the keys and values of its window in a ring, a head's first row of which is given. */
static void attend(const struct stack *s, const float *query, const float *ring, int64_t position, float *scores,
                   float *restrict out) {
    int64_t n = s->head_dim, row = 2 * s->keys * n, values = s->keys * n;
    int64_t first = position < s->window ? 0 : position - s->window + 1, length = position + 1 - first;
    float scale = 1 / sqrtf((float)n);
    int64_t begin = first % s->ring, at = begin;
    for (int64_t i = 0; i < length; i++, at = at + 1 < s->ring ? at + 1 : 0)
        scores[i] = dot(query, ring + at * row, n) * scale;
    float share = 1 / soften(scores, length);
    memset(out, 0, 4 * (size_t)n);
    at = begin;
    for (int64_t i = 0; i < length; i++, at = at + 1 < s->ring ? at + 1 : 0) {
        const float *value = ring + at * row + values;
        for (int64_t d = 0; d < n; d += LANES) store(out + d, load(out + d) + scores[i] * load(value + d));
    }
    for (int64_t d = 0; d < n; d += LANES) store(out + d, load(out + d) * share);
}

/* One key-value head of one stream: its new keys and values into the ring, then the queries that belong to it. */
static void attend_head(const struct attending *a, int64_t layer, int64_t stream, int64_t head) {
    const struct stack *s = a->stack;
    const struct step *step = a->step;
    int64_t n = s->head_dim, group = s->queries / s->keys, width = (s->queries + 2 * s->keys) * n;
    int64_t row_floats = 2 * s->keys * n, begin = stream * step->rows;
    float *ring = step->cache + (layer * step->slots_of_layer + step->slots[stream]) * s->ring * row_floats + head * n;
    for (int64_t row = begin; row < begin + step->rows; row++) {
        float *at = ring + (step->positions[stream] + row - begin) % s->ring * row_floats;
        const float *key = a->heads + row * width + (s->queries + head) * n;
        turn(key, step->cos + row * n, step->sin + row * n, n, at);
        memcpy(at + s->keys * n, key + s->keys * n, 4 * (size_t)n);
    }
    for (int64_t row = begin; row < begin + step->rows; row++)
        for (int64_t member = head * group; member < (head + 1) * group; member++) {
            float *query = a->heads + row * width + member * n;
            turn(query, step->cos + row * n, step->sin + row * n, n, query);
            attend(s, query, ring, step->positions[stream] + row - begin,
                   a->scores + (row * s->queries + member) * padded(s->window, LANES),
                   a->attended + (row * s->queries + member) * n);
        }
}

static struct product layer_product(const struct attending *a, const struct window_layer *l, enum layer_phase phase) {
    int64_t n = a->step->streams * a->step->rows;
    struct product p = {&l->qkv, a->normed, 1, n, n, a->heads, PLAIN, false, {0}};
    if (phase == OUTPUT) p = (struct product){&l->o, a->attended, 1, n, n, a->step->x, ADDED, false, {0}};
    if (phase == GATE_UP) p = (struct product){&l->gate_up, a->normed, 1, n, n, a->gated, PLAIN, false, {0}};
    if (phase == DOWN) p = (struct product){&l->down, a->active, 1, n, n, a->step->x, ADDED, false, {0}};
    return p;
}

INLINE bool is_product(int64_t phase) { return phase == QKV || phase == OUTPUT || phase == GATE_UP || phase == DOWN; }

static int64_t items_of_attending(const struct attending *a, int64_t phase, int64_t threads) {
    const struct stack *s = a->stack;
    int64_t layer = phase / PHASES_OF_LAYER, kind = phase % PHASES_OF_LAYER;
    if (kind == ATTEND) return a->step->streams * s->keys;
    if (!is_product(kind)) return a->step->streams * a->step->rows; /* the last norm's phase too */
    struct product p = layer_product(a, s->layer + layer, (enum layer_phase)kind);
    return items_of_product(&p, threads);
}

static void run_attending(const struct attending *a, int64_t phase, int64_t item, int64_t items) {
    const struct stack *s = a->stack;
    int64_t layer = phase / PHASES_OF_LAYER, kind = phase % PHASES_OF_LAYER;
    const float *x = a->step->x + item * s->hidden;
    if (layer == s->layers) rms_norm(x, s->hidden, s->epsilon, a->step->out + item * s->hidden);
    else if (kind == ATTEND) attend_head(a, layer, item / s->keys, item % s->keys);
    else if (kind == SWIGLU) swiglu(a->gated + item * 2 * s->inner, s->inner, a->active + item * s->inner);
    else if (!is_product(kind)) rms_norm(x, s->hidden, s->epsilon, a->normed + item * s->hidden);
    else {
        struct product p = layer_product(a, s->layer + layer, (enum layer_phase)kind);
        run_product(&p, item, items);
    }
}

#endif
