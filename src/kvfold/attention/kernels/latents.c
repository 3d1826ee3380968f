/* Attention over latents, for decode.c, with which it is compiled as one file.

   Slots of one row whose keys and values lie in a few dimensions of a basis, the same number for all slots of a block
   (../basis.py). All heads share a latent, so a tile is read once for all of them. Values are added up as latents and
   mapped back once a query. Keys are scored as latents too, by queries that were mapped into the basis; where the basis
   is one before rotation, they are written out and rotated, a tile and a head at a time. */

/* Which dimensions a side writes in how many bits (../bit_planes.py). */
typedef struct {
    const int32_t *order; /* [dims]: the dimension of the basis that each written one is; NULL: the first ones */
    const int32_t *planes; /* [bits]: dimensions in each plane */
    const float *cells, *halves; /* [dims] */
    int32_t bits, dims;
} coded;

typedef struct {
    const float *decode; /* [heads, rank, SIZE] */
    const float *mean;   /* [heads, SIZE] */
    coded codes;
    int64_t rank, parts;
} basis;

typedef struct {
    const void *keys, *values; /* [slots, width]; keys of several parts [width, room] */
    const _Float16 *scales;    /* [slots, 2]: of keys and of values, where these are bytes */
    const int32_t *positions;
    int64_t count, room;
    int32_t key_width, value_width; /* dimensions, or bytes of planes */
} block;

typedef struct {
    basis keys, values;
    const float *cosines, *sines; /* [positions, rotated]; the second half repeats the first */
    const block *blocks;
    const int64_t *rows; /* [rows + 1]: the first block of each row */
    int32_t kind, rotated, heads, unused;
} latents;

/* Ask for a line of the next tile: tiles are short runs in turn, which a processor does not foresee by itself. */
#define ASK_FOR(address) __builtin_prefetch((address), 0, 2)
#define AHEAD 4 /* tiles, where dimensions lie apart: each is a run of its own */
#define CHUNK 4 /* slots, or rows of queries, whose sums are held in registers together */
#ifdef __AVX512F__
#define ROWS 9 /* rows of queries that read a tile of values together: their sums are in registers too */
#define VECTORS (SIZE / LANES % 4 == 0 ? 4 : SIZE / LANES % 2 == 0 ? 2 : 1)
#else
#define ROWS 3
#define VECTORS 1
#endif

/* Scratch of one call, and what the heads from `first` to `end` read of a part. Rows are queries of all these heads. */
struct scratch {
    const part *of;
    int64_t first, end;
    float *memory, *asked;
    int rows, group, padded; /* queries of all heads here, of one head, and rows rounded up to whole vectors */
    float *absorbed;         /* [key rank, padded]: queries in the basis of keys */
    float *weights;          /* [rows, TILE] */
    float *latent;           /* [rows, value stride] */
    float *largest, *total;  /* [rows] */
    float *tile;             /* [TILE, most dimensions], and room behind them to read a whole vector */
    float *other;            /* [TILE, SIZE] of keys that are written out, or [TILE, padded] of scores */
    int64_t stride;          /* of latents: their rank rounded up to whole vectors */
    int64_t key_reach, value_reach; /* dimensions that some block keeps */
    int64_t pairs;           /* of dimensions of keys that are written out by products of pairs (pairs.c); 0: none are */
    uint32_t *paired;        /* [heads, pairs, SIZE]: their basis */
    float *steps;            /* [heads, SIZE]: what one is worth in each column of it */
    uint16_t *narrow;        /* [TILE, 2 pairs] latents of a tile, and room behind them */
};

static int64_t pairs_of(const latents *from, const scratch *own);
static void pair_basis(const latents *from, int64_t head, int heads, scratch *own);
static const uint16_t *narrowed(const latents *from, const block *one, int64_t first, int count, int is_last, int64_t *stride,
                                scratch *own);
static void write_out_pairs(const latents *from, int64_t head, int64_t of_call, const uint16_t *tile, int width, int64_t stride,
                            const _Float16 *scales, int count, const scratch *own);

/* Add `worth` to the lanes whose bits are set. */
static inline floats add_where(floats sums, int bits, float worth) {
#if defined(__AVX512F__) && SIZE % 16 == 0
    return (floats)_mm512_mask_add_ps((__m512)sums, (__mmask16)bits, (__m512)sums, _mm512_set1_ps(worth));
#else
    ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = 1 << lane;
    ints is_set = (((ints){0} + bits) & lanes) != 0;
    return sums + (floats)(is_set & (ints)spread(worth));
#endif
}

/* Read LANES dimensions from `first` on of a slot's bit planes, as numbers around zero: the middles of cells. */
static inline floats unpack_some(const uint8_t *planes, const coded *codes, int first) {
    floats sums = -*(floats *)(codes->halves + first);
    float worth = 1.0f;
    for (int place = 0; place < codes->bits; place++, worth += worth) {
        int dims = codes->planes[place];
        if (dims <= first) break; /* higher planes hold no more dimensions */
        const uint8_t *bytes = planes + first / 8;
        int bits = bytes[0]; /* behind the last dimension of a plane they are 0 */
        if (LANES == 16 && dims - first > 8) {
            uint16_t both;
            memcpy(&both, bytes, sizeof both);
            bits = both;
        }
        sums = add_where(sums, bits, worth);
        planes += (dims + 7) / 8;
    }
    return sums;
}

/* Read a slot's bit planes into numbers, without the slot's scale; up to LANES numbers behind them are written too. */
static inline void unpack(const uint8_t *planes, const coded *codes, float *to) {
    for (int d = 0; d < codes->dims; d += LANES) *(floats *)(to + d) = unpack_some(planes, codes, d) * *(floats *)(codes->cells + d);
}

/* Widen `count` slots of one width to floats, one behind the other; where they end, a whole vector can be read. */
static APART const float *widened(enum kind kind, const void *from, int64_t first, int count, int width, const coded *codes,
                            int is_last, float *to) {
    int64_t begin = first * width;
    int numbers = count * width;
    if (kind == FLOAT32) {
        if (!is_last) return (const float *)from + begin;
        memcpy(to, (const float *)from + begin, sizeof(float) * numbers);
    } else if (kind == BFLOAT16) {
        const uint16_t *of = (const uint16_t *)from + begin;
        for (int d = 0; d < numbers; d++) {
            union { uint32_t bits; float number; } one = {(uint32_t)of[d] << 16};
            to[d] = one.number;
        }
    } else if (kind == FLOAT16) {
        for (int d = 0; d < numbers; d++) to[d] = (float)((const _Float16 *)from)[begin + d];
    } else if (kind == INT8) {
        for (int d = 0; d < numbers; d++) to[d] = (float)((const int8_t *)from)[begin + d];
    } else {
        for (int slot = 0; slot < count; slot++)
            unpack((const uint8_t *)from + begin + (int64_t)slot * width, codes, to + slot * codes->dims);
    }
    return to;
}

/* Map the queries of some heads into the basis of keys. What all slots share, the product with the mean, is apart. */
static void absorb(const latents *from, int64_t head, const float *query, scratch *own) {
    const basis *keys = &from->keys;
    for (int row = 0; row < own->rows; row++)
        for (int64_t j = 0; j < own->key_reach; j++) {
            const float *back = keys->decode + ((head + row / own->group) * keys->rank + j) * SIZE;
            floats products = {0};
            for (int d = 0; d < SIZE; d += LANES) products += *(floats *)(query + row * SIZE + d) * *(floats *)(back + d);
            own->absorbed[j * own->padded + row] = sum_of(products);
        }
}

/* Score a tile by queries in the basis: a vector is of queries. */
static APART void score_absorbed(const basis *keys, const float *tile, int width, const scratch *own) {
    const int32_t *order = keys->codes.order;
    const float *absorbed = own->absorbed;
    float *restrict scores = own->other, *restrict weights = own->weights;
    int padded = own->padded, rows = own->rows;
    for (int first = 0; first < padded; first += LANES)
        for (int slot = 0; slot < TILE; slot += 2 * CHUNK) {
            floats sums[2 * CHUNK] = {{0}};
            for (int begin = 0; begin < width; begin += LANES) {
                int end = begin + LANES < width ? begin + LANES : width;
                for (int k = 0; k < 2 * CHUNK; k++) ASK_FOR(tile + (slot + k + TILE) * width + begin);
                for (int j = begin; j < end; j++) {
                    int64_t at = order == NULL ? j : order[j];
                    floats asked = *(floats *)(absorbed + at * padded + first);
                    for (int k = 0; k < 2 * CHUNK; k++) sums[k] += asked * tile[(slot + k) * width + j];
                }
            }
            for (int k = 0; k < 2 * CHUNK; k++) *(floats *)(scores + (slot + k) * padded + first) = sums[k];
        }
    for (int row = 0; row < rows; row++)
        for (int slot = 0; slot < TILE; slot++) weights[row * TILE + slot] = scores[slot * padded + row];
}

/* Score a tile by some rows of queries that read one part: a vector is of slots, and dimensions are `step` apart. */
static inline __attribute__((always_inline)) void
score_rows(int rows, const float *absorbed, int padded, const float *tile, int width, int64_t step, float *weights) {
    floats sums[CHUNK][TILE / LANES] = {{{0}}};
    for (int j = 0; j < width; j++)
        for (int v = 0; v < TILE / LANES; v++) {
            floats some = *(floats *)(tile + j * step + v * LANES);
            ASK_FOR(tile + j * step + AHEAD * TILE + v * LANES);
            for (int row = 0; row < rows; row++) sums[row][v] += some * absorbed[j * padded + row];
        }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < TILE / LANES; v++) *(floats *)(weights + row * TILE + v * LANES) = sums[row][v];
}

/* Score a tile whose dimensions lie `step` apart, and whose parts take turns, each for its own heads. */
static APART void score_parts(const latents *from, int64_t head, const float *tile, int width, int64_t step, scratch *own) {
    int64_t parts = from->keys.parts, of_part = from->heads / parts;
    for (int row = 0; row < own->rows;) {
        int64_t part = (head + row / own->group) / of_part;
        int left = (int)((part + 1) * of_part - head) * own->group - row; /* rows that read the same part */
        left = left < own->rows - row ? left : own->rows - row;
        const float *absorbed = own->absorbed + row, *lines = tile + part * step;
        float *weights = own->weights + row * TILE;
        int dims = (int)(width / parts);
        switch (left) {
        case 1: score_rows(1, absorbed, own->padded, lines, dims, parts * step, weights); row += 1; break;
        case 2: score_rows(2, absorbed, own->padded, lines, dims, parts * step, weights); row += 2; break;
        case 3: score_rows(3, absorbed, own->padded, lines, dims, parts * step, weights); row += 3; break;
        default: score_rows(4, absorbed, own->padded, lines, dims, parts * step, weights); row += 4;
        }
    }
}

/* Write out the keys of a tile for one head, as they were before their rotation. */
static APART void write_out(const basis *keys, int64_t head, const float *tile, int width, const _Float16 *scales, int count,
                      float *to) {
    const float *back = keys->decode + head * keys->rank * SIZE, *mean = keys->mean + head * SIZE;
    const int32_t *order = keys->codes.order;
    for (int d = 0; d < SIZE; d += VECTORS * LANES)
        for (int slot = 0; slot < TILE; slot += CHUNK) {
            floats sums[CHUNK][VECTORS] = {{{0}}};
            for (int j = 0; j < width; j++) {
                const float *line = back + (order == NULL ? j : order[j]) * (int64_t)SIZE + d;
                for (int v = 0; v < VECTORS; v++) {
                    floats some = *(floats *)(line + v * LANES);
                    for (int k = 0; k < CHUNK; k++) sums[k][v] += some * tile[(slot + k) * width + j];
                }
            }
            for (int k = 0; k < CHUNK; k++)
                for (int v = 0; v < VECTORS; v++) {
                    float scale = scales == NULL || slot + k >= count ? 1.0f : (float)scales[2 * (slot + k)];
                    *(floats *)(to + (slot + k) * SIZE + d + v * LANES) = sums[k][v] * scale + *(floats *)(mean + d + v * LANES);
                }
        }
}

/* Rotate the keys of a tile to their positions. */
static APART void turn(const latents *from, const int32_t *positions, int count, float *keys) {
    int rotated = from->rotated, half = rotated / 2;
    for (int slot = 0; slot < count; slot++) {
        const float *cosines = from->cosines + (int64_t)positions[slot] * rotated;
        const float *sines = from->sines + (int64_t)positions[slot] * rotated;
        float *key = keys + slot * SIZE;
        int d = 0;
        for (; d + LANES <= half; d += LANES) {
            floats low = *(floats *)(key + d), high = *(floats *)(key + d + half);
            floats cosine = *(floats *)(cosines + d), sine = *(floats *)(sines + d);
            *(floats *)(key + d) = low * cosine - high * sine;
            *(floats *)(key + d + half) = high * cosine + low * sine;
        }
        for (; d < half; d++) {
            float low = key[d], high = key[d + half];
            key[d] = low * cosines[d] - high * sines[d];
            key[d + half] = high * cosines[d] + low * sines[d];
        }
    }
}

/* Score a tile by keys that are written out and rotated, head by head. */
static APART void score_written(const latents *from, const block *one, int64_t head, int64_t first, int count, int is_last,
                                const _Float16 *scales, const float *query, scratch *own) {
    const float *tile = NULL;
    const uint16_t *narrow = NULL;
    int width = from->kind == PLANES ? from->keys.codes.dims : one->key_width;
    int64_t stride = 0;
    if (own->pairs) narrow = narrowed(from, one, first, count, is_last, &stride, own);
    else tile = widened(from->kind, one->keys, first, count, one->key_width, &from->keys.codes, is_last, own->tile);
    for (int row = 0; row < own->rows; row++) {
        if (row % own->group == 0) {
            int64_t of_call = row / own->group;
            if (own->pairs) write_out_pairs(from, head + of_call, of_call, narrow, width, stride, scales, count, own);
            else write_out(&from->keys, head + of_call, tile, width, scales, count, own->other);
            turn(from, one->positions + first, count, own->other);
        }
        score(SIZE, query + row * SIZE, own->other, TILE, (ahead){0}, own->weights + row * TILE);
    }
}

/* Add a tile of values, by weight, to the latents of some rows of queries. */
static inline __attribute__((always_inline)) void
add_rows(int rows, const float *weights, const float *tile, int count, int width, int64_t stride, float *latent) {
    for (int d = 0; d < width; d += 2 * LANES) {
        /* Behind the last dimension lies the next slot, which is not added. */
        ints inside[2] = {{0}};
        for (int lane = 0; lane < LANES; lane++)
            for (int v = 0; v < 2; v++) inside[v][lane] = d + v * LANES + lane < width ? -1 : 0;
        int second = d + LANES < width ? LANES : 0; /* no second vector: the first one again, and nothing of it */
        floats sums[ROWS][2];
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < 2; v++) sums[row][v] = *(floats *)(latent + row * stride + d + v * LANES);
        for (int slot = 0; slot < count; slot++) {
            const float *from = tile + (int64_t)slot * width + d;
            ASK_FOR(from + TILE * width);
            ASK_FOR(from + TILE * width + LANES);
            floats some[2] = {(floats)(*(ints *)from & inside[0]), (floats)(*(ints *)(from + second) & inside[1])};
            for (int row = 0; row < rows; row++)
                for (int v = 0; v < 2; v++) sums[row][v] += some[v] * weights[row * TILE + slot];
        }
        for (int row = 0; row < rows; row++)
            for (int v = 0; v < 2; v++) *(floats *)(latent + row * stride + d + v * LANES) = sums[row][v];
    }
}

static APART void add_values(const float *tile, int count, int width, scratch *own) {
    for (int row = 0; row < own->rows;) {
        const float *weights = own->weights + row * TILE;
        float *latent = own->latent + row * own->stride;
        int rows = own->rows - row < ROWS ? own->rows - row : ROWS;
        switch (rows) {
        case 1: add_rows(1, weights, tile, count, width, own->stride, latent); break;
        case 2: add_rows(2, weights, tile, count, width, own->stride, latent); break;
        case 3: add_rows(3, weights, tile, count, width, own->stride, latent); break;
#if ROWS > 4
        case 4: add_rows(4, weights, tile, count, width, own->stride, latent); break;
        case 5: add_rows(5, weights, tile, count, width, own->stride, latent); break;
        case 6: add_rows(6, weights, tile, count, width, own->stride, latent); break;
        case 7: add_rows(7, weights, tile, count, width, own->stride, latent); break;
        case 8: add_rows(8, weights, tile, count, width, own->stride, latent); break;
#endif
        default: add_rows(ROWS, weights, tile, count, width, own->stride, latent);
        }
        row += rows;
    }
}

/* Read the keys of a tile whose dimensions lie apart, into [dimensions, TILE]. */
static APART void gather(enum kind kind, const block *from, int64_t first, int count, float *to) {
    for (int j = 0; j < from->key_width; j++) {
        int64_t begin = j * from->room + first;
        float *line = to + j * TILE;
        if (count < TILE) memset(line, 0, sizeof(float) * TILE);
        const float *found = widened(kind, from->keys, begin, count, 1, NULL, 1, line);
        (void)found;
    }
}

/* Attend over one block, whose slots go on from the softmax of those before. */
static void attend_block(const latents *from, const block *one, int64_t head, const float *query, scratch *own) {
    int is_written = from->cosines != NULL, has_parts = from->keys.parts > 1;
    int is_coded = from->kind == PLANES;
    int key_dims = is_coded ? from->keys.codes.dims : one->key_width;
    int value_dims = is_coded ? from->values.codes.dims : one->value_width;
    for (int64_t first = 0; first < one->count; first += TILE) {
        int count = one->count - first < TILE ? (int)(one->count - first) : TILE, is_last = first + TILE >= one->count;
        const _Float16 *scales = one->scales == NULL ? NULL : one->scales + 2 * first;
        const float *tile = own->tile;
        int64_t step = TILE;
        if (is_written) score_written(from, one, head, first, count, is_last, scales, query, own);
        else if (has_parts && from->kind == FLOAT32 && !is_last) tile = (const float *)one->keys + first, step = one->room;
        else if (has_parts) gather(from->kind, one, first, count, own->tile);
        else tile = widened(from->kind, one->keys, first, count, one->key_width, &from->keys.codes, is_last, own->tile);
        if (has_parts) score_parts(from, head, tile, key_dims, step, own);
        else if (!is_written) score_absorbed(&from->keys, tile, key_dims, own);
        float of_values[TILE];
        for (int slot = 0; slot < count; slot++) of_values[slot] = scales == NULL ? 1.0f : (float)scales[2 * slot + 1];
        for (int row = 0; row < own->rows; row++) {
            float *scores = own->weights + row * TILE;
            if (scales != NULL && !is_written)
                for (int slot = 0; slot < count; slot++) scores[slot] *= (float)scales[2 * slot];
            for (int slot = count; slot < TILE; slot++) scores[slot] = NOTHING;
            float shrink = soften(scores, own->largest + row, own->total + row);
            if (shrink != 1.0f)
                for (int64_t d = 0; d < own->stride; d++) own->latent[row * own->stride + d] *= shrink;
            if (scales != NULL)
                for (int slot = 0; slot < count; slot++) scores[slot] *= of_values[slot];
        }
        /* Values are read by whole vectors, which reach beyond a tile: so far that they may end with the next slots. */
        is_last |= (first + TILE) * value_dims + LANES > one->count * value_dims;
        tile = widened(from->kind, one->values, first, count, one->value_width, &from->values.codes, is_last, own->tile);
        add_values(tile, count, value_dims, own);
    }
}

static int64_t whole_vectors(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

/* Attend over the latents of a row for `heads` heads from `head` on, with queries [heads x group, SIZE]. */
static int attend_latents(const latents *from, int64_t row, int64_t head, int heads, int group, const float *query, scratch *own) {
    int64_t rows = (int64_t)heads * group, padded = whole_vectors(rows), stride = 2 * whole_vectors((from->values.rank + 1) / 2);
    int64_t most = from->keys.rank * from->keys.parts;
    most = most > from->values.rank ? most : from->values.rank;
    int64_t wide = padded > SIZE ? padded : SIZE;
    own->key_reach = own->value_reach = 0;
    for (int64_t at = from->rows[row]; at < from->rows[row + 1]; at++) {
        int64_t keys = from->blocks[at].key_width / from->keys.parts, values = from->blocks[at].value_width;
        own->key_reach = own->key_reach > keys ? own->key_reach : keys;
        own->value_reach = own->value_reach > values ? own->value_reach : values;
    }
    if (from->kind == PLANES) own->key_reach = from->keys.rank, own->value_reach = from->values.codes.dims;
    own->pairs = pairs_of(from, own);
    int64_t sizes[] = {from->keys.rank * padded, rows * TILE, rows * stride, rows, rows, TILE * most + LANES, TILE * wide,
                       heads * own->pairs * SIZE, heads * SIZE, TILE * own->pairs + LANES};
    float **fields[] = {&own->absorbed, &own->weights, &own->latent, &own->largest, &own->total, &own->tile, &own->other,
                        (float **)&own->paired, &own->steps, (float **)&own->narrow};
    int64_t numbers = 0;
    for (int at = 0; at < 10; at++) numbers += whole_vectors(sizes[at]);
    free(own->memory);
    own->memory = calloc(numbers, sizeof(float));
    if (own->memory == NULL) return 1;
    float *next = own->memory;
    for (int at = 0; at < 10; at++) *fields[at] = next, next += whole_vectors(sizes[at]);
    own->rows = (int)rows, own->group = group, own->padded = (int)padded, own->stride = stride;
    for (int64_t at = 0; at < rows; at++) own->largest[at] = NOTHING;
    if (own->pairs) pair_basis(from, head, heads, own);
    if (from->cosines == NULL) absorb(from, head, query, own);
    for (int64_t at = from->rows[row]; at < from->rows[row + 1]; at++) attend_block(from, from->blocks + at, head, query, own);
    return 0;
}

/* Map what one head's queries read back to its dimensions. */
static void map_back(const latents *from, int64_t head, int row, const float *query, const scratch *own, answer *into) {
    const float *back = from->values.decode + head * from->values.rank * SIZE, *mean = from->values.mean + head * SIZE;
    const int32_t *order = from->values.codes.order;
    for (int q = 0; q < own->group; q++) {
        const float *latent = own->latent + (row + q) * own->stride;
        float total = own->total[row + q], largest = own->largest[row + q];
        floats sums[SIZE / LANES];
        for (int d = 0; d < SIZE / LANES; d++) sums[d] = *(floats *)(mean + d * LANES) * total;
        for (int64_t j = 0; j < own->value_reach; j++) {
            const float *line = back + (order == NULL ? j : order[j]) * SIZE;
            for (int d = 0; d < SIZE / LANES; d++) sums[d] += latent[j] * *(floats *)(line + d * LANES);
        }
        for (int d = 0; d < SIZE / LANES; d++) *(floats *)(into->output[q] + d * LANES) = sums[d];
        if (from->cosines == NULL && total > 0)
            for (int d = 0; d < SIZE; d++) largest += query[(row + q) * SIZE + d] * from->keys.mean[head * SIZE + d];
        into->largest[q] = largest, into->total[q] = total;
    }
}

/* Add what one head reads of latents; the first head of a row, or of those asked for, reads them for all. */
static int attend_shared(const part *one, int64_t head, int64_t last, int group, const float *query, float scale, scratch **of_call,
                         answer *into) {
    if (*of_call == NULL) *of_call = calloc(1, sizeof(scratch));
    scratch *own = *of_call;
    if (own == NULL) return 1;
    const latents *from = (const latents *)one->keys.numbers;
    int64_t row = head / from->heads, end = (row + 1) * from->heads;
    if (own->of != one || head >= own->end) {
        own->of = one, own->first = head, own->end = end < last ? end : last;
        int64_t numbers = (own->end - head) * group * SIZE;
        free(own->asked);
        own->asked = malloc(sizeof(float) * numbers);
        if (own->asked == NULL) return 1;
        for (int64_t d = 0; d < numbers; d++) own->asked[d] = query[head * group * SIZE + d] * scale;
        int heads = (int)(own->end - head);
        if (attend_latents(from, row, head - row * from->heads, heads, group, own->asked, own)) return 1;
    }
    answer read;
    map_back(from, head - row * from->heads, (int)(head - own->first) * group, own->asked, own, &read);
    merge(&read, group, into);
    return 0;
}

static void forget(scratch *own) {
    if (own == NULL) return;
    free(own->memory);
    free(own->asked);
    free(own);
}
