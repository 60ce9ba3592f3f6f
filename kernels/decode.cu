// decode_attention: all that happens between the QKV projection and the output projection for one new token a row.
//
// Norm and rotation of q and k, the store of k and v, and attention over the pages, in one kernel. The keys of a row are cut into
// splits; a block takes one split of one key head with its query heads at a time and goes on to the next; the block that ends
// last for a row and head merges the splits, in their order. split_keys lists the splits, once a step for all layers.
//
// Both products run on tensor cores, straight from registers (see product.cu for the trick with the order of the columns): lane
// (g, t) = (lane / 4, lane % 4) loads elements 8 t .. 8 t + 7 of every 32 of keys g and g + 8. Scores come out as [keys, heads];
// movmatrix turns them and the values into what the second product, [elements, keys] x [keys, heads], wants.
#include "heads.cuh"

constexpr int TILE = 16;   // keys that a warp takes at once
constexpr int GROUP = 8;   // query heads of one key head, at most

// Copy 16 bytes to shared memory without waiting for them.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

// The list of splits, longest first: blocks that take every n-th get about equal shares. work[0] is their number; from work[4] on
// there are four numbers each: row, first key, last key + 1, splits of the row << 16 | number of this one. Room for `most` = rows +
// target of them; then as much for the list in the order of rows, and the place in that order of each. Rows are cut evenly, into
// parts of `least` keys or more (a multiple of TILE), about `target` in all beyond one a row. One block.
extern "C" __global__ void __launch_bounds__(1024) split_keys(
    int* __restrict__ work, const int* __restrict__ positions, int rows, int window, int least, int target) {
    __shared__ int totals[32], base;
    extern __shared__ int lengths[];  // of the splits, in the order of rows
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto keys = [&](int row) { return window > 0 ? min(positions[row], window - 1) : positions[row]; };  // that are in the cache
    int sum = 0;
    for (int row = threadIdx.x; row < rows; row += blockDim.x) sum += keys(row);
    for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (lane == 0) totals[warp] = sum;
    if (threadIdx.x == 0) base = 0;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) all += totals[w];
    const int size = max(least, (all / TILE + target) / target * TILE);  // a multiple of TILE: no split is empty
    __syncthreads();
    int4* unsorted = reinterpret_cast<int4*>(work) + 1 + rows + target;
    for (int first = 0; first < rows; first += blockDim.x) {
        const int row = first + threadIdx.x, length = row < rows ? keys(row) : 0;
        const int splits = row < rows ? max(1, (length + size - 1) / size) : 0;
        int before = splits;  // inclusive prefix sum over the block
        for (int i = 1; i < 32; i <<= 1) {
            const int other = __shfl_up_sync(0xffffffffu, before, i);
            if (lane >= i) before += other;
        }
        if (lane == 31) totals[warp] = before;
        __syncthreads();
        int start = base + before - splits;
        for (int w = 0; w < warp; ++w) start += totals[w];
        if (row < rows) {
            const int begin = positions[row] - length, part = (length + splits * TILE - 1) / (splits * TILE) * TILE;
            for (int s = 0; s < splits; ++s) {
                const int from = min(length, s * part), to = min(length, (s + 1) * part);
                lengths[start + s] = to - from;
                unsorted[start + s] = make_int4(row, begin + from, begin + to, splits << 16 | s);
            }
        }
        __syncthreads();
        if (threadIdx.x == blockDim.x - 1) base = start + splits;
        __syncthreads();
    }
    for (int i = threadIdx.x; i < base; i += blockDim.x) {
        int place = 0;
        for (int j = 0; j < base; ++j) place += lengths[j] > lengths[i] || (lengths[j] == lengths[i] && j < i);
        reinterpret_cast<int4*>(work)[1 + place] = unsorted[i];
        work[4 * (1 + 2 * (rows + target)) + place] = i;
    }
    if (threadIdx.x == 0) work[0] = base;
}

// One split of one key head: whose it is, and where its keys are.
struct Split {
    int row, begin, end, splits, number, head, position, index;
    const int* pages;
};

template <typename T, int E, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, WARPS == 4 ? 3 : 1) decode_attention(
    T* __restrict__ out, const T* qkv, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows,
    T* k_cache, T* v_cache, long long page_stride, long long slot_stride, const int* __restrict__ slots, int num_slots,
    const int* __restrict__ pages, long long pages_stride, const int* __restrict__ owners, int page_size,
    const int* __restrict__ work, int most_splits, float* partial, unsigned* arrived, float scale, int heads, int kv_heads) {
    constexpr int BLOCKS = E / 32, VECTORS = E / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = heads / kv_heads;
    // As projected, of this split and the next: q's heads, then k, then v; and the angles.
    __shared__ alignas(16) T raw[2][GROUP + 2][E], query[GROUP][E + 32], key[E], norms[2][E];
    __shared__ alignas(16) float angles[2][E];
    __shared__ float outs[WARPS][GROUP][E + 4], most[WARPS + 1][GROUP], sums[WARPS + 1][GROUP];
    __shared__ bool merges;
    launch_next();

    const int items = work[0] * kv_heads;
    // Every other round goes backwards: the splits come longest first, and each block is to have as much as the others.
    auto item_of = [&](int round) { return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); };
    auto find = [&](int item) {
        if (item >= items) return Split{0, 0, 0, 0, 0, 0, 0, 0, pages};
        const int place = item / kv_heads;
        const int4 w = reinterpret_cast<const int4*>(work)[1 + place];
        const int index = work[4 * (1 + 2 * most_splits) + place];
        return Split{w.x, w.y, w.z, w.w >> 16, w.w & 0xffff, item % kv_heads, positions[w.x], index, pages + owners[w.x] * pages_stride};
    };
    auto offset = [&](const Split& split, int token) {
        token = min(token, split.end - 1);
        return split.pages[token / page_size] * page_stride + token % page_size * slot_stride + split.head * E + t * 8;
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
            const int h = i / VECTORS, head = h < group ? split.head * group + h : heads + (h - group) * kv_heads + split.head;
            copy_later(&raw[turn][h][i % VECTORS * 8], from + head * E + i % VECTORS * 8);
        }
    };

    const Split very_first = find(item_of(0));
    fetch(very_first);
    bring_angles(very_first, 0);
    for (int i = threadIdx.x; i < E; i += 32 * WARPS) {
        norms[0][i] = q_norm ? q_norm[i] : T();
        norms[1][i] = k_norm ? k_norm[i] : T();
    }
    wait_for_previous();
    bring_heads(very_first, 0);
    for (int round = 0; item_of(round) < items; ++round) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
        // Looked up once more, from L1, rather than kept: registers are scarce.
        const Split now = find(item_of(round)), next = find(item_of(round + 1));
        const int turn = round % 2;
        const int row = now.row, head = now.head;
        const bool newest = now.number == now.splits - 1;  // this split also has the new token
        const float* rotation = is_rotated(now) ? angles[turn] : nullptr;
        for (int h = warp; h < GROUP; h += WARPS) {
            if (h < group) prepare_head<E / 64>(query[h], raw[turn][h], q_norm ? norms[0] : nullptr, eps, rotation, E);
            else for (int i = lane; i < E; i += 32) query[h][i] = from_float<T>(0.f);
        }
        if (newest && warp == WARPS - 1) prepare_head<E / 64>(key, raw[turn][group], k_norm ? norms[1] : nullptr, eps, rotation, E);
        const T* value = raw[turn][group + 1];
        __syncthreads();
        if (item_of(round + 1) < items) {
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
        const long long step = (long long)kv_heads * group * (E + 2);  // E sums, the greatest score and the sum of weights of each head
        float* mine = partial + now.index * step + head * group * (E + 2);
        for (int at = threadIdx.x; at < group * E; at += 32 * WARPS) {
            const int h = at / E, i = at % E;
            float high = most[WARPS][h], total = 0.f, result = 0.f;
            #pragma unroll
            for (int w = 0; w < WARPS; ++w) high = fmaxf(high, most[w][h]);
            #pragma unroll
            for (int w = 0; w <= WARPS; ++w) {
                const float weight = exp2f(most[w][h] - high);
                total += weight * sums[w][h];
                if (w < WARPS) result += weight * outs[w][h][i];
                else if (newest) result += weight * to_float(value[i]);
            }
            if (now.splits == 1) {
                out[((long long)row * heads + head * group + h) * E + i] = from_float<T>(result / total);
            } else {
                mine[h * (E + 2) + i] = result;
                if (i == 0) mine[h * (E + 2) + E] = high, mine[h * (E + 2) + E + 1] = total;
            }
        }
        if (now.splits > 1) {
            __threadfence();
            __syncthreads();
            if (threadIdx.x == 0) {
                unsigned* counter = arrived + row * kv_heads + head;
                merges = atomicAdd(counter, 1u) == now.splits - 1;
                if (merges) *counter = 0;  // for the next layer
            }
            __syncthreads();
            if (merges) {
                __threadfence();
                for (int at = threadIdx.x; at < group * E; at += 32 * WARPS) {
                    const int h = at / E, i = at % E;
                    const float* from = mine - now.number * step + h * (E + 2);
                    float high = -infinity(), total = 0.f, result = 0.f;
                    #pragma unroll 8
                    for (int s = 0; s < now.splits; ++s) {
                        const float there = __ldcg(from + s * step + E), both = fmaxf(high, there);
                        const float kept = exp2f(high - both), weight = exp2f(there - both);
                        total = total * kept + weight * __ldcg(from + s * step + E + 1);
                        result = result * kept + weight * __ldcg(from + s * step + i);
                        high = both;
                    }
                    out[((long long)row * heads + head * group + h) * E + i] = from_float<T>(result / total);
                }
            }
        }
    }
}
