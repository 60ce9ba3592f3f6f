// A mixture of experts without the host: group the pairs (token, choice) by expert, run two GEMMs over the groups, and sum the
// choices of each token. Pair p is choice p % K of token p / K. No grid depends on the routing.
#include "expert_choice.cuh"
#include "expert_epilogue.cuh"
#include "mxfp4.cuh"

constexpr int DEPTH = 64;  // elements of a row in one stage: of x 128 bytes, eight chunks of 16 bytes
constexpr int BLOCK = 32;  // elements with one scale in MXFP4

// The format of weights of type W, and the type of their scales.
template <typename W> struct Format {
    typedef unsigned char Scale;
    static constexpr bool MXFP4 = false, FP8 = false;
};
template <> struct Format<mxfp4> {
    typedef unsigned char Scale;
    static constexpr bool MXFP4 = true, FP8 = false;
};
template <> struct Format<fp8> {
    typedef float Scale;
    static constexpr bool MXFP4 = false, FP8 = true;
};

// Return `before` and the sum of `value` over this thread and the lower ones of the block; add the whole block's sum to `before`.
DEVICE int2 running_sum(int2 value, int2& before) {
    __shared__ int2 of_warp[32];
    UNROLL for (int by = 1; by < 32; by *= 2) {
        const int2 below = make_int2(__shfl_up_sync(0xffffffffu, value.x, by), __shfl_up_sync(0xffffffffu, value.y, by));
        if (lane_id() >= by) value.x += below.x, value.y += below.y;
    }
    if (lane_id() == 31) of_warp[warp_id()] = value;
    __syncthreads();
    value.x += before.x, value.y += before.y;
    for (int w = 0; w < blockDim.x / 32; ++w) {
        if (w < warp_id()) value.x += of_warp[w].x, value.y += of_warp[w].y;
        before.x += of_warp[w].x, before.y += of_warp[w].y;
    }
    __syncthreads();  // all have read of_warp
    return value;
}

// The grid is one block. order = the pairs by expert; tiles[i] = (expert, first index in `order`, rows, 0), with 0 rows for unused tiles.
// Within an expert the atomics decide the order, on which no result depends.
template <int ROWS>
__global__ void __launch_bounds__(1024) group_pairs(
    int4* __restrict__ tiles, int* __restrict__ order, const long long* __restrict__ expert_ids, int pairs, int experts, int num_tiles) {
    extern __shared__ int count[];  // pairs [experts], then next index [experts], at a multiple of 16 bytes for vector loads
    int* next = count + (experts + 3) / 4 * 4;
    wait_for_previous();
    launch_next();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
    for (int i = threadIdx.x; i < num_tiles; i += blockDim.x) tiles[i] = make_int4(0, 0, 0, 0);
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += blockDim.x)
        if (exists(expert_ids[p], experts)) atomicAdd(count + expert_ids[p], 1);
    __syncthreads();
    int2 before = make_int2(0, 0);  // pairs and tiles of the experts below `start`
    for (int start = 0; start < experts; start += blockDim.x) {
        const int e = start + threadIdx.x, n = e < experts ? count[e] : 0, num_tiles_of_expert = (n + ROWS - 1) / ROWS;
        const int2 sum = running_sum(make_int2(n, num_tiles_of_expert), before);
        const int first = sum.x - n, tile = sum.y - num_tiles_of_expert;
        if (e < experts) next[e] = first;
        for (int i = 0; i < num_tiles_of_expert; ++i) tiles[tile + i] = make_int4(e, first + i * ROWS, min(ROWS, n - i * ROWS), 0);
    }
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += blockDim.x)
        if (exists(expert_ids[p], experts)) order[atomicAdd(next + expert_ids[p], 1)] = p;
}

// choose_experts for each token, by a warp. With bias_stride each token has its own row of biases.
template <typename T, int PER_LANE, bool NORMALIZED, bool SIGMOID>
__global__ void __launch_bounds__(256) select_experts(
    long long* __restrict__ expert_ids, float* __restrict__ scores, const T* __restrict__ logits, long long logit_stride,
    const T* __restrict__ logit_bias, const float* __restrict__ bias, int bias_stride, float least_sum, float scaling, int tokens, int experts, int choices,
    int first_expert, int shared) {
    launch_next();
    wait_for_previous();
    const long long token = blockIdx.x * 8 + threadIdx.x / 32, first = token * (choices + shared);
    if (token >= tokens) return;
    const Choice choice = {bias ? bias + token * bias_stride : nullptr, least_sum, scaling, experts, choices, first_expert, shared};
    const T* row = logits + token * logit_stride;
    choose_experts<PER_LANE, NORMALIZED, SIGMOID>(expert_ids + first, scores + first, choice, [&](int i) {
        return to_float(row[i]) + (logit_bias ? to_float(logit_bias[i]) : 0.f);
    });
}

// Return the byte offset of a row's chunk in a stage. The exclusive or spreads equal chunks of eight rows, read at once, over the banks.
DEVICE int swizzle(int row, int chunk) { return row * 2 * DEPTH + (chunk ^ row % 8) * 16; }

// Multiply M x N tiles of a stage; first_row is the stage's first row of x, first_weight_row that of the weights.
template <typename T, int M, int N>
DEVICE void multiply_stage(float (&sums)[M][N][2][4], unsigned stage, int lane, int first_row, int first_weight_row) {
    UNROLL for (int k = 0; k < DEPTH / 8; k += 2) {
        unsigned a[M][4], b[N][4];  // a: the quarters of a tile, down first; b: two tiles of 8 rows, two halves along k each
        UNROLL for (int m = 0; m < M; ++m) load_matrices(a[m], stage + swizzle(first_row + 16 * m + lane % 16, k + lane / 16));
        UNROLL for (int n = 0; n < N; ++n)
            load_matrices(b[n], stage + swizzle(first_weight_row + 16 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
        UNROLL for (int m = 0; m < M; ++m)
            UNROLL for (int n = 0; n < N; ++n)
                UNROLL for (int half = 0; half < 2; ++half)
                    multiply(sums[m][n][half], a[m][0], a[m][1], a[m][2], a[m][3], b[n][2 * half], b[n][2 * half + 1], T());
    }
}

// Do multiply_stage with weights in MXFP4, of which LARGE allows scales of more than 128, whose rows of 32 bytes, two blocks, begin at `weights`. Lane (g, t) widens word t of each block
// of rows g and g + 8: elements 2 t and 2 t + 1 of each eight elements.
template <bool LARGE, int M, int N> DEVICE void multiply_mxfp4_stage(
    float (&sums)[M][N][2][4], unsigned stage, int lane, int first_row, const char* weights, const int (&scales)[N][2][2]) {
    UNROLL for (int block = 0; block < 2; ++block) {
        unsigned a[M][2][4];
        UNROLL for (int m = 0; m < M; ++m)
            UNROLL for (int part = 0; part < 2; ++part)
                load_matrices(a[m][part], stage + swizzle(first_row + 16 * m + lane % 16, 4 * block + 2 * part + lane / 16));
        UNROLL for (int n = 0; n < N; ++n)
            UNROLL for (int half = 0; half < 2; ++half) {
                const char* row = weights + (16 * n + 8 * half + lane / 4) * DEPTH / 2;
                const unsigned word = *reinterpret_cast<const unsigned*>(row + 16 * (block ^ lane / 16) + lane % 4 * 4);
                unsigned b[4];
                UNROLL for (int pair = 0; pair < 4; ++pair) b[pair] = widen_mxfp4<LARGE>(word, pair, scales[n][half][block]);
                UNROLL for (int m = 0; m < M; ++m)
                    UNROLL for (int part = 0; part < 2; ++part) {
                        const auto& of_x = a[m][part];
                        multiply(sums[m][n][half], of_x[0], of_x[1], of_x[2], of_x[3], b[2 * part], b[2 * part + 1], bf16());
                    }
            }
    }
}

// Multiply two adjacent numbers by a scale, and round them to T.
template <typename T> DEVICE unsigned scaled_pair(unsigned halves, float scale) {
    const Vec<f16, 2> pair = *reinterpret_cast<const Vec<f16, 2>*>(&halves);
    return pack<T>(to_float(pair.at[0]) * scale, to_float(pair.at[1]) * scale);
}

// Do multiply_stage with weights in FP8, whose rows of 64 bytes begin at `weights`. Lane (g, t) widens elements 2 t and 2 t + 1 of each
// eight elements of rows g and g + 8, to what the dequantized matrix has there.
template <typename T, int M, int N> DEVICE void multiply_fp8_stage(
    float (&sums)[M][N][2][4], unsigned stage, int lane, int first_row, const char* weights, const float (&scales)[N][2]) {
    const unsigned selector = lane % 2 ? 0x7632 : 0x5410;
    UNROLL for (int k = 0; k < DEPTH / 8; k += 2) {
        unsigned a[M][4];
        UNROLL for (int m = 0; m < M; ++m) load_matrices(a[m], stage + swizzle(first_row + 16 * m + lane % 16, k + lane / 16));
        UNROLL for (int n = 0; n < N; ++n)
            UNROLL for (int half = 0; half < 2; ++half) {
                const uint4 row = *reinterpret_cast<const uint4*>(weights + (16 * n + 8 * half + lane / 4) * DEPTH + 8 * k);
                unsigned b[2];
                widen(lane % 4 < 2 ? __byte_perm(row.x, row.z, selector) : __byte_perm(row.y, row.w, selector), b[0], b[1], f16());
                UNROLL for (int i = 0; i < 2; ++i) b[i] = scaled_pair<T>(b[i], scales[n][half]);
                UNROLL for (int m = 0; m < M; ++m) multiply(sums[m][n][half], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1], T());
            }
    }
}

// Write a warp's sums; its tiles begin at this row and column of the block's tile and of out.
template <typename T, int M, int N, Gate GATE, typename F> DEVICE void store_sums(
    T* __restrict__ out, const float (&sums)[M][N][2][4], const Epilogue<T>& epilogue, const F& pair_of, int rows, int first_row,
    int columns, int first_column) {
    constexpr bool GATED = GATE != PLAIN;
    const int lane = threadIdx.x % 32;
    UNROLL for (int i = 0; i < 2 * M; ++i) {  // rows of eight
        const int row = first_row + 8 * i + lane / 4;
        if (row >= rows) break;
        T* target = out + (long long)pair_of(row) * columns;
        UNROLL for (int j = 0; j < (GATED ? N : 2 * N); ++j) {  // columns of eight
            const int column = first_column + 8 * j + lane % 4 * 2;
            if (column >= columns) break;
            Vec<T, 2> result;
            UNROLL for (int c = 0; c < 2; ++c) {
                const auto& sum = sums[i / 2][GATED ? j : j / 2];
                const int at = i % 2 * 2 + c;
                const float first = sum[GATED ? 0 : j % 2][at], up = GATED ? sum[1][at] : 0.f;
                result.at[c] = epilogue.template finish<GATE>(first, up, min(column + c, columns - 1), columns);
            }
            if (columns % 2 == 0) *reinterpret_cast<Vec<T, 2>*>(target + column) = result;
            else for (int c = 0; c < 2 && column + c < columns; ++c) target[column + c] = result.at[c];
        }
    }
}

// out[p] = weights[expert of p] x[p / pairs_per_row] for the pairs of a tile and a part of the columns. Unless GATE is PLAIN, column c
// is made of the products gate and up of the rows c and columns + c of the weights. W is T, mxfp4 or fp8; see FP8Weight of
// arguments.py for the scales of the latter, and `first`. A block has WARPS_M x WARPS_N warps, a warp M x N tiles of 16 rows by 16
// weight rows. Every shape adds the same products of 16 in the same order: a row is bitwise identical in any shape and batch.
// Without `tiles` and `order` there is one expert that has all pairs in order.
template <typename T, typename W, int WARPS_M, int WARPS_N, int M, int N, int STAGES, Gate GATE>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N) grouped_gemm(
    T* __restrict__ out, const T* __restrict__ x, const W* __restrict__ weights, const typename Format<W>::Scale* __restrict__ scales,
    int row_shift, int column_shift, int scale_columns, int first, const T* __restrict__ bias, const int4* __restrict__ tiles,
    const int* __restrict__ order, int pairs_per_row, int num_pairs, int width, int columns, float alpha, float limit) {
    constexpr bool GATED = GATE != PLAIN, IS_MXFP4 = Format<W>::MXFP4, IS_FP8 = Format<W>::FP8;
    constexpr int THREADS = 32 * WARPS_M * WARPS_N, ROWS = 16 * M * WARPS_M, WEIGHT_ROWS = 16 * N * WARPS_N;
    constexpr int PART = GATED ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;
    constexpr int PACKED = IS_MXFP4 ? 2 : 1;                          // elements in a W
    constexpr int WEIGHT_BYTES = DEPTH * sizeof(W) / PACKED;          // of a row of the weights in a stage
    constexpr int CHUNKS = WEIGHT_BYTES / 16, CHUNK = DEPTH / CHUNKS;  // chunks of 16 bytes, and their elements
    constexpr int STAGE = ROWS * 2 * DEPTH + WEIGHT_ROWS * WEIGHT_BYTES;
    constexpr int STEP = THREADS / 8, WEIGHT_STEP = THREADS / CHUNKS;  // rows that the block copies at once
    extern __shared__ __align__(128) char stages[];  // each: rows of x, then rows of the weights
    const int parts = (columns + PART - 1) / PART, first_column = blockIdx.x % parts * PART;
    const int number = blockIdx.x / parts;
    wait_for_previous();
    launch_next();
    const int4 tile = tiles ? tiles[number] : make_int4(0, number * ROWS, min(ROWS, num_pairs - number * ROWS), 0);
    const int expert = tile.x, rows = tile.z;
    if (rows == 0) return;
    auto pair_of = [&](int row) { return order ? order[tile.y + row] : tile.y + row; };
    auto matrix_row = [&](int row) {  // gate and up alternate every eight rows, so that one thread has both sums of a column
        const int column = min(first_column + (GATED ? row / 16 * 8 + row % 8 : row), columns - 1);
        return (GATED ? expert * 2ll + row / 8 % 2 : expert) * columns + column;
    };

    const int chunk = threadIdx.x % 8, copied_row = threadIdx.x / 8;
    const int weight_chunk = threadIdx.x % CHUNKS, copied_weight = threadIdx.x / CHUNKS;
    const T* x_rows[ROWS / STEP];
    const W* weight_rows[WEIGHT_ROWS / WEIGHT_STEP];
    UNROLL for (int i = 0; i < ROWS / STEP; ++i) {
        const int pair = pair_of(min(copied_row + i * STEP, rows - 1));
        x_rows[i] = x + (long long)(pair / pairs_per_row) * width;
    }
    UNROLL for (int i = 0; i < WEIGHT_ROWS / WEIGHT_STEP; ++i)
        weight_rows[i] = weights + matrix_row(copied_weight + i * WEIGHT_STEP) * (width / PACKED);
    const int blocks = width / BLOCK;
    const auto weight_of = [&](int i, int k) {
        if (!IS_MXFP4) return weight_rows[i] + k;
        return weights + RowBlocks(matrix_row(copied_weight + i * WEIGHT_STEP), blocks).at(k / BLOCK) * 16ll;
    };
    const int before = IS_FP8 ? first : 0;  // columns of the first block of scales that are another shard's
    const unsigned memory = (unsigned)__cvta_generic_to_shared(stages);
    const auto inside = [&](int at) { return (!IS_FP8 || at >= 0) && at < width; };
    const auto clamped = [&](int at, int length) { return IS_FP8 && at < 0 ? 0 : min(at, width - length); };
    const auto load = [&](int step) {
        const unsigned stage = memory + step % STAGES * STAGE, weight_stage = stage + ROWS * 2 * DEPTH;
        const int k = step * DEPTH + chunk * 8 - before, weight_k = step * DEPTH + weight_chunk * CHUNK - before;
        UNROLL for (int i = 0; i < ROWS / STEP; ++i) {
            const int row = copied_row + i * STEP;
            copy_async(stage + swizzle(row, chunk), x_rows[i] + clamped(k, 8), inside(k) && row < rows);
        }
        UNROLL for (int i = 0; i < WEIGHT_ROWS / WEIGHT_STEP; ++i) {
            const int row = copied_weight + i * WEIGHT_STEP;
            const int at = IS_MXFP4     ? row * WEIGHT_BYTES + (weight_chunk ^ row / 4 % 2) * 16
                           : CHUNKS < 8 ? row * WEIGHT_BYTES + weight_chunk * 16
                                        : swizzle(row, weight_chunk);
            copy_async(weight_stage + at, weight_of(i, clamped(weight_k, CHUNK)), inside(weight_k));
        }
    };

    const int steps = (before + width + DEPTH - 1) / DEPTH;
    UNROLL for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load(step);
        commit_copies();
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp / WARPS_N * 16 * M, first_weight_row = warp % WARPS_N * 16 * N;
    int next_scales[N][2][2];  // of the two blocks of a step
    const auto load_scales = [&](int step) {
        UNROLL for (int i = 0; i < 4 * N; ++i) {
            const long long row = matrix_row(first_weight_row + i / 2 * 8 + lane / 4);
            next_scales[i / 4][i / 2 % 2][i % 2] = scales[RowBlocks(row, blocks).at(min(2 * step + i % 2, blocks - 1))];
        }
    };
    if constexpr (IS_MXFP4) load_scales(0);
    float fp8_scales[N][2];
    const auto load_fp8_scales = [&](int step) {
        const long long matrix = (GATED ? 2ll : 1ll) * columns, scale_rows = ((matrix - 1) >> row_shift) + 1;
        UNROLL for (int i = 0; i < 2 * N; ++i) {
            const long long row = matrix_row(first_weight_row + i * 8 + lane / 4) - expert * matrix;
            fp8_scales[i / 2][i % 2] = scales[(expert * scale_rows + (row >> row_shift)) * scale_columns + (step * DEPTH >> column_shift)];
        }
    };
    float sums[M][N][2][4] = {};
    for (int step = 0; step < steps; ++step) {
        if constexpr (IS_FP8) load_fp8_scales(step);
        wait_copies<STAGES - 2>();  // this thread's copies of this step are done; after the barrier, those of all threads,
        __syncthreads();            // and all threads have left the stage that the next copies overwrite
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        commit_copies();  // also an empty group: the wait counts groups
        const int at = step % STAGES * STAGE;
        const char* warp_weights = stages + at + ROWS * 2 * DEPTH + first_weight_row * WEIGHT_BYTES;
        if constexpr (IS_MXFP4) {
            int step_scales[N][2][2], greatest = 0;
            UNROLL for (int i = 0; i < 4 * N; ++i)
                greatest = max(greatest, step_scales[i / 4][i / 2 % 2][i % 2] = next_scales[i / 4][i / 2 % 2][i % 2]);
            load_scales(step + 1);
            if (__any_sync(0xffffffffu, greatest > 128))
                multiply_mxfp4_stage<true>(sums, memory + at, lane, first_row, warp_weights, step_scales);
            else multiply_mxfp4_stage<false>(sums, memory + at, lane, first_row, warp_weights, step_scales);
        } else if constexpr (IS_FP8) {
            multiply_fp8_stage<T>(sums, memory + at, lane, first_row, warp_weights, fp8_scales);
        } else {
            multiply_stage<T, M, N>(sums, memory + at, lane, first_row, ROWS + first_weight_row);
        }
    }

    const Epilogue<T> epilogue = epilogue_of<GATE>(bias, expert, columns, alpha, limit);
    const int warp_column = first_column + first_weight_row / (GATED ? 2 : 1);
    store_sums<T, M, N, GATE>(out, sums, epilogue, pair_of, rows, first_row, columns, warp_column);
}

// The GEMM of grouped_gemm in float32, without tensor cores because they round: one warp for each pair and column.
template <Gate GATE>
__global__ void __launch_bounds__(256) float32_gemm(
    float* __restrict__ out, const float* __restrict__ x, const float* __restrict__ weights, const float* __restrict__ bias,
    const long long* __restrict__ expert_ids, int pairs, int pairs_per_row, int experts, int width, int columns, float alpha, float limit) {
    constexpr bool GATED = GATE != PLAIN;
    const long long at = blockIdx.x * 8ll + threadIdx.x / 32, pair = at / columns;
    const int column = at % columns, lane = threadIdx.x % 32;
    if (pair >= pairs || !exists(expert_ids[pair], experts)) return;
    const long long matrix_row = expert_ids[pair] * (GATED ? 2 : 1) * columns + column;
    const float* row = weights + matrix_row * width;
    x += pair / pairs_per_row * width;
    float first = 0.f, second = 0.f;
    for (int i = lane; i < width; i += 32) {
        first += x[i] * row[i];
        if (GATED) second += x[i] * row[(long long)columns * width + i];
    }
    first = warp_sum(first), second = warp_sum(second);
    const Epilogue<float> epilogue = epilogue_of<GATE>(bias, expert_ids[pair], columns, alpha, limit);
    if (lane == 0) out[at] = epilogue.template finish<GATE>(first, second, column, columns);
}

// Load where it is written; the compiler would wait for a pair's expert first.
template <typename T> DEVICE T load_here(const T* from) { return *const_cast<const volatile T*>(from); }
template <typename T, int V> DEVICE Vec<T, V> load_here(const Vec<T, V>* from) {
    if constexpr (sizeof(*from) < 16) return *from;
    const uint4 loaded = load_written(from);
    return *reinterpret_cast<const Vec<T, V>*>(&loaded);
}

// out[t] = sum over k of scores[t, k] * expert_out[t K + k] in float32, in the order of k, and add_to[t] if it is not null, which may
// be out; grid (T, parts of a row). The loads of AT_ONCE choices do not wait for each other: also of a choice without an expert, whose
// row holds anything.
template <typename T, int V>
__global__ void __launch_bounds__(256, 2) weighted_sum(
    T* out, const T* __restrict__ expert_out, const float* __restrict__ scores, const long long* __restrict__ expert_ids,
    const T* add_to, int choices, int experts, int size) {
    constexpr int AT_ONCE = 9;
    typedef Vec<T, V> Vector;
    launch_next();
    wait_for_previous();
    const long long first = (long long)blockIdx.x * choices;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * V; i < size; i += gridDim.y * blockDim.x * V) {
        const long long at = (long long)blockIdx.x * size + i;
        float sum[V] = {};
        Vector before;
        if (add_to) before = *reinterpret_cast<const Vector*>(add_to + at);
        for (int begin = 0; begin < choices; begin += AT_ONCE) {
            Vector in[AT_ONCE];
            float score[AT_ONCE];
            long long expert[AT_ONCE];
            UNROLL for (int k = 0; k < AT_ONCE; ++k) {
                if (begin + k >= choices) break;
                const long long pair = first + begin + k;
                in[k] = load_here(reinterpret_cast<const Vector*>(expert_out + pair * size + i));
                score[k] = load_here(scores + pair);
                expert[k] = load_here(expert_ids + pair);
            }
            UNROLL for (int k = 0; k < AT_ONCE; ++k)
                if (begin + k < choices && exists(expert[k], experts))
                    UNROLL for (int j = 0; j < V; ++j) sum[j] += score[k] * to_float(in[k].at[j]);
        }
        if (add_to)
            UNROLL for (int j = 0; j < V; ++j) sum[j] += to_float(before.at[j]);
        *reinterpret_cast<Vector*>(out + at) = round_all<T>(sum);
    }
}
