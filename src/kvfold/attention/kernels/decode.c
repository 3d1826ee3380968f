/* Attention of one new token over the slots of a layer, read as they lie: plain numbers, 8 bits, 4 bits, or latents.

   A layer's parts are gone through one after the other. A part is decoded a tile at a time into a buffer that stays in the
   first cache, and all query heads that share its key/value head read it there. The softmax goes along (Milakov and
   Gimelshein, https://arxiv.org/abs/1805.02867), so parts need no merge. Sums are float32. Vectors are those of GCC and
   Clang, for any processor. It is compiled once for each head size, SIZE. The slow reference is ../reference.py. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES (SIZE % 16 ? 8 : 16)
#define TILE 32         /* slots that are decoded at a time */
#define MOST_QUERIES 64 /* query heads that share a key/value head */
#define APART __attribute__((noinline)) /* a profile names it, and it is compiled once */
#define NOTHING -1e30f  /* the largest score of no slots */
#define BLOCK (SIZE & -SIZE)

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint8_t codes __attribute__((vector_size(LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));

enum kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4, PLANES = 5, LATENTS = 6 };

/* Keys or values of all slots, in order of row, head, slot. */
typedef struct {
    const void *numbers;   /* [slots, SIZE], or [slots, SIZE / 2] of 4 bits */
    const _Float16 *steps; /* [slots, SIZE / group] of codes */
    const _Float16 *lows;  /* likewise, of 4 bits */
} side;

typedef struct {
    side keys, values;
    const int64_t *spans;   /* [heads, 2]: where each head's slots begin and end; NULL: `count` of each, `stride` apart */
    int64_t stride, count;
    int32_t kind, group, rotated, unused;
} part;

/* A running softmax of the query heads that share a key/value head. */
typedef struct {
    float output[MOST_QUERIES][SIZE], largest[MOST_QUERIES], total[MOST_QUERIES];
} answer;

static inline floats spread(float number) { return number - (floats){0}; }

static inline float sum_of(floats numbers) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += numbers[lane];
    return total;
}

/* Sum LANES vectors at once: number i of the answer is the sum of vector i. A third of the work of one after the other. */
static inline __attribute__((always_inline)) floats sums_of(floats *vectors) {
    ints even, odd;
    for (int lane = 0; lane < LANES; lane++) even[lane] = 2 * lane, odd[lane] = 2 * lane + 1;
#pragma GCC unroll 8
    for (int left = LANES / 2; left > 0; left /= 2)
#pragma GCC unroll 8
        for (int at = 0; at < left; at++) {
            floats one = vectors[2 * at], other = vectors[2 * at + 1];
            vectors[at] = __builtin_shuffle(one, other, even) + __builtin_shuffle(one, other, odd);
        }
    return vectors[0];
}

/* What is read next, asked for a few lines with each slot, so that memory works while this tile is computed. A processor's
   own foresight ends with a page, and keys and values take turns every two. */
typedef struct {
    const char *from; /* NULL: nothing */
    int64_t bytes;    /* with each slot: whole lines */
} ahead;

#define LINE 64

static inline __attribute__((always_inline)) void ask_ahead(ahead next, int64_t slot) {
    for (int64_t at = 0; at < next.bytes; at += LINE) __builtin_prefetch(next.from + slot * next.bytes + at, 0, 2);
}

/* The share of query `q` of a tile of so many bytes, of which all queries together ask for the whole. */
static inline ahead share_of(const void *tile, int64_t bytes, int q, int queries) {
    int64_t each = (bytes / TILE + queries * LINE - 1) / (queries * LINE) * LINE;
    int64_t before = q * each * TILE;
    return before < bytes ? (ahead){(const char *)tile + before, each} : (ahead){NULL, 0};
}

/* Score `count` slots of a tile, `size` whole vectors' numbers each, by one query. Behind them nothing is read. */
static inline __attribute__((always_inline)) void
score(int size, const float *query, const float *tile, int count, ahead next, float *scores) {
    int slot = 0;
    for (; slot + LANES <= count; slot += LANES) {
        floats products[LANES];
#pragma GCC unroll 16
        for (int k = 0; k < LANES; k++) {
            ask_ahead(next, slot + k);
            products[k] = *(floats *)query * *(floats *)(tile + (slot + k) * size);
            for (int d = LANES; d < size; d += LANES)
                products[k] += *(floats *)(query + d) * *(floats *)(tile + (slot + k) * size + d);
        }
        *(floats *)(scores + slot) = sums_of(products);
    }
    for (; slot < count; slot++) {
        floats products = {0};
        for (int d = 0; d < size; d += LANES) products += *(floats *)(query + d) * *(floats *)(tile + slot * size + d);
        scores[slot] = sum_of(products);
    }
}

/* exp of numbers that are at most 0, by a power of two and a polynomial; below -87 it is 0. */
static inline floats exponential(floats x) {
    ints alive = x > spread(-87.0f);
    x = (floats)((ints)x & alive);
    ints whole = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats rest = x - __builtin_convertvector(whole, floats) * 0.693359375f;
    rest += __builtin_convertvector(whole, floats) * 2.12194440e-4f;
    floats power = spread(1.9875691500e-4f);
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    ints exponent = (whole + 127) << 23;
    return (floats)((ints)(power * (floats)exponent) & alive);
}

/* Rotate by the Walsh-Hadamard matrix, in blocks (../hadamard.py); twice gives the numbers back. */
static void rotate(float *numbers) {
    for (int first = 0; first < SIZE; first += BLOCK)
        for (int step = 1; step < BLOCK; step *= 2)
            for (int at = first; at < first + BLOCK; at += 2 * step)
                for (int d = at; d < at + step; d++) {
                    float left = numbers[d], right = numbers[d + step];
                    numbers[d] = left + right;
                    numbers[d + step] = left - right;
                }
    for (int d = 0; d < SIZE; d++) numbers[d] *= 1 / sqrtf(BLOCK);
}

/* Put the even dimensions of each 32 before the odd ones, or back: two 4-bit numbers lie in one byte. */
static void split_pairs(const float *from, float *to, int back) {
    for (int first = 0; first < SIZE; first += 2 * LANES)
        for (int d = 0; d < 2 * LANES; d++) {
            int apart = first + d / 2 + d % 2 * LANES;
            if (back) to[first + d] = from[apart];
            else to[apart] = from[first + d];
        }
}

/* Widen LANES signed bytes. Compilers are slow at the sign. */
static inline floats signed_bytes(const uint8_t *from) {
#if defined(__AVX512F__) && SIZE % 16 == 0
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(codes *)from ^ 128, ints) - 128, floats);
#endif
}

/* Decode `count` slots from number `first` on into floats [count, SIZE]; 4 bits in the order of split_pairs. */
static inline __attribute__((always_inline)) void
decode(enum kind kind, const side *from, int64_t first, int count, int group, float *restrict to) {
    if (kind == BFLOAT16 || kind == FLOAT16) {
        const uint16_t *numbers = (const uint16_t *)from->numbers + first * SIZE;
        for (int d = 0; d < count * SIZE; d += LANES) {
            if (kind == BFLOAT16) *(floats *)(to + d) = (floats)(__builtin_convertvector(*(halves *)(numbers + d), ints) << 16);
            else for (int lane = 0; lane < LANES; lane++) to[d + lane] = (float)((const _Float16 *)numbers)[d + lane];
        }
        return;
    }
    int groups = SIZE / group;
    const _Float16 *steps = from->steps + first * groups, *lows = kind == INT4 ? from->lows + first * groups : steps;
    const uint8_t *packed = (const uint8_t *)from->numbers + (kind == INT4 ? first * SIZE / 2 : first * SIZE);
    for (int at = 0; at < count * groups; at++) {
        float step = (float)steps[at], low = (float)lows[at];
        if (kind == INT8)
            for (int d = 0; d < group; d += LANES, packed += LANES, to += LANES) *(floats *)to = signed_bytes(packed) * step;
        else
            for (int d = 0; d < group; d += 2 * LANES, packed += LANES, to += 2 * LANES) {
                codes pairs = *(codes *)packed;
                *(floats *)to = __builtin_convertvector(__builtin_convertvector(pairs & 15, ints), floats) * step + low;
                *(floats *)(to + LANES) = __builtin_convertvector(__builtin_convertvector(pairs >> 4, ints), floats) * step + low;
            }
    }
}

/* Turn a tile of scores into weights under a running softmax; by what must its earlier sums be multiplied? */
static inline float soften(float *scores, float *largest, float *total) {
    float before = *largest, highest = before;
    for (int slot = 0; slot < TILE; slot++) highest = scores[slot] > highest ? scores[slot] : highest;
    floats sums = {0};
    for (int slot = 0; slot < TILE; slot += LANES)
        sums += *(floats *)(scores + slot) = exponential(*(floats *)(scores + slot) - highest);
    float shrink = highest == before ? 1.0f : exponential(spread(before - highest))[0];
    *largest = highest;
    *total = *total * shrink + sum_of(sums);
    return shrink;
}

/* Add the slots from `begin` to `end` to an answer. */
static inline __attribute__((always_inline)) void
attend(enum kind kind, const part *from, int64_t begin, int64_t end, int queries, const float *query, answer *into) {
    float buffer[TILE * SIZE] __attribute__((aligned(64)));
    float weights[MOST_QUERIES][TILE] __attribute__((aligned(64)));
    int64_t width = kind == FLOAT32 ? 4 * SIZE : kind == INT8 ? SIZE : kind == INT4 ? SIZE / 2 : 2 * SIZE;
    int64_t bytes = kind == FLOAT32 ? TILE * width : 0; /* narrow numbers cost more to decode than to fetch */
    for (int64_t first = begin; first < end; first += TILE) {
        int count = end - first < TILE ? (int)(end - first) : TILE;
        int64_t behind = (first + TILE) * width; /* where the next tile begins */
        const float *tile = buffer;
        if (kind == FLOAT32) tile = (const float *)from->keys.numbers + first * SIZE;
        else decode(kind, &from->keys, first, count, from->group, buffer);
        for (int q = 0; q < queries; q++) {
            float *scores = weights[q];
            ahead next = share_of((const char *)from->keys.numbers + behind, bytes, q, queries);
            score(SIZE, query + q * SIZE, tile, count, next, scores);
            for (int slot = count; slot < TILE; slot++) scores[slot] = NOTHING;
            float shrink = soften(scores, &into->largest[q], &into->total[q]);
            if (shrink != 1.0f)
                for (int d = 0; d < SIZE; d++) into->output[q][d] *= shrink;
        }
        if (kind == FLOAT32) tile = (const float *)from->values.numbers + first * SIZE;
        else decode(kind, &from->values, first, count, from->group, buffer);
        for (int q = 0; q < queries; q++) {
            ahead next = share_of((const char *)from->values.numbers + behind, bytes, q, queries);
            floats sums[SIZE / LANES];
            for (int d = 0; d < SIZE / LANES; d++) sums[d] = *(floats *)(into->output[q] + d * LANES);
            for (int slot = 0; slot < count; slot++) {
                ask_ahead(next, slot);
                for (int d = 0; d < SIZE / LANES; d++)
                    sums[d] += weights[q][slot] * *(floats *)(tile + slot * SIZE + d * LANES);
            }
            for (int d = 0; d < SIZE / LANES; d++) *(floats *)(into->output[q] + d * LANES) = sums[d];
        }
    }
}

static void attend_kind(const part *from, int64_t begin, int64_t end, int queries, const float *query, answer *into) {
    switch (from->kind) {
    case FLOAT32: attend(FLOAT32, from, begin, end, queries, query, into); break;
    case BFLOAT16: attend(BFLOAT16, from, begin, end, queries, query, into); break;
    case FLOAT16: attend(FLOAT16, from, begin, end, queries, query, into); break;
    case INT8: attend(INT8, from, begin, end, queries, query, into); break;
    case INT4: attend(INT4, from, begin, end, queries, query, into); break;
    }
}

static void clear(answer *one, int queries) {
    memset(one->output, 0, sizeof(float) * SIZE * queries);
    for (int q = 0; q < queries; q++) one->largest[q] = NOTHING, one->total[q] = 0;
}

/* Add what was read apart. */
static void merge(const answer *own, int queries, answer *into) {
    for (int q = 0; q < queries; q++) {
        float largest = own->largest[q] > into->largest[q] ? own->largest[q] : into->largest[q];
        float old = expf(into->largest[q] - largest), new = expf(own->largest[q] - largest);
        for (int d = 0; d < SIZE; d++) into->output[q][d] = into->output[q][d] * old + own->output[q][d] * new;
        into->total[q] = into->total[q] * old + own->total[q] * new;
        into->largest[q] = largest;
    }
}

/* Attend over a part that is stored in other coordinates, and add what comes back in those of the queries. */
static void attend_turned(const part *from, int64_t begin, int64_t end, int queries, const float *query, answer *into) {
    float turned[MOST_QUERIES * SIZE], numbers[SIZE];
    answer own;
    clear(&own, queries);
    for (int q = 0; q < queries; q++) {
        memcpy(numbers, query + q * SIZE, sizeof numbers);
        if (from->rotated) rotate(numbers);
        if (from->kind == INT4) split_pairs(numbers, turned + q * SIZE, 0);
        else memcpy(turned + q * SIZE, numbers, sizeof numbers);
    }
    attend_kind(from, begin, end, queries, turned, &own);
    for (int q = 0; q < queries; q++) {
        if (from->kind == INT4) split_pairs(own.output[q], numbers, 1);
        else memcpy(numbers, own.output[q], sizeof numbers);
        if (from->rotated) rotate(numbers);
        memcpy(own.output[q], numbers, sizeof numbers);
    }
    merge(&own, queries, into);
}

/* What one call keeps of latents (latents.c), which all heads of a row share. */
typedef struct scratch scratch;
static int attend_shared(const part *one, int64_t head, int64_t last, int group, const float *query, float scale, scratch **of_call,
                         answer *into);
static void forget(scratch *own);

/* Attend with queries [heads, queries, SIZE], for the heads from `head` to `last`; 1: there are too many queries, or
   no memory. */
int kvfold_decode(const part *parts, int count, int64_t head, int64_t last, int queries, float scale, const float *query,
                  float *output, float *log_sum_exp) {
    if (queries > MOST_QUERIES) return 1;
    float scaled[MOST_QUERIES * SIZE];
    answer whole;
    scratch *shared = NULL;
    int failed = 0;
    for (; head < last && !failed; head++) {
        for (int d = 0; d < queries * SIZE; d++) scaled[d] = query[head * queries * SIZE + d] * scale;
        clear(&whole, queries);
        for (const part *one = parts; one < parts + count; one++) {
            if (one->kind == LATENTS) {
                failed |= attend_shared(one, head, last, queries, query, scale, &shared, &whole);
                continue;
            }
            int64_t begin = one->spans == NULL ? head * one->stride : one->spans[2 * head];
            int64_t end = one->spans == NULL ? begin + one->count : one->spans[2 * head + 1];
            if (one->rotated || one->kind == INT4) attend_turned(one, begin, end, queries, scaled, &whole);
            else attend_kind(one, begin, end, queries, scaled, &whole);
        }
        for (int q = 0; q < queries; q++) {
            float total = whole.total[q], share = total > 0 ? 1 / total : 0;
            for (int d = 0; d < SIZE; d++) output[(head * queries + q) * SIZE + d] = whole.output[q][d] * share;
            log_sum_exp[head * queries + q] = total > 0 ? whole.largest[q] + logf(total) : -INFINITY;
        }
    }
    forget(shared);
    return failed;
}

/* Write one new token of each row behind the `at` slots that each head of a tail holds: [heads, SIZE] numbers of the
   tail's kind, and a position of each row, `step` apart (0: rows share it). */
void kvfold_append(const part *tail, int64_t rows, int64_t heads, int64_t at, const void *keys, const void *values,
                   int32_t *positions, const int64_t *new, int64_t step) {
    int64_t bytes = SIZE * (tail->kind == FLOAT32 ? 4 : 2);
    for (int64_t head = 0; head < rows * heads; head++) {
        int64_t to = (head * tail->stride + at) * bytes;
        memcpy((char *)tail->keys.numbers + to, (const char *)keys + head * bytes, bytes);
        memcpy((char *)tail->values.numbers + to, (const char *)values + head * bytes, bytes);
    }
    for (int64_t row = 0; row < rows; row++) positions[row * tail->stride + at] = (int32_t)new[row * step];
}
