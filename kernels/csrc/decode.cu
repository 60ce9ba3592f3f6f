// decode_attention: all that happens between the QKV projection and the output projection for one new token a row.
//
// Norm and rotation of q and k, the store of k and v, and attention over the pages, in one kernel. The keys of all rows, row by
// row, are cut into equal parts; a block has a part of one key head, with its query heads, and goes through it split by split: the
// keys of one row. Of a row that was cut, the block that ends last merges the splits, in their order. split_keys says where the
// parts begin, once a step for all layers. Neighbours have the heads of one part, so that a page is read by all of them at about the
// same time.
//
// Both products run on tensor cores, straight from registers (see product.cu for the trick with the order of the columns): lane
// (g, t) = (lane / 4, lane % 4) loads elements 8 t .. 8 t + 7 of every 32 of keys g and g + 8. Scores come out as [keys, heads];
// movmatrix turns them and the values into what the second product, [elements, keys] x [keys, heads], wants.
#include "heads.cuh"

constexpr int TILE = 16;   // keys that a warp takes at once
constexpr int GROUP = 8;   // query heads of one key head, at most

__device__ __forceinline__ unsigned transpose(unsigned x) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Copy 16 bytes to shared memory without waiting for them.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

// How many keys in the cache a row sees.
__device__ __forceinline__ int seen(int position, int window) { return window > 0 ? min(position, window - 1) : position; }

// work: the number of parts; the units of all rows, a unit being so many keys; for each row the units of those before it, and of
// all; for each part the row where it begins. A row has a unit at least. As many parts as rows, or more of `least` units or
// more, but `most` at most; where there are no more units than that, and one is enough, each is a part. One block.
extern "C" __global__ void __launch_bounds__(1024) partition_keys(
    int* __restrict__ work, const int* __restrict__ positions, int rows, int window, int unit, int least, int most) {
    __shared__ int totals[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int* starts = work + 2;
    int total = 0;
    for (int first = 0; first < rows; first += blockDim.x) {
        const int row = first + threadIdx.x;
        const int units = row < rows ? max(1, (seen(positions[row], window) + unit - 1) / unit) : 0;
        int before = units;  // inclusive prefix sum over the warp
        for (int i = 1; i < 32; i <<= 1) {
            const int other = __shfl_up_sync(0xffffffffu, before, i);
            if (lane >= i) before += other;
        }
        if (lane == 31) totals[warp] = before;
        __syncthreads();
        before += total - units;
        for (int w = 0; w < blockDim.x / 32; ++w) {
            if (w < warp) before += totals[w];
            total += totals[w];
        }
        if (row < rows) starts[row] = before;
        __syncthreads();
    }
    const int parts = min(most, min(total, max(rows, total / least)));
    if (threadIdx.x == 0) starts[rows] = total, work[0] = parts, work[1] = total;
    __syncthreads();
    for (int part = threadIdx.x; part < parts; part += blockDim.x) {
        const int begin = (int)((long long)part * total / parts);
        int low = 0, high = rows;  // starts[low] <= begin < starts[high]
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (starts[middle] <= begin ? low : high) = middle;
        }
        starts[rows + 1 + part] = low;
    }
}

// The keys of one row in a part. Units: the first in the sequence of all; from, to and how many of this row.
struct Split {
    int row, begin, end, position, unit, from, to, units;
    const int* pages;
};

template <typename T, int E, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 4 ? 3 : 1) decode_attention(
    T* __restrict__ out, const T* qkv, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows,
    T* k_cache, T* v_cache, long long page_stride, long long slot_stride, const int* __restrict__ slots, int num_slots,
    const int* __restrict__ pages, long long pages_stride, const int* __restrict__ owners, int page_size,
    const int* __restrict__ work, int rows, int window, int unit, float* partial, unsigned* arrived, float scale, int heads, int kv_heads) {
    constexpr int BLOCKS = E / 32, VECTORS = E / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = heads / kv_heads;
    // As projected, of this split and the next: q's heads, then k, then v; and the angles.
    __shared__ alignas(16) T raw[2][GROUP + 2][E], query[GROUP][E + 32], key[E], norms[2][E];
    __shared__ alignas(16) float angles[2][E];
    __shared__ float outs[WARPS][GROUP][E + 17], most[WARPS + 1][GROUP], sums[WARPS + 1][GROUP];  // 17: no two lanes on one bank
    __shared__ bool merges;
    launch_next();

    const int parts = work[0], total = work[1], part = blockIdx.x / kv_heads, head = blockIdx.x % kv_heads;
    const int* starts = work + 2;
    if (part >= parts) return;
    const int stop = (int)((part + 1ll) * total / parts);
    auto find = [&](int at, int row) {
        if (at >= stop) return Split{0, 0, 0, 0, at, 0, 0, 0, pages};
        const int units = starts[row + 1] - starts[row], from = at - starts[row], to = min(units, from + stop - at);
        const int position = positions[row], first = position - seen(position, window);
        return Split{
            row, min(position, first + from * unit), min(position, first + to * unit), position, at, from, to, units,
            pages + owners[row] * pages_stride};
    };
    auto after = [&](const Split& split) {
        return find(split.unit + split.to - split.from, split.row + (split.to == split.units));
    };
    auto offset = [&](const Split& split, int token) {
        token = min(token, split.end - 1);
        return split.pages[token / page_size] * page_stride + token % page_size * slot_stride + head * E + t * 8;
    };
    uint4 k[BLOCKS][2], v[BLOCKS][2];  // of keys g and g + 8 of a tile; always of the tile to come
    long long first = 0, second = 0;   // where they are
    auto aim = [&](const Split& split, int token) {
        const bool any = token - g < split.end;
        if (any) first = offset(split, token), second = offset(split, token + 8);
        return any;
    };
    auto fetch = [&](const Split& split) {
        if (!aim(split, split.begin + warp * TILE + g)) return;
        #pragma unroll
        for (int j = 0; j < BLOCKS; ++j) k[j][0] = stream(k_cache + first + 32 * j), k[j][1] = stream(k_cache + second + 32 * j);
        #pragma unroll
        for (int j = 0; j < BLOCKS; ++j) v[j][0] = stream(v_cache + first + 32 * j), v[j][1] = stream(v_cache + second + 32 * j);
    };
    auto is_rotated = [&](const Split& split) { return split.position >= 0 && split.position < table_rows; };
    auto bring_angles = [&](const Split& split, int turn) {
        for (int i = threadIdx.x; i < E / 4 && is_rotated(split); i += 32 * WARPS)
            copy_later(&angles[turn][4 * i], cos_sin + (long long)split.position * E + 4 * i);
    };
    auto bring_heads = [&](const Split& split, int turn) {
        const T* from = qkv + (long long)split.row * (heads + 2 * kv_heads) * E;
        for (int i = threadIdx.x; i < (group + 2) * VECTORS; i += 32 * WARPS) {
            const int h = i / VECTORS, place = h < group ? head * group + h : heads + (h - group) * kv_heads + head;
            copy_later(&raw[turn][h][i % VECTORS * 8], from + place * E + i % VECTORS * 8);
        }
    };

    Split now = find((int)((long long)part * total / parts), starts[rows + 1 + part]);
    fetch(now);
    bring_angles(now, 0);
    for (int i = threadIdx.x; i < E; i += 32 * WARPS) {
        norms[0][i] = q_norm ? q_norm[i] : T();
        norms[1][i] = k_norm ? k_norm[i] : T();
    }
    for (int i = group * (E + 32) + threadIdx.x; i < GROUP * (E + 32); i += 32 * WARPS) query[0][i] = T();
    wait_for_previous();
    bring_heads(now, 0);
    for (int turn = 0; now.unit < stop; turn ^= 1) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        const Split next = after(now);
        const int row = now.row;
        const bool newest = now.to == now.units;  // this split also has the new token
        const float* rotation = is_rotated(now) ? angles[turn] : nullptr;
        for (int h = warp; h < group; h += WARPS) prepare_head<E / 64, E / 64>(query[h], raw[turn][h], q_norm ? norms[0] : nullptr, eps, rotation, E);
        if (newest && warp == WARPS - 1) prepare_head<E / 64, E / 64>(key, raw[turn][group], k_norm ? norms[1] : nullptr, eps, rotation, E);
        const T* value = raw[turn][group + 1];
        __syncthreads();
        if (next.unit < stop) {
            bring_angles(next, turn ^ 1);
            bring_heads(next, turn ^ 1);
        }
        if (newest) {
            const int slot = slots[row];
            const long long at = slot / page_size * page_stride + slot % page_size * slot_stride + head * E;
            for (int i = threadIdx.x; i < E && slot >= 0 && slot < num_slots; i += 32 * WARPS) k_cache[at + i] = key[i], v_cache[at + i] = value[i];
        }
        uint4 q[BLOCKS];
        #pragma unroll
        for (int j = 0; j < BLOCKS; ++j) q[j] = *reinterpret_cast<const uint4*>(&query[g][32 * j + 8 * t]);

        float acc[2 * BLOCKS][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};  // top and sum: of heads 2 t and 2 t + 1
        int token = now.begin + warp * TILE + g;
        bool more = token - g < now.end;
        if (!more) fetch(next);  // nothing for this warp here
        for (; more; token += WARPS * TILE) {
            more = aim(now, token + WARPS * TILE);
            const bool any = more || aim(next, next.begin + warp * TILE + g);
            float s[4] = {};
            #pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                multiply(s, k[j][0].x, k[j][1].x, k[j][0].y, k[j][1].y, q[j].x, q[j].y, T());
                multiply(s, k[j][0].z, k[j][1].z, k[j][0].w, k[j][1].w, q[j].z, q[j].w, T());
                if (any) k[j][0] = stream(k_cache + first + 32 * j), k[j][1] = stream(k_cache + second + 32 * j);
            }
            float shrink[2];
            #pragma unroll
            for (int i = 0; i < 2; ++i) {  // s[i]: key g, head 2 t + i; s[2 + i]: key g + 8
                s[i] = token < now.end ? s[i] * scale : -infinity();
                s[2 + i] = token + 8 < now.end ? s[2 + i] * scale : -infinity();
                float high = fmaxf(s[i], s[2 + i]);
                #pragma unroll
                for (int n = 4; n < 32; n <<= 1) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, n));
                high = fmaxf(high, top[i]);
                shrink[i] = exp2f(top[i] - high);
                top[i] = high;
                s[i] = exp2f(s[i] - high);
                s[2 + i] = exp2f(s[2 + i] - high);
                sum[i] = sum[i] * shrink[i] + s[i] + s[2 + i];
            }
            const unsigned low = transpose(pack<T>(s[0], s[1])), high = transpose(pack<T>(s[2], s[3]));
            #pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                float (&even)[4] = acc[2 * j], (&odd)[4] = acc[2 * j + 1];
                #pragma unroll
                for (int i = 0; i < 4; ++i) even[i] *= shrink[i % 2], odd[i] *= shrink[i % 2];
                multiply(even, transpose(v[j][0].x), transpose(v[j][0].y), transpose(v[j][1].x), transpose(v[j][1].y), low, high, T());
                multiply(odd, transpose(v[j][0].z), transpose(v[j][0].w), transpose(v[j][1].z), transpose(v[j][1].w), low, high, T());
                if (any) v[j][0] = stream(v_cache + first + 32 * j), v[j][1] = stream(v_cache + second + 32 * j);
            }
        }

        // acc[2 j + o][i] is element 32 j + 8 (g / 2) + 4 o + 2 (i / 2) + g % 2 of head 2 t + i % 2.
        #pragma unroll
        for (int n = 0; n < 2 * BLOCKS; ++n)
            #pragma unroll
            for (int i = 0; i < 4; ++i) outs[warp][2 * t + i % 2][32 * (n / 2) + 8 * (g / 2) + 4 * (n % 2) + 2 * (i / 2) + g % 2] = acc[n][i];
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            #pragma unroll
            for (int n = 4; n < 32; n <<= 1) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], n);
            if (g == 0) most[warp][2 * t + i] = top[i], sums[warp][2 * t + i] = sum[i];
        }
        for (int h = warp; h < group; h += WARPS) {  // the new token is one more partial result, of one key
            float dot = 0.f;
            for (int i = lane; i < E && newest; i += 32) dot += to_float(query[h][i]) * to_float(key[i]);
            dot = warp_sum(dot);
            if (lane == 0) most[WARPS][h] = newest ? dot * scale : -infinity(), sums[WARPS][h] = newest ? 1.f : 0.f;
        }
        __syncthreads();
        // A split of several has a place in `partial`: that of its part's first, or of its last where the row begins in the part. E
        // sums, the greatest score and the sum of weights of each head.
        const int step = group * (E + 2), first_unit = now.unit - now.from;
        const bool whole = now.to - now.from == now.units;
        auto part_of = [&](int at) { return (int)(((at + 1ll) * parts - 1) / total); };
        const int lowest = whole ? part : part_of(first_unit), highest = whole ? part : part_of(first_unit + now.units - 1);
        auto place_of = [&](int p) { return partial + (2ll * (p * kv_heads + head) + (p == lowest)) * step; };
        T* result = out + ((long long)row * heads + head * group) * E;
        for (int h = warp; h < group; h += WARPS) {
            float high = most[WARPS][h], weight_sum = 0.f, mixed[BLOCKS] = {};
            #pragma unroll
            for (int w = 0; w < WARPS; ++w) high = fmaxf(high, most[w][h]);
            #pragma unroll
            for (int w = 0; w <= WARPS; ++w) {
                const float weight = exp2f(most[w][h] - high);
                weight_sum += weight * sums[w][h];
                #pragma unroll
                for (int j = 0; j < BLOCKS; ++j) {
                    if (w < WARPS) mixed[j] += weight * outs[w][h][lane + 32 * j];
                    else if (newest) mixed[j] += weight * to_float(value[lane + 32 * j]);
                }
            }
            float* mine = place_of(part) + h * (E + 2);
            #pragma unroll
            for (int j = 0; j < BLOCKS; ++j) {
                if (whole) result[h * E + lane + 32 * j] = from_float<T>(mixed[j] / weight_sum);
                else mine[lane + 32 * j] = mixed[j];
            }
            if (!whole && lane == 0) mine[E] = high, mine[E + 1] = weight_sum;
        }
        if (!whole) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                unsigned* counter = arrived + row * kv_heads + head;
                merges = atomicAdd(counter, 1u) == highest - lowest;
                if (merges) *counter = 0;  // for the next layer
            }
            __syncthreads();
            if (merges) {
                __threadfence();
                for (int h = warp; h < group; h += WARPS) {
                    float high = -infinity(), weight_sum = 0.f, mixed[BLOCKS] = {};
                    #pragma unroll 8
                    for (int p = lowest; p <= highest; ++p) {
                        const float* from = place_of(p) + h * (E + 2);
                        const float there = __ldcg(from + E), both = fmaxf(high, there);
                        const float kept = exp2f(high - both), weight = exp2f(there - both);
                        weight_sum = weight_sum * kept + weight * __ldcg(from + E + 1);
                        #pragma unroll
                        for (int j = 0; j < BLOCKS; ++j) mixed[j] = mixed[j] * kept + weight * __ldcg(from + lane + 32 * j);
                        high = both;
                    }
                    #pragma unroll
                    for (int j = 0; j < BLOCKS; ++j) result[h * E + lane + 32 * j] = from_float<T>(mixed[j] / weight_sum);
                }
            }
        }
        now = next;
    }
}
