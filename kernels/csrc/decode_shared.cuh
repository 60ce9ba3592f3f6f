// The shared memory of a block of decode_attention.
#pragma once
#include "cache_tile.cuh"
#include "key_partition.cuh"

constexpr int MAX_GROUP = 8;  // query heads of a block

template <typename T, typename C, int HEAD_DIM, int WARPS> struct DecodeShared {
    // Two stages: one for this range, one for the next.
    alignas(16) T projected[2][MAX_GROUP + 2][HEAD_DIM];  // q's heads, then k, then v
    alignas(16) typename OperandOf<T, C>::type query[MAX_GROUP][HEAD_DIM + 32];
    alignas(16) T key[HEAD_DIM];
    alignas(16) T norms[2][HEAD_DIM];
    alignas(16) float angles[2][HEAD_DIM];  // cosines, then sines
    int slot[2];                            // of the new token in the cache
    unsigned long long copied;              // a barrier: the inputs of a range have arrived
    CutRow cut_rows[2];                     // of the part: its first row and its last one, if other parts have keys of them
    // The partial results of the warps, with their acc in WarpSums; the last element is that of the new token.
    float max_score[WARPS + 1][MAX_GROUP], weight_sum[WARPS + 1][MAX_GROUP];
};

// The acc of each warp, in dynamic shared memory: with heads of 256 elements it does not fit into the 48 KiB of static memory.
// Place 16 n + 8 o + g of a head is acc[n][2 o + ..] of the lanes g; see CacheTile::element_at. 4: no two lanes on one bank.
template <int HEAD_DIM> using WarpSums = float[MAX_GROUP][HEAD_DIM + 4];
