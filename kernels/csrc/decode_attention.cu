// decode_attention: norm and rotation of q and k, the store of k and v, and attention over pages, for one new token per row.
//
// partition_keys divides the keys of all rows into parts, once per step for all layers. A block processes one part of one KV head,
// with a group of its query heads: all of them, if they are at most MAX_GROUP. It goes through its part row by row: a KeyRange is the
// keys of one row in a part. The last block of a row to finish merges the row's partial results in the order of the parts, so
// rounding does not depend on timing. Adjacent blocks have the heads of one part, so that they read a page at about the same time.
//
// Both products run on tensor cores, straight from registers (see skinny_gemm.cu for the order of the columns). Lane (g, t) = (lane / 4,
// lane % 4) loads elements 8 t .. 8 t + 7 of every 32 elements of keys g and g + 8. The first product is [keys, elements] x [elements,
// heads]; movmatrix transposes its result and the values for the second, [elements, keys] x [keys, heads].
#include "head_norm_rope.cuh"
#include "key_partition.cuh"

constexpr float LOG2_E = 1.44269504f;
constexpr int TILE = 16;      // keys that a warp processes at once
constexpr int MAX_GROUP = 8;  // query heads of a block

// Eight elements of the cache, whose type is C, in registers.
template <typename C> struct EightOf { typedef uint4 type; };
template <> struct EightOf<fp8> { typedef uint2 type; };
DEVICE void load_eight(uint4& to, const void* from) { to = stream(from); }
DEVICE void load_eight(uint2& to, const void* from) { to = stream_half(from); }

// Return eight elements as operands of a product.
template <typename T> DEVICE uint4 operands(const uint4& stored, T) { return stored; }
template <typename T> DEVICE uint4 operands(const uint2& stored, T type) {
    uint4 wide;
    widen(stored.x, wide.x, wide.y, type), widen(stored.y, wide.z, wide.w, type);
    return wide;
}

// The grid is one block.
extern "C" __global__ void __launch_bounds__(1024) partition_keys(
    int* __restrict__ data, const int* __restrict__ positions, int rows, int window, int kv_chunk, int min_chunks, int max_parts) {
    const Partition<int> partition{data, rows};
    const int total = scan_chunks(partition.starts(), positions, rows, window, kv_chunk);
    const int parts = min(max_parts, min(total, max(rows, total / min_chunks)));
    if (threadIdx.x == 0) partition.starts()[rows] = total, partition.num_parts() = parts, partition.num_chunks() = total;
    __syncthreads();
    for (int part = threadIdx.x; part < parts; part += blockDim.x)
        partition.first_row(part) = row_of(partition.starts(), rows, (int)((long long)part * total / parts));
}

// The score of a key in units of log2, from its product with the query: capped, softcap * tanh(product * scale).
template <bool CAPPED> struct Score {
    float scale, softcap;
    DEVICE float operator()(float product) const { return CAPPED ? softcap * tanh_of(product * scale) : product * scale; }
};

// A warp's running softmax over its keys: acc = sum of 2^(score - max_score) * value, weight_sum = sum of 2^(score - max_score).
// acc[2 j + o][i] is element 32 j + 8 (g / 2) + 4 o + 2 (i / 2) + g % 2 of head 2 t + i % 2; [i] of the others is head 2 t + i.
template <int HEAD_DIM> struct SoftmaxState {
    float acc[HEAD_DIM / 16][4] = {}, max_score[2] = {-infinity(), -infinity()}, weight_sum[2] = {};

    // Turn the scores of a tile into weights; rescale[i] is the factor for earlier sums of head 2 t + i.
    // s[i] is of key g = token and head 2 t + i, s[2 + i] of key g + 8.
    template <bool CAPPED> DEVICE void update(float (&s)[4], float (&rescale)[2], Score<CAPPED> score, int token, int end) {
        UNROLL for (int i = 0; i < 2; ++i) {
            s[i] = token < end ? score(s[i]) : -infinity();
            s[2 + i] = token + 8 < end ? score(s[2 + i]) : -infinity();
            float high = fmaxf(s[i], s[2 + i]);
            UNROLL for (int n = 4; n < 32; n <<= 1) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, n));
            high = fmaxf(high, max_score[i]);
            rescale[i] = exp2f(max_score[i] - high);
            max_score[i] = high;
            s[i] = exp2f(s[i] - high);
            s[2 + i] = exp2f(s[2 + i] - high);
            weight_sum[i] = weight_sum[i] * rescale[i] + s[i] + s[2 + i];
        }
    }
};

template <typename T, int HEAD_DIM, int WARPS> struct DecodeShared {
    // Two stages: one for this range, one for the next.
    alignas(16) T projected[2][MAX_GROUP + 2][HEAD_DIM];  // q's heads, then k, then v
    alignas(16) T query[MAX_GROUP][HEAD_DIM + 32];
    alignas(16) T key[HEAD_DIM];
    alignas(16) T norms[2][HEAD_DIM];
    alignas(16) float angles[2][HEAD_DIM];  // cosines, then sines
    // The partial results of the warps, with their acc in WarpSums; the last element is that of the new token.
    float max_score[WARPS + 1][MAX_GROUP], weight_sum[WARPS + 1][MAX_GROUP];
};

// The acc of each warp, in dynamic shared memory: with heads of 256 elements it does not fit into the 48 KiB of static memory.
template <int HEAD_DIM> using WarpSums = float[MAX_GROUP][HEAD_DIM + 17];  // 17: no two lanes on one bank

// The state of one block of the kernel: its arguments, its part and head, and the steps that it takes.
template <typename T, typename C, int HEAD_DIM, int WARPS, bool CAPPED> struct DecodeBlock {
    static constexpr int THREADS = 32 * WARPS, BLOCKS = HEAD_DIM / 32;
    static constexpr int PARTIAL = HEAD_DIM + 2;  // floats of a head's partial result: acc, max_score, weight_sum

    const T *qkv, *q_norm, *k_norm, *sinks;
    C *k_cache, *v_cache;
    const int *positions, *kv_slots, *page_table, *page_table_rows;
    const float* cos_sin;
    long long page_stride, slot_stride, page_table_stride;
    float eps;
    Score<CAPPED> score;
    int qkv_stride, head_stride, table_rows, rotary, num_slots, page_size, window, kv_chunk, heads, kv_heads, group_size;
    Partition<const int> partition;
    float* partial;
    unsigned* counters;

    DecodeShared<T, HEAD_DIM, WARPS>& s;
    WarpSums<HEAD_DIM>* acc;
    int part, kv_head, num_parts, num_chunks, stop;  // stop: the first chunk of the next part

    typedef typename EightOf<C>::type Stored;  // 8 elements of the cache
    // A warp's tile of 16 keys and values in registers: elements 32 j + 8 t .. + 7 of key g in [j][0], of key g + 8 in [j][1].
    // While the warp computes with a tile, it replaces each register by that of the next tile.
    struct Tile {
        Stored k[BLOCKS][2], v[BLOCKS][2];
        long long first = 0, second = 0;  // the offsets of both keys in the cache
    };

    DEVICE int groups() const { return kv_heads * gridDim.y; }
    DEVICE int group() const { return kv_head * gridDim.y + blockIdx.y; }

    DEVICE KeyRange range_at(int chunk, int row) const {
        if (chunk >= stop) return KeyRange{0, 0, 0, 0, chunk, 0, 0, 0, page_table};
        const int* starts = partition.starts();
        const int row_chunks = starts[row + 1] - starts[row];
        const int first_chunk = chunk - starts[row], end_chunk = min(row_chunks, first_chunk + stop - chunk);
        const int position = positions[row], first = position - num_visible_keys(position, window);
        const int begin = min(position, first + first_chunk * kv_chunk), end = min(position, first + end_chunk * kv_chunk);
        const int* pages = page_table + page_table_rows[row] * page_table_stride;
        return KeyRange{row, begin, end, position, chunk, first_chunk, end_chunk, row_chunks, pages};
    }

    DEVICE KeyRange range_after(const KeyRange& range) const {
        return range_at(range.chunk + range.end_chunk - range.first_chunk, range.row + range.has_new_token());
    }

    DEVICE bool is_rotated(const KeyRange& range) const { return range.position >= 0 && range.position < table_rows; }
    DEVICE void load_angles(const KeyRange& range, int stage) const {
        for (int i = threadIdx.x; i < rotary / 4 && is_rotated(range); i += THREADS)
            copy_async(&s.angles[stage][4 * i], cos_sin + (long long)range.position * rotary + 4 * i);
    }

    DEVICE void load_heads(const KeyRange& range, int stage) const {
        constexpr int VECTORS = HEAD_DIM / 8;
        const T* from = qkv + (long long)range.row * qkv_stride;
        for (int i = threadIdx.x; i < (group_size + 2) * VECTORS; i += THREADS) {
            const int h = i / VECTORS, place = h < group_size ? group() * group_size + h : heads + (h - group_size) * kv_heads + kv_head;
            copy_async(&s.projected[stage][h][i % VECTORS * 8], from + place * HEAD_DIM + i % VECTORS * 8);
        }
    }

    // Load the weights of the norms, and zero the queries of heads that the group does not have.
    DEVICE void load_norms() const {
        for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            s.norms[0][i] = q_norm ? q_norm[i] : T();
            s.norms[1][i] = k_norm ? k_norm[i] : T();
        }
        for (int i = group_size * (HEAD_DIM + 32) + threadIdx.x; i < MAX_GROUP * (HEAD_DIM + 32); i += THREADS) s.query[0][i] = T();
    }

    // Norm and rotate the query heads, a warp for each, and the new key if it is in this range.
    DEVICE void prepare_heads(const KeyRange& range, int stage) const {
        constexpr int PAIRS = HEAD_DIM <= 64 ? 1 : HEAD_DIM <= 128 ? 2 : 4;
        const float* angles = is_rotated(range) ? s.angles[stage] : nullptr;
        for (int h = warp_id(); h < group_size; h += WARPS)
            prepare_head<PAIRS, PAIRS>(s.query[h], s.projected[stage][h], q_norm ? s.norms[0] : nullptr, eps, angles, rotary, HEAD_DIM);
        if (range.has_new_token() && warp_id() == WARPS - 1)
            prepare_head<PAIRS, PAIRS>(s.key, s.projected[stage][group_size], k_norm ? s.norms[1] : nullptr, eps, angles, rotary, HEAD_DIM);
    }

    DEVICE void store_new_token(int row, const T* value) const {
        const int slot = kv_slots[row];
        const long long at = slot / page_size * page_stride + slot % page_size * slot_stride + kv_head * head_stride;
        for (int i = threadIdx.x; i < HEAD_DIM && slot >= 0 && slot < num_slots; i += THREADS)
            k_cache[at + i] = convert<C>(s.key[i]), v_cache[at + i] = convert<C>(value[i]);
    }

    // Return the position of key g in a warp's first tile of a range.
    DEVICE int first_token(const KeyRange& range) const { return range.begin + warp_id() * TILE + group_id(); }
    DEVICE long long offset(const KeyRange& range, int token) const {
        token = min(token, range.end - 1);
        const long long slot = range.pages[token / page_size] * page_stride + token % page_size * slot_stride;
        return slot + kv_head * head_stride + thread_in_group() * 8;
    }

    // Point to the tile whose key g is `token`; return whether it has any key of the range.
    DEVICE bool seek(Tile& tile, const KeyRange& range, int token) const {
        const bool any = token - group_id() < range.end;
        if (any) tile.first = offset(range, token), tile.second = offset(range, token + 8);
        return any;
    }

    DEVICE void load(Stored (&to)[2], const C* cache, const Tile& tile, int j) const {
        load_eight(to[0], cache + tile.first + 32 * j), load_eight(to[1], cache + tile.second + 32 * j);
    }

    DEVICE void load_first_tile(Tile& tile, const KeyRange& range) const {
        if (!seek(tile, range, first_token(range))) return;
        UNROLL for (int j = 0; j < BLOCKS; ++j) load(tile.k[j], k_cache, tile, j);
        UNROLL for (int j = 0; j < BLOCKS; ++j) load(tile.v[j], v_cache, tile, j);
    }

    DEVICE const uint4& query_part(int j) const {
        return *reinterpret_cast<const uint4*>(&s.query[group_id()][32 * j + 8 * thread_in_group()]);
    }

    // Attend to the tile in registers, whose key g is `token`; load the next one in its place.
    DEVICE void attend_tile(SoftmaxState<HEAD_DIM>& state, Tile& tile, const uint4 (&q)[BLOCKS], int token, int end, bool load_next) const {
        float s[4] = {}, rescale[2];
        UNROLL for (int j = 0; j < BLOCKS; ++j) {  // s = k q^T
            const uint4 first = operands(tile.k[j][0], T()), second = operands(tile.k[j][1], T());
            const uint4 part = HEAD_DIM > 128 ? query_part(j) : q[j];  // there are not registers enough for more
            multiply(s, first.x, second.x, first.y, second.y, part.x, part.y, T());
            multiply(s, first.z, second.z, first.w, second.w, part.z, part.w, T());
            if (load_next) load(tile.k[j], k_cache, tile, j);
        }
        state.update(s, rescale, score, token, end);
        const unsigned low = transpose(pack<T>(s[0], s[1])), high = transpose(pack<T>(s[2], s[3]));
        UNROLL for (int j = 0; j < BLOCKS; ++j) {  // acc = acc * rescale + v^T s
            float (&even)[4] = state.acc[2 * j], (&odd)[4] = state.acc[2 * j + 1];
            UNROLL for (int i = 0; i < 4; ++i) even[i] *= rescale[i % 2], odd[i] *= rescale[i % 2];
            const uint4 first = operands(tile.v[j][0], T()), second = operands(tile.v[j][1], T());
            multiply(even, transpose(first.x), transpose(first.y), transpose(second.x), transpose(second.y), low, high, T());
            multiply(odd, transpose(first.z), transpose(first.w), transpose(second.z), transpose(second.w), low, high, T());
            if (load_next) load(tile.v[j], v_cache, tile, j);
        }
    }

    // Attend to the cached keys of a range, each warp to every WARPS-th tile; leave the first tile of `next` loading.
    DEVICE void attend_range(SoftmaxState<HEAD_DIM>& state, Tile& tile, const KeyRange& range, const KeyRange& next) const {
        uint4 q[BLOCKS];
        UNROLL for (int j = 0; j < BLOCKS; ++j) q[j] = query_part(j);
        int token = first_token(range);
        bool more = token - group_id() < range.end;
        if (!more) load_first_tile(tile, next);  // this warp has no tile here
        for (; more; token += WARPS * TILE) {
            more = seek(tile, range, token + WARPS * TILE);
            const bool load_next = more || seek(tile, next, first_token(next));
            attend_tile(state, tile, q, token, range.end, load_next);
        }
    }

    DEVICE void write_state(SoftmaxState<HEAD_DIM>& state) const {
        const int warp = warp_id(), g = group_id(), t = thread_in_group();
        UNROLL for (int n = 0; n < HEAD_DIM / 16; ++n)
            UNROLL for (int i = 0; i < 4; ++i)
                acc[warp][2 * t + i % 2][32 * (n / 2) + 8 * (g / 2) + 4 * (n % 2) + 2 * (i / 2) + g % 2] = state.acc[n][i];
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int n = 4; n < 32; n <<= 1) state.weight_sum[i] += __shfl_xor_sync(0xffffffffu, state.weight_sum[i], n);
            if (g == 0) s.max_score[warp][2 * t + i] = state.max_score[i], s.weight_sum[warp][2 * t + i] = state.weight_sum[i];
        }
    }

    // Add the new token as the result of one key: its score is the maximum, its weight 1.
    DEVICE void attend_new_token(bool has_new_token) const {
        for (int h = warp_id(); h < group_size; h += WARPS) {
            float dot = 0.f;
            for (int i = lane_id(); i < HEAD_DIM && has_new_token; i += 32) dot += to_float(s.query[h][i]) * to_float(s.key[i]);
            dot = warp_sum(dot);
            if (lane_id() > 0) continue;
            s.max_score[WARPS][h] = has_new_token ? score(dot) : -infinity();
            s.weight_sum[WARPS][h] = has_new_token ? 1.f : 0.f;
        }
    }

    DEVICE int first_chunk(int part) const { return (int)((long long)part * num_chunks / num_parts); }
    DEVICE int part_of(int chunk) const { return (int)(((chunk + 1ll) * num_parts - 1) / num_chunks); }

    // Return the memory for a row's partial results in a part, for each of its heads. A part has two: one for a row that began
    // in an earlier part, one for a row that begins in this one.
    DEVICE float* partial_result(int part, int first_part) const {
        return partial + (2ll * (part * groups() + group()) + (part == first_part)) * (group_size * PARTIAL);
    }

    // Return the sum of the weights with that of the sink of a head: a logit without a value.
    DEVICE float with_sink(float weight_sum, float max_score, int h) const {
        return sinks ? weight_sum + exp2f(to_float(sinks[group() * group_size + h]) * LOG2_E - max_score) : weight_sum;
    }

    // Merge the results of the warps and the new token: into `out` if the range is the whole row, else into the partial result.
    DEVICE void merge_warps(T* out, const KeyRange& range, int first_part, const T* value) const {
        const bool whole = range.is_whole_row();
        for (int h = warp_id(); h < group_size; h += WARPS) {
            float max_score = s.max_score[WARPS][h], weight_sum = 0.f, sums[BLOCKS] = {};
            UNROLL for (int w = 0; w < WARPS; ++w) max_score = fmaxf(max_score, s.max_score[w][h]);
            UNROLL for (int w = 0; w <= WARPS; ++w) {
                const float weight = exp2f(s.max_score[w][h] - max_score);
                weight_sum += weight * s.weight_sum[w][h];
                UNROLL for (int j = 0; j < BLOCKS; ++j) {
                    if (w < WARPS) sums[j] += weight * acc[w][h][lane_id() + 32 * j];
                    else if (range.has_new_token()) sums[j] += weight * to_float(value[lane_id() + 32 * j]);
                }
            }
            if (whole) weight_sum = with_sink(weight_sum, max_score, h);
            float* mine = partial_result(part, first_part) + h * PARTIAL;
            UNROLL for (int j = 0; j < BLOCKS; ++j) {
                if (whole) out[h * HEAD_DIM + lane_id() + 32 * j] = from_float<T>(sums[j] / weight_sum);
                else mine[lane_id() + 32 * j] = sums[j];
            }
            if (!whole && lane_id() == 0) mine[HEAD_DIM] = max_score, mine[HEAD_DIM + 1] = weight_sum;
        }
    }

    // Count the parts of a row that are done; return on all threads whether this block's part was the last.
    DEVICE bool is_last_block(int row, int row_parts) const {
        __threadfence();
        __syncthreads();
        bool is_last = false;
        if (threadIdx.x == 0) {
            unsigned* counter = counters + row * groups() + group();
            is_last = atomicAdd(counter, 1u) == row_parts - 1;
            if (is_last) *counter = 0;  // for the next layer
        }
        return __syncthreads_or(is_last);
    }

    // Merge the partial results of a row, in the order of its parts.
    DEVICE void merge_partials(T* out, int first_part, int last_part) const {
        __threadfence();
        for (int h = warp_id(); h < group_size; h += WARPS) {
            float max_score = -infinity(), weight_sum = 0.f, sums[BLOCKS] = {};
            #pragma unroll 8
            for (int p = first_part; p <= last_part; ++p) {
                const float* from = partial_result(p, first_part) + h * PARTIAL;
                const float other = __ldcg(from + HEAD_DIM), high = fmaxf(max_score, other);
                const float rescale = exp2f(max_score - high), weight = exp2f(other - high);
                weight_sum = weight_sum * rescale + weight * __ldcg(from + HEAD_DIM + 1);
                UNROLL for (int j = 0; j < BLOCKS; ++j) sums[j] = sums[j] * rescale + weight * __ldcg(from + lane_id() + 32 * j);
                max_score = high;
            }
            weight_sum = with_sink(weight_sum, max_score, h);
            UNROLL for (int j = 0; j < BLOCKS; ++j) out[h * HEAD_DIM + lane_id() + 32 * j] = from_float<T>(sums[j] / weight_sum);
        }
    }
};

// The grid is max_parts * kv_heads by groups of one KV head.
template <typename T, typename C, int HEAD_DIM, int WARPS, bool CAPPED>
__global__ void __launch_bounds__(32 * WARPS, WARPS > 4 ? 1 : HEAD_DIM > 128 ? 2 : 3) decode_attention(
    T* __restrict__ out, const T* qkv, int qkv_stride, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows, int rotary,
    C* k_cache, C* v_cache, long long page_stride, long long slot_stride, int head_stride, const int* __restrict__ kv_slots, int num_slots,
    const int* __restrict__ page_table, long long page_table_stride, const int* __restrict__ page_table_rows, int page_size,
    const int* __restrict__ partition, int rows, int window, int kv_chunk, float* partial, unsigned* counters,
    float scale, float softcap, const T* __restrict__ sinks, int heads, int kv_heads) {
    __shared__ DecodeShared<T, HEAD_DIM, WARPS> shared;
    extern __shared__ float warp_sums[];  // WarpSums [WARPS]
    launch_next();
    DecodeBlock<T, C, HEAD_DIM, WARPS, CAPPED> block{
        qkv, q_norm, k_norm, sinks, k_cache, v_cache, positions, kv_slots, page_table, page_table_rows, cos_sin,
        page_stride, slot_stride, page_table_stride, eps, {scale, softcap}, qkv_stride, head_stride, table_rows, rotary, num_slots,
        page_size, window, kv_chunk, heads, kv_heads, heads / (kv_heads * (int)gridDim.y), {partition, rows}, partial, counters, shared,
        reinterpret_cast<WarpSums<HEAD_DIM>*>(warp_sums)};
    block.part = blockIdx.x / kv_heads, block.kv_head = blockIdx.x % kv_heads;
    block.num_parts = block.partition.num_parts(), block.num_chunks = block.partition.num_chunks();
    if (block.part >= block.num_parts) return;
    block.stop = block.first_chunk(block.part + 1);

    KeyRange range = block.range_at(block.first_chunk(block.part), block.partition.first_row(block.part));
    typename DecodeBlock<T, C, HEAD_DIM, WARPS, CAPPED>::Tile tile;
    block.load_first_tile(tile, range);
    block.load_angles(range, 0);
    block.load_norms();
    wait_for_previous();
    block.load_heads(range, 0);
    for (int stage = 0; range.chunk < block.stop; stage ^= 1) {
        wait_all_copies();
        __syncthreads();
        const KeyRange next = block.range_after(range);
        const T* value = shared.projected[stage][block.group_size + 1];
        block.prepare_heads(range, stage);
        __syncthreads();
        if (next.chunk < block.stop) block.load_angles(next, stage ^ 1), block.load_heads(next, stage ^ 1);
        if (range.has_new_token() && blockIdx.y == 0) block.store_new_token(range.row, value);

        SoftmaxState<HEAD_DIM> state;
        block.attend_range(state, tile, range, next);
        block.write_state(state);
        block.attend_new_token(range.has_new_token());
        __syncthreads();
        const int row_start = range.chunk - range.first_chunk;
        const int first_part = range.is_whole_row() ? block.part : block.part_of(row_start);
        const int last_part = range.is_whole_row() ? block.part : block.part_of(row_start + range.row_chunks - 1);
        T* result = out + ((long long)range.row * heads + block.group() * block.group_size) * HEAD_DIM;
        block.merge_warps(result, range, first_part, value);
        if (!range.is_whole_row() && block.is_last_block(range.row, last_part - first_part + 1))
            block.merge_partials(result, first_part, last_part);
        range = next;
    }
}
