// race: a random token per row from logits, by the least E(v) / p(v); see race and winners in ops.py for the contract.
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
    const int bits = __float_as_int(score + 0.f);  // -0 becomes 0
    const int ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
    return ((long long)ordered << 32) | (0xffffffffu - (unsigned)index);
}

// A lower bound of the score of a token with these 52 random bits: E = -log(u) is at most (1 - u) / u.
__device__ __forceinline__ float least(float score, u64 bits) {
    const float u = (float)(unsigned)(bits >> 20) * 0x1p-32f, rest = (float)((unsigned)(~bits >> 20) + 1ull) * 0x1p-32f;
    return score - __logf(rest) + __logf(u) - 1e-3f - 1e-6f * fminf(fabsf(score), 1e30f);
}

// Grid (S, parts): each block takes a part of a row and joins its best with the row's. `best` starts at the least integer.
// E is at least 1 - u: who is to reach the bar needs a small 1 - u, one integer to compare with for V tokens. Only for those that
// may reach it two precise logarithms are taken.
template <typename T, int V, bool NAMED>
__global__ void __launch_bounds__(256) race(
    long long* __restrict__ best, const T* __restrict__ logits, long long row_stride, const int* __restrict__ tokens,
    int first_token, const float* __restrict__ temperature, const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const int* names = tokens + (NAMED ? (long long)blockIdx.x * vocab : 0);
    const float t = temperature[blockIdx.x], inverse = 1.f / t;
    const u64 key = (u64)keys[blockIdx.x];
    long long mine = -0x7fffffffffffffffll - 1;
    float bar = -infinity();  // no more than the best score of this warp
    bool started = t == 0.f;
    for (int base = (blockIdx.y * blockDim.x + threadIdx.x / 32 * 32) * V; base < vocab; base += gridDim.y * blockDim.x * V) {
        const int first = base + threadIdx.x % 32 * V;
        Vec<T, V> values;
        u64 bits[V];
        int token[V];
        if (first < vocab) values = *reinterpret_cast<const Vec<T, V>*>(row + first);
        float high = -infinity();
        #pragma unroll
        for (int i = 0; i < V; ++i) {
            token[i] = !NAMED ? first_token + first + i : first + i < vocab ? names[first + i] : 0;
            if (first + i < vocab) high = fmaxf(high, to_float(values.at[i]));
            if (t > 0.f) bits[i] = mix(key + 0x9E3779B97F4A7C15ull * (u64)token[i]) >> 12;
            if (!started && first + i < vocab) bar = fmaxf(bar, least(to_float(values.at[i]) * inverse, bits[i]));
        }
        if (!started)
            for (int i = 16; i > 0; i >>= 1) bar = fmaxf(bar, __shfl_xor_sync(0xffffffffu, bar, i));
        started = true;
        high *= inverse;
        const float reach = __expf(high - bar + 1e-3f + 1e-6f * fminf(fabsf(high), 1e30f));  // of 1 - u
        const unsigned limit = reach < 0.99f ? (unsigned)(reach * 0x1p32f) : 0xffffffffu;
        #pragma unroll
        for (int i = 0; i < V; ++i) {
            if (first + i >= vocab) break;
            float score = to_float(values.at[i]);
            if (t > 0.f) {
                if ((unsigned)(~bits[i] >> 20) > limit) continue;  // the upper bits of 1 - u, rounded down
                // double: 52 random bits stay apart, also where E is small and decides.
                score = __fdiv_rn(score, t) - logf((float)-log(((double)bits[i] + 0.5) * 0x1p-52));
            }
            if (score < bar) continue;
            bar = score;
            const long long packed = pack(score, token[i]);
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

// The tokens of the greatest among the contenders [ranks, rows].
extern "C" __global__ void winners(int* __restrict__ tokens, const long long* __restrict__ contenders, int ranks, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    long long best = contenders[row];
    for (int rank = 1; rank < ranks; ++rank) best = max(best, contenders[(long long)rank * rows + row]);
    tokens[row] = (int)(0xffffffffu - (unsigned)best);
}
