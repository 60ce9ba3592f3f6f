// gather_rows: out[t] = weight[ids[t] - first_row], or zero if that row is in another shard.
#include "common.cuh"

// Grid (T, parts): a block has a part of a row of `vectors` vectors W. One unsigned comparison of a row index checks both bounds.
template <typename W, typename Id>
__global__ void __launch_bounds__(256) gather_rows(
    W* __restrict__ out, const W* __restrict__ weight, const Id* __restrict__ ids, long long first_row, long long rows, int vectors) {
    const long long t = blockIdx.x;
    const unsigned long long row = (unsigned long long)((long long)ids[t] - first_row);
    const bool owned = row < (unsigned long long)rows;
    const W* source = weight + (owned ? row : 0) * vectors;
    W* target = out + t * vectors;
    const int step = blockDim.x * gridDim.y;
    const W zero{};
    #pragma unroll 4
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < vectors; i += step)
        target[i] = owned ? source[i] : zero;
}
