// stream_gemm: x @ weight^T for tens of rows in 16 bits with an epilogue.
//
// x is the left operand of wgmma: 64 rows, of which those that x lacks are whatever the memory holds. The rows of the weight are the right
// one, so that a tile has any multiple of 16. It is chosen such that nearly all multiprocessors have one tile each. Where that makes too
// small ones, SHARING blocks of a cluster share the columns of a tile; each adds up the sums of a part of the features.
// Two warps more have TMA copy the weight and x to shared memory, STAGES steps ahead. The first weights are copied before the kernel that
// computes x has ended, but few at a time: what that kernel reads would queue behind more.
//
// A tile takes a few microseconds, so the code before and behind the products must be short: it is fetched once and runs once.
#include "wgmma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; stream_gemm.py uses these names

constexpr int BARRIERS = 1024;          // bytes for them; the last one counts the sums that have arrived
constexpr int FIRST_BYTES = 32 * 1024;  // of the first stages of the weight that are on their way at a time, and what makes it whole steps

// Shared memory: stages of PARTS times ROWS of x and, for each group, PARTS times N rows of the weight; then barriers, and sums of other
// blocks. A part is LINE bytes of columns. wgmma reads 64 rows of x, also those of the weight behind it.
template <int ROWS, int N, int GROUPS, int PARTS, int STAGES> struct Stages {
    static constexpr int X = PARTS * ROWS * LINE, GROUP = PARTS * N * LINE, STAGE = X + GROUPS * GROUP, RECEIVED = STAGES * STAGE + BARRIERS;
    static constexpr int AT_ONCE = (FIRST_BYTES + GROUPS * GROUP - 1) / (GROUPS * GROUP);  // steps of FIRST_BYTES
    static_assert(STAGES * 24 + 8 <= BARRIERS && (64 - ROWS) * LINE <= GROUP, "barriers, and rows that x lacks");
    unsigned base;

    DEVICE unsigned x(int stage) const { return base + stage * STAGE; }
    DEVICE unsigned weight(int stage, int group) const { return x(stage) + X + group * GROUP; }
    // Barriers: the weight's rows are there; x is there; all have been multiplied; sums are there.
    DEVICE unsigned has_weight(int stage) const { return base + STAGES * STAGE + stage * 24; }
    DEVICE unsigned has_x(int stage) const { return has_weight(stage) + 8; }
    DEVICE unsigned empty(int stage) const { return has_weight(stage) + 16; }
    DEVICE unsigned has_sums() const { return base + RECEIVED - 8; }
    DEVICE void init_barriers() const {
        ROLLED for (int i = 0; i < STAGES; ++i) init_barrier(has_weight(i), 1), init_barrier(has_x(i), 1), init_barrier(empty(i), 4 * GROUPS);
        init_barrier(has_sums(), 1);
        publish_barriers();
    }

    // The warp that copies the weight for steps begin .. end - 1 of the block, which are `first` further in the weight. A group has rows
    // from `row` + group * stride on.
    DEVICE void copy_weight(const TileMap& weights, int row, int stride, int first, int begin, int end) const {
        ROLLED for (int step = begin; step < end; ++step) {
            const int stage = step % STAGES;
            if (step >= STAGES)
                wait_for_phase(empty(stage), step / STAGES - 1);
            else if (step >= AT_ONCE)
                wait_for_phase(has_weight(step - AT_ONCE), 0);
            if (!is_elected()) continue;
            arrive_expecting(has_weight(stage), GROUPS * GROUP);
            UNROLL for (int group = 0; group < GROUPS; ++group)
                copy_parts(weight(stage, group), weights, row + group * stride, (first + step) * PARTS, has_weight(stage));
        }
    }
    // The warp that copies x.
    DEVICE void copy_x(const TileMap& rows, int first, int steps) const {
        ROLLED for (int step = 0; step < steps; ++step) {
            const int stage = step % STAGES;
            if (step >= STAGES) wait_for_phase(empty(stage), step / STAGES - 1);
            if (!is_elected()) continue;
            arrive_expecting(has_x(stage), X);
            copy_parts(x(stage), rows, 0, (first + step) * PARTS, has_x(stage));
        }
    }

    // A thread that multiplies: add the products of 64 rows of x and its group's rows of the weight.
    template <typename T> DEVICE void multiply(float (&sums)[N / 2], int group, int steps, T type) const {
        UNROLL for (float& sum : sums) sum = 0.f;
        int stage = 0, phase = 0, last = 0;
        ROLLED for (int step = 0; step < steps; ++step) {
            wait_for_phase(has_weight(stage), phase);
            wait_for_phase(has_x(stage), phase);
            begin_multiply();
            UNROLL for (int part = 0; part < PARTS; ++part) {
                const unsigned long long a = descriptor(x(stage) + part * ROWS * LINE), b = descriptor(weight(stage, group) + part * N * LINE);
                UNROLL for (int k = 0; k < LINE / 32; ++k) multiply_async(sums, a + 2 * k, b + 2 * k, type);
            }
            commit_multiply();
            wait_multiply_but_last();
            __syncwarp();
            if (step > 0 && threadIdx.x % 32 == 0) arrive(empty(last));
            last = stage;
            if (++stage == STAGES) stage = 0, ++phase;
        }
        wait_multiply();
        UNROLL for (float& sum : sums) compute_later(sum);
    }
};

// The results of a block. Its groups send their sums to the shared memory of the block that owns them. There a thread adds up those of
// an item: of one row, eight features and eight more, N / 2 further or, with SILU, of up. A unit is these features of all rows.
template <typename T, int ROWS, int N, int GROUPS, int SHARING> struct Results {
    static constexpr int UNITS = N / 16, OWN = (UNITS + SHARING - 1) / SHARING;  // units of a group, and those of one block
    static constexpr int STRIDE = 2 * OWN * 8 + 8;  // from a row of sums to the next, so that lanes write to different banks
    static constexpr int THREADS = 128 * GROUPS, ITEMS = (ROWS * GROUPS * OWN + THREADS - 1) / THREADS;
    typedef Vec<T, 8> Eight;
    T* out;
    const T* bias;
    int rows, features, epilogue, first_feature, stride, place;
    float* sums;  // [block of the cluster][group][row][half][the block's units][8]
    Eight before[ITEMS][2];

    struct Item { int unit, group, row, feature; };
    DEVICE Item item(int i) const {
        const int index = i * THREADS + threadIdx.x, unit = index % OWN, group = index / OWN % GROUPS;
        return {unit, group, index / OWN / GROUPS, first_feature + group * stride + 8 * (place * OWN + unit)};
    }
    DEVICE bool exists(const Item& i, int half) const {
        return i.row < rows && i.feature + half * N / 2 < features && place * OWN + i.unit < UNITS;
    }
    DEVICE Eight* at(const Item& i, int half) const { return reinterpret_cast<Eight*>(out + (long long)i.row * features + i.feature + half * N / 2); }
    DEVICE void load_before() {
        UNROLL for (int i = 0; i < 2 * ITEMS; ++i) before[i / 2][i % 2] = Eight{};
        if (epilogue != ADD) return;
        UNROLL for (int i = 0; i < 2 * ITEMS; ++i)
            if (exists(item(i / 2), i % 2)) before[i / 2][i % 2] = *at(item(i / 2), i % 2);
    }

    DEVICE float* sums_at(int from, int group, int row, int half, int unit) const {
        return sums + ((from * GROUPS + group) * ROWS + row) * STRIDE + (half * OWN + unit) * 8;
    }
    // The bytes that all blocks of the cluster send to this one.
    DEVICE int bytes() const { return SHARING * GROUPS * ROWS * max(0, min(OWN, UNITS - place * OWN)) * 16 * 4; }
    DEVICE void send(const float (&of_thread)[N / 2], int group, unsigned barrier) const {
        const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        if (row >= ROWS) return;
        float* const first = sums_at(place, group, row, 0, 0) + threadIdx.x % 4 * 2;
        UNROLL for (int i = 0; i < N / 4; ++i) {  // two sums: of one unit, one half, and row `row` or row + 8
            const int unit = i / 2 % UNITS, half = i / 2 / UNITS;
            float* const to = first + i % 2 * 8 * STRIDE + (half * OWN + unit % OWN) * 8;
            const float2 pair{of_thread[2 * i], of_thread[2 * i + 1]};
            if (SHARING == 1)
                *reinterpret_cast<float2*>(to) = pair;
            else
                send_to_block(to, pair, unit / OWN, barrier);
        }
    }

    DEVICE void add(float (&values)[8], const Eight* from) const {
        const Eight v = *from;
        UNROLL for (int i = 0; i < 8; ++i) values[i] += to_float(v.at[i]);
    }
    DEVICE void sum_blocks(float (&values)[8], const Item& i, int half) const {
        UNROLL for (float& value : values) value = 0.f;
        UNROLL for (int from = 0; from < SHARING; ++from) {
            const Vec<float, 8> v = *reinterpret_cast<const Vec<float, 8>*>(sums_at(from, i.group, i.row, half, i.unit));
            UNROLL for (int j = 0; j < 8; ++j) values[j] += v.at[j];
        }
        if (bias) add(values, reinterpret_cast<const Eight*>(bias + i.feature + half * (epilogue == SILU ? features : N / 2)));
    }
    DEVICE void write() {
        ROLLED for (int n = 0; n < ITEMS; ++n) {
            const Item i = item(n);
            if (exists(i, 0)) {
                float first[8], second[8] = {};
                sum_blocks(first, i, 0);
                if (epilogue == SILU || exists(i, 1)) sum_blocks(second, i, 1);
                if (epilogue == SILU) {
                    UNROLL for (int j = 0; j < 8; ++j) first[j] = fast_silu(first[j]) * second[j];
                } else {
                    add(first, &before[0][0]), add(second, &before[0][1]);
                    if (exists(i, 1)) *at(i, 1) = round_all<T>(second);
                }
                *at(i, 0) = round_all<T>(first);
            }
            UNROLL for (int k = 1; k < ITEMS; ++k) before[k - 1][0] = before[k][0], before[k - 1][1] = before[k][1];  // no index: they stay in registers
        }
    }
};

// The grid is tiles of the weight x SHARING.
template <typename T, int ROWS, int N, int GROUPS, int SHARING, int PARTS, int STAGES>
__global__ void __launch_bounds__(128 * GROUPS + 64, 1) stream_gemm(
    T* out, const __grid_constant__ TileMap x, const __grid_constant__ TileMap weight, const T* bias, int rows, int features, int size, int epilogue) {
    typedef Stages<ROWS, N, GROUPS, PARTS, STAGES> Shape;
    typedef Results<T, ROWS, N, GROUPS, SHARING> Sums;
    static_assert(SHARING > 1 || GROUPS * ROWS * Sums::STRIDE * 4 <= STAGES * Shape::STAGE, "sums fit into the stages");
    extern __shared__ __align__(1024) char shared[];
    launch_next();
    const Shape stages{(unsigned)__cvta_generic_to_shared(shared)};
    const int warp = common_warp_id(), copier = warp - 4 * GROUPS;  // common: descriptors and addresses stay in uniform registers
    const int tile = blockIdx.x / SHARING, place = blockIdx.x % SHARING, stride = epilogue == SILU ? N / 2 : N, feature = tile * GROUPS * stride;
    const int all = (size * (int)sizeof(T) + PARTS * LINE - 1) / (PARTS * LINE), first = all * place / SHARING, steps = all * (place + 1) / SHARING - first;
    const int at_once = min(Shape::AT_ONCE, min(STAGES, steps));
    if (copier == 0) {
        if (is_elected()) stages.init_barriers();
        stages.copy_weight(weight, feature, stride, first, 0, at_once);
    }
    if (copier == 1 && is_elected()) prefetch_map(x);
    if (SHARING > 1) arrive_without_memory();  // this block has begun
    __syncthreads();

    if (copier >= 0) {
        if (copier == 0) stages.copy_weight(weight, feature, stride, first, at_once, steps);
        if (copier == 1) wait_for_previous(), stages.copy_x(x, first, steps);
        if (SHARING > 1) wait_for_cluster();
        return;
    }
    wait_for_previous();  // before results are read or written
    Sums results{out, bias, rows, features, epilogue, feature, stride, place, reinterpret_cast<float*>(shared + (SHARING > 1 ? Shape::RECEIVED : 0)), {}};
    results.load_before();
    float sums[N / 2];
    stages.multiply(sums, warp / 4, steps, T());

    if (SHARING > 1) {
        wait_for_cluster();
        if (threadIdx.x == 0) arrive_expecting(stages.has_sums(), results.bytes());
        results.send(sums, warp / 4, stages.has_sums());
        wait_for_blocks(stages.has_sums(), 0);
    } else {
        sync_threads(Sums::THREADS);  // all products are done, so sums may overwrite the stages
        results.send(sums, warp / 4, 0);
        sync_threads(Sums::THREADS);
    }
    results.write();
}
