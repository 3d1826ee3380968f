/* Keys that are written out by products of pairs of narrow numbers, for latents.c: twice as many at a time as floats.

   Codes of 8 bits or fewer are whole numbers, and are multiplied as such by a basis in 16 bits (AVX512_VNNI); sums are
   exact. Latents in bfloat16, whose answer is rounded to bfloat16 anyway, are multiplied as they are (AVX512_BF16). */
#if defined(__AVX512VNNI__) && SIZE % 16 == 0
#ifdef __AVX512BF16__
#define READS_BFLOAT16 1
#define product_of_halves(sums, line, some) \
    (__m512i)_mm512_dpbf16_ps((__m512)(sums), (__m512bh)(line), (__m512bh)(some))
#else
#define READS_BFLOAT16 0
#define product_of_halves(sums, line, some) (sums)
#endif
#define LARGEST 32767.0f /* number of 16 bits */
#define LARGEST_SUM 2147483647.0f
#define LARGEST_CODE 255 /* an odd number of 8 bits, and more than a signed byte */

/* Count the pairs of dimensions of keys; 0: they are written out by floats. */
static int64_t pairs_of(const latents *from, const scratch *own) {
    int is_read = from->kind == INT8 || from->kind == PLANES || (from->kind == BFLOAT16 && READS_BFLOAT16);
    if (from->cosines == NULL || !is_read) return 0;
    int64_t dims = from->kind == PLANES ? from->keys.codes.dims : own->key_reach;
    return (dims + 1) / 2;
}

static inline uint32_t bfloat16_of(float number) {
    union { float number; uint32_t bits; } one = {number};
    return (one.bits + 0x7fff + (one.bits >> 16 & 1)) >> 16;
}

/* Put two rows of the basis of keys side by side, as products take them; a row of codes has its cell's width. */
static void pair_basis(const latents *from, int64_t head, int heads, scratch *own) {
    const basis *keys = &from->keys;
    int64_t dims = from->kind == PLANES ? keys->codes.dims : own->key_reach;
    float largest = fminf(LARGEST, LARGEST_SUM / (LARGEST_CODE * (dims + 1))); /* so that no sum overflows */
    for (int64_t of_call = 0; of_call < heads; of_call++) {
        const float *back = keys->decode + (head + of_call) * keys->rank * SIZE;
        float *steps = own->steps + of_call * SIZE;
        for (int pass = from->kind == BFLOAT16; pass < 2; pass++) /* the first one finds the largest number of each column */
            for (int64_t j = 0; j < dims; j++) {
                const float *line = back + (keys->codes.order == NULL ? j : keys->codes.order[j]) * SIZE;
                float cell = keys->codes.cells == NULL ? 1.0f : keys->codes.cells[j] / 2; /* codes are read as odd numbers */
                uint32_t *to = own->paired + (of_call * own->pairs + j / 2) * SIZE;
                int high = j % 2 * 16;
                if (pass == 0)
                    for (int d = 0; d < SIZE; d++) steps[d] = fmaxf(steps[d], fabsf(line[d] * cell) / largest);
                else if (from->kind == BFLOAT16)
                    for (int d = 0; d < SIZE; d++) to[d] |= bfloat16_of(line[d]) << high;
                else
                    for (int d = 0; d < SIZE; d++) {
                        float whole = steps[d] > 0 ? line[d] * cell / steps[d] : 0;
                        to[d] |= (uint32_t)(uint16_t)(int16_t)(whole + (whole < 0 ? -0.5f : 0.5f)) << high;
                    }
            }
    }
}

/* Give the latents of a tile as 16 bits each, `stride` of them a slot. Behind the last one whole pairs can be read. */
static const uint16_t *narrowed(const latents *from, const block *one, int64_t first, int count, int is_last, int64_t *stride,
                                scratch *own) {
    int width = one->key_width;
    *stride = from->kind == PLANES ? 2 * own->pairs : width;
    if (from->kind == BFLOAT16) {
        const uint16_t *found = (const uint16_t *)one->keys + first * width;
        if (!is_last) return found;
        memcpy(own->narrow, found, sizeof(uint16_t) * count * width);
    } else if (from->kind == INT8) {
        const int8_t *found = (const int8_t *)one->keys + first * width;
        for (int at = 0; at < count * width; at++) own->narrow[at] = (uint16_t)(int16_t)found[at];
    } else {
        const coded *codes = &from->keys.codes;
        for (int slot = 0; slot < count; slot++)
            for (int d = 0; d < codes->dims; d += LANES) {
                floats middles = unpack_some((const uint8_t *)one->keys + (first + slot) * width, codes, d);
                ints odd = __builtin_convertvector(middles + middles, ints);
                *(halves *)(own->narrow + slot * *stride + d) = __builtin_convertvector(odd & 0xffff, halves);
            }
    }
    return own->narrow;
}

static inline __attribute__((always_inline)) void
write_out_as(int is_whole, const latents *from, int64_t head, const uint32_t *back, const float *steps, const uint16_t *tile,
             int width, int64_t stride, const _Float16 *scales, int count, float *to) {
    const float *mean = from->keys.mean + head * SIZE;
    for (int d = 0; d < SIZE; d += VECTORS * LANES)
        for (int slot = 0; slot < TILE; slot += CHUNK) {
            __m512i sums[CHUNK][VECTORS];
            for (int k = 0; k < CHUNK; k++)
                for (int v = 0; v < VECTORS; v++) sums[k][v] = _mm512_setzero_si512();
            for (int j = 0; j < width; j += 2) {
                __m512i line[VECTORS];
                for (int v = 0; v < VECTORS; v++) line[v] = _mm512_loadu_si512(back + j / 2 * SIZE + d + v * LANES);
                for (int k = 0; k < CHUNK; k++) {
                    uint32_t both;
                    memcpy(&both, tile + (slot + k) * stride + j, sizeof both);
                    if (j + 1 == width) both &= 0xffff; /* behind the last dimension lies the next slot */
                    __m512i some = _mm512_set1_epi32((int)both);
                    for (int v = 0; v < VECTORS; v++)
                        sums[k][v] = is_whole ? _mm512_dpwssd_epi32(sums[k][v], line[v], some)
                                              : product_of_halves(sums[k][v], line[v], some);
                }
            }
            for (int k = 0; k < CHUNK; k++)
                for (int v = 0; v < VECTORS; v++) {
                    int at = d + v * LANES;
                    float scale = scales == NULL || slot + k >= count ? 1.0f : (float)scales[2 * (slot + k)];
                    floats sum = is_whole ? (floats)_mm512_cvtepi32_ps(sums[k][v]) * *(floats *)(steps + at) : (floats)sums[k][v];
                    *(floats *)(to + (slot + k) * SIZE + at) = sum * scale + *(floats *)(mean + at);
                }
        }
}

/* Write out the keys of a tile for one head, the number `of_call` of this call, as they were before their rotation. */
static APART void write_out_pairs(const latents *from, int64_t head, int64_t of_call, const uint16_t *tile, int width, int64_t stride,
                                  const _Float16 *scales, int count, const scratch *own) {
    const uint32_t *back = own->paired + of_call * own->pairs * SIZE;
    const float *steps = own->steps + of_call * SIZE;
    if (from->kind == BFLOAT16) write_out_as(0, from, head, back, steps, tile, width, stride, scales, count, own->other);
    else write_out_as(1, from, head, back, steps, tile, width, stride, scales, count, own->other);
}
#else
static int64_t pairs_of(const latents *from, const scratch *own) { return (void)from, (void)own, 0; }
static void pair_basis(const latents *from, int64_t head, int heads, scratch *own) { (void)from, (void)head, (void)heads, (void)own; }
static const uint16_t *narrowed(const latents *from, const block *one, int64_t first, int count, int is_last, int64_t *stride,
                                scratch *own) {
    return (void)from, (void)one, (void)first, (void)count, (void)is_last, (void)stride, own->narrow;
}
static void write_out_pairs(const latents *from, int64_t head, int64_t of_call, const uint16_t *tile, int width, int64_t stride,
                            const _Float16 *scales, int count, const scratch *own) {
    (void)from, (void)head, (void)of_call, (void)tile, (void)width, (void)stride, (void)scales, (void)count, (void)own;
}
#endif
