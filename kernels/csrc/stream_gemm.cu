// stream_gemm: x @ weight^T for tens of rows in 16 bits with an epilogue.
//
// x is the left operand of wgmma: 64 rows, of which those that x lacks are whatever the memory holds. The rows of the weight are the right
// one, so that a tile has any multiple of 16. It is chosen such that nearly all multiprocessors have one tile each. Where that makes too
// small ones, the blocks of a cluster share the columns of a tile; each adds up the sums of a part of the features.
// With SPLIT two groups of four warps multiply the same rows, each a half of the columns: one alone is too slow for small tiles.
// One thread has TMA copy both to shared memory, STAGES steps ahead, the first weights before the kernel that computes x has ended.
#include "wgmma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; stream_gemm.py uses these names

constexpr int PARTS = 2;  // of a step: LINE bytes of columns each

// Write four sums to the shared memory of a block of the cluster, at an address of this block's.
DEVICE void store_of_block(float4* at, int block, const float* v) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.v4.f32 [a], {%2,%3,%4,%5}; }"
                 ::"r"((unsigned)__cvta_generic_to_shared(at)), "r"(block), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// Shared memory: stages of PARTS times ROWS of x and GROUPS times N rows of the weight, barriers, and sums of other blocks. wgmma reads
// 64 rows of x, also beyond the stages.
template <int ROWS, int N, int GROUPS, int SPLIT, int STAGES> struct Stages {
    static constexpr int PART = (ROWS + GROUPS * N) * LINE, STAGE = PARTS * PART, HALF = N / 2, RECEIVED = STAGES * STAGE + 1024;
    static_assert(STAGES * 16 <= 1024, "barriers");
    unsigned base;

    DEVICE unsigned x(int step, int part) const { return base + step % STAGES * STAGE + part * PART; }
    DEVICE unsigned weight(int step, int part, int group) const { return x(step, part) + (ROWS + group * N) * LINE; }
    DEVICE unsigned full(int step) const { return base + STAGES * STAGE + step % STAGES * 16; }
    DEVICE unsigned empty(int step) const { return full(step) + 8; }
    DEVICE void init_barriers() const {
        for (int i = 0; i < STAGES; ++i) init_barrier(full(i), 1), init_barrier(empty(i), 4 * GROUPS * SPLIT);
        publish_barriers();
    }

    // The thread that has steps first .. first + steps - 1 copied. A group has HALF rows of the weight from first_half + group * stride
    // on, and as many from second_half on.
    DEVICE void copy(const TileMap& weights, const TileMap& rows, int first_half, int second_half, int stride, int first, int steps) const {
        auto load_weight = [&](int step) {
            arrive_expecting(full(step), STAGE);
            UNROLL for (int part = 0; part < PARTS; ++part) {
                const int column = ((first + step) * PARTS + part) * LINE;
                UNROLL for (int group = 0; group < GROUPS; ++group) {
                    copy_box(weight(step, part, group), weights, first_half + group * stride, column, full(step));
                    copy_box(weight(step, part, group) + HALF * LINE, weights, second_half + group * stride, column, full(step));
                }
            }
        };
        auto load_x = [&](int step) {
            UNROLL for (int part = 0; part < PARTS; ++part) copy_box(x(step, part), rows, 0, ((first + step) * PARTS + part) * LINE, full(step));
        };
        const int ahead = min(STAGES, steps);
        ROLLED for (int step = 0; step < ahead; ++step) load_weight(step);
        wait_for_previous();
        ROLLED for (int step = 0; step < ahead; ++step) load_x(step);
        ROLLED for (int step = ahead; step < steps; ++step) {
            wait_for_phase(empty(step), step / STAGES - 1);
            load_weight(step), load_x(step);
        }
    }

    // A thread that multiplies: add the products of 64 rows of x and its group's rows of the weight, of its parts of each step.
    template <typename T> DEVICE void multiply(float (&sums)[N / 2], int group, int split, int steps, T type) const {
        auto release = [&](int step) {
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(empty(step));
        };
        UNROLL for (float& sum : sums) sum = 0.f;
        for (int step = 0; step < steps; ++step) {
            wait_for_phase(full(step), step / STAGES);
            begin_multiply();
            UNROLL for (int i = 0; i < PARTS / SPLIT; ++i) {
                const int part = SPLIT * i + split;
                const unsigned long long a = descriptor(x(step, part)), b = descriptor(weight(step, part, group));
                UNROLL for (int k = 0; k < LINE / 32; ++k) multiply_async(sums, a + 2 * k, b + 2 * k, type);
            }
            commit_multiply();
            wait_multiply_but_last();
            if (step > 0) release(step - 1);
        }
        wait_multiply();
        UNROLL for (float& sum : sums) compute_later(sum);
    }
};

// A thread's part of the results. A unit is 8 features and 8 more, HALF further or of up; of both the thread has two adjacent ones in
// rows `row` and row + 8.
template <typename T, int N> struct Results {
    static constexpr int UNITS = N / 16;
    T* out;
    const T* bias;
    int row, rows, first_half, second_half, features, epilogue;  // the thread's first features of both halves
    Vec<T, 2> before[UNITS][2][2];

    DEVICE int feature(int unit, int half) const { return (half ? second_half : first_half) + 8 * unit; }
    DEVICE Vec<T, 2>* at(int unit, int half, int r) const {
        return reinterpret_cast<Vec<T, 2>*>(out + (long long)(row + 8 * r) * features + feature(unit, half));
    }
    DEVICE bool exists(int unit, int half, int r) const { return row + 8 * r < rows && feature(unit, half) < features; }
    DEVICE void load_before() {
        UNROLL for (int unit = 0; unit < UNITS; ++unit)
            UNROLL for (int i = 0; i < 4; ++i)
                before[unit][i / 2][i % 2] = epilogue == ADD && exists(unit, i / 2, i % 2) ? *at(unit, i / 2, i % 2) : Vec<T, 2>{};
    }
    // first and second: the sums of both halves, row after row.
    DEVICE void write(int unit, const float* first, const float* second) const {
        UNROLL for (int half = 0; half < (epilogue == SILU ? 1 : 2); ++half) {
            if (feature(unit, half) >= features) continue;
            float shift[2] = {}, up_shift[2] = {};
            UNROLL for (int i = 0; i < 2; ++i) {
                if (bias) shift[i] = to_float(bias[feature(unit, half) + i]);
                if (bias && epilogue == SILU) up_shift[i] = to_float(bias[features + feature(unit, half) + i]);
            }
            UNROLL for (int r = 0; r < 2; ++r) {
                if (row + 8 * r >= rows) continue;
                float values[2];
                UNROLL for (int i = 0; i < 2; ++i) {
                    values[i] = (half ? second : first)[2 * r + i] + shift[i] + to_float(before[unit][half][r].at[i]);
                    if (epilogue == SILU) values[i] = silu(values[i]) * (second[2 * r + i] + up_shift[i]);
                }
                *at(unit, half, r) = round_all<T>(values);
            }
        }
    }
};

// The grid is tiles of the weight x `sharing`, the blocks of a cluster.
template <typename T, int ROWS, int N, int GROUPS, int SPLIT, int STAGES>
__global__ void __launch_bounds__(128 * GROUPS * SPLIT + 32, 1) stream_gemm(
    T* out, const __grid_constant__ TileMap x, const __grid_constant__ TileMap weight, const T* bias, int rows, int features, int size,
    int epilogue, int sharing) {
    constexpr int UNITS = N / 16, CONSUMERS = 128 * GROUPS * SPLIT, SENDERS = GROUPS * ROWS * 2;  // threads that have rows of x
    typedef Stages<ROWS, N, GROUPS, SPLIT, STAGES> Shape;
    extern __shared__ __align__(1024) char shared[];
    launch_next();
    const Shape stages{(unsigned)__cvta_generic_to_shared(shared)};
    if (threadIdx.x == 0) stages.init_barriers();
    if (threadIdx.x == CONSUMERS) prefetch_map(x);  // it is needed at once after the wait
    const bool gated = epilogue == SILU;
    const int tile = blockIdx.x / sharing, place = blockIdx.x % sharing, stride = gated ? Shape::HALF : N;
    const int all = (size * (int)sizeof(T) + PARTS * LINE - 1) / (PARTS * LINE), first = all * place / sharing;
    const int steps = all * (place + 1) / sharing - first, first_half = tile * GROUPS * stride, second_half = first_half + (gated ? features : Shape::HALF);
    if (sharing > 1) arrive_without_memory();  // this block has begun
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) stages.copy(weight, x, first_half, second_half, stride, first, steps);
        __syncwarp();
        if (sharing > 1) wait_for_cluster(), sync_cluster();  // like the others
        return;
    }
    const int group = threadIdx.x / 128 / SPLIT, split = threadIdx.x / 128 % SPLIT, t = threadIdx.x % 4, row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    wait_for_previous();  // before results are read or written
    const int feature = first_half + group * stride + 2 * t;
    Results<T, N> results{out, bias, row, rows, feature, feature + Shape::HALF, features, epilogue, {}};
    results.load_before();
    float sums[N / 2];
    stages.multiply(sums, group, split, steps, T());

    const bool has_rows = row < ROWS;
    if (SPLIT == 1 && sharing == 1) {
        if (has_rows)
            UNROLL for (int unit = 0; unit < UNITS; ++unit) results.write(unit, sums + 4 * unit, sums + Shape::HALF / 2 + 4 * unit);
        return;
    }
    // The parties that share a tile: all blocks of the cluster, and the groups of a block that multiply the same rows. Of each unit one
    // party, the owner, adds up the sums. received[owner's group][party][the owner's units][half][thread]
    const int parties = sharing * SPLIT, self = place * SPLIT + split, most = (UNITS + parties - 1) / parties;
    const int sender = group * ROWS * 2 + threadIdx.x % 128;
    float4* const received = reinterpret_cast<float4*>(shared + Shape::RECEIVED);
    auto owner_of = [&](int unit) { return ((unit + 1) * parties - 1) / UNITS; };
    auto place_of = [&](int party, int unit, int half) {
        const int owner = owner_of(unit), among = unit - UNITS * owner / parties;
        return (((owner % SPLIT * parties + party) * most + among) * 2 + half) * SENDERS + sender;
    };
    if (sharing > 1) wait_for_cluster();
    if (has_rows)
        UNROLL for (int unit = 0; unit < UNITS; ++unit)
            UNROLL for (int half = 0; half < 2; ++half)
                store_of_block(received + place_of(self, unit, half), owner_of(unit) / SPLIT, sums + half * Shape::HALF / 2 + 4 * unit);
    sharing > 1 ? sync_cluster() : sync_threads(CONSUMERS);
    if (!has_rows) return;
    UNROLL for (int unit = 0; unit < UNITS; ++unit) {
        if (owner_of(unit) != self) continue;
        float halves[2][4] = {};
        for (int party = 0; party < parties; ++party)
            UNROLL for (int half = 0; half < 2; ++half) {
                const float4 v = received[place_of(party, unit, half)];
                halves[half][0] += v.x, halves[half][1] += v.y, halves[half][2] += v.z, halves[half][3] += v.w;
            }
        results.write(unit, halves[0], halves[1]);
    }
}
