// race: a random token per row from logits, by the least E(v) / p(v); see race in ops.py for the contract.
#include "common.cuh"

typedef unsigned long long u64;

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Score and index as one integer: greater for a greater score, then for a lesser index.
__device__ __forceinline__ long long pack(float score, int index) {
    const int bits = __float_as_int(score);
    const int ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
    return ((long long)ordered << 32) | (0xffffffffu - (unsigned)index);
}

// Grid (S, parts): each block takes a part of a row and joins its best with the row's. `best` starts at the least integer.
extern "C" __global__ void __launch_bounds__(256) race(
    long long* __restrict__ best, const float* __restrict__ logits, long long row_stride, const float* __restrict__ temperature,
    const long long* __restrict__ keys, int vocab) {
    const float* row = logits + blockIdx.x * row_stride;
    const float t = temperature[blockIdx.x];
    const u64 key = (u64)keys[blockIdx.x];
    long long mine = -0x7fffffffffffffffll - 1;
    for (int v = blockIdx.y * blockDim.x + threadIdx.x; v < vocab; v += gridDim.y * blockDim.x) {
        float score = row[v];
        if (t > 0.f) {
            // double: 52 random bits stay apart, also where E is small and decides.
            const double uniform = ((double)(mix(key + 0x9E3779B97F4A7C15ull * (u64)v) >> 12) + 0.5) * 0x1p-52;
            score = __fdiv_rn(score, t) - logf((float)-log(uniform));
        }
        const long long packed = pack(score, v);
        mine = packed > mine ? packed : mine;
    }
    for (int i = 16; i > 0; i >>= 1) {
        const long long other = __shfl_xor_sync(0xffffffffu, mine, i);
        mine = other > mine ? other : mine;
    }
    if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.x, mine);
}
