// fp8_gemm: x @ weight^T for FP8 weights and FP8 rows of x with scales, for tens of rows, with an epilogue.
//
// The weight is the left operand of wgmma, so that its 64 rows are always full and few rows of x waste nothing. A block computes TILE
// rows of the weight for up to N rows of x; two groups of four warps have 64 of them each. One thread more has TMA copy both to
// shared memory, a step of 128 columns at a time and STAGES ahead, the first weights before the kernel that computes x has ended.
// A step lies in one block of scales: its products are summed apart in registers, and added times the scales of the weight and of x.
// The blocks of a cluster, at most four, share the columns, and add their sums through distributed shared memory, each for a part of
// the results and always in the same order.
#include "wgmma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; scaled_gemm.py uses these names

constexpr int GROUPS = 2, GROUP_ROWS = 64, TILE = GROUPS * GROUP_ROWS;  // with SILU, group 0 has gate, and group 1 the same rows of up
constexpr int CONSUMERS = 128 * GROUPS;                                  // threads that multiply
constexpr int MAX_PARTS = 4;                                             // blocks of a cluster
constexpr int SUM_STRIDE = TILE + 4;  // from a row of sums to the next, so that lanes write to different banks

// Shared memory: stages of TILE rows of the weight, then N rows of x; the scales of x of all stages; two barriers for each stage.
template <int N, int STAGES> struct Memory {
    static constexpr int X = TILE * LINE, STAGE = X + N * LINE, SCALES = STAGES * STAGE, BARRIERS = SCALES + STAGES * N * 4;
    unsigned base;
    DEVICE unsigned weight(int stage, int group) const { return base + stage * STAGE + group * GROUP_ROWS * LINE; }
    DEVICE unsigned x(int stage) const { return base + stage * STAGE + X; }
    DEVICE unsigned scales(int stage) const { return base + SCALES + stage * N * 4; }
    DEVICE unsigned full(int stage) const { return base + BARRIERS + stage * 16; }
    DEVICE unsigned empty(int stage) const { return full(stage) + 8; }
    DEVICE void init_barriers() const {
        for (int i = 0; i < STAGES; ++i) init_barrier(full(i), 1), init_barrier(empty(i), CONSUMERS / 32);
        publish_barriers();
    }
};

// The stage of a step, and the phase of its barriers.
template <int STAGES> struct Ring {
    int stage = 0, phase = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// The thread that has `steps` steps copied, from this column on. x_scales are those of the first step, `padded` apart.
template <int N, int STAGES> struct Producer {
    Memory<N, STAGES> memory;
    const TileMap &weight, &x;
    int weight_rows[GROUPS], first_row, scale_bytes, padded;

    DEVICE void load_weight(int stage, int column) const {
        arrive_expecting(memory.full(stage), Memory<N, STAGES>::STAGE + scale_bytes);
        UNROLL for (int group = 0; group < GROUPS; ++group)
            copy_box(memory.weight(stage, group), weight, weight_rows[group], column, memory.full(stage));
    }
    DEVICE void load_x(int stage, int column, const float* x_scales) const {
        copy_box(memory.x(stage), x, first_row, column, memory.full(stage));
        copy_bytes(memory.scales(stage), x_scales, scale_bytes, memory.full(stage));
    }
    DEVICE void run(int steps, int column, const float* x_scales) const {
        const int ahead = min(STAGES, steps);
        ROLLED for (int i = 0; i < ahead; ++i) load_weight(i, column + i * LINE);
        wait_for_previous();
        ROLLED for (int i = 0; i < ahead; ++i, column += LINE, x_scales += padded) load_x(i, column, x_scales);
        Ring<STAGES> ring;
        for (int i = ahead; i < steps; ++i, column += LINE, x_scales += padded, ring.advance()) {
            wait_for_phase(memory.empty(ring.stage), ring.phase);
            load_weight(ring.stage, column), load_x(ring.stage, column, x_scales);
        }
    }
};

// The scales of two rows of the weight, step after step; see FP8Weight of arguments.py.
struct RowScales {
    const float* __restrict__ rows[2];
    int shift;  // binary logarithm of the steps in a block of columns
    DEVICE Vec<float, 2> at(int step) const { return {__ldg(rows[0] + (step >> shift)), __ldg(rows[1] + (step >> shift))}; }
};

// A thread that multiplies: its sums for the rows of its group and all rows of x.
template <int N, int STAGES> struct Consumer {
    Memory<N, STAGES> memory;
    int group, begin, end;
    float sums[N / 2];

    DEVICE void multiply_stage(int stage, const Vec<float, 2>& factor, const float* x_factors) {
        const unsigned long long a = descriptor(memory.weight(stage, group)), b = descriptor(memory.x(stage));
        float products[N / 2];
        begin_multiply();
        UNROLL for (int k = 0; k < LINE / 32; ++k) multiply_async(products, a + 2 * k, b + 2 * k, k > 0);
        end_multiply();
        UNROLL for (int j = 0; j < N / 8; ++j) {
            const Vec<float, 2> x_factor = *reinterpret_cast<const Vec<float, 2>*>(x_factors + 8 * j + threadIdx.x % 4 * 2);
            UNROLL for (int i = 0; i < 4; ++i) sums[4 * j + i] += products[4 * j + i] * (x_factor.at[i % 2] * factor.at[i / 2]);
        }
    }
    DEVICE void run(const RowScales& scales, const char* shared) {
        ROLLED for (int i = begin + threadIdx.x % 4 * 32; i < end; i += 128) prefetch_line(scales.rows[0] + (i >> scales.shift));
        Ring<STAGES> ring;
        Vec<float, 2> next = scales.at(begin);
        for (int step = begin; step < end; ++step, ring.advance()) {
            const Vec<float, 2> factor = next;
            next = scales.at(min(step + 1, end - 1));
            wait_for_phase(memory.full(ring.stage), ring.phase);
            multiply_stage(ring.stage, factor, reinterpret_cast<const float*>(shared + memory.scales(ring.stage) - memory.base));
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(memory.empty(ring.stage));
        }
    }
    // Write to rows of x by rows of the weight; `to` is at the thread's row of the weight.
    DEVICE void store(float* to) const {
        UNROLL for (int i = 0; i < N / 2; ++i)
            to[(i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * SUM_STRIDE + i / 2 % 2 * 8] = sums[i];
    }
};

// sum[i] = four adjacent sums at[i], added over the blocks of the cluster.
template <int ROWS> DEVICE void add_blocks(float4 (&sum)[ROWS], const float* const (&at)[ROWS], int parts) {
    if (parts == 1) {
        UNROLL for (int i = 0; i < ROWS; ++i) sum[i] = *reinterpret_cast<const float4*>(at[i]);
        return;
    }
    float4 of_block[MAX_PARTS][ROWS];  // all are loaded before the first is used
    UNROLL for (int p = 0; p < MAX_PARTS; ++p)
        if (p < parts) UNROLL for (int i = 0; i < ROWS; ++i) of_block[p][i] = load_of_block(at[i], p);
    UNROLL for (int i = 0; i < ROWS; ++i) sum[i] = of_block[0][i];
    UNROLL for (int p = 1; p < MAX_PARTS; ++p)
        if (p < parts) UNROLL for (int i = 0; i < ROWS; ++i) {
            const float4& addend = of_block[p][i];
            sum[i].x += addend.x, sum[i].y += addend.y, sum[i].z += addend.z, sum[i].w += addend.w;
        }
}

// Compute the part of the result that is this block's: finish the sums of the cluster. A thread has four features of some rows of x.
template <typename T> struct Results {
    static constexpr int AT_ONCE = 2;  // rows that are loaded before the first is stored
    T* out;
    const T* bias;
    int tile, first_row, rows, features, epilogue, number, parts;

    DEVICE Vec<T, 4> load(const T* at, bool exists) const { return exists ? *reinterpret_cast<const Vec<T, 4>*>(at) : Vec<T, 4>{}; }
    DEVICE Vec<T, 4> finish(const float4& sums, const float4& up_sums, const Vec<T, 4>& before, const Vec<T, 4>& shift, const Vec<T, 4>& up_shift) const {
        const float sum[4] = {sums.x, sums.y, sums.z, sums.w}, up[4] = {up_sums.x, up_sums.y, up_sums.z, up_sums.w};
        float values[4];
        UNROLL for (int j = 0; j < 4; ++j) {
            values[j] = sum[j] + to_float(shift.at[j]) + to_float(before.at[j]);
            if (epilogue == SILU) values[j] = silu(values[j]) * (up[j] + to_float(up_shift.at[j]));
        }
        return round_all<T>(values);
    }
    static_assert(GROUP_ROWS == 4 << 4 && TILE == 4 << 5, "a row has 16 or 32 vectors");
    DEVICE void write(const float* sums) const {
        const int shift_of_row = epilogue == SILU ? 4 : 5, vectors = 1 << shift_of_row;  // of a row; they divide the threads
        const int step = CONSUMERS * parts >> shift_of_row, column = (threadIdx.x & (vectors - 1)) * 4;
        const int feature = tile * vectors * 4 + column;
        if (feature >= features) return;
        const Vec<T, 4> shift = load(bias + feature, bias), up_shift = load(bias + features + feature, bias && epilogue == SILU);
        for (int first = number * CONSUMERS + threadIdx.x >> shift_of_row; first < rows; first += AT_ONCE * step) {
            Vec<T, 4> before[AT_ONCE];
            float4 sum[AT_ONCE], up[AT_ONCE] = {};
            const float *from[AT_ONCE], *up_from[AT_ONCE];
            auto row = [&](int i) { return min(first + i * step, rows - 1); };
            auto at = [&](int i) { return out + (long long)(first_row + row(i)) * features + feature; };
            UNROLL for (int i = 0; i < AT_ONCE; ++i) before[i] = load(at(i), epilogue == ADD);
            UNROLL for (int i = 0; i < AT_ONCE; ++i) from[i] = sums + row(i) * SUM_STRIDE + column, up_from[i] = from[i] + GROUP_ROWS;
            add_blocks(sum, from, parts);
            if (epilogue == SILU) add_blocks(up, up_from, parts);
            UNROLL for (int i = 0; i < AT_ONCE; ++i)
                if (first + i * step < rows) *reinterpret_cast<Vec<T, 4>*>(at(i)) = finish(sum[i], up[i], before[i], shift, up_shift);
        }
    }
};

// The grid is tiles of the weight x tiles of x x `parts`, the blocks of a cluster. x_scales: [groups of 128 columns, padded rows].
// `first` is the place of column 0 in its block of scales.
template <typename T, int N, int STAGES>
__global__ void __launch_bounds__(CONSUMERS + 32, 2) fp8_gemm(
    T* out, const __grid_constant__ TileMap x, const float* x_scales, const __grid_constant__ TileMap weight, const float* scale,
    const T* bias, int rows, int padded, int features, int size, int first, int row_shift, int column_shift, int blocks, int epilogue,
    int parts) {
    extern __shared__ __align__(1024) char shared[];
    launch_next();
    const Memory<N, STAGES> memory{(unsigned)__cvta_generic_to_shared(shared)};
    if (threadIdx.x == 0) memory.init_barriers();
    if (threadIdx.x == CONSUMERS) prefetch_map(x);  // it is needed at once after the wait
    // Divisions would delay the first copies.
    const int number = parts == 1 ? 0 : place_in_cluster(), place = parts == 1 ? blockIdx.x : cluster_index();
    const int row_tiles = (rows + N - 1) / N, steps = (first + size + LINE - 1) / LINE;
    int tile = place, first_row = 0;
    if (row_tiles > 1) tile = (unsigned)place / row_tiles, first_row = (place - tile * row_tiles) * N;
    static_assert(MAX_PARTS == 4, "a division by 3, or a shift");
    auto share = [&](unsigned steps) { return parts == 3 ? steps / 3 : steps >> parts / 2; };
    const int begin = share(steps * number), end = share(steps * (number + 1));
    auto weight_row = [&](int group) { return epilogue == SILU ? tile * GROUP_ROWS + group * features : tile * TILE + group * GROUP_ROWS; };
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        const int scale_bytes = min(N, padded - first_row) * 4;
        const Producer<N, STAGES> producer{memory, weight, x, {weight_row(0), weight_row(1)}, first_row, scale_bytes, padded};
        if (threadIdx.x == CONSUMERS) producer.run(end - begin, begin * LINE - first, x_scales + (long long)begin * padded + first_row);
        return;
    }
    const int group = threadIdx.x / 128, lane_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // of the group's rows
    const int row = weight_row(group) + lane_row, last = (epilogue == SILU ? 2 : 1) * features - 1;
    auto row_scales = [&](int row) { return scale + (min(row, last) >> row_shift) * blocks; };
    Consumer<N, STAGES> consumer{memory, group, begin, end, {}};
    consumer.run({{row_scales(row), row_scales(row + 8)}, column_shift - 7}, shared);
    wait_for_previous();  // before results are written

    float* sums = reinterpret_cast<float*>(shared);
    sync_threads(CONSUMERS);  // all have left the stages, which the sums overwrite: N rows of SUM_STRIDE
    consumer.store(sums + group * GROUP_ROWS + lane_row);
    parts == 1 ? sync_threads(CONSUMERS) : sync_cluster();
    const Results<T> results{out, bias, tile, first_row, min(N, rows - first_row), features, epilogue, number, parts};
    results.write(sums);
    if (parts > 1) arrive_without_memory(), wait_for_cluster();  // no block ends before the others have read its memory
}
