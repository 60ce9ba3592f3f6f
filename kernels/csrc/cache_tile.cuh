// A warp's tile of cached keys and values in registers, as operands of the two products of attention. Lane (g, t) = (lane / 4,
// lane % 4), and E is the number of elements of a vector, which a lane loads at once. A tile has groups of 16 adjacent keys.
//
// scores [keys, heads] += keys [16, elements] x queries [elements, heads]: a lane has the elements E t .. E t + E - 1 of every 4 E
// elements of keys g and g + 8. Queries have their elements in the same order.
//
// results [elements, heads] += values^T [elements, 16] x weights [keys, heads]: a lane has the elements E g .. E g + E - 1 of every
// 8 E elements of keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. So both keys of an operand are in one lane: nothing is transposed.
#pragma once
#include "mma.cuh"

// The type of the operands: an FP8 cache is widened to float16, which is one instruction for two numbers.
template <typename T, typename C> struct OperandOf { typedef T type; };
template <typename T> struct OperandOf<T, fp8> { typedef f16 type; };

// The words of the longest vector of at most 16 bytes that divides a lane's part of a head.
constexpr int words_of_vector(int bytes) { return bytes % 16 == 0 ? 4 : bytes % 8 == 0 ? 2 : 1; }

DEVICE void load_vector(unsigned (&to)[4], const void* from) {
    const uint4 loaded = stream(from);
    to[0] = loaded.x, to[1] = loaded.y, to[2] = loaded.z, to[3] = loaded.w;
}
DEVICE void load_vector(unsigned (&to)[2], const void* from) {
    const uint2 loaded = stream_half(from);
    to[0] = loaded.x, to[1] = loaded.y;
}
DEVICE void load_vector(unsigned (&to)[1], const void* from) { to[0] = stream_word(from); }

template <typename T, typename C, int HEAD_DIM, int WARPS> struct CacheTile {
    typedef typename OperandOf<T, C>::type Operand;
    static constexpr bool WIDENED = sizeof(C) == 1;
    // FP8 heads of 128 have 32, not 64, with four warps: what widens them takes registers, too, and four blocks have 128 a thread.
    static constexpr int REGISTERS = HEAD_DIM > 128 ? 64 : WARPS == 8 ? 128 : WIDENED && HEAD_DIM == 128 ? 32 : 64;
    static constexpr int GROUP_REGISTERS = HEAD_DIM * sizeof(C) / 4;
    static constexpr int GROUPS = REGISTERS >= 2 * GROUP_REGISTERS ? 2 : 1;
    static constexpr int STRIDE = 16 * WARPS;  // from a group to the next: those of the other warps are between them
    static constexpr int K_WORDS = words_of_vector(HEAD_DIM / 4 * sizeof(C)), V_WORDS = words_of_vector(HEAD_DIM / 8 * sizeof(C));
    static constexpr int K_WIDTH = K_WORDS * 4 / sizeof(C), V_WIDTH = V_WORDS * 4 / sizeof(C);  // elements of a vector
    static constexpr int K_VECTORS = HEAD_DIM / 4 / K_WIDTH, V_VECTORS = HEAD_DIM / 8 / V_WIDTH;

    unsigned k[GROUPS][K_VECTORS][2][K_WORDS];
    unsigned v[GROUPS][V_VECTORS][4][V_WORDS];
    const unsigned unit;  // bytes
    unsigned place = 0;   // in the cache, in units, of key lane % 16 of group lane / 16 % GROUPS

    DEVICE explicit CacheTile(unsigned unit) : unit(unit) {}
    DEVICE const C* head_of(const C* cache, int key) const {
        const unsigned long long bytes = (unsigned long long)unit * __shfl_sync(0xffffffffu, place, key);
        return reinterpret_cast<const C*>(reinterpret_cast<const char*>(cache) + bytes);
    }

    // Load the vectors j, before `stop`, of a group.
    DEVICE void load_keys(const C* cache, int group, int j, int stop) {
        cache += thread_in_group() * K_WIDTH;
        UNROLL for (int i = 0; i < 2; ++i) {
            const C* head = head_of(cache, 16 * group + 8 * i + group_id());
            UNROLL for (int at = j; at < stop; ++at) load_vector(k[group][at][i], head + 4 * at * K_WIDTH);
        }
    }

    DEVICE void load_values(const C* cache, int group, int j, int stop) {
        cache += group_id() * V_WIDTH;
        UNROLL for (int i = 0; i < 4; ++i) {
            const C* head = head_of(cache, 16 * group + 8 * (i / 2) + 2 * thread_in_group() + i % 2);
            UNROLL for (int at = j; at < stop; ++at) load_vector(v[group][at][i], head + 8 * at * V_WIDTH);
        }
    }

    // Add the products of the elements 8 h .. 8 h + 7 of a lane's vector j of keys to the scores of a group.
    DEVICE void multiply_keys(float (&scores)[4], int group, int j, int h, const uint4& query) const {
        unsigned a[4][2];  // [2 i + half] is of key g + 8 (i % 2)
        UNROLL for (int n = 0; n < 4; ++n) four_elements(k[group][j][n % 2], 2 * h + n / 2, a[n]);
        multiply(scores, a[0][0], a[1][0], a[0][1], a[1][1], query.x, query.y, Operand());
        multiply(scores, a[2][0], a[3][0], a[2][1], a[3][1], query.z, query.w, Operand());
    }

    // Add the products of the elements 2 i and 2 i + 1 of a lane's vector j of values: weights are of keys 2 t and 2 t + 1, and of
    // 2 t + 8 and 2 t + 9; rows g of the results are the even elements, rows g + 8 the odd ones.
    DEVICE void multiply_values(float (&results)[4], int group, int j, int i, const unsigned (&weights)[2]) const {
        unsigned low[2], high[2];
        two_keys(v[group][j][0], v[group][j][1], i, low);
        two_keys(v[group][j][2], v[group][j][3], i, high);
        multiply(results, low[0], low[1], high[0], high[1], weights[0], weights[1], Operand());
    }

    // The elements 4 i .. 4 i + 3 of a vector.
    template <int N> DEVICE static void four_elements(const unsigned (&vector)[N], int i, unsigned (&to)[2]) {
        if constexpr (WIDENED) widen(vector[i], to[0], to[1], Operand());
        else to[0] = vector[2 * i], to[1] = vector[2 * i + 1];
    }

    // The element 2 i of two keys, and their element 2 i + 1.
    template <int N> DEVICE static void two_keys(const unsigned (&first)[N], const unsigned (&second)[N], int i, unsigned (&to)[2]) {
        if constexpr (WIDENED) widen(__byte_perm(first[i / 2], second[i / 2], i % 2 ? 0x7362 : 0x5140), to[0], to[1], Operand());
        else to[0] = __byte_perm(first[i], second[i], 0x5410), to[1] = __byte_perm(first[i], second[i], 0x7632);
    }

    // Return the element of a head that is at this place in the sums of a block and in partial results. Those at adjacent places, from a
    // multiple of four on, have the distance V_WIDTH.
    DEVICE static int element_at(int place) {
        constexpr int PAIRS = V_WIDTH / 2;
        const int n = place / 16, odd = place / 8 % 2, g = place % 8;
        return (n / PAIRS * 8 + g) * V_WIDTH + n % PAIRS * 2 + odd;
    }
};
