/* The decoder layers of a few rows on a CPU: one call runs a whole stack of layers for rows that are one new position
 * each. What bounds a frame there is the time to read the weights; so they are read once for all rows, each thread in
 * streams that do not break, and nothing but a few thousand instructions lies between two products.
 *
 * Owns the order of a layer's work and its arithmetic between the products, which are products.h's. Tensors, and the
 * scratch that a call needs, are the caller's (products.py, stack.py), which mirrors the structs. No call checks its
 * arguments. A row is calculated by itself: no bit of it depends on the rows beside it, on the threads (threads.h) or
 * on who took which item.
 * Shapes: N rows, I inputs, O outputs, H hidden, Q query heads, K key-value heads, G queries of each, D head_dim.
 */
#define _GNU_SOURCE
#include "products.h"
#include "threads.h"

/* ---- one product ---- */

struct product {
    struct job job;
    const struct matrix *matrix;
    int64_t n;
    const float *x;
    struct rows rows;
    float *out;
};

static int64_t items_of_product(const void *job, int64_t phase, int64_t threads) {
    const struct product *p = job;
    return phase ? product_items(threads) : p->n;
}

static void run_product(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct product *p = job;
    int64_t inputs = p->matrix->inputs;
    if (phase) multiply_part(p->matrix, &p->rows, p->n, p->out, false, item, items);
    else prepare(p->matrix->kind, p->x + item * inputs, inputs, item, &p->rows);
}

EXPORT int64_t product_scratch(const struct matrix *m, int64_t n) {
    return m->kind == EXACT ? 0 : 4 * padded(n, LANES) + n * (m->kind == FINE ? 2 : 1) * code_stride(m->inputs);
}

/* x (N, I) -> out (N, O); scratch: product_scratch bytes. */
EXPORT void multiply(struct pool *pool, const struct matrix *m, int64_t n, const float *x, float *out,
                     uint8_t *scratch) {
    struct product p = {{2, items_of_product, run_product}, m, n, x, {0}, out};
    p.rows = (struct rows){scratch + 4 * padded(n, LANES), (float *)scratch, (float *)x};
    run_job(pool, &p.job);
}

/* ---- layers ---- */

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

struct layers_job {
    struct job job;
    const struct stack *stack;
    const struct step *step;
    struct buffers buffers;
    int64_t n;
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

/* For n rows, of which none attends to more than `longest` positions. */
EXPORT int64_t step_scratch(const struct stack *s, int64_t n, int64_t longest) {
    struct buffers b;
    return (int64_t)lay_out(s, n, longest, 0, &b);
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

static void rms_norm(const float *x, const float *restrict weight, int64_t n, double epsilon, float *out) {
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + (float)epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* gated (2 I,) -> silu(gate) * up (I,). */
static void swiglu(const float *gated, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        size_t bytes = 4 * (size_t)(n - i < LANES ? n - i : LANES);
        Floats gate = {0}, up = {0};
        memcpy(&gate, gated + i, bytes);
        memcpy(&up, gated + n + i, bytes);
        gate = gate / (1 + exponential(-gate)) * up;
        memcpy(out + i, &gate, bytes);
    }
}

/* A head (D,), normed and rotated; `out` may be the head itself. */
static void turn(const float *head, const float *weight, const float *cos, const float *sin, int64_t n, double epsilon,
                 float *out) {
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

/* One query (D,) over `length` keys and values (length, D) -> out (D,). */
static void attend(const float *query, const float *keys, const float *restrict values, int64_t length, int64_t n,
                   float *restrict scores, float *restrict out) {
    float scale = 1 / sqrtf((float)n);
    for (int64_t i = 0; i < length; i++) scores[i] = dot(query, keys + i * n, n) * scale;
    float share = 1 / soften(scores, length);
    memset(out, 0, 4 * (size_t)n);
    for (int64_t i = 0; i < length; i++)
        for (int64_t d = 0; d < n; d++) out[d] += scores[i] * values[i * n + d];
    for (int64_t d = 0; d < n; d++) out[d] *= share;
}

/* One key-value head of one sequence: its new keys and values into the arenas, then the queries that belong to it. */
static void attend_head(const struct layers_job *j, int64_t layer, int64_t sequence, int64_t head) {
    const struct stack *s = j->stack;
    const struct step *step = j->step;
    const struct layer *l = s->layer + layer;
    int64_t n = s->head_dim, group = s->queries / s->keys, width = (s->queries + 2 * s->keys) * n;
    int64_t longest = 0, first = sequence * step->fresh;
    int64_t arena = (layer * step->slots_of_layer + step->slots[first]) * s->keys + head;
    float *keys = step->keys + arena * step->span * n, *values = step->values + arena * step->span * n;
    for (int64_t row = first; row < first + step->fresh; row++) {
        int64_t at = step->positions[row] * n;
        const float *projected = j->buffers.heads + row * width + (s->queries + head) * n;
        turn(projected, l->k_norm, step->cos + at, step->sin + at, n, s->epsilon, keys + at);
        memcpy(values + at, projected + s->keys * n, 4 * (size_t)n);
    }
    for (int64_t row = 0; row < j->n; row++) longest = step->positions[row] > longest ? step->positions[row] : longest;
    for (int64_t row = first; row < first + step->fresh; row++)
        for (int64_t member = head * group; member < (head + 1) * group; member++) {
            int64_t at = step->positions[row] * n;
            float *query = j->buffers.heads + row * width + member * n;
            float *scores = j->buffers.scores + (row * s->queries + member) * padded(longest + 1, LANES);
            turn(query, l->q_norm, step->cos + at, step->sin + at, n, s->epsilon, query);
            attend(query, keys, values, step->positions[row] + 1, n, scores,
                   j->buffers.attended + (row * s->queries + member) * n);
        }
}

/* What a phase is, and of which layer. */
static enum phase kind_of(const struct stack *s, int64_t phase, int64_t *layer) {
    *layer = phase / PHASES_OF_LAYER;
    if (*layer < s->layers) return (enum phase)(phase % PHASES_OF_LAYER);
    return phase == s->layers * PHASES_OF_LAYER ? LAST_NORM : HEAD;
}

static int64_t items_of_layers(const void *job, int64_t phase, int64_t threads) {
    const struct layers_job *j = job;
    int64_t number;
    switch (kind_of(j->stack, phase, &number)) {
    case QKV: case O: case GATE_UP: case DOWN: case HEAD: return product_items(threads);
    case ATTEND: return j->step->sequences * j->stack->keys;
    case LAST_NORM: return j->step->sequences;
    default: return j->n;
    }
}

static void run_layers(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct layers_job *j = job;
    const struct stack *s = j->stack;
    const struct step *step = j->step;
    const struct buffers *b = &j->buffers;
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
    case QKV: multiply_part(&l->qkv, &rows, j->n, b->heads, false, item, items); break;
    case ATTEND: attend_head(j, number, item / s->keys, item % s->keys); break;
    case ROUND: prepare(l->o.kind, b->attended + item * inner, inner, item, &rows); break;
    case O: multiply_part(&l->o, &rows, j->n, step->x, true, item, items); break;
    case POST_NORM:
        rms_norm(x, l->post_norm, s->hidden, s->epsilon, normed);
        prepare(l->gate_up.kind, normed, s->hidden, item, &rows);
        break;
    case GATE_UP: multiply_part(&l->gate_up, &rows, j->n, b->gated, false, item, items); break;
    case SWIGLU:
        swiglu(b->gated + item * 2 * s->inner, s->inner, b->active + item * s->inner);
        prepare(l->down.kind, b->active + item * s->inner, s->inner, item, &rows);
        break;
    case DOWN: multiply_part(&l->down, &rows, j->n, step->x, true, item, items); break;
    case LAST_NORM:
        x = step->x + ((item + 1) * step->fresh - 1) * s->hidden;
        rms_norm(x, s->norm, s->hidden, s->epsilon, step->normed + item * s->hidden);
        if (head) prepare(head->kind, step->normed + item * s->hidden, s->hidden, item, &rows);
        break;
    default: multiply_part(head, &rows, step->sequences, step->logits, false, item, items);
    }
}

EXPORT void run_step(struct pool *pool, const struct stack *stack, const struct step *step) {
    int64_t n = step->sequences * step->fresh, longest = 0;
    for (int64_t row = 0; row < n; row++) longest = step->positions[row] > longest ? step->positions[row] : longest;
    struct layers_job j = {{0, items_of_layers, run_layers}, stack, step, {0}, n};
    j.job.phases = stack->layers * PHASES_OF_LAYER + 1 + (step->head != NULL);
    lay_out(stack, n, longest + 1, (uintptr_t)step->scratch, &j.buffers);
    run_job(pool, &j.job);
}
