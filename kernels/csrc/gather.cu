// gather_rows: out[t] = weight[ids[t] - first_row], or zero where that row is another shard's.
#include "common.cuh"

// One block for a part of a row; `chunks` vectors W in a row, grid (T, parts). A row index is compared unsigned once for both bounds.
template <typename W, typename Id>
__global__ void __launch_bounds__(256) gather_rows(
    W* __restrict__ out, const W* __restrict__ weight, const Id* __restrict__ ids, long long first_row, long long rows, int chunks) {
    const long long t = blockIdx.x;
    const unsigned long long row = (unsigned long long)((long long)ids[t] - first_row);
    const bool owned = row < (unsigned long long)rows;
    const W* source = weight + (owned ? row : 0) * chunks;
    W* target = out + t * chunks;
    const int step = blockDim.x * gridDim.y;
    const W zero{};
    #pragma unroll 4
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < chunks; i += step)
        target[i] = owned ? source[i] : zero;
}
