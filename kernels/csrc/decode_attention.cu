// decode_attention: norm and rotation of q and k, the store of k and v, and attention over pages, for one new token per row.
//
// partition_keys divides the keys of all rows into parts, once per step for all layers. A block processes one part of one KV head,
// with a group of its query heads: all of them, if they are at most MAX_GROUP. It goes through its part row by row: a KeyRange is the
// keys of one row in a part. A row that is cut has several parts. The last of its blocks to finish merges its partial results in the
// order of the parts, so rounding does not depend on timing. Adjacent blocks have the heads of one part, so that they read a page at
// about the same time.
//
// Both products run on tensor cores, straight from registers (see cache_tile.cuh): scores = keys x queries, results = values^T x
// weights. Between them movmatrix transposes the weights.
#include "cache_tile.cuh"
#include "decode_shared.cuh"
#include "head_norm_rope.cuh"
#include "head_results.cuh"
#include "run_copies.cuh"
#include "running_softmax.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int MAX_BLOCKS = 3;  // of four warps on a multiprocessor; ordinary copies take more registers than bulk copies
#else
constexpr int MAX_BLOCKS = 4;
#endif

// The state of one block of the kernel: its arguments, its part and head, and the steps that it takes.
template <typename T, typename C, typename O, int HEAD_DIM, int WARPS, bool CAPPED> struct DecodeBlock {
    typedef CacheTile<T, C, HEAD_DIM, WARPS> Tile;
    static constexpr int THREADS = 32 * WARPS, BLOCKS = HEAD_DIM / 32;
    static constexpr int STEP = Tile::GROUPS * Tile::STRIDE;  // keys that a block processes at once
    static constexpr int PARTIAL = HEAD_DIM + 4;  // floats of a head's partial result: acc, max_score, weight_sum, two for alignment
    static constexpr bool QUANTIZED = sizeof(O) == 1;  // O is fp8
    static constexpr int WIDTH = WARPS > 4 && !QUANTIZED ? 2 : 4;  // adjacent places of a head that a thread merges at once
    static_assert(!QUANTIZED || HEAD_DIM == 32 * WIDTH, "a warp has the results of a head");
    typedef Vec<float, WIDTH> Places;

    const T *qkv, *q_norm, *k_norm, *sinks;
    C *k_cache, *v_cache;
    const int *kv_slots, *page_table;
    const float* cos_sin;
    long long page_table_stride;
    unsigned page_stride, slot_stride, head_stride;  // in units, of which 32 bits suffice
    unsigned long long page_reciprocal;              // of page_size, times 2^32
    float eps;
    Score<CAPPED> score;
    int unit;  // elements
    int qkv_stride, table_rows, rotary, num_slots, page_size, heads, kv_heads, group_size;
    Partition<const int> partition;
    KeySequence keys;
    float* partial;
    unsigned* counters;

    DecodeShared<T, C, HEAD_DIM, WARPS>& s;
    WarpSums<HEAD_DIM>* acc;
    int warp, part, kv_head, stop;  // stop: the first chunk of the next part

    DEVICE int groups() const { return kv_heads * gridDim.y; }
    DEVICE int group() const { return kv_head * gridDim.y + blockIdx.y; }

    DEVICE KeyRange range_after(const KeyRange& range) const {
        const int chunk = range.chunk + range.end_chunk - range.first_chunk;
        if (chunk >= stop) return KeyRange{0, 0, 0, 0, chunk};
        return keys.range_at(chunk, range.row + range.has_new_token(), stop);
    }

    DEVICE bool is_rotated(const KeyRange& range) const { return range.position >= 0 && range.position < table_rows; }

    // One warp copies what a range needs beside keys: angles, weights of the norms, the new token's slot, and heads.
    DEVICE RunCopies copies() const { return {&s.copied}; }
    DEVICE void expect_copies(const KeyRange& range) const {
        const int elements = (group_size + 2 + (q_norm != nullptr) + (k_norm != nullptr)) * HEAD_DIM;
        copies().expect(elements * sizeof(T) + (is_rotated(range) ? rotary : 0) * sizeof(float));
    }
    DEVICE void copy_tables(const KeyRange& range, int stage) const {
        if (lane_id() == 0) copy_word_async(&s.slot[stage], kv_slots + range.row);
        if (is_rotated(range)) copies().copy(s.angles[stage], cos_sin + (long long)range.position * rotary, rotary * sizeof(float));
        if (q_norm) copies().copy(s.norms[0], q_norm, HEAD_DIM * sizeof(T));
        if (k_norm) copies().copy(s.norms[1], k_norm, HEAD_DIM * sizeof(T));
    }
    DEVICE void copy_heads(const KeyRange& range, int stage) const {
        const T* from = qkv + (long long)range.row * qkv_stride;
        T* to = s.projected[stage][0];
        const int queries = group_size * HEAD_DIM;
        copies().copy(to, from + group() * queries, queries * sizeof(T));
        copies().copy(to + queries, from + (heads + kv_head) * HEAD_DIM, HEAD_DIM * sizeof(T));
        copies().copy(to + queries + HEAD_DIM, from + (heads + kv_heads + kv_head) * HEAD_DIM, HEAD_DIM * sizeof(T));
    }
    // Zero the queries of heads that the group does not have.
    DEVICE void zero_queries() const {
        ROLLED for (int i = group_size * (HEAD_DIM + 32) + threadIdx.x; i < MAX_GROUP * (HEAD_DIM + 32); i += THREADS)
            s.query[0][i] = typename Tile::Operand();
    }

    // Norm and rotate the query heads, a warp for each, and after them the new key if it is in this range.
    DEVICE void prepare_heads(const KeyRange& range, int stage) const {
        ROLLED for (int h = warp; h < group_size + range.has_new_token(); h += WARPS) {
            const bool is_key = h == group_size;
            const T* norm = is_key ? (k_norm ? s.norms[1] : nullptr) : q_norm ? s.norms[0] : nullptr;
            if constexpr (Tile::WIDENED) {
                if (is_key) prepare(s.key, range, stage, h, norm);
                else prepare(s.query[h], range, stage, h, norm);
            } else {
                prepare(is_key ? s.key : s.query[h], range, stage, h, norm);
            }
        }
    }
    template <typename To> DEVICE void prepare(To* to, const KeyRange& range, int stage, int h, const T* norm) const {
        constexpr int PAIRS = HEAD_DIM <= 64 ? 1 : HEAD_DIM <= 128 ? 2 : 4;
        const float* angles = is_rotated(range) ? s.angles[stage] : nullptr;
        prepare_head<PAIRS, PAIRS>(to, s.projected[stage][h], norm, eps, angles, rotary, HEAD_DIM);
    }

    struct Place { int page, slot; };

    // The index of a token's page in its row: at / page_size, exact for 2^20 tokens and pages of up to 4096.
    DEVICE unsigned page_of(unsigned at) const { return at * page_reciprocal >> 32; }

    // Store the new key and value, by one warp.
    DEVICE void store_new_token(const T* value, int stage) const {
        wait_all_copies();
        __syncwarp();
        const int slot = s.slot[stage];
        const long long at = (long long)unit * place_of({slot / page_size, slot % page_size});
        ROLLED for (int i = lane_id(); i < HEAD_DIM && slot >= 0 && slot < num_slots; i += 32)
            k_cache[at + i] = convert<C>(s.key[i]), v_cache[at + i] = convert<C>(value[i]);
    }

    // The place of the key of a tile whose place this lane has.
    DEVICE Place look_up(const KeyRange& range, int tile_start) const {
        const int token = min(tile_start + lane_id() % 16 + lane_id() / 16 % Tile::GROUPS * Tile::STRIDE, range.end - 1);
        const int index = page_of(token);
        return {page_table[range.table_row * page_table_stride + index], token - index * page_size};
    }
    DEVICE unsigned place_of(Place place) const { return place.page * page_stride + place.slot * slot_stride + kv_head * head_stride; }

    // Point to this warp's first tile of a range; return how many keys are left from there on.
    DEVICE int seek(Tile& tile, const KeyRange& range) const {
        const int first = range.begin + warp * 16;
        if (first < range.end) tile.place = place_of(look_up(range, first));
        return range.end - first;
    }

    DEVICE void load_first_tile(Tile& tile, const KeyRange& range) const {
        const int left = seek(tile, range);
        UNROLL for (int n = 0; n < Tile::GROUPS; ++n)
            if (n * Tile::STRIDE < left) tile.load_keys(k_cache, n, 0, Tile::K_VECTORS);
        UNROLL for (int n = 0; n < Tile::GROUPS; ++n)
            if (n * Tile::STRIDE < left) tile.load_values(v_cache, n, 0, Tile::V_VECTORS);
    }

    // Return the elements of head g in the order of a lane's keys: eight for each of the BLOCKS.
    DEVICE const uint4& query_part(int block) const {
        constexpr int PARTS = Tile::K_WIDTH / 8;
        const int vector = block / PARTS * 4 + thread_in_group();
        return *reinterpret_cast<const uint4*>(&s.query[group_id()][vector * Tile::K_WIDTH + block % PARTS * 8]);
    }

    // scores = k q^T of the groups that have any of the `left` keys; replace the keys by those of the next tile.
    DEVICE void multiply_keys(float (&scores)[Tile::GROUPS][4], Tile& tile, int left, int next_left) const {
        constexpr int PARTS = Tile::K_WIDTH / 8;
        UNROLL for (int n = 0; n < Tile::GROUPS; ++n) {
            const bool used = n == 0 || n * Tile::STRIDE < left, loads = n * Tile::STRIDE < next_left;
            constexpr bool TWO_SUMS = HEAD_DIM <= 128 && (WARPS > 4 || (!Tile::WIDENED && HEAD_DIM != 96));  // registers allow for them
            float odd[4] = {};  // with two sums a product does not wait for the one before
            UNROLL for (int i = 0; i < BLOCKS; ++i) {
                if (used) tile.multiply_keys(i % 2 && TWO_SUMS ? odd : scores[n], n, i / PARTS, i % PARTS, query_part(i));
                if (loads && i % PARTS == PARTS - 1) tile.load_keys(k_cache, n, i / PARTS, i / PARTS + 1);
            }
            UNROLL for (int i = 0; i < 4; ++i) scores[n][i] += odd[i];
        }
    }

    // acc += v^T weights of the groups that have any of the `left` keys; replace the values by those of the next tile.
    DEVICE void multiply_values(float (&acc)[HEAD_DIM / 16][4], Tile& tile, const float (&weights)[Tile::GROUPS][4], int left, int next_left) const {
        constexpr int PAIRS = Tile::V_WIDTH / 2;
        UNROLL for (int n = 0; n < Tile::GROUPS; ++n) {
            const bool used = n == 0 || n * Tile::STRIDE < left, loads = n * Tile::STRIDE < next_left;
            unsigned operands[2];
            UNROLL for (int i = 0; i < 2; ++i)
                operands[i] = transpose(pack<typename Tile::Operand>(weights[n][2 * i], weights[n][2 * i + 1]));
            UNROLL for (int j = 0; j < Tile::V_VECTORS; ++j) {
                UNROLL for (int i = 0; i < PAIRS && used; ++i) tile.multiply_values(acc[j * PAIRS + i], n, j, i, operands);
                if (loads) tile.load_values(v_cache, n, j, j + 1);
            }
        }
    }

    // Attend to the tile in registers, which begins with key `first`; load the next one in its place, if there are keys left for it.
    DEVICE void attend_tile(SoftmaxState<HEAD_DIM>& state, Tile& tile, int first, int end, int next_left) const {
        float scores[Tile::GROUPS][4] = {}, rescale[2];
        multiply_keys(scores, tile, end - first, next_left);
        state.template update<Tile::STRIDE>(scores, rescale, score, first, end);
        UNROLL for (int n = 0; n < HEAD_DIM / 16; ++n)
            UNROLL for (int i = 0; i < 4; ++i) state.acc[n][i] *= rescale[i % 2];
        multiply_values(state.acc, tile, scores, end - first, next_left);
    }

    // Attend to the cached keys of a range, each warp to its groups of them; leave the first tile of `next` loading.
    DEVICE void attend_range(SoftmaxState<HEAD_DIM>& state, Tile& tile, const KeyRange& range, const KeyRange& next) const {
        int first = range.begin + warp * 16;
        if (first >= range.end) return load_first_tile(tile, next);  // this warp has no tile here
        Place ahead = {};  // of the next tile: its page is on its way
        if (first + STEP < range.end) ahead = look_up(range, first + STEP);
        for (; first < range.end; first += STEP) {
            int next_left = range.end - first - STEP;
            if (next_left <= 0) next_left = seek(tile, next);
            else tile.place = place_of(ahead);
            if (first + 2 * STEP < range.end) ahead = look_up(range, first + 2 * STEP);
            attend_tile(state, tile, first, range.end, next_left);
        }
    }

    DEVICE void write_state(SoftmaxState<HEAD_DIM>& state) const {
        const int g = group_id(), t = thread_in_group();
        UNROLL for (int n = 0; n < HEAD_DIM / 16; ++n)
            UNROLL for (int i = 0; i < 4; ++i) acc[warp][2 * t + i % 2][16 * n + 8 * (i / 2) + g] = state.acc[n][i];
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int n = 4; n < 32; n <<= 1) state.weight_sum[i] += __shfl_xor_sync(0xffffffffu, state.weight_sum[i], n);
            if (g == 0) s.max_score[warp][2 * t + i] = state.max_score[i], s.weight_sum[warp][2 * t + i] = state.weight_sum[i];
        }
    }

    // Add the new token as the result of one key: its score is the maximum, its weight 1.
    DEVICE void attend_new_token(bool has_new_token) const {
        ROLLED for (int h = warp; h < group_size; h += WARPS) {
            float dot = 0.f;
            ROLLED for (int i = lane_id(); i < HEAD_DIM && has_new_token; i += 32) dot += to_float(s.query[h][i]) * to_float(s.key[i]);
            dot = warp_sum(dot);
            if (lane_id() > 0) continue;
            s.max_score[WARPS][h] = has_new_token ? score(dot) : -infinity();
            s.weight_sum[WARPS][h] = has_new_token ? 1.f : 0.f;
        }
    }

    DEVICE HeadResults<O> result_of(const HeadResults<O>& all, int row) const {
        const int first = group() * group_size;
        return {all.out + ((long long)row * heads + first) * HEAD_DIM, all.scales + (long long)first * all.stride + row, all.stride};
    }

    // The results of a row in one part, for each of its heads. A part has two such rows: one that began in an earlier part, one that
    // begins in this part.
    struct PartialResults {
        float *acc, *stats;  // [group_size, HEAD_DIM] and [group_size, 2]: max_score and weight_sum
    };
    DEVICE PartialResults partial_results(int part, bool begins) const {
        float* acc = partial + (2 * (part * groups() + group()) + begins) * (group_size * PARTIAL);
        return {acc, acc + group_size * HEAD_DIM};
    }

    template <typename F> DEVICE void for_places(const F& merge) const {
        if constexpr (QUANTIZED) {  // a warp has a head: the compiler knows that its lanes branch alike
            ROLLED for (int h = warp; h < group_size; h += WARPS) merge(h, lane_id() * WIDTH);
            return;
        }
        ROLLED for (int i = threadIdx.x * WIDTH; i < group_size * HEAD_DIM; i += THREADS * WIDTH) merge(i / HEAD_DIM, i % HEAD_DIM);
    }

    // Write the result of a head at these places: sums by the sum of the weights, to which the head's sink adds; it has no value.
    DEVICE void write_result(const HeadResults<O>& to, int h, int place, const Places& sums, float weight_sum, float max_score) const {
        if (sinks) weight_sum += exp2_of(to_float(sinks[group() * group_size + h]) * LOG2_E - max_score);
        const float scale = __fdividef(1.f, weight_sum);
        const int first = Tile::element_at(place);
        T results[WIDTH];
        UNROLL for (int j = 0; j < WIDTH; ++j) results[j] = from_float<T>(sums.at[j] * scale);
        to.store(results, h, h * HEAD_DIM + first, Tile::V_WIDTH);
    }

    // Merge the results of the warps and the new token: into `out` if the range is the whole row, else into the partial result.
    DEVICE void merge_warps(const HeadResults<O>& out, const KeyRange& range, const T* value) const {
        const PartialResults mine = partial_results(part, range.first_chunk == 0);
        for_places([&](int h, int place) {
            float max_score = s.max_score[WARPS][h], weight_sum = 0.f;
            UNROLL for (int w = 0; w < WARPS; ++w) max_score = fmaxf(max_score, s.max_score[w][h]);
            Places sums = {};
            UNROLL for (int w = 0; w <= WARPS; ++w) {
                const float weight = exp2_of(s.max_score[w][h] - max_score);
                weight_sum += weight * s.weight_sum[w][h];
                if (w < WARPS) {
                    const Places from = *reinterpret_cast<const Places*>(&acc[w][h][place]);
                    UNROLL for (int j = 0; j < WIDTH; ++j) sums.at[j] += weight * from.at[j];
                } else if (range.has_new_token()) {
                    UNROLL for (int j = 0; j < WIDTH; ++j) sums.at[j] += weight * to_float(value[Tile::element_at(place) + j * Tile::V_WIDTH]);
                }
            }
            if (range.is_whole_row()) return write_result(out, h, place, sums, weight_sum, max_score);
            *reinterpret_cast<Places*>(mine.acc + h * HEAD_DIM + place) = sums;
            if (place == 0) *reinterpret_cast<float2*>(mine.stats + 2 * h) = {max_score, weight_sum};
        });
    }

    // Count this part as done for its rows that are cut; merge the partial results of those that have no other part left.
    DEVICE void merge_cut_rows(const HeadResults<O>& out) const {
        __syncthreads();
        if (s.cut_rows[0].row < 0 && s.cut_rows[1].row < 0) return;
        const EvenParts parts = partition.even_parts();
        bool is_done = false;
        if (threadIdx.x < 2 && s.cut_rows[threadIdx.x].row >= 0) {
            const CutRow& counted = s.cut_rows[threadIdx.x];
            unsigned* counter = counters + counted.row * groups() + group();
            __threadfence();  // the barriers order the other threads' stores before it, and their loads after it
            is_done = atomicAdd(counter, 1u) == parts.part_of(counted.last_chunk) - parts.part_of(counted.first_chunk);
            __threadfence();
            if (is_done) *counter = 0;  // for the next layer
        }
        ROLLED for (int i = 0; i < 2; ++i) {
            const CutRow& cut = s.cut_rows[i];
            if (__syncthreads_or(is_done && threadIdx.x == i))
                merge_partials(result_of(out, cut.row), parts.part_of(cut.first_chunk), parts.part_of(cut.last_chunk));
        }
    }

    // Merge the partial results of a row, in the order of its parts.
    DEVICE void merge_partials(const HeadResults<O>& out, int first_part, int last_part) const {
        for_places([&](int h, int place) {
            float max_score = -infinity(), weight_sum = 0.f;
            Places sums = {};
            #pragma unroll(WARPS)
            for (int p = first_part; p <= last_part; ++p) {
                const PartialResults from = partial_results(p, p == first_part);
                const float2 stats = __ldcg(reinterpret_cast<const float2*>(from.stats + 2 * h));
                const Places other = load_places(from.acc + h * HEAD_DIM + place);
                const float high = fmaxf(max_score, stats.x);
                const float rescale = exp2_of(max_score - high), weight = exp2_of(stats.x - high);
                weight_sum = weight_sum * rescale + weight * stats.y;
                UNROLL for (int j = 0; j < WIDTH; ++j) sums.at[j] = sums.at[j] * rescale + weight * other.at[j];
                max_score = high;
            }
            write_result(out, h, place, sums, weight_sum, max_score);
        });
    }
    // Load what another block has written.
    DEVICE static Places load_places(const float* from) {
        Places places;
        UNROLL for (int j = 0; j < WIDTH; j += 2) *reinterpret_cast<float2*>(&places.at[j]) = __ldcg(reinterpret_cast<const float2*>(from + j));
        return places;
    }
};

// The grid is max_parts * kv_heads by groups of one KV head. The results are of type O, T or fp8; then they have scales [heads, scale_stride].
template <typename T, typename C, typename O, int HEAD_DIM, int WARPS, bool CAPPED>
__global__ void __launch_bounds__(32 * WARPS, WARPS > 4 ? 1 : HEAD_DIM > 128 ? 2 : MAX_BLOCKS) decode_attention(
    O* __restrict__ out, float* scales, int scale_stride, const T* qkv, int qkv_stride, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows, int rotary,
    C* k_cache, C* v_cache, int unit, unsigned page_stride, unsigned slot_stride, unsigned head_stride, const int* __restrict__ kv_slots, int num_slots,
    const int* __restrict__ page_table, long long page_table_stride, const int* __restrict__ page_table_rows, int page_size, unsigned long long page_reciprocal,
    const int* __restrict__ partition, int window, int kv_chunk, float* partial, unsigned* counters,
    float scale, float softcap, const T* __restrict__ sinks, int heads, int kv_heads, int keys_first) {
    __shared__ DecodeShared<T, C, HEAD_DIM, WARPS> shared;
    extern __shared__ float warp_sums[];  // WarpSums [WARPS]
    launch_next();
    const int part = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
    const Partition<const int> parts{partition, (int)gridDim.x / kv_heads};
    const PartStart start = parts.part(part);
    KeyRange range = start.range;
    if (range.row < 0) return;
    DecodeBlock<T, C, O, HEAD_DIM, WARPS, CAPPED> block{
        qkv, q_norm, k_norm, sinks, k_cache, v_cache, kv_slots, page_table, cos_sin,
        page_table_stride, page_stride, slot_stride, head_stride, page_reciprocal, eps, {scale, softcap}, unit, qkv_stride, table_rows, rotary, num_slots,
        page_size, heads, kv_heads, heads / (kv_heads * (int)gridDim.y), parts, {parts.starts(), positions, page_table_rows, window, kv_chunk},
        partial, counters, shared, reinterpret_cast<WarpSums<HEAD_DIM>*>(warp_sums), common_warp_id(), part, kv_head, start.stop};

    CacheTile<T, C, HEAD_DIM, WARPS> tile(unit * sizeof(C));
    const HeadResults<O> results{out, scales, scale_stride};
    const bool copies = block.warp == WARPS - 1;
    if (copies) block.copies().init();
    block.zero_queries();
    if (threadIdx.x < 2) shared.cut_rows[threadIdx.x].row = -1;
    const bool heads_first = WARPS <= 4 || !keys_first;
    if (copies) block.expect_copies(range);
    if (copies && heads_first) wait_for_previous(), block.copy_heads(range, 0);
    if (copies) block.copy_tables(range, 0);
    block.load_first_tile(tile, range);
    if (copies && !heads_first) wait_for_previous(), block.copy_heads(range, 0);
    if (sinks) prefetch_line(sinks + kv_head * (heads / kv_heads));
    __syncthreads();
    for (int stage = 0; range.chunk < block.stop; stage ^= 1) {
        block.copies().wait(stage);
        const KeyRange next = block.range_after(range);
        const T* value = shared.projected[stage][block.group_size + 1];
        block.prepare_heads(range, stage);
        __syncthreads();
        if (copies && range.has_new_token() && blockIdx.y == 0) block.store_new_token(value, stage);
        if (copies && next.chunk < block.stop) block.expect_copies(next), block.copy_heads(next, stage ^ 1), block.copy_tables(next, stage ^ 1);

        block.attend_new_token(range.has_new_token());
        SoftmaxState<HEAD_DIM> state;
        block.attend_range(state, tile, range, next);
        block.write_state(state);
        __syncthreads();
        block.merge_warps(block.result_of(results, range.row), range, value);
        if (!range.is_whole_row() && threadIdx.x == 0) shared.cut_rows[next.chunk < block.stop ? 0 : 1] = range.cut_row();
        range = next;
    }
    block.merge_cut_rows(results);
}
