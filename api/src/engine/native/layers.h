/* Decoder layers for rows that are one new position each: the order of a layer's work, and its arithmetic between the
 * products, which are products.h's. Nothing but a few thousand instructions lies between two products.
 *
 * Shapes: N rows, H hidden, Q query heads, K key-value heads, G queries of each, D head_dim, I inner. */
#ifndef LAYERS_H
#define LAYERS_H

#include "products.h"

struct layer {
    struct matrix qkv, o, gate_up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm;
};

struct stack {
    int64_t hidden, queries, keys, head_dim, inner, layers;
    double epsilon;
    const struct layer *layer; /* (layers,) */
    const float *norm;
};

/* B sequences of T new positions each: N = B * T rows. After them come the norm and, if there is one, a head, of each
 * sequence's last row. */
struct step {
    int64_t sequences, fresh;
    const int64_t *slots, *positions; /* (N,): place in the arenas, and which position of it */
    float *x;                         /* (N, H): the input; overwritten */
    float *keys, *values;             /* (layers, slots, K, span, D) */
    int64_t slots_of_layer, span;
    const float *cos, *sin;    /* (positions, D); the first half of sin is negated */
    float *normed;             /* (B, H) */
    const struct matrix *head; /* or NULL */
    float *logits;             /* (B, O) */
    uint8_t *scratch;          /* step_scratch bytes, aligned to 64 */
};

struct buffers {
    float *normed, *heads, *attended, *gated, *active, *scores;
    struct rows rows;
};

/* A step on its way; `longest`: no row attends to more positions. */
struct pass {
    const struct stack *stack;
    struct step step;
    int64_t n, longest;
    struct buffers buffers;
};

enum phase { INPUT_NORM, QKV, ATTEND, ROUND, O, POST_NORM, GATE_UP, SWIGLU, DOWN, PHASES_OF_LAYER, LAST_NORM, HEAD };

INLINE void *take(uintptr_t *rest, int64_t bytes) {
    void *taken = (void *)*rest;
    *rest += (uintptr_t)padded(bytes, 64);
    return taken;
}

/* Places for n rows from the address `scratch` on; the address of what is behind them. */
static uintptr_t lay_out(const struct stack *s, int64_t n, int64_t longest, uintptr_t scratch, struct buffers *b) {
    int64_t inner = s->queries * s->head_dim, widest = s->hidden > inner ? s->hidden : inner;
    widest = widest > 2 * s->inner ? widest : 2 * s->inner; /* FINE has two codes for each input of `down` */
    b->normed = take(&scratch, 4 * n * s->hidden);
    b->heads = take(&scratch, 4 * n * (inner + 2 * s->keys * s->head_dim));
    b->attended = take(&scratch, 4 * n * inner);
    b->gated = take(&scratch, 4 * n * 2 * s->inner);
    b->active = take(&scratch, 4 * n * s->inner);
    b->scores = take(&scratch, 4 * n * s->queries * padded(longest, LANES));
    b->rows.scales = take(&scratch, 4 * n);
    b->rows.codes = take(&scratch, n * (widest + 2 * 64));
    return scratch;
}

static struct pass begin_pass(const struct stack *s, const struct step *step, int64_t longest) {
    struct pass pass = {s, *step, step->sequences * step->fresh, longest, {0}};
    lay_out(s, pass.n, longest, (uintptr_t)step->scratch, &pass.buffers);
    return pass;
}

INLINE Floats pick(Ints where, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & where) | ((Ints)no & ~where));
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

INLINE void rms_norm(const float *x, const float *restrict weight, int64_t n, double epsilon, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + (float)epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

INLINE Floats swish(Floats gate, Floats up) { return gate / (1 + exponential(-gate)) * up; }

/* gated (2 I,) -> silu(gate) * up (I,). */
static void swiglu(const float *gated, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, swish(load(gated + i), load(gated + n + i)));
    if (i == n) return;
    size_t bytes = 4 * (size_t)(n - i);
    Floats gate = {0}, up = {0};
    memcpy(&gate, gated + i, bytes);
    memcpy(&up, gated + n + i, bytes);
    gate = swish(gate, up);
    memcpy(out + i, &gate, bytes);
}

/* A head (D,), normed and rotated; `out` may be the head itself. */
INLINE void turn(const float *head, const float *weight, const float *restrict cos, const float *restrict sin,
                 int64_t n, double epsilon, float *out) {
    rms_norm(head, weight, n, epsilon, out);
    for (int64_t i = 0; i < n / 2; i++) {
        float here = out[i], there = out[i + n / 2];
        out[i] = here * cos[i] + there * sin[i];
        out[i + n / 2] = there * cos[i + n / 2] + here * sin[i + n / 2];
    }
}

/* scores (n,), with room up to a multiple of 16 -> their exponentials; the sum of these. */
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

/* shares (length,) of values (length, D) -> their sum times `scale`, out (D,). */
INLINE void mix(const float *shares, const float *restrict values, int64_t length, int64_t n, float scale,
                float *restrict out) {
    int64_t d = 0;
    for (; d + 8 * LANES <= n; d += 8 * LANES) { /* as many as are on their way through the processor at once */
        Floats sums[8] = {{0}};
        for (int64_t i = 0; i < length; i++)
            UNROLL for (int v = 0; v < 8; v++) sums[v] += shares[i] * load(values + i * n + d + v * LANES);
        UNROLL for (int v = 0; v < 8; v++) store(out + d + v * LANES, sums[v] * scale);
    }
    for (; d < n; d++) {
        float sum = 0;
        for (int64_t i = 0; i < length; i++) sum += shares[i] * values[i * n + d];
        out[d] = sum * scale;
    }
}

enum { EARLY = 16 }; /* keys asked for before they are needed */

/* One query (D,) over `length` keys and values (length, D) -> out (D,). cold: they are in no cache yet. */
INLINE void attend(const float *query, const float *keys, const float *values, int64_t length, int64_t n, bool cold,
                   float *restrict scores, float *out) {
    float scale = 1 / sqrtf((float)n);
    for (int64_t i = 0; i < length; i++) {
        if (cold)
            for (int64_t d = 0; d < n; d += LANES) {
                __builtin_prefetch(keys + (i + EARLY) * n + d, 0, 2);
                __builtin_prefetch(values + i * n + d, 0, 2);
            }
        scores[i] = dot(query, keys + i * n, n) * scale;
    }
    float all = soften(scores, length);
    mix(scores, values, length, n, 1 / all, out);
}

/* Where keys and values of one key-value head of one sequence begin. */
INLINE int64_t arena_of(const struct pass *p, int64_t layer, int64_t sequence, int64_t head) {
    const struct step *step = &p->step;
    int64_t slot = step->slots[sequence * step->fresh];
    return ((layer * step->slots_of_layer + slot) * p->stack->keys + head) * step->span * p->stack->head_dim;
}

/* Asks for the first of them. */
static void fetch_head(const struct pass *p, int64_t layer, int64_t sequence, int64_t head) {
    const struct step *step = &p->step;
    int64_t arena = arena_of(p, layer, sequence, head), known = step->positions[sequence * step->fresh];
    known = known < EARLY ? known : EARLY;
    for (int64_t i = 0; i < known * p->stack->head_dim; i += LANES) {
        __builtin_prefetch(step->keys + arena + i, 0, 2);
        __builtin_prefetch(step->values + arena + i, 0, 2);
    }
}

/* One key-value head of one sequence: its new keys and values into the arenas, then the queries that belong to it. */
INLINE void attend_sized(const struct pass *p, int64_t layer, int64_t sequence, int64_t head, int64_t n) {
    const struct stack *s = p->stack;
    const struct step *step = &p->step;
    const struct layer *l = s->layer + layer;
    int64_t group = s->queries / s->keys, width = (s->queries + 2 * s->keys) * n, first = sequence * step->fresh;
    int64_t arena = arena_of(p, layer, sequence, head);
    float *keys = step->keys + arena, *values = step->values + arena;
    for (int64_t row = first; row < first + step->fresh; row++) {
        int64_t at = step->positions[row] * n;
        const float *projected = p->buffers.heads + row * width + (s->queries + head) * n;
        turn(projected, l->k_norm, step->cos + at, step->sin + at, n, s->epsilon, keys + at);
        memcpy(values + at, projected + s->keys * n, 4 * (size_t)n);
    }
    for (int64_t row = first; row < first + step->fresh; row++)
        for (int64_t member = head * group; member < (head + 1) * group; member++) {
            int64_t at = step->positions[row] * n;
            float *query = p->buffers.heads + row * width + member * n;
            float *scores = p->buffers.scores + (row * s->queries + member) * padded(p->longest, LANES);
            turn(query, l->q_norm, step->cos + at, step->sin + at, n, s->epsilon, query);
            attend(query, keys, values, step->positions[row] + 1, n, row == first && member == head * group, scores,
                   p->buffers.attended + (row * s->queries + member) * n);
        }
}

/* Item `item` of ATTEND. */
static void attend_head(const struct pass *p, int64_t layer, int64_t item) {
    int64_t heads = p->stack->keys, next = item + 1;
    if (item == 0) fetch_head(p, layer, 0, 0);
    if (next < p->step.sequences * heads) fetch_head(p, layer, next / heads, next % heads);
    if (p->stack->head_dim == 128) attend_sized(p, layer, item / heads, item % heads, 128); /* the published size */
    else attend_sized(p, layer, item / heads, item % heads, p->stack->head_dim);
}

/* What a phase is, and of which layer. */
static enum phase kind_of(const struct stack *s, int64_t phase, int64_t *layer) {
    *layer = phase / PHASES_OF_LAYER;
    if (*layer < s->layers) return (enum phase)(phase % PHASES_OF_LAYER);
    return phase == s->layers * PHASES_OF_LAYER ? LAST_NORM : HEAD;
}

static int64_t phases_of_pass(const struct stack *s, bool head) { return s->layers * PHASES_OF_LAYER + 1 + head; }

static int64_t items_of_pass(const struct stack *s, int64_t sequences, int64_t fresh, int64_t phase, int64_t threads) {
    int64_t layer;
    switch (kind_of(s, phase, &layer)) {
    case QKV: case O: case GATE_UP: case DOWN: case HEAD: return product_items(threads);
    case ATTEND: return sequences * s->keys;
    case LAST_NORM: return sequences;
    default: return sequences * fresh;
    }
}

static void run_pass(const struct pass *p, int64_t phase, int64_t item, int64_t items) {
    const struct stack *s = p->stack;
    const struct step *step = &p->step;
    const struct buffers *b = &p->buffers;
    int64_t number, inner = s->queries * s->head_dim;
    enum phase kind = kind_of(s, phase, &number);
    const struct layer *l = s->layer + number;
    struct rows rows = b->rows;
    const struct matrix *head = step->head;
    float *x = step->x + item * s->hidden, *normed = b->normed + item * s->hidden;
    rows.floats = kind == O || kind == ROUND ? b->attended : kind == DOWN || kind == SWIGLU ? b->active : b->normed;
    switch (kind) {
    case INPUT_NORM:
        rms_norm(x, l->input_norm, s->hidden, s->epsilon, normed);
        prepare(l->qkv.kind, normed, s->hidden, item, &rows);
        break;
    case QKV: multiply_part(&l->qkv, &rows, p->n, b->heads, false, item, items); break;
    case ATTEND: attend_head(p, number, item); break;
    case ROUND: prepare(l->o.kind, b->attended + item * inner, inner, item, &rows); break;
    case O: multiply_part(&l->o, &rows, p->n, step->x, true, item, items); break;
    case POST_NORM:
        rms_norm(x, l->post_norm, s->hidden, s->epsilon, normed);
        prepare(l->gate_up.kind, normed, s->hidden, item, &rows);
        break;
    case GATE_UP: multiply_part(&l->gate_up, &rows, p->n, b->gated, false, item, items); break;
    case SWIGLU:
        swiglu(b->gated + item * 2 * s->inner, s->inner, b->active + item * s->inner);
        prepare(l->down.kind, b->active + item * s->inner, s->inner, item, &rows);
        break;
    case DOWN: multiply_part(&l->down, &rows, p->n, step->x, true, item, items); break;
    case LAST_NORM:
        x = step->x + ((item + 1) * step->fresh - 1) * s->hidden;
        rms_norm(x, s->norm, s->hidden, s->epsilon, step->normed + item * s->hidden);
        if (head) prepare(head->kind, step->normed + item * s->hidden, s->hidden, item, &rows);
        break;
    default: multiply_part(head, &rows, step->sequences, step->logits, false, item, items);
    }
}

#endif
