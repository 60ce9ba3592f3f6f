// Both ends of a decode step: read its tokens from the tables of the slots, and append the sampled tokens.
#include "common.cuh"

// token_ids[b] = tokens[slots[b], positions[b]], and pages[slots[b], positions[b] / page_size] = kv_slots[b] / page_size.
extern "C" __global__ void begin_decode(
    int* __restrict__ token_ids, const int* __restrict__ tokens, long long tokens_stride, int* __restrict__ pages, long long pages_stride,
    const int* __restrict__ slots, const int* __restrict__ positions, const int* __restrict__ kv_slots, int page_size, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    token_ids[row] = tokens[slots[row] * tokens_stride + positions[row]];
    if (kv_slots[row] >= 0) pages[slots[row] * pages_stride + positions[row] / page_size] = kv_slots[row] / page_size;
}

// tokens[slots[b], positions[b] + 1] = new_tokens[b]
extern "C" __global__ void append_tokens(
    int* __restrict__ tokens, long long tokens_stride, const int* __restrict__ slots, const int* __restrict__ positions,
    const int* __restrict__ new_tokens, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) tokens[slots[row] * tokens_stride + positions[row] + 1] = new_tokens[row];
}
