/* The decoder layers of a few rows on a CPU: one call runs a whole stack of layers for rows that are one new position
 * each, or a whole frame: the talker's step, and the code predictor's passes with the choices between them. What bounds
 * a frame there is the time to read the weights; so they are read once for all rows, each thread in streams that do not
 * break, and little lies between two products.
 *
 * Owns the order of passes and choices in a frame; a layer's work is layers.h's, a choice sampling.h's. Tensors, and
 * the scratch that a call needs, are the caller's (products.py, stack.py, frame.py), which mirrors the structs. No call
 * checks its arguments. A row is calculated by itself: no bit of it depends on the rows beside it, on the threads
 * (threads.h) or on who took which item.
 * Shapes: N rows, I inputs, O outputs, B sequences, H talker's hidden, h the predictor's, V a vocabulary, C code groups.
 */
#define _GNU_SOURCE
#include "layers.h"
#include "products.h"
#include "sampling.h"
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

/* ---- one step of a stack ---- */

struct step_job {
    struct job job;
    struct pass pass;
};

static int64_t items_of_step(const void *job, int64_t phase, int64_t threads) {
    const struct pass *p = &((const struct step_job *)job)->pass;
    return items_of_pass(p->stack, p->step.sequences, p->step.fresh, phase, threads);
}

static void run_step_item(const void *job, int64_t phase, int64_t item, int64_t items) {
    run_pass(&((const struct step_job *)job)->pass, phase, item, items);
}

/* For n rows, of which none attends to more than `longest` positions. */
EXPORT int64_t step_scratch(const struct stack *s, int64_t n, int64_t longest) {
    struct buffers b;
    return (int64_t)lay_out(s, n, longest, 0, &b);
}

static int64_t longest_of(const int64_t *positions, int64_t n) {
    int64_t longest = 0;
    for (int64_t row = 0; row < n; row++) longest = positions[row] > longest ? positions[row] : longest;
    return longest + 1;
}

EXPORT void run_step(struct pool *pool, const struct stack *stack, const struct step *step) {
    int64_t longest = longest_of(step->positions, step->sequences * step->fresh);
    struct step_job j = {{phases_of_pass(stack, step->head), items_of_step, run_step_item},
                         begin_pass(stack, step, longest)};
    run_job(pool, &j.job);
}

/* ---- choices ---- */

EXPORT int64_t scratch_to_choose(int64_t n) { return choice_scratch(n); }

/* One code by n logits; scratch: scratch_to_choose bytes. */
EXPORT int64_t choose_one(const float *logits, int64_t n, bool sampled, float temperature, int64_t top_k, float top_p,
                          float uniform, uint8_t *scratch) {
    return choose(logits, n, (struct rule){sampled, temperature, top_p, top_k}, uniform, scratch);
}

/* ---- one frame ---- */

/* slots.py's arenas (S, ...) and what their columns are. */
enum real { PENALTY, TEMPERATURE, TOP_P, SUB_TEMPERATURE, SUB_TOP_P, REALS };
enum setting { SAMPLED, TOP_K, SUB_SAMPLED, SUB_TOP_K, MIN_NEW_TOKENS, KEY, SETTINGS };
enum progress { POSITION, FRAME, TEXT_ROWS, PROGRESSES };

struct slots {
    const float *reals;
    const int64_t *settings;
    int64_t *progress;
    float *next_input;  /* (S, H) */
    const float *text;  /* (S, rows, H) */
    int64_t rows;
    bool *seen;         /* (S, V) */
};

struct frame {
    const struct stack *talker, *predictor;
    struct slots slots;
    struct step first, later;          /* the talker's, the predictor's: arenas, rotation and the first one's head */
    int64_t groups;                    /* C */
    const struct matrix *const *heads; /* (C - 1,) */
    const struct matrix *projection;   /* of H inputs and h outputs, EXACT; NULL: H is h */
    const float *bias;                 /* (h,) */
    const float *const *inputs;        /* (C - 1,) of (V, h): what a code is to the predictor */
    const float *const *embeddings;    /* (C,) of (V, H): what it is to the talker */
    const bool *suppressed;            /* (V,) first codes that are never chosen */
    int64_t end;                       /* the first code that ends the speech */
    int64_t sequences;                 /* B */
    const int64_t *index;              /* (B,): slots */
    int64_t *codes;                    /* (B, C): made */
    uint8_t *scratch;                  /* frame_scratch bytes, aligned to 64 */
};

struct frame_job {
    struct job job;
    const struct frame *frame;
    struct pass talker;
    struct step later;                  /* what the predictor's steps have in common */
    int64_t *lengths;                   /* (B,): the talker's positions */
    int64_t *places, *positions, *pair; /* (B,), (C - 1, B) and, of the first pass, (2 B,) twice */
    float *projected;                   /* (B, h) */
    uint8_t *choices;                   /* choice_scratch of each row */
    int64_t choice_bytes;
};

static int64_t widest_vocabulary(const struct frame *f) {
    int64_t widest = f->first.head->outputs;
    for (int64_t g = 0; g + 1 < f->groups; g++) widest = f->heads[g]->outputs > widest ? f->heads[g]->outputs : widest;
    return widest;
}

/* Places from the address `scratch` on; the address of what is behind them. */
static uintptr_t lay_out_frame(const struct frame *f, uintptr_t scratch, struct frame_job *j) {
    int64_t b = f->sequences, widest = widest_vocabulary(f), longest = 0;
    struct step first = f->first, later = f->later;
    for (int64_t row = 0; row < b; row++) {
        int64_t length = f->slots.progress[f->index[row] * PROGRESSES + POSITION] + 1;
        longest = length > longest ? length : longest;
    }
    j->frame = f;
    j->places = take(&scratch, 8 * b);
    j->positions = take(&scratch, 8 * b * (f->groups - 1));
    j->pair = take(&scratch, 8 * 4 * b);
    j->projected = take(&scratch, 4 * b * f->predictor->hidden);
    j->choice_bytes = padded(choice_scratch(widest), 64);
    j->choices = take(&scratch, b * j->choice_bytes);
    first.sequences = later.sequences = b;
    first.fresh = 1;
    first.slots = f->index;
    first.positions = j->lengths = take(&scratch, 8 * b);
    first.x = take(&scratch, 4 * b * f->talker->hidden);
    first.normed = take(&scratch, 4 * b * f->talker->hidden);
    later.x = take(&scratch, 4 * 2 * b * f->predictor->hidden);
    later.normed = take(&scratch, 4 * b * f->predictor->hidden);
    first.logits = later.logits = take(&scratch, 4 * b * widest);
    first.scratch = later.scratch = (uint8_t *)scratch; /* one after the other */
    j->talker = begin_pass(f->talker, &first, longest);
    j->later = later;
    int64_t talker = step_scratch(f->talker, b, longest), predictor = step_scratch(f->predictor, 2 * b, f->groups);
    return scratch + (uintptr_t)(talker > predictor ? talker : predictor);
}

EXPORT int64_t frame_scratch(const struct frame *f) {
    struct frame_job j;
    return (int64_t)lay_out_frame(f, 0, &j);
}

/* The predictor's pass that gives the logits of code group + 1. */
static struct pass pass_of(const struct frame_job *j, int64_t group) {
    const struct frame *f = j->frame;
    struct step step = j->later;
    int64_t b = step.sequences;
    step.fresh = group ? 1 : 2;
    step.slots = group ? j->places : j->pair;
    step.positions = group ? j->positions + group * b : j->pair + 2 * b;
    step.head = f->heads[group];
    return begin_pass(f->predictor, &step, f->groups);
}

/* Code `group` of a row by n logits. */
static int64_t choose_code(const struct frame_job *j, int64_t row, int64_t group, const float *logits, int64_t n) {
    const struct frame *f = j->frame;
    const float *reals = f->slots.reals + f->index[row] * REALS;
    const int64_t *settings = f->slots.settings + f->index[row] * SETTINGS;
    int64_t frame = f->slots.progress[f->index[row] * PROGRESSES + FRAME];
    struct rule first = {settings[SAMPLED], reals[TEMPERATURE], reals[TOP_P], settings[TOP_K]};
    struct rule later = {settings[SUB_SAMPLED], reals[SUB_TEMPERATURE], reals[SUB_TOP_P], settings[SUB_TOP_K]};
    float uniform = uniform_at((uint64_t)settings[KEY], (uint64_t)(frame * f->groups + group + 1));
    int64_t code = choose(logits, n, group ? later : first, uniform, j->choices + row * j->choice_bytes);
    f->codes[row * f->groups + group] = code;
    return code;
}

static void choose_first(const struct frame_job *j, int64_t row) {
    const struct frame *f = j->frame;
    int64_t n = f->first.head->outputs, h = f->predictor->hidden, slot = f->index[row];
    float *logits = j->talker.step.logits + row * n, *x = j->later.x + 2 * row * h;
    penalise(logits, n, f->slots.seen + slot * n, f->slots.reals[slot * REALS + PENALTY], f->suppressed);
    if (f->slots.progress[slot * PROGRESSES + FRAME] < f->slots.settings[slot * SETTINGS + MIN_NEW_TOKENS])
        logits[f->end] = -INFINITY;
    int64_t code = choose_code(j, row, 0, logits, n);
    memcpy(x, (f->projection ? j->projected : j->talker.step.normed) + row * h, 4 * (size_t)h);
    if (f->projection) for (int64_t i = 0; i < h; i++) x[i] += f->bias[i];
    memcpy(x + h, f->inputs[0] + code * h, 4 * (size_t)h);
}

/* What the codes of a row lead to: the slot's next input is the sum of their embeddings and of its text. */
static void commit(const struct frame *f, int64_t row) {
    int64_t n = f->talker->hidden, slot = f->index[row], *progress = f->slots.progress + slot * PROGRESSES;
    const int64_t *codes = f->codes + row * f->groups;
    int64_t text = progress[FRAME] < progress[TEXT_ROWS] ? progress[FRAME] : progress[TEXT_ROWS];
    const float *restrict said = f->slots.text + (slot * f->slots.rows + text) * n;
    float *restrict sum = f->slots.next_input + slot * n;
    memset(sum, 0, 4 * (size_t)n);
    for (int64_t g = 1; g <= f->groups; g++) { /* code 0 last, as torch's operations have it */
        const float *restrict embedding = f->embeddings[g % f->groups] + codes[g % f->groups] * n;
        for (int64_t i = 0; i < n; i++) sum[i] += embedding[i];
    }
    for (int64_t i = 0; i < n; i++) sum[i] += said[i];
    f->slots.seen[slot * f->first.head->outputs + codes[0]] = true;
    progress[POSITION]++;
    progress[FRAME]++;
}

/* Of code `group`, from 1 on. */
static void choose_next(const struct frame_job *j, int64_t group, int64_t row) {
    const struct frame *f = j->frame;
    int64_t n = f->heads[group - 1]->outputs, h = f->predictor->hidden;
    int64_t code = choose_code(j, row, group, j->later.logits + row * n, n);
    if (group + 1 == f->groups) commit(f, row);
    else memcpy(j->later.x + row * h, f->inputs[group] + code * h, 4 * (size_t)h);
}

/* After the talker's phases come the projection and the first choice; after those of each pass, its choice. */
enum { BETWEEN = 2 };

static int64_t items_of_frame(const void *job, int64_t phase, int64_t threads) {
    const struct frame_job *j = job;
    const struct frame *f = j->frame;
    int64_t b = f->sequences, talker = phases_of_pass(f->talker, true);
    int64_t predictor = phases_of_pass(f->predictor, true) + 1;
    if (phase < talker) return items_of_pass(f->talker, b, 1, phase, threads);
    if (phase == talker) return f->projection ? product_items(threads) : 1;
    if (phase == talker + 1) return b;
    phase -= talker + BETWEEN;
    int64_t group = phase / predictor, within = phase % predictor;
    return within + 1 == predictor ? b : items_of_pass(f->predictor, b, group ? 1 : 2, within, threads);
}

static void run_frame_item(const void *job, int64_t phase, int64_t item, int64_t items) {
    const struct frame_job *j = job;
    const struct frame *f = j->frame;
    int64_t talker = phases_of_pass(f->talker, true), predictor = phases_of_pass(f->predictor, true) + 1;
    if (phase < talker) {
        run_pass(&j->talker, phase, item, items);
    } else if (phase == talker) {
        struct rows rows = {NULL, NULL, j->talker.step.normed};
        if (f->projection) multiply_part(f->projection, &rows, f->sequences, j->projected, false, item, items);
    } else if (phase == talker + 1) {
        choose_first(j, item);
    } else {
        phase -= talker + BETWEEN;
        int64_t group = phase / predictor, within = phase % predictor;
        struct pass pass = pass_of(j, group);
        if (within + 1 == predictor) choose_next(j, group + 1, item);
        else run_pass(&pass, within, item, items);
    }
}

/* One frame of each slot in `index`; what a slot has and how far it is, is then as for its next one. */
EXPORT void run_frame(struct pool *pool, const struct frame *f) {
    int64_t b = f->sequences, h = f->talker->hidden, later = (f->groups - 1) * (phases_of_pass(f->predictor, true) + 1);
    struct frame_job j;
    lay_out_frame(f, (uintptr_t)f->scratch, &j);
    j.job = (struct job){phases_of_pass(f->talker, true) + BETWEEN + later, items_of_frame, run_frame_item};
    for (int64_t row = 0; row < b; row++) {
        int64_t slot = f->index[row];
        j.places[row] = row;
        j.lengths[row] = f->slots.progress[slot * PROGRESSES + POSITION];
        memcpy(j.talker.step.x + row * h, f->slots.next_input + slot * h, 4 * (size_t)h);
    }
    for (int64_t i = 0; i < (f->groups - 1) * b; i++) j.positions[i] = i / b + 1;
    for (int64_t i = 0; i < 2 * b; i++) {
        j.pair[i] = i / 2;
        j.pair[2 * b + i] = i % 2;
    }
    run_job(pool, &j.job);
}
