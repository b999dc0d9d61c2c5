/* Choosing the code of a row as sampling.py does: penalty, suppression, temperature, top-k, top-p, and a place among
 * what is left, the likeliest first. Sums of odds are doubles that are rounded, as torch's cumulative sums are.
 *
 * Whatever the logits are, what comes of them is a code. Shapes: V vocabulary. */
#ifndef SAMPLING_H
#define SAMPLING_H

#include "layers.h"

struct rule {
    bool sampled;
    float temperature, top_p;
    int64_t top_k; /* 0: all */
};

struct ranked {
    float score;
    int32_t code;
};

static int64_t choice_scratch(int64_t codes) { return padded(codes, LANES) * (int64_t)(4 + sizeof(struct ranked)); }

/* The generator's number `counter` in [0, 1): SplitMix64 (Steele, Lea, Flood 2014), its highest 24 bits. */
static float uniform_at(uint64_t key, uint64_t counter) {
    uint64_t mixed = key + counter * 0x9e3779b97f4a7c15;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
    return (float)((mixed ^ mixed >> 31) >> 40) * 0x1p-24f;
}

/* Repetition penalty of what was `seen` (V,), and -inf where `suppressed` (V,). */
static void penalise(float *logits, int64_t n, const bool *seen, float penalty, const bool *suppressed) {
    for (int64_t i = 0; i < n; i++) {
        float logit = logits[i], less = logit < 0 ? logit * penalty : logit / penalty;
        logits[i] = suppressed[i] ? -INFINITY : seen[i] ? less : logit;
    }
}

static int64_t best_of(const float *logits, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++) best = logits[i] > logits[best] ? i : best;
    return best;
}

/* Integers in the order of the floats, and back. */
INLINE Ints ordered(Ints bits) { return bits ^ (bits >> 31 & INT32_MAX); }

/* The k-th largest of n integers, followed by INT32_MIN up to a multiple of 16: bit by bit, from the highest. */
static int32_t kth_largest(const int32_t *numbers, int64_t n, int64_t k) {
    int64_t found = INT32_MIN;
    for (int bit = 31; bit >= 0; bit--) {
        int64_t tried = found + (1LL << bit), count = 0;
        Ints counts = {0};
        for (int64_t i = 0; i < n; i += LANES) {
            Ints some;
            memcpy(&some, numbers + i, sizeof some);
            counts -= some >= (int32_t)tried;
        }
        for (int lane = 0; lane < LANES; lane++) count += counts[lane];
        if (count >= k) found = tried;
    }
    return (int32_t)found;
}

/* Whether a comes before b: equal ones go by their codes. */
INLINE bool before(struct ranked a, struct ranked b) {
    return a.score > b.score || (a.score == b.score && a.code < b.code);
}

static void sift(struct ranked *heap, int64_t n, int64_t place) {
    struct ranked moved = heap[place];
    for (int64_t child; (child = 2 * place + 1) < n; place = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], moved)) break;
        heap[place] = heap[child];
    }
    heap[place] = moved;
}

/* The first of the heap of n, which goes behind the rest of it. */
static struct ranked take_first(struct ranked *heap, int64_t n) {
    struct ranked first = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = first;
    sift(heap, n - 1, 0);
    return first;
}

INLINE float odds(float score, float most, float all) { return exponential(spread(score - most))[0] / all; }

/* One of n codes, in any order. most: their highest score; all: the sum of the exponentials above it. */
static int64_t draw(struct ranked *heap, int64_t n, float most, float all, float top_p, float uniform) {
    int64_t left = n, end = 0;
    double kept = 1, reach = 0;
    for (int64_t i = n / 2; i-- > 0;) sift(heap, n, i);
    if (top_p < 1) {
        for (kept = 0; left; left--) {
            float own = odds(heap[0].score, most, all);
            if (left < n && !((float)(kept + own) - own < top_p)) break;
            kept += own;
            take_first(heap, left);
        }
        end = left;
    }
    for (int64_t place = n - 1; place > end; place--) { /* what was taken from the heap lies behind it, in its order */
        if (place < left) take_first(heap, left--);
        reach += odds(heap[place].score, most, all);
        if ((float)reach >= uniform * (float)kept) return heap[place].code;
    }
    return heap[end].code;
}

/* A code by n logits; scratch: choice_scratch bytes. */
static int64_t choose(const float *logits, int64_t n, struct rule rule, float uniform, uint8_t *scratch) {
    int64_t best = best_of(logits, n), count = 0;
    if (!rule.sampled) return best;
    struct ranked *heap = (struct ranked *)scratch;
    int32_t *numbers = (int32_t *)(heap + padded(n, LANES));
    float most = logits[best] / rule.temperature;
    for (int64_t i = 0; i < padded(n, LANES); i += LANES) {
        Floats some = spread(-INFINITY);
        memcpy(&some, logits + i, 4 * (size_t)(n - i < LANES ? n - i : LANES));
        some = (Floats)ordered((Ints)(some / rule.temperature));
        store((float *)numbers + i, some);
    }
    int32_t least = kth_largest(numbers, n, rule.top_k == 0 || rule.top_k > n ? n : rule.top_k);
    Floats all = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        Ints some;
        memcpy(&some, numbers + i, sizeof some);
        Floats score = (Floats)ordered(some);
        Ints in = (some >= least) & (score - most > -87.0f); /* NaN is not; nor what has no odds, as -inf */
        all += pick(in, exponential(score - most), spread(0));
        memcpy((float *)numbers + i, &score, sizeof score);
        for (int lane = 0; lane < LANES; lane++)
            if (in[lane]) heap[count++] = (struct ranked){score[lane], (int32_t)i + lane};
    }
    return count ? draw(heap, count, most, total(all), rule.top_p, uniform) : best;
}

#endif
