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
// E = -log(u) is at least 1 - u, so log(1 - u) bounds a token's score from above: only who may win is worth two precise logarithms.
template <typename T, int V>
__global__ void __launch_bounds__(256) race(
    long long* __restrict__ best, const T* __restrict__ logits, long long row_stride, const float* __restrict__ temperature,
    const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const float t = temperature[blockIdx.x];
    const u64 key = (u64)keys[blockIdx.x];
    long long mine = -0x7fffffffffffffffll - 1;
    float bar = -infinity();  // no less than what a lane of this warp has
    for (int base = (blockIdx.y * blockDim.x + threadIdx.x / 32 * 32) * V; base < vocab; base += gridDim.y * blockDim.x * V) {
        const int first = base + threadIdx.x % 32 * V;
        Vec<T, V> values;
        if (first < vocab) values = *reinterpret_cast<const Vec<T, V>*>(row + first);
        #pragma unroll
        for (int i = 0; i < V; ++i) {
            const int v = first + i;
            if (v >= vocab) break;
            float score = to_float(values.at[i]);
            if (t > 0.f) {
                const u64 bits = mix(key + 0x9E3779B97F4A7C15ull * (u64)v) >> 12;
                score = __fdiv_rn(score, t);
                const float rest = (float)((1ull << 53) - 2 * bits - 1) * 0x1p-53f;  // 1 - u
                if (score - __logf(rest) + 1e-3f < bar) continue;
                // double: 52 random bits stay apart, also where E is small and decides.
                score -= logf((float)-log(((double)bits + 0.5) * 0x1p-52));
            }
            if (score < bar) continue;
            bar = score;
            const long long packed = pack(score, v);
            mine = packed > mine ? packed : mine;
        }
        for (int i = 16; i > 0; i >>= 1) bar = fmaxf(bar, __shfl_xor_sync(0xffffffffu, bar, i));
    }
    for (int i = 16; i > 0; i >>= 1) {
        const long long other = __shfl_xor_sync(0xffffffffu, mine, i);
        mine = other > mine ? other : mine;
    }
    if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.x, mine);
}
