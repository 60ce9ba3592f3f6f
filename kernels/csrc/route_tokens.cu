// The way of up to ROWS tokens to their experts in one launch: RMSNorm, the router's GEMM, and the choice by the block that ends last.
#include "expert_choice.cuh"
#include "weight_chunk.cuh"

constexpr int ROWS = 8, WARPS = 8, DEPTH = 4;  // DEPTH: chunks that a warp loads ahead

// normed = RMSNorm(x) if there is the norm's weight, and experts and scores of choose_experts by the logits normed weight^T + logit_bias.
// x [tokens, size]; a block has 16 rows of the weight, of which its warps share the columns. `logits` is memory for them, rounded to T;
// `counter` is 0 before and after. Dynamic shared memory: tokens rows of `size` elements, rounded up to a multiple of 64, and 32 more.
template <typename T, int PER_LANE, bool NORMALIZED, bool SIGMOID>
__global__ void __launch_bounds__(32 * WARPS) route_tokens(
    long long* expert_ids, float* scores, T* normed, float* logits, unsigned* counter, const T* x, const T* __restrict__ norm, float eps,
    const T* __restrict__ weight, const T* __restrict__ logit_bias, const float* __restrict__ bias, float least_sum, float scaling,
    int tokens, int size, int experts, int choices, int first_expert, int shared) {
    typedef Chunk<T, T> Chunk;
    extern __shared__ uint4 memory[];
    __shared__ float partial[WARPS][ROWS][16 + 1];
    __shared__ unsigned ended;
    launch_next();
    const int warp = warp_id(), lane = lane_id(), g = group_id(), t = thread_in_group(), first_row = blockIdx.x * 16;
    const int rows = experts + shared, chunks = (size + Chunk::COLUMNS - 1) / Chunk::COLUMNS;
    const int stride = chunks * Chunk::COLUMNS + 32;  // lanes (g, t) and (g + 1, t) read different banks
    T* staged = reinterpret_cast<T*>(memory);
    const LaneRows<T> from = {weight, nullptr, {min(first_row + g, rows - 1), min(first_row + g + 8, rows - 1)}, size};
    Chunk ahead[DEPTH];
    UNROLL for (int d = 0; d < DEPTH; ++d)
        if (warp + d * WARPS < chunks) ahead[d].load(from, warp + d * WARPS);
    wait_for_previous();

    if (warp < tokens) {  // a warp normalizes a token
        const T* row = x + (long long)warp * size;
        float squares = 0.f, scale = 1.f;
        for (int i = lane * 8; norm && i < size; i += 32 * 8) {
            const Vec<T, 8> eight = *reinterpret_cast<const Vec<T, 8>*>(row + i);
            UNROLL for (int j = 0; j < 8; ++j) squares += to_float(eight.at[j]) * to_float(eight.at[j]);
        }
        if (norm) scale = rsqrtf(warp_sum(squares) / size + eps);
        for (int i = lane * 8; i < size; i += 32 * 8) {
            Vec<T, 8> eight = *reinterpret_cast<const Vec<T, 8>*>(row + i);
            if (norm) {
                const Vec<T, 8> by = *reinterpret_cast<const Vec<T, 8>*>(norm + i);
                UNROLL for (int j = 0; j < 8; ++j) eight.at[j] = from_float<T>(to_float(eight.at[j]) * scale * to_float(by.at[j]));
                if (blockIdx.x == warp % gridDim.x) *reinterpret_cast<Vec<T, 8>*>(normed + (long long)warp * size + i) = eight;
            }
            *reinterpret_cast<Vec<T, 8>*>(staged + warp * stride + i) = eight;
        }
    }
    __syncthreads();

    float sums[1][4] = {};
    for (int first = warp; first < chunks; first += DEPTH * WARPS)
        UNROLL for (int d = 0; d < DEPTH; ++d) {
            const int chunk = first + d * WARPS, next = chunk + DEPTH * WARPS;
            if (chunk >= chunks) break;
            UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) {
                uint4 right[1] = {make_uint4(0, 0, 0, 0)};
                const int column = Chunk::column(chunk, piece);
                if (g < tokens && column < size) right[0] = *reinterpret_cast<const uint4*>(staged + g * stride + column);
                ahead[d].template multiply_piece<false>(sums, piece, right);
            }
            if (next < chunks) ahead[d].load(from, next);
        }
    UNROLL for (int i = 0; i < 4; ++i) partial[warp][2 * t + i % 2][g + i / 2 * 8] = sums[0][i];
    __syncthreads();
    if (threadIdx.x < tokens * 16 && first_row + threadIdx.x % 16 < rows) {
        const int token = threadIdx.x / 16, row = first_row + threadIdx.x % 16;
        float sum = logit_bias ? to_float(logit_bias[row]) : 0.f;
        UNROLL for (int w = 0; w < WARPS; ++w) sum += partial[w][token][threadIdx.x % 16];
        logits[token * rows + row] = to_float(from_float<T>(sum));
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) ended = atomicAdd(counter, 1u);
    __syncthreads();
    if (ended + 1 != gridDim.x) return;

    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
    if (warp >= tokens) return;
    const Choice choice = {bias, least_sum, scaling, experts, choices, first_expert, shared};
    const long long first = (long long)warp * (choices + shared);
    const float* row = logits + warp * rows;
    choose_experts<PER_LANE, NORMALIZED, SIGMOID>(expert_ids + first, scores + first, choice, [&](int i) { return __ldcg(row + i); });
}
