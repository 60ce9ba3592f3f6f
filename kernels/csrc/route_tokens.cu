// The way of up to ROWS tokens to their experts in one launch: RMSNorm, the router's GEMM, and the choice by the block that ends last.
#include "expert_choice.cuh"
#include "weight_chunk.cuh"

constexpr int ROWS = 8, SHARES = 8;  // most tokens; warps that share the columns of 16 rows of the weight

// Tokens in shared memory, and the weight of their norm after them. Each token has `share` warps.
template <typename T, int WARPS> struct Staged {
    T* at;
    int stride, size, tokens, share;
    DEVICE Staged(void* memory, int stride, int size, int tokens)
        : at(static_cast<T*>(memory)), stride(stride), size(size), tokens(tokens), share(WARPS / tokens) {}

    // Copy the norm's weight, by all threads.
    DEVICE void copy_norm(const T* norm) const {
        for (int i = threadIdx.x * 8; i < size; i += 32 * WARPS * 8) copy_async(at + tokens * stride + i, norm + i);
    }
    // Call `process` with the addresses of the vectors of this thread's token.
    template <typename F> DEVICE void for_vectors(F process) const {
        const int token = warp_id() / share;
        for (int i = (warp_id() % share * 32 + lane_id()) * 8; token < tokens && i < size; i += share * 32 * 8)
            process(reinterpret_cast<Vec<T, 8>*>(at + token * stride + i), token, i);
    }
    DEVICE void copy(const T* x) const {
        for_vectors([&](Vec<T, 8>* to, int token, int i) { copy_async(to, x + token * size + i); });
        wait_all_copies();
    }
    // Normalize the tokens; also write those to `normed` that are this block's. All threads of the block call it.
    DEVICE void normalize(T* normed, float eps) const {
        __shared__ float squares[WARPS];
        float square = 0.f;
        for_vectors([&](const Vec<T, 8>* from, int, int) {
            const Vec<T, 8> x = *from;
            UNROLL for (int j = 0; j < 8; ++j) square += to_float(x.at[j]) * to_float(x.at[j]);
        });
        square = warp_sum(square);
        if (lane_id() == 0) squares[warp_id()] = square;
        __syncthreads();
        float sum = 0.f;
        for (int n = 0; n < share; ++n) sum += squares[warp_id() / share * share + n];
        const float scale = rsqrtf(sum / size + eps);
        for_vectors([&](Vec<T, 8>* to, int token, int i) {
            const Vec<T, 8> x = *to, by = *reinterpret_cast<const Vec<T, 8>*>(at + tokens * stride + i);
            float scaled[8];
            UNROLL for (int j = 0; j < 8; ++j) scaled[j] = to_float(x.at[j]) * scale * to_float(by.at[j]);
            *to = round_all<T>(scaled);
            if (blockIdx.x == token % gridDim.x) *reinterpret_cast<Vec<T, 8>*>(normed + token * size + i) = *to;
        });
    }
};

// normed = RMSNorm(x) if there is the norm's weight, and experts and scores of choose_experts by the logits normed weight^T + logit_bias.
// x [tokens, size]; a block has 16 rows of the weight for each of its GROUPS of warps, which share their columns. Two groups have all rows,
// and the logits stay in the block. Else `logits` is memory for them, rounded to T;
// `counter` is 0 before and after. Dynamic shared memory: tokens + 1 rows of `size` elements, rounded up to a multiple of 64, and 32 more.
// All weights load before the kernel before has ended: a warp has CHUNKS chunks. Up to six leave room for a block of skinny_gemm.
template <typename T, int CHUNKS, int PER_LANE, bool NORMALIZED, bool SIGMOID, bool BY_LOGITS, int GROUPS>
__global__ void __launch_bounds__(32 * SHARES * GROUPS, GROUPS == 1 && CHUNKS <= 6 ? 2 : 1) route_tokens(
    long long* expert_ids, float* scores, T* normed, float* logits, unsigned* counter, const T* x, const T* __restrict__ norm, float eps,
    const T* __restrict__ weight, const T* __restrict__ logit_bias, const float* __restrict__ bias, float least_sum, float scaling,
    int tokens, int size, int experts, int choices, int first_expert, int shared) {
    typedef Chunk<T, T> Chunk;
    extern __shared__ uint4 memory[];
    constexpr int WARPS = SHARES * GROUPS, BLOCK_ROWS = 16 * GROUPS;
    __shared__ float partial[WARPS][ROWS][16 + 1], block_logits[ROWS][BLOCK_ROWS];
    __shared__ unsigned ended;
    launch_next();
    const int warp = warp_id(), share = warp % SHARES, g = group_id(), t = thread_in_group();
    const int block_row = blockIdx.x * BLOCK_ROWS, first_row = block_row + warp / SHARES * 16;
    const int rows = experts + shared, chunks = (size + Chunk::COLUMNS - 1) / Chunk::COLUMNS;
    const int stride = chunks * Chunk::COLUMNS + 32;  // lanes (g, t) and (g + 1, t) read different banks
    const PaddedRows<T> from = {weight, {min(first_row + g, rows - 1), min(first_row + g + 8, rows - 1)}, size};
    Chunk weights[CHUNKS];
    UNROLL for (int c = 0; c < CHUNKS; ++c) weights[c].load(from, share + c * SHARES);
    const int token = threadIdx.x / BLOCK_ROWS, row = block_row + threadIdx.x % BLOCK_ROWS;  // of the logit that this thread finishes
    const bool finishes = token < tokens && row < rows;
    const float row_bias = logit_bias && row < rows ? to_float(logit_bias[row]) : 0.f;
    if (bias && threadIdx.x * 32 < experts) prefetch_line(bias + threadIdx.x * 32);
    const Staged<T, WARPS> staged(memory, stride, size, tokens);
    if (norm) staged.copy_norm(norm);
    wait_for_previous();
    staged.copy(x);
    if (norm) staged.normalize(normed, eps);
    __syncthreads();

    constexpr int PARTS = 4;  // sums that are independent of each other
    float sums[PARTS][1][4] = {};
    UNROLL for (int c = 0; c < CHUNKS; ++c)
        UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) {
            uint4 right[1] = {make_uint4(0, 0, 0, 0)};
            const int column = Chunk::column(share + c * SHARES, piece, size);
            if (g < tokens && column < size) right[0] = *reinterpret_cast<const uint4*>(staged.at + g * stride + column);
            weights[c].template multiply_piece<false>(sums[(c * Chunk::PIECES + piece) % PARTS], piece, right);
        }
    UNROLL for (int i = 0; i < 4; ++i) {
        float sum = 0.f;
        UNROLL for (int part = 0; part < PARTS; ++part) sum += sums[part][0][i];
        partial[warp][2 * t + i % 2][g + i / 2 * 8] = sum;
    }
    __syncthreads();
    if (finishes) {
        float sum = row_bias;
        UNROLL for (int w = 0; w < SHARES; ++w) sum += partial[threadIdx.x % BLOCK_ROWS / 16 * SHARES + w][token][threadIdx.x % 16];
        const float logit = to_float(from_float<T>(sum));
        if (GROUPS > 1) block_logits[token][row] = logit;
        else logits[token * rows + row] = logit, __threadfence();
    }
    __syncthreads();
    if constexpr (GROUPS == 1) {
        if (threadIdx.x == 0) ended = atomicAdd(counter, 1u);
        __syncthreads();
        if (ended + 1 != gridDim.x) return;
        __threadfence();
        if (threadIdx.x == 0) *counter = 0;
    }
    if (warp >= tokens) return;
    const Choice choice = {bias, least_sum, scaling, experts, choices, first_expert, shared};
    const long long first = (long long)warp * (choices + shared);
    choose<PER_LANE, NORMALIZED, SIGMOID, BY_LOGITS>(expert_ids + first, scores + first, choice, [&](int i) {
        return GROUPS > 1 ? block_logits[warp][i] : __ldcg(logits + warp * rows + i);
    });
}
