// Sampling of tokens: Gumbel-max over a whole row (gumbel_argmax, merge_candidates), among the top-k candidates of a row
// (topk_candidates, sample_topk), or among the tokens that top-p and min-p keep (sample_top_p). The contracts are in ops.py.
//
// Gumbel-max: the token argmax_v score(v) - log E(v), E(v) = -log u(v), is a sample from softmax(score). u(v) in (0, 1) is hashed
// from the row's key and the token alone: u = (bits + 0.5) 2^-52.
#include "common.cuh"

typedef unsigned long long u64;

constexpr long long NO_CANDIDATE = -0x7fffffffffffffffll - 1;  // less than any candidate
constexpr int TOPK_ITEMS = 32;     // elements of a row in a thread of topk_candidates
constexpr int TOPK_THREADS = 128;  // threads of topk_candidates and sample_topk, and the maximum count of both

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
DEVICE u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// A candidate: score and token in one integer, greater for a greater score, then for a lesser token.
DEVICE long long pack(float score, int token) {
    const int bits = __float_as_int(score + 0.f);  // -0 becomes 0
    const int ordered = bits < 0 ? bits ^ 0x7fffffff : bits;
    return ((long long)ordered << 32) | (0xffffffffu - (unsigned)token);
}

DEVICE float score_of(long long candidate) {
    const int ordered = (int)(candidate >> 32);
    return __int_as_float(ordered < 0 ? ordered ^ 0x7fffffff : ordered);
}

DEVICE int token_of(long long candidate) { return (int)(0xffffffffu - (unsigned)candidate); }
// Return the 52 random bits of a token.
DEVICE u64 random_bits(u64 key, int token) { return mix(key + 0x9E3779B97F4A7C15ull * (u64)token) >> 12; }
DEVICE unsigned upper_bits(u64 bits) { return bits >> 20; }  // 32 of the 52

// score - log E. double: the 52 bits stay apart also for a small E, which decides.
DEVICE float gumbel_score(float score, u64 bits) { return score - logf((float)-log(((double)bits + 0.5) * 0x1p-52)); }

// The bounds below add or subtract 1e-3 + 1e-6 |score|, which is more than the errors of the fast logarithms and of float32.
// A bound below gumbel_score, without its precise logarithms: E = -log u <= (1 - u) / u.
DEVICE float lower_bound(float score, unsigned upper) {
    const float u = (float)upper, rest = (float)~upper + 1.f;  // times 2^32
    return score - __logf(rest) + __logf(u) - 1e-3f - 1e-6f * fminf(fabsf(score), 1e30f);
}

// A bound above gumbel_score: E >= 1 - u, the upper bits of which are ~upper.
DEVICE float upper_bound(float score, unsigned upper) {
    const float rest = (float)~upper * 0x1p-32f;
    return score - __logf(rest) + 1e-3f + 1e-6f * fminf(fabsf(score), 1e30f);
}

// Return the greatest upper 32 bits of 1 - u with which a score can reach the threshold: score - log(1 - u) >= threshold.
DEVICE unsigned max_rest(float score, float threshold) {
    const float rest = __expf(score - threshold + 1e-3f + 1e-6f * fminf(fabsf(score), 1e30f));
    return rest < 0.99f ? (unsigned)(rest * 0x1p32f) : 0xffffffffu;
}

template <typename T> DEVICE T warp_max(T x) {
    for (int i = 16; i > 0; i >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// Grid (S, parts): each block merges the best candidate of a part of a row into the row's. `candidates` starts at NO_CANDIDATE.
// Few tokens can reach the best score so far. One integer comparison per token finds them; only they take two precise logarithms, in
// a loop: less code, and the lanes of a warp do it at the same time.
template <typename T, int V, bool HAS_TOKENS>
__global__ void __launch_bounds__(256) gumbel_argmax(
    long long* __restrict__ candidates, const T* __restrict__ logits, long long row_stride, const int* __restrict__ tokens,
    int first_token, const float* __restrict__ temperature, const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const int* row_tokens = tokens + (HAS_TOKENS ? (long long)blockIdx.x * vocab : 0);
    const float t = temperature[blockIdx.x], inverse = inverse_of(t);
    const u64 key = (u64)keys[blockIdx.x];
    long long best = NO_CANDIDATE;
    float threshold = -infinity();  // at most the best score of this warp
    bool has_threshold = t == 0.f;
    for (int base = (blockIdx.y * blockDim.x + threadIdx.x / 32 * 32) * V; base < vocab; base += gridDim.y * blockDim.x * V) {
        const int first = base + threadIdx.x % 32 * V;  // V divides vocab
        const bool exists = first < vocab;
        auto token_at = [&](int i) { return HAS_TOKENS ? row_tokens[first + i] : first_token + first + i; };
        Vec<T, V> values;
        unsigned upper[V];
        float max_logit = -infinity();
        if (exists) {
            values = *reinterpret_cast<const Vec<T, V>*>(row + first);
            UNROLL for (int i = 0; i < V; ++i) max_logit = fmaxf(max_logit, to_float(values.at[i]));
            if (t > 0.f) UNROLL for (int i = 0; i < V; ++i) upper[i] = upper_bits(random_bits(key, token_at(i)));
            if (!has_threshold)
                UNROLL for (int i = 0; i < V; ++i) threshold = fmaxf(threshold, lower_bound(to_float(values.at[i]) * inverse, upper[i]));
        }
        if (!has_threshold) threshold = warp_max(threshold);
        has_threshold = true;
        unsigned left = 0;  // bit i: value i can be the best
        if (exists) {
            const unsigned limit = max_rest(max_logit * inverse, threshold);
            const float least = fmaxf(max_logit, threshold);  // where the greatest logit wins
            UNROLL for (int i = 0; i < V; ++i)
                left |= (unsigned)(t > 0.f ? ~upper[i] <= limit : !(to_float(values.at[i]) < least)) << i;
        }
        for (; left; left &= left - 1) {
            const int i = __ffs(left) - 1, token = token_at(i);
            float score = to_float(row[first + i]);
            if (t > 0.f) score = gumbel_score(__fdiv_rn(score, t), random_bits(key, token));
            if (score < threshold) continue;
            threshold = score;
            best = max(best, pack(score, token));
        }
        threshold = warp_max(threshold);
    }
    best = warp_max(best);
    if (threadIdx.x % 32 == 0) atomicMax(candidates + blockIdx.x, best);
}

// tokens[row] = the token of the greatest of candidates [ranks, rows] in that column.
extern "C" __global__ void merge_candidates(int* __restrict__ tokens, const long long* __restrict__ candidates, int ranks, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    long long best = candidates[row];
    ROLLED for (int first = 1; first < ranks; first += 4)  // four loads are under way
        UNROLL for (int i = 0; i < 4; ++i) best = max(best, candidates[(long long)min(first + i, ranks - 1) * rows + row]);
    tokens[row] = token_of(best);
}

template <typename T> DEVICE long long candidate(T logit, int token) { return pack(to_float(logit), token); }
template <> DEVICE long long candidate(long long packed, int) { return packed; }

// The number of `count` items in shared memory that are greater: the place of an item in descending order. `count` is even.
DEVICE int num_greater(long long item, const long long* items, int count) {
    int greater = 0;
    #pragma unroll 8
    for (int i = 0; i < count / 2; ++i) {
        const longlong2 two = reinterpret_cast<const longlong2*>(items)[i];
        greater += (two.x > item) + (two.y > item);
    }
    return greater;
}

// Grid (S, parts): the `count` greatest of a part of a row, of logits or of candidates; [S, count, parts], descending, padded with
// NO_CANDIDATE. The count-th greatest of the threads' maxima is a threshold that at least `count` elements pass, at most
// count * TOPK_ITEMS, and about `count` if the order is random. Only the elements that pass are sorted.
template <typename T, int V>
__global__ void __launch_bounds__(TOPK_THREADS, sizeof(T) == 2 ? 8 : 4) topk_candidates(
    long long* __restrict__ out, const T* __restrict__ in, long long row_stride, int first_token, int columns, int count) {
    extern __shared__ __align__(16) long long items[];  // [max(TOPK_THREADS, count * TOPK_ITEMS)]
    __shared__ long long threshold;
    __shared__ int num_passed;
    const int first = (blockIdx.y * TOPK_ITEMS * TOPK_THREADS) + threadIdx.x * V, left = columns - first;
    const T* row = in + blockIdx.x * row_stride + first;
    Vec<T, V> loaded[TOPK_ITEMS / V];
    UNROLL for (int r = 0; r < TOPK_ITEMS / V; ++r)
        if (r * TOPK_THREADS * V < left) loaded[r] = *reinterpret_cast<const Vec<T, V>*>(row + r * TOPK_THREADS * V);
    auto for_each = [&](auto f) {  // f(candidate, its index in this thread)
        UNROLL for (int r = 0; r < TOPK_ITEMS / V; ++r) {
            const int at = r * TOPK_THREADS * V;
            if (at >= left) break;
            UNROLL for (int i = 0; i < V; ++i) f(candidate(loaded[r].at[i], first_token + first + at + i), r * V + i);
        }
    };
    long long best = NO_CANDIDATE;
    for_each([&](long long item, int) { best = max(best, item); });
    items[threadIdx.x] = best;
    if (threadIdx.x == 0) num_passed = 0, threshold = NO_CANDIDATE;
    __syncthreads();
    if (num_greater(best, items, TOPK_THREADS) == count - 1) threshold = best;
    __syncthreads();
    unsigned passes = 0;  // one bit for each item
    for_each([&](long long item, int i) { passes |= (unsigned)(item >= threshold && item != NO_CANDIDATE) << i; });
    int place = passes ? atomicAdd(&num_passed, __popc(passes)) : 0;
    for (; passes; passes &= passes - 1) {  // few items: they are loaded again, which is less code
        const int i = __ffs(passes) - 1, at = i / V * TOPK_THREADS * V + i % V;
        items[place++] = candidate(row[at], first_token + first + at);
    }
    __syncthreads();
    const int passed = num_passed;
    if (threadIdx.x == 0 && passed % 2) items[passed] = NO_CANDIDATE;
    __syncthreads();
    out += (long long)blockIdx.x * count * gridDim.y + blockIdx.y;
    ROLLED for (int i = threadIdx.x; i < max(passed, count); i += TOPK_THREADS) {
        place = i < passed ? num_greater(items[i], items, passed + passed % 2) : i;
        if (place < count) out[(long long)place * gridDim.y] = i < passed ? items[i] : NO_CANDIDATE;
    }
}

// The running sums of a value per thread, by Hillis and Steele.
DEVICE void block_scan(float* sums) {
    const int i = threadIdx.x;
    for (int step = 1; step < blockDim.x; step *= 2) {
        __syncthreads();
        const float before = i >= step ? sums[i - step] : 0.f;
        __syncthreads();
        sums[i] += before;
    }
    __syncthreads();
}

// One block for each row of candidates [S, count], descending; one thread for each candidate, padded to whole warps. The order of
// sums does not depend on the batch.
extern "C" __global__ void __launch_bounds__(TOPK_THREADS) sample_topk(
    int* __restrict__ tokens, const long long* __restrict__ candidates, const float* __restrict__ temperature,
    const long long* __restrict__ top_k, const float* __restrict__ top_p, const float* __restrict__ min_p,
    const long long* __restrict__ keys, int count) {
    __shared__ float mass[TOPK_THREADS];  // the running sum of exp(score - max_score)
    __shared__ long long warp_best[TOPK_THREADS / 32];
    const int row = blockIdx.x, i = threadIdx.x;
    const float t = temperature[row], p = top_p[row], min_ratio = min_p[row];
    const long long k = top_k[row];
    candidates += (long long)row * count;
    const long long mine = i < count ? candidates[i] : NO_CANDIDATE;
    const float max_score = __fdiv_rn(score_of(candidates[0]), t), score = __fdiv_rn(score_of(mine), t);
    bool kept = mine != NO_CANDIDATE && (k <= 0 || i < k) && (min_ratio <= 0.f || score >= max_score + logf(min_ratio));
    mass[i] = kept ? expf(score - max_score) : 0.f;
    block_scan(mass);
    if (i > 0 && p < 1.f && mass[i - 1] >= p * mass[blockDim.x - 1]) kept = false;
    const int token = token_of(mine);
    long long best = kept ? pack(gumbel_score(score, random_bits((u64)keys[row], token)), token) : NO_CANDIDATE;
    best = warp_max(best);
    if (i % 32 == 0) warp_best[i / 32] = best;
    __syncthreads();
    if (i > 0) return;
    ROLLED for (int warp = 1; warp < blockDim.x / 32; ++warp) best = max(best, warp_best[warp]);
    tokens[row] = token_of(best);
}

template <typename T> DEVICE T block_max(T x) {
    __shared__ T warps[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(warps[min(threadIdx.x % 32, blockDim.x / 32 - 1)]);
}

// One block for each row. If the sample from all tokens is among the kept ones, it is the sample from the kept ones. If not, all
// kept tokens are more likely than it, and the next round samples from the more likely tokens only. So nothing is sorted, and most
// rows need two or three passes. (Rejection sampling as in FlashInfer's top-p; here each round's sample is a function of the key.)
template <typename T, int V>
__global__ void __launch_bounds__(1024, 1) sample_top_p(
    int* __restrict__ tokens, const T* __restrict__ logits, long long row_stride, const float* __restrict__ temperature,
    const float* __restrict__ top_p, const float* __restrict__ min_p, const long long* __restrict__ keys, int vocab) {
    const T* row = logits + blockIdx.x * row_stride;
    const float t = temperature[blockIdx.x], p = top_p[blockIdx.x];
    const float inverse = inverse_of(t);
    const u64 key = (u64)keys[blockIdx.x];
    auto score_of_logit = [&](float logit) {  // logit / t
        const float score = divide(logit, t, inverse);
        return score == score ? score : logit * inverse;  // infinite
    };
    auto for_each = [&](auto f) {  // f(values, first, count) on all lanes of a warp together
        for (int base = threadIdx.x / 32 * 32 * V; base < vocab; base += blockDim.x * V) {
            const int first = base + threadIdx.x % 32 * V;
            Vec<T, V> values;
            if (first < vocab) values = *reinterpret_cast<const Vec<T, V>*>(row + first);
            f(values, first, first < vocab ? V : 0);
        }
    };
    float max_logit = -infinity();
    for_each([&](const Vec<T, V>& values, int, int count) {
        UNROLL for (int i = 0; i < V; ++i) if (i < count) max_logit = fmaxf(max_logit, to_float(values.at[i]));
    });
    const float max_score = score_of_logit(block_max(max_logit));
    const float min_score = min_p[blockIdx.x] > 0.f ? max_score + logf(min_p[blockIdx.x]) : -infinity();
    float mass = 0.f;  // sum of exp(score - max_score) over the tokens that min-p keeps
    for_each([&](const Vec<T, V>& values, int, int count) {
        UNROLL for (int i = 0; i < V; ++i) {
            const float score = i < count ? score_of_logit(to_float(values.at[i])) : -infinity();
            if (score >= min_score) mass += expf(score - max_score);
        }
    });
    mass = block_sum(mass);
    for (long long rejected = NO_CANDIDATE;;) {  // the greatest rejected token, as a candidate by its logit
        long long best = NO_CANDIDATE;
        float threshold = -infinity();  // at most the best score of this warp
        for_each([&](const Vec<T, V>& values, int first, int count) {
            unsigned left = 0;  // bit i: value i can be the best
            UNROLL for (int i = 0; i < V; ++i) {
                const float logit = to_float(values.at[i]), score = score_of_logit(logit);
                if (i >= count || score < min_score || pack(logit, first + i) <= rejected) continue;
                left |= (unsigned)!(upper_bound(score, upper_bits(random_bits(key, first + i))) < threshold) << i;
            }
            for (; left; left &= left - 1) {
                const int token = first + __ffs(left) - 1;
                const float score = gumbel_score(score_of_logit(to_float(row[token])), random_bits(key, token));
                if (score < threshold) continue;
                threshold = score;
                best = max(best, pack(score, token));
            }
            threshold = warp_max(threshold);
        });
        const int token = token_of(block_max(best));
        if (token < 0) break;  // impossible: the most likely token is always kept
        rejected = pack(to_float(row[token]), token);
        float mass_above = 0.f;  // the mass of more likely tokens
        for_each([&](const Vec<T, V>& values, int first, int count) {
            UNROLL for (int i = 0; i < V; ++i) {
                if (i >= count || pack(to_float(values.at[i]), first + i) <= rejected) continue;
                mass_above += expf(score_of_logit(to_float(values.at[i])) - max_score);
            }
        });
        mass_above = block_sum(mass_above);
        if (mass_above > 0.f && p < 1.f && mass_above >= p * mass) continue;
        if (threadIdx.x == 0) tokens[blockIdx.x] = token;
        break;
    }
}
