/* Products of queries and sketched keys (place/sketch.py), for decode.c: numbers of 4 bits, two to a byte. */

#define DIMS (2 * ((SIZE + 3) / 4)) /* of a sketch; byte d holds dimension d low and DIMS / 2 + d high */

/* Read sketches [heads, slots, DIMS / 2], heads `stride` bytes apart, by queries [heads, queries, DIMS] into products
   [heads, queries, slots]. 1: such sizes are not read. */
int kvfold_sketch(const uint8_t *sketches, int64_t stride, int64_t heads, int64_t slots, int64_t queries, const float *asked,
                  float *products) {
    if (DIMS / 2 % LANES) return 1;
    float tile[LANES * DIMS] __attribute__((aligned(64)));
    for (int64_t head = 0; head < heads; head++, sketches += stride, asked += queries * DIMS, products += queries * slots)
        for (int64_t first = 0; first < slots; first += LANES) {
            int count = slots - first < LANES ? (int)(slots - first) : LANES;
            for (int slot = 0; slot < count; slot++)
                for (int d = 0; d < DIMS / 2; d += LANES) {
                    codes both = *(codes *)(sketches + (first + slot) * (DIMS / 2) + d);
                    *(floats *)(tile + slot * DIMS + d) = __builtin_convertvector(__builtin_convertvector(both & 15, ints), floats);
                    *(floats *)(tile + slot * DIMS + DIMS / 2 + d) = __builtin_convertvector(__builtin_convertvector(both >> 4, ints), floats);
                }
            for (int64_t q = 0; q < queries; q++) score(DIMS, asked + q * DIMS, tile, count, (ahead){0}, products + q * slots + first);
        }
    return 0;
}
