// From logits to tokens: a race by the least E(v) / p(v) among all of a row (race, winners), among the greatest of it that top-k,
// top-p and min-p leave (best, draw), or among what top-p and min-p leave of all (nucleus). See ops.py for the contracts.
#include "common.cuh"

typedef unsigned long long u64;

constexpr long long NOBODY = -0x7fffffffffffffffll - 1;  // less than any contender
constexpr int HELD = 32;  // elements of a row in a thread of best
constexpr int FEW = 128;  // threads of best and of draw, and the most that they are asked for

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

__device__ __forceinline__ float score_of(long long contender) {
    const int ordered = (int)(contender >> 32);
    return __int_as_float(ordered < 0 ? ordered ^ 0x7fffffff : ordered);
}

__device__ __forceinline__ int token_of(long long contender) { return (int)(0xffffffffu - (unsigned)contender); }

// The 52 random bits of a token.
__device__ __forceinline__ u64 noise(u64 key, int token) { return mix(key + 0x9E3779B97F4A7C15ull * (u64)token) >> 12; }

// log(p / E) up to a constant of the row. double: 52 random bits stay apart, also where E is small and decides.
__device__ __forceinline__ float drawn(float score, u64 bits) {
    return score - logf((float)-log(((double)bits + 0.5) * 0x1p-52));
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
__global__ void __launch_bounds__(256) gumbel_argmax(
    long long* __restrict__ best, const T* __restrict__ logits, long long row_stride, const int* __restrict__ tokens,
    int first_token, const float* __restrict__ temperature, const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const int* names = tokens + (NAMED ? (long long)blockIdx.x * vocab : 0);
    const float t = temperature[blockIdx.x], inverse = 1.f / t;
    const u64 key = (u64)keys[blockIdx.x];
    long long mine = NOBODY;
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
            if (t > 0.f) bits[i] = noise(key, token[i]);
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
                score = drawn(__fdiv_rn(score, t), bits[i]);
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
extern "C" __global__ void merge_candidates(int* __restrict__ tokens, const long long* __restrict__ contenders, int ranks, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    long long best = contenders[row];
    for (int rank = 1; rank < ranks; ++rank) best = max(best, contenders[(long long)rank * rows + row]);
    tokens[row] = token_of(best);
}

template <typename T> __device__ __forceinline__ long long contender(T logit, int token) { return pack(to_float(logit), token); }
template <> __device__ __forceinline__ long long contender(long long packed, int) { return packed; }

// The place of `own` among the `count` in shared memory, no two of which are alike: how many are greater. `count` is even.
__device__ __forceinline__ int place_of(long long own, const long long* items, int count) {
    int place = 0;
    #pragma unroll 8
    for (int i = 0; i < count / 2; ++i) {
        const longlong2 two = reinterpret_cast<const longlong2*>(items)[i];
        place += (two.x > own) + (two.y > own);
    }
    return place;
}

// Grid (S, parts): the `count` greatest of a part of a row, of logits or of contenders; [S, count, parts], descending, NOBODY where
// there are fewer. Each thread has HELD of them. The count-th greatest of the threads' own greatest is a bar that `count` of all
// pass for sure, at most count * HELD, and about as many as are wanted where the order is random: only these are put in order.
template <typename T, int V>
__global__ void __launch_bounds__(FEW, sizeof(T) == 2 ? 8 : 4) topk_candidates(
    long long* __restrict__ out, const T* __restrict__ in, long long row_stride, int first_token, int columns, int count) {
    extern __shared__ __align__(16) long long items[];  // [max(FEW, count * HELD)]
    __shared__ long long bar;
    __shared__ int passed;
    const int first = (blockIdx.y * HELD * FEW) + threadIdx.x * V, left = columns - first;
    const T* row = in + blockIdx.x * row_stride + first;
    Vec<T, V> held[HELD / V];
    #pragma unroll
    for (int r = 0; r < HELD / V; ++r)
        if (r * FEW * V < left) held[r] = *reinterpret_cast<const Vec<T, V>*>(row + r * FEW * V);
    auto for_each = [&](auto f) {  // f(contender, which of the thread's)
        #pragma unroll
        for (int i = 0; i < HELD; ++i) {
            if (i / V * FEW * V < left) f(contender(held[i / V].at[i % V], first_token + first + i / V * FEW * V + i % V), i);
        }
    };
    long long most = NOBODY;
    for_each([&](long long own, int) { most = max(most, own); });
    items[threadIdx.x] = most;
    if (threadIdx.x == 0) passed = 0, bar = NOBODY;
    __syncthreads();
    if (place_of(most, items, FEW) == count - 1) bar = most;
    __syncthreads();
    unsigned mine = 0;  // a bit for each that passes
    for_each([&](long long own, int i) { mine |= (unsigned)(own >= bar && own != NOBODY) << i; });
    int place = mine ? atomicAdd(&passed, __popc(mine)) : 0;
    for_each([&](long long own, int i) { if (mine >> i & 1) items[place++] = own; });
    __syncthreads();
    const int there = passed;
    if (threadIdx.x == 0 && there % 2) items[there] = NOBODY;
    __syncthreads();
    out += (long long)blockIdx.x * count * gridDim.y + blockIdx.y;
    for (int i = threadIdx.x; i < max(there, count); i += FEW) {
        place = i < there ? place_of(items[i], items, there + there % 2) : i;
        if (place < count) out[(long long)place * gridDim.y] = i < there ? items[i] : NOBODY;
    }
}

// A block for each row of contenders [S, count], descending; a thread for each, and more up to a whole warp. Sums go in the same
// order whatever else is in the batch.
extern "C" __global__ void __launch_bounds__(FEW) sample_topk(
    int* __restrict__ tokens, const long long* __restrict__ contenders, const float* __restrict__ temperature,
    const long long* __restrict__ top_k, const float* __restrict__ top_p, const float* __restrict__ min_p,
    const long long* __restrict__ keys, int count) {
    __shared__ float mass[FEW];
    __shared__ long long best_of[FEW / 32];
    const int row = blockIdx.x, i = threadIdx.x;
    const float t = temperature[row], p = top_p[row], least = min_p[row];
    const long long k = top_k[row];
    contenders += (long long)row * count;
    const long long own = i < count ? contenders[i] : NOBODY;
    const float greatest = __fdiv_rn(score_of(contenders[0]), t), score = __fdiv_rn(score_of(own), t);
    bool kept = own != NOBODY && (k <= 0 || i < k) && (least <= 0.f || score >= greatest + logf(least));
    mass[i] = kept ? expf(score - greatest) : 0.f;
    for (int step = 1; step < blockDim.x; step *= 2) {  // its running sum
        __syncthreads();
        const float before = i >= step ? mass[i - step] : 0.f;
        __syncthreads();
        mass[i] += before;
    }
    __syncthreads();
    if (i > 0 && p < 1.f && mass[i - 1] >= p * mass[blockDim.x - 1]) kept = false;
    const int token = token_of(own);
    long long mine = kept ? pack(drawn(score, noise((u64)keys[row], token)), token) : NOBODY;
    for (int step = 16; step > 0; step >>= 1) mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, step));
    if (i % 32 == 0) best_of[i / 32] = mine;
    __syncthreads();
    if (i > 0) return;
    for (int warp = 1; warp < blockDim.x / 32; ++warp) mine = max(mine, best_of[warp]);
    tokens[row] = token_of(mine);
}

template <typename T> __device__ __forceinline__ T block_max(T mine) {
    __shared__ T of[32];
    for (int i = 16; i > 0; i >>= 1) mine = max(mine, __shfl_xor_sync(0xffffffffu, mine, i));
    __syncthreads();
    if (threadIdx.x % 32 == 0) of[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) mine = max(mine, of[warp]);
    return mine;
}

// A block for each row. The winner of the race among all has also won among those that are left, if it is one of them; else these
// are all greater than it, and it is among the greater that the race is run again. So nothing is sorted, and there are two or
// three passes in most cases. (Rejection sampling as in FlashInfer's top-p; here each round's winner is a function of the key.)
template <typename T, int V>
__global__ void __launch_bounds__(1024) sample_top_p(
    int* __restrict__ tokens, const T* __restrict__ logits, long long row_stride, const float* __restrict__ temperature,
    const float* __restrict__ top_p, const float* __restrict__ min_p, const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const float t = temperature[blockIdx.x], p = top_p[blockIdx.x];
    const u64 key = (u64)keys[blockIdx.x];
    auto for_all = [&](auto f) {  // f(values, first, how many) on all lanes of a warp together
        for (int base = threadIdx.x / 32 * 32 * V; base < vocab; base += blockDim.x * V) {
            const int first = base + threadIdx.x % 32 * V;
            Vec<T, V> values;
            if (first < vocab) values = *reinterpret_cast<const Vec<T, V>*>(row + first);
            f(values, first, first < vocab ? V : 0);
        }
    };
    float high = -infinity();
    for_all([&](const Vec<T, V>& values, int, int count) {
        #pragma unroll
        for (int i = 0; i < V; ++i) if (i < count) high = fmaxf(high, to_float(values.at[i]));
    });
    const float greatest = __fdiv_rn(block_max(high), t);
    const float least = min_p[blockIdx.x] > 0.f ? greatest + logf(min_p[blockIdx.x]) : -infinity();
    float mass = 0.f;
    for_all([&](const Vec<T, V>& values, int, int count) {
        #pragma unroll
        for (int i = 0; i < V; ++i) {
            const float score = i < count ? __fdiv_rn(to_float(values.at[i]), t) : -infinity();
            if (score >= least) mass += expf(score - greatest);
        }
    });
    mass = block_sum(mass);
    for (long long floor = NOBODY;;) {  // which is none of those that are left
        long long mine = NOBODY;
        float bar = -infinity();  // no more than the best of this warp
        for_all([&](const Vec<T, V>& values, int first, int count) {
            #pragma unroll
            for (int i = 0; i < V; ++i) {
                if (i >= count) continue;
                const float logit = to_float(values.at[i]);
                float score = __fdiv_rn(logit, t);
                if (score < least || pack(logit, first + i) <= floor) continue;
                const u64 bits = noise(key, first + i);
                // E is at least 1 - u, whose upper bits these are: no logarithm is precise for who cannot win even so.
                const float rest = (float)(unsigned)(~bits >> 20) * 0x1p-32f;
                if (score - __logf(rest) + 1e-3f + 1e-6f * fminf(fabsf(score), 1e30f) < bar) continue;
                score = drawn(score, bits);
                if (score < bar) continue;
                bar = score;
                mine = max(mine, pack(score, first + i));
            }
            for (int i = 16; i > 0; i >>= 1) bar = fmaxf(bar, __shfl_xor_sync(0xffffffffu, bar, i));
        });
        const int winner = token_of(block_max(mine));
        if (winner < 0) break;  // cannot be: the greatest is always left
        floor = pack(to_float(row[winner]), winner);
        float above = 0.f;
        for_all([&](const Vec<T, V>& values, int first, int count) {
            #pragma unroll
            for (int i = 0; i < V; ++i) {
                if (i >= count || pack(to_float(values.at[i]), first + i) <= floor) continue;
                above += expf(__fdiv_rn(to_float(values.at[i]), t) - greatest);
            }
        });
        above = block_sum(above);
        if (above > 0.f && p < 1.f && above >= p * mass) continue;
        if (threadIdx.x == 0) tokens[blockIdx.x] = winner;
        break;
    }
}
