// decode_attention: norm and rotation of q and k, the store of k and v, and attention over pages, for one new token per row.
//
// partition_keys divides the keys of all rows into parts, once per step for all layers. A block processes one part of one KV head,
// with a group of its query heads: all of them, if they are at most MAX_GROUP. It goes through its part row by row: a KeyRange is the
// keys of one row in a part. The last block of a row to finish merges the row's partial results in the order of the parts, so
// rounding does not depend on timing. Adjacent blocks have the heads of one part, so that they read a page at about the same time.
//
// Both products run on tensor cores, straight from registers (see cache_tile.cuh): scores = keys x queries, results = values^T x
// weights. Between them movmatrix transposes the weights.
#include "cache_tile.cuh"
#include "head_norm_rope.cuh"
#include "key_partition.cuh"
#include "running_softmax.cuh"

constexpr int MAX_GROUP = 8;  // query heads of a block

// The index of the warp. Because one lane gives it to the others, the compiler knows that they branch alike.
DEVICE int common_warp_id() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

// The grid is one block.
extern "C" __global__ void __launch_bounds__(1024) partition_keys(
    int* __restrict__ data, const int* __restrict__ positions, int rows, int window, int kv_chunk, int min_chunks, int max_parts,
    int slack) {
    const Partition<int> partition{data, rows};
    const int total = scan_chunks(partition.starts(), positions, rows, window, kv_chunk);
    const int parts = min(max_parts, min(total, max(rows, total / min_chunks))), part_rows = (rows + parts - 1) / parts;
    int* starts = partition.starts();
    if (threadIdx.x == 0) starts[rows] = total;
    __syncthreads();
    const bool whole = have_about_one_length(starts, rows, part_rows, parts, slack);
    if (threadIdx.x == 0) partition.num_parts() = whole ? (rows + part_rows - 1) / part_rows : parts, partition.num_chunks() = total;
    for (int part = threadIdx.x; part <= max_parts; part += blockDim.x) {
        const int chunk = whole ? starts[min(rows, part * part_rows)] : min(total, EvenParts(total, parts).first_chunk(part));
        partition.first_chunk(part) = chunk, partition.first_row(part) = chunk < total ? row_of(starts, rows, chunk) : rows;
    }
}

template <typename T, typename C, int HEAD_DIM, int WARPS> struct DecodeShared {
    // Two stages: one for this range, one for the next.
    alignas(16) T projected[2][MAX_GROUP + 2][HEAD_DIM];  // q's heads, then k, then v
    alignas(16) typename OperandOf<T, C>::type query[MAX_GROUP][HEAD_DIM + 32];
    alignas(16) T key[HEAD_DIM];
    alignas(16) T norms[2][HEAD_DIM];
    alignas(16) float angles[2][HEAD_DIM];  // cosines, then sines
    int slot[2];                            // of the new token in the cache
    // The partial results of the warps, with their acc in WarpSums; the last element is that of the new token.
    float max_score[WARPS + 1][MAX_GROUP], weight_sum[WARPS + 1][MAX_GROUP];
};

// The acc of each warp, in dynamic shared memory: with heads of 256 elements it does not fit into the 48 KiB of static memory.
// Place 16 n + 8 o + g of a head is acc[n][2 o + ..] of the lanes g; see element_at. 4: no two lanes on one bank.
template <int HEAD_DIM> using WarpSums = float[MAX_GROUP][HEAD_DIM + 4];

// The state of one block of the kernel: its arguments, its part and head, and the steps that it takes.
template <typename T, typename C, int HEAD_DIM, int WARPS, bool CAPPED> struct DecodeBlock {
    typedef CacheTile<T, C, HEAD_DIM, WARPS> Tile;
    static constexpr int THREADS = 32 * WARPS, BLOCKS = HEAD_DIM / 32;
    static constexpr int STEP = Tile::GROUPS * Tile::STRIDE;  // keys that a block processes at once
    static constexpr int PARTIAL = HEAD_DIM + 2;              // floats of a head's partial result: acc, max_score, weight_sum

    const T *qkv, *q_norm, *k_norm, *sinks;
    C *k_cache, *v_cache;
    const int *positions, *kv_slots, *page_table, *page_table_rows;
    const float* cos_sin;
    long long page_table_stride;
    unsigned page_stride, slot_stride, head_stride;  // in units, of which 32 bits suffice
    unsigned long long page_reciprocal;              // of page_size, times 2^32
    float eps;
    Score<CAPPED> score;
    int unit;  // elements
    int qkv_stride, table_rows, rotary, num_slots, page_size, window, kv_chunk, heads, kv_heads, group_size;
    Partition<const int> partition;
    float* partial;
    unsigned* counters;

    DecodeShared<T, C, HEAD_DIM, WARPS>& s;
    WarpSums<HEAD_DIM>* acc;
    int warp, part, kv_head, stop;  // stop: the first chunk of the next part

    DEVICE int groups() const { return kv_heads * gridDim.y; }
    DEVICE int group() const { return kv_head * gridDim.y + blockIdx.y; }

    DEVICE KeyRange range_at(int chunk, int row) const {
        const int* starts = partition.starts();
        const int row_chunks = starts[row + 1] - starts[row];
        const int first_chunk = chunk - starts[row], end_chunk = min(row_chunks, first_chunk + stop - chunk);
        const int position = positions[row], first = position - num_visible_keys(position, window);
        const int begin = min(position, first + first_chunk * kv_chunk), end = min(position, first + end_chunk * kv_chunk);
        return KeyRange{row, begin, end, position, chunk, first_chunk, end_chunk, row_chunks, page_table_rows[row]};
    }

    DEVICE KeyRange range_after(const KeyRange& range) const {
        const int chunk = range.chunk + range.end_chunk - range.first_chunk;
        if (chunk >= stop) return KeyRange{0, 0, 0, 0, chunk};
        return range_at(chunk, range.row + range.has_new_token());
    }

    DEVICE bool is_rotated(const KeyRange& range) const { return range.position >= 0 && range.position < table_rows; }
    DEVICE void load_angles_and_slot(const KeyRange& range, int stage) const {
        ROLLED for (int i = threadIdx.x; i < rotary / 4 && is_rotated(range); i += THREADS)
            copy_async(&s.angles[stage][4 * i], cos_sin + (long long)range.position * rotary + 4 * i);
        if (threadIdx.x == 0) copy_word_async(&s.slot[stage], kv_slots + range.row);
    }

    DEVICE void load_heads(const KeyRange& range, int stage) const {
        constexpr int VECTORS = HEAD_DIM / 8;
        const T* from = qkv + (long long)range.row * qkv_stride;
        ROLLED for (int i = threadIdx.x; i < (group_size + 2) * VECTORS; i += THREADS) {
            const int h = i / VECTORS, place = h < group_size ? group() * group_size + h : heads + (h - group_size) * kv_heads + kv_head;
            copy_async(&s.projected[stage][h][i % VECTORS * 8], from + place * HEAD_DIM + i % VECTORS * 8);
        }
    }

    // Load the weights of the norms, and zero the queries of heads that the group does not have.
    DEVICE void load_norms() const {
        ROLLED for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            s.norms[0][i] = q_norm ? q_norm[i] : T();
            s.norms[1][i] = k_norm ? k_norm[i] : T();
        }
        ROLLED for (int i = group_size * (HEAD_DIM + 32) + threadIdx.x; i < MAX_GROUP * (HEAD_DIM + 32); i += THREADS)
            s.query[0][i] = typename Tile::Operand();
    }

    // Norm and rotate the query heads, a warp for each, and the new key if it is in this range.
    DEVICE void prepare_heads(const KeyRange& range, int stage) const {
        constexpr int PAIRS = HEAD_DIM <= 64 ? 1 : HEAD_DIM <= 128 ? 2 : 4;
        const float* angles = is_rotated(range) ? s.angles[stage] : nullptr;
        ROLLED for (int h = warp; h < group_size; h += WARPS)
            prepare_head<PAIRS, PAIRS>(s.query[h], s.projected[stage][h], q_norm ? s.norms[0] : nullptr, eps, angles, rotary, HEAD_DIM);
        if (range.has_new_token() && warp == WARPS - 1)
            prepare_head<PAIRS, PAIRS>(s.key, s.projected[stage][group_size], k_norm ? s.norms[1] : nullptr, eps, angles, rotary, HEAD_DIM);
    }

    struct Place { int page, slot; };

    // The index of a token's page in its row: at / page_size, exact for 2^20 tokens and pages of up to 4096.
    DEVICE unsigned page_of(unsigned at) const { return at * page_reciprocal >> 32; }

    // Store the new key and value, by one warp.
    DEVICE void store_new_token(int slot, const T* value) const {
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
            float odd[4] = {};  // two sums: a product does not wait for the one before
            UNROLL for (int i = 0; i < BLOCKS; ++i) {
                if (used) tile.multiply_keys(i % 2 && HEAD_DIM <= 128 ? odd : scores[n], n, i / PARTS, i % PARTS, query_part(i));
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

    // Return the element of a head that is at this place in WarpSums and in partial results.
    DEVICE static int element_at(int place) {
        constexpr int PAIRS = Tile::V_WIDTH / 2;
        const int n = place / 16, odd = place / 8 % 2, g = place % 8;
        return (n / PAIRS * 8 + g) * Tile::V_WIDTH + n % PAIRS * 2 + odd;
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

    // Return the memory for a row's partial results in a part, for each of its heads. A part has two: one for a row that began
    // in an earlier part, one for a row that begins in this one.
    DEVICE float* partial_result(int part, bool begins) const {
        return partial + (2ll * (part * groups() + group()) + begins) * (group_size * PARTIAL);
    }

    // Return the sum of the weights with that of the sink of a head: a logit without a value.
    DEVICE float with_sink(float weight_sum, float max_score, int h) const {
        return sinks ? weight_sum + exp2_of(to_float(sinks[group() * group_size + h]) * LOG2_E - max_score) : weight_sum;
    }

    // Merge the results of the warps and the new token: into `out` if the range is the whole row, else into the partial result.
    DEVICE void merge_warps(T* out, const KeyRange& range, const T* value) const {
        const bool whole = range.is_whole_row();
        ROLLED for (int h = warp; h < group_size; h += WARPS) {
            float max_score = s.max_score[WARPS][h], weight_sum = 0.f, sums[BLOCKS] = {};
            UNROLL for (int w = 0; w < WARPS; ++w) max_score = fmaxf(max_score, s.max_score[w][h]);
            UNROLL for (int w = 0; w <= WARPS; ++w) {
                const float weight = exp2_of(s.max_score[w][h] - max_score);
                weight_sum += weight * s.weight_sum[w][h];
                UNROLL for (int j = 0; j < BLOCKS; ++j) {
                    if (w < WARPS) sums[j] += weight * acc[w][h][lane_id() + 32 * j];
                    else if (range.has_new_token()) sums[j] += weight * to_float(value[element_at(lane_id() + 32 * j)]);
                }
            }
            const float scale = whole ? __fdividef(1.f, with_sink(weight_sum, max_score, h)) : 1.f;
            float* mine = partial_result(part, range.first_chunk == 0) + h * PARTIAL;
            UNROLL for (int j = 0; j < BLOCKS; ++j) {
                if (whole) out[h * HEAD_DIM + element_at(lane_id() + 32 * j)] = from_float<T>(sums[j] * scale);
                else mine[lane_id() + 32 * j] = sums[j];
            }
            if (!whole && lane_id() == 0) mine[HEAD_DIM] = max_score, mine[HEAD_DIM + 1] = weight_sum;
        }
    }

    // Count the parts of a row that are done; return on all threads whether this block's part was the last.
    DEVICE bool is_last_block(int row, int row_parts) const {
        __syncthreads();
        bool is_last = false;
        if (threadIdx.x == 0) {
            unsigned* counter = counters + row * groups() + group();
            __threadfence();  // the barriers order the other threads' stores before it, and their loads after it
            is_last = atomicAdd(counter, 1u) == row_parts - 1;
            __threadfence();
            if (is_last) *counter = 0;  // for the next layer
        }
        return __syncthreads_or(is_last);
    }

    // Merge the partial results of a row, if this block's is the last of them.
    DEVICE void merge_parts(T* out, const KeyRange& range) const {
        const int row_start = range.chunk - range.first_chunk;
        const EvenParts parts = partition.even_parts();
        const int first_part = parts.part_of(row_start), last_part = parts.part_of(row_start + range.row_chunks - 1);
        if (is_last_block(range.row, last_part - first_part + 1)) merge_partials(out, first_part, last_part);
    }

    // Merge the partial results of a row, in the order of its parts.
    DEVICE void merge_partials(T* out, int first_part, int last_part) const {
        ROLLED for (int h = warp; h < group_size; h += WARPS) {
            float max_score = -infinity(), weight_sum = 0.f, sums[BLOCKS] = {};
            #pragma unroll(HEAD_DIM > 128 ? 2 : WARPS)
            for (int p = first_part; p <= last_part; ++p) {
                const float* from = partial_result(p, p == first_part) + h * PARTIAL;
                const float other = __ldcg(from + HEAD_DIM), high = fmaxf(max_score, other);
                const float rescale = exp2_of(max_score - high), weight = exp2_of(other - high);
                weight_sum = weight_sum * rescale + weight * __ldcg(from + HEAD_DIM + 1);
                UNROLL for (int j = 0; j < BLOCKS; ++j) sums[j] = sums[j] * rescale + weight * __ldcg(from + lane_id() + 32 * j);
                max_score = high;
            }
            const float scale = __fdividef(1.f, with_sink(weight_sum, max_score, h));
            UNROLL for (int j = 0; j < BLOCKS; ++j)
                out[h * HEAD_DIM + element_at(lane_id() + 32 * j)] = from_float<T>(sums[j] * scale);
        }
    }
};

// The grid is max_parts * kv_heads by groups of one KV head.
template <typename T, typename C, int HEAD_DIM, int WARPS, bool CAPPED>
__global__ void __launch_bounds__(32 * WARPS, WARPS > 4 ? 1 : HEAD_DIM > 128 ? 2 : 3) decode_attention(
    T* __restrict__ out, const T* qkv, int qkv_stride, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows, int rotary,
    C* k_cache, C* v_cache, int unit, unsigned page_stride, unsigned slot_stride, unsigned head_stride, const int* __restrict__ kv_slots, int num_slots,
    const int* __restrict__ page_table, long long page_table_stride, const int* __restrict__ page_table_rows, int page_size, unsigned long long page_reciprocal,
    const int* __restrict__ partition, int rows, int window, int kv_chunk, float* partial, unsigned* counters,
    float scale, float softcap, const T* __restrict__ sinks, int heads, int kv_heads) {
    __shared__ DecodeShared<T, C, HEAD_DIM, WARPS> shared;
    extern __shared__ float warp_sums[];  // WarpSums [WARPS]
    launch_next();
    const Partition<const int> keys{partition, rows};
    const int part = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int first_row = keys.first_row(part);
    if (first_row == rows) return;
    DecodeBlock<T, C, HEAD_DIM, WARPS, CAPPED> block{
        qkv, q_norm, k_norm, sinks, k_cache, v_cache, positions, kv_slots, page_table, page_table_rows, cos_sin,
        page_table_stride, page_stride, slot_stride, head_stride, page_reciprocal, eps, {scale, softcap}, unit, qkv_stride, table_rows, rotary, num_slots,
        page_size, window, kv_chunk, heads, kv_heads, heads / (kv_heads * (int)gridDim.y), keys, partial, counters, shared,
        reinterpret_cast<WarpSums<HEAD_DIM>*>(warp_sums), common_warp_id(), part, kv_head, keys.first_chunk(part + 1)};

    KeyRange range = block.range_at(keys.first_chunk(part), first_row);
    CacheTile<T, C, HEAD_DIM, WARPS> tile(unit * sizeof(C));
    block.load_first_tile(tile, range);
    block.load_angles_and_slot(range, 0);
    block.load_norms();
    if (sinks) prefetch_line(sinks + kv_head * (heads / kv_heads));
    wait_for_previous();
    block.load_heads(range, 0);
    for (int stage = 0; range.chunk < block.stop; stage ^= 1) {
        wait_all_copies();
        __syncthreads();
        const KeyRange next = block.range_after(range);
        const T* value = shared.projected[stage][block.group_size + 1];
        block.prepare_heads(range, stage);
        __syncthreads();
        if (next.chunk < block.stop) block.load_angles_and_slot(next, stage ^ 1), block.load_heads(next, stage ^ 1);
        if (range.has_new_token() && blockIdx.y == 0 && block.warp == WARPS - 1) block.store_new_token(shared.slot[stage], value);

        block.attend_new_token(range.has_new_token());
        SoftmaxState<HEAD_DIM> state;
        block.attend_range(state, tile, range, next);
        block.write_state(state);
        __syncthreads();
        T* result = out + ((long long)range.row * heads + block.group() * block.group_size) * HEAD_DIM;
        block.merge_warps(result, range, value);
        if (!range.is_whole_row()) block.merge_parts(result, range);
        range = next;
    }
}
