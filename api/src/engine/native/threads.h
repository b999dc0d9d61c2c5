/* Threads that do one job at a time, in phases. Theirs is all the memory here; jobs are the caller's. */
#ifndef THREADS_H
#define THREADS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Work in phases, each of so many items in any order. Whoever has the time takes the next item of the present phase:
 * a thread that the system has put aside is waited for only if it holds an item. */
struct job {
    int64_t phases;
    int64_t (*items)(const void *job, int64_t phase, int64_t threads);
    void (*run)(const void *job, int64_t phase, int64_t item, int64_t items);
};

struct pool {
    _Alignas(64) _Atomic uint64_t claims; /* number of the phase << 32 | items that nobody has taken; grows for ever */
    _Alignas(64) _Atomic int64_t unfinished;
    _Alignas(64) _Atomic bool busy;
    _Atomic bool ending;
    _Atomic int sleepers;
    const struct job *job; /* only to be read by who holds an item of it: it is the caller's */
    uint32_t begin;        /* number of its first phase */
    int64_t threads;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t ids[];
};

enum { SPINS = 2000, IDLE_NS = 200000 }; /* some 50 us until a waiting thread yields, 200 until an idle one sleeps */

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void open_phase(struct pool *pool, uint32_t number) {
    const struct job *job = pool->job;
    int64_t phase = (int64_t)(uint32_t)(number - pool->begin);
    int64_t items = phase < job->phases ? job->items(job, phase, pool->threads) : 0;
    atomic_store_explicit(&pool->unfinished, items, memory_order_relaxed);
    atomic_store(&pool->claims, (uint64_t)number << 32 | (uint64_t)items);
}

/* Take one item and do it; false if there is none to take. */
static bool help(struct pool *pool) {
    uint64_t seen = atomic_load_explicit(&pool->claims, memory_order_acquire);
    do {
        if (!(uint32_t)seen) return false;
    } while (!atomic_compare_exchange_weak(&pool->claims, &seen, seen - 1));
    const struct job *job = pool->job;
    uint32_t number = (uint32_t)(seen >> 32);
    int64_t phase = (int64_t)(uint32_t)(number - pool->begin), items = job->items(job, phase, pool->threads);
    job->run(job, phase, items - (int64_t)(uint32_t)seen, items);
    if (atomic_fetch_sub(&pool->unfinished, 1) == 1) open_phase(pool, number + 1);
    return true;
}

static void run_job(struct pool *pool, const struct job *job) {
    pool->job = job;
    pool->begin = (uint32_t)(atomic_load(&pool->claims) >> 32) + 1;
    uint32_t end = pool->begin + (uint32_t)job->phases;
    atomic_store(&pool->busy, true);
    open_phase(pool, pool->begin);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    for (int idle = 0; (uint32_t)(atomic_load_explicit(&pool->claims, memory_order_acquire) >> 32) != end;) {
        if (help(pool)) idle = 0;
        else if (++idle < SPINS) relax();
        else sched_yield();
    }
    atomic_store(&pool->busy, false);
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void sleep_until_busy(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!atomic_load(&pool->busy) && !atomic_load(&pool->ending)) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void *thread_main(void *argument) {
    struct pool *pool = argument;
    int idle = 0;
    int64_t since = 0;
    while (!atomic_load(&pool->ending)) {
        if (help(pool)) idle = 0;
        else if (++idle < SPINS) relax();
        else if (atomic_load(&pool->busy)) sched_yield();
        else {
            int64_t time = now_ns();
            if (idle == SPINS) since = time;
            else if (time - since > IDLE_NS) { sleep_until_busy(pool); idle = 0; }
            else sched_yield();
        }
    }
    return NULL;
}

EXPORT void pool_free(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->ending, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int64_t i = 0; i + 1 < pool->threads; i++) pthread_join(pool->ids[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

/* `threads` with the caller's own, which is one of them while it waits; fewer if there are no more. NULL: no memory. */
EXPORT struct pool *pool_new(int64_t threads) {
    size_t size = sizeof(struct pool) + (size_t)threads * sizeof(pthread_t);
    struct pool *pool = aligned_alloc(64, (size_t)padded((int64_t)size, 64));
    if (!pool) return NULL;
    memset(pool, 0, size);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    for (pool->threads = 1; pool->threads < threads; pool->threads++) {
        if (pthread_create(&pool->ids[pool->threads - 1], NULL, thread_main, pool)) break;
#ifdef __linux__
        pthread_setname_np(pool->ids[pool->threads - 1], "tts-kernel"); /* as top and debuggers show it */
#endif
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool;
}

#endif
