// stream_fp8: x @ weight^T for FP8 rows of x and FP8 weights in blocks of scales, for 33 to 128 rows, with an epilogue.
//
// Like stream_gemm, x is the left operand of wgmma, 64 rows for each group of four warps, so that a tile has any multiple of 16 rows of
// the weight. The products of LINE columns have one scale of x and one of the weight: they are summed apart, and added times both.
// Either two blocks of one group fill a multiprocessor, so that a block of the next kernel moves in as one ends; or one block of
// several groups. The blocks of a cluster share the columns of a tile; each adds up the sums of a part of the features.
// One thread has TMA copy both to shared memory, some steps ahead, the first weights before the kernel that computes x has ended.
#include "quantize.cuh"
#include "wgmma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; scaled_gemm.py uses these names

constexpr int BLOCK = 128;  // rows and columns of a scale of the weight
static_assert(BLOCK == LINE, "a part of a step has one scale");

// Give registers of this group of warps to the others; and take them, in a block where so many groups multiply.
DEVICE void release_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
DEVICE void take_registers(int groups) {
    if (groups == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    if (groups == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    if (groups == 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
}

// The groups of warps of a block: each has 64 of ROWS rows of x and N of GROUPS * N rows of the weight.
template <int ROWS, int N, int GROUPS> struct Warps {
    static constexpr int X_GROUPS = ROWS / 64, CONSUMERS = 128 * X_GROUPS * GROUPS;
    static constexpr bool ALONE = CONSUMERS > 128;  // on the multiprocessor; the group that copies has few registers then
    static constexpr int THREADS = CONSUMERS + (ALONE ? 128 : 32), BLOCKS = ALONE ? 1 : 2;
    static_assert(ROWS % 64 == 0 && CONSUMERS <= 512, "groups of warps");
};

// The scales of a group's rows of the weight. They are two halves, each of which may begin in one block and end in the next one.
struct WeightScales {
    const float* rows[2][2];
    int bounds[2];  // units of 8 rows before the next block
    DEVICE WeightScales(const float* scales, int blocks, const int (&starts)[2], int last) {
        UNROLL for (int half = 0; half < 2; ++half) {
            bounds[half] = (BLOCK - starts[half] % BLOCK) / 8;
            UNROLL for (int i = 0; i < 2; ++i) rows[half][i] = scales + min(starts[half] / BLOCK + i, last) * blocks;
        }
    }
    struct Factors { float of[2][2]; };
    DEVICE Factors at(int column) const {
        return {{{__ldg(rows[0][0] + column), __ldg(rows[0][1] + column)}, {__ldg(rows[1][0] + column), __ldg(rows[1][1] + column)}}};
    }
    DEVICE float of(const Factors& factors, int half, int unit) const { return unit < bounds[half] ? factors.of[half][0] : factors.of[half][1]; }
};

// The stage of a step, and the phase of its barriers.
struct Ring {
    int stage = 0, phase = 0;
    DEVICE void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// Shared memory: stages of PARTS times ROWS of x and GROUPS times N rows of the weight; scales of x; barriers; sums of other blocks.
template <int ROWS, int N, int GROUPS> struct Stages {
    static constexpr int PARTS = GROUPS * N <= 64 && ROWS == 64 ? 2 : 1;  // of a step: LINE bytes of columns each
    static constexpr int PART = (ROWS + GROUPS * N) * LINE, STAGE = PARTS * PART, SCALES = PARTS * ROWS * 4, HALF = N / 2;
    unsigned base;
    int stages, columns, first, steps;  // columns: blocks of columns in all; the block has steps first .. first + steps - 1

    DEVICE unsigned x(int stage, int part) const { return base + stage * STAGE + part * PART; }
    DEVICE unsigned weight(int stage, int part, int group) const { return x(stage, part) + (ROWS + group * N) * LINE; }
    DEVICE unsigned scales(int stage, int part) const { return base + stages * STAGE + stage * SCALES + part * ROWS * 4; }
    DEVICE unsigned full(int stage) const { return base + stages * (STAGE + SCALES) + stage * 16; }
    DEVICE unsigned empty(int stage) const { return full(stage) + 8; }
    DEVICE unsigned received() const { return stages * (STAGE + SCALES) + 1024; }
    DEVICE int column(int step, int part) const { return (first + step) * PARTS + part; }
    DEVICE int last_column(int step, int part) const { return min(column(step, part), columns - 1); }  // beyond are zeros
    DEVICE void init_barriers() const {
        for (int i = 0; i < stages; ++i) init_barrier(full(i), 1), init_barrier(empty(i), Warps<ROWS, N, GROUPS>::CONSUMERS / 32);
        publish_barriers();
    }

    // The thread that has all steps copied. A group has HALF rows of the weight from starts[0] + group * stride on, and as many from
    // starts[1] on. x_scales: [columns, padded].
    DEVICE void copy(
        const TileMap& weights, const TileMap& rows, const float* x_scales, int padded, const int (&starts)[2], int stride) const {
        const int scale_bytes = min(ROWS, padded) * 4;
        auto load_weight = [&](int stage, int step) {
            arrive_expecting(full(stage), STAGE + PARTS * scale_bytes);
            UNROLL for (int part = 0; part < PARTS; ++part)
                UNROLL for (int i = 0; i < 2 * GROUPS; ++i) {
                    const unsigned to = weight(stage, part, i / 2) + i % 2 * HALF * LINE;
                    copy_box(to, weights, starts[i % 2] + i / 2 * stride, column(step, part) * LINE, full(stage));
                }
        };
        auto load_x = [&](int stage, int step) {
            UNROLL for (int part = 0; part < PARTS; ++part) {
                copy_box(x(stage, part), rows, 0, column(step, part) * LINE, full(stage));
                copy_bytes(scales(stage, part), x_scales + (long long)last_column(step, part) * padded, scale_bytes, full(stage));
            }
        };
        const int ahead = min(stages, steps);
        ROLLED for (int step = 0; step < ahead; ++step) load_weight(step, step);
        wait_for_previous();
        ROLLED for (int step = 0; step < ahead; ++step) load_x(step, step);
        Ring ring;
        ROLLED for (int step = ahead; step < steps; ++step, ring.advance(stages)) {
            wait_for_phase(empty(ring.stage), ring.phase);
            load_weight(ring.stage, step), load_x(ring.stage, step);
        }
    }

    // A thread that multiplies: sum the products of its group's rows. `row` is the thread's first row of x, of x_group.
    DEVICE void multiply(
        float (&sums)[N / 2], const char* shared, const WeightScales& weight_scales, int row, int group, int x_group) const {
        UNROLL for (float& sum : sums) sum = 0.f;
        WeightScales::Factors next[PARTS];
        UNROLL for (int part = 0; part < PARTS; ++part) next[part] = weight_scales.at(last_column(0, part));
        Ring ring;
        for (int step = 0; step < steps; ++step, ring.advance(stages)) {
            WeightScales::Factors factors[PARTS];
            UNROLL for (int part = 0; part < PARTS; ++part)
                factors[part] = next[part], next[part] = weight_scales.at(last_column(step + 1, part));
            wait_for_phase(full(ring.stage), ring.phase);
            UNROLL for (int part = 0; part < PARTS; ++part) {
                const float* x_scales = reinterpret_cast<const float*>(shared + (scales(ring.stage, part) - base)) + row;
                const float x_factors[2] = {x_scales[0], x_scales[8]};
                const unsigned long long a = descriptor(x(ring.stage, part) + x_group * 64 * LINE);
                const unsigned long long b = descriptor(weight(ring.stage, part, group));
                float products[N / 2];
                begin_multiply();
                UNROLL for (int k = 0; k < LINE / 32; ++k) multiply_async(products, a + 2 * k, b + 2 * k, k > 0);
                end_multiply();
                UNROLL for (float& product : products) compute_later(product);
                if (part == PARTS - 1) {
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) arrive(empty(ring.stage));
                }
                UNROLL for (int unit = 0; unit < N / 8; ++unit) {
                    const float factor = weight_scales.of(factors[part], unit / (N / 16), unit % (N / 16));
                    UNROLL for (int i = 0; i < 4; ++i) sums[4 * unit + i] += products[4 * unit + i] * (factor * x_factors[i / 2]);
                }
            }
        }
    }
};

// A thread's part of the results. A unit is 8 features and 8 more, HALF further or of up; of both the thread has two adjacent ones in
// rows `row` and row + 8.
template <typename T, int N> struct Results {
    static constexpr int UNITS = N / 16;
    T* out;
    const T* bias;
    int row, rows, starts[2], features, epilogue;  // starts: the thread's first features of both halves
    Vec<T, 2> before[UNITS][2][2];

    DEVICE int feature(int unit, int half) const { return starts[half] + 8 * unit; }
    DEVICE Vec<T, 2>* at(int unit, int half, int r) const {
        return reinterpret_cast<Vec<T, 2>*>(out + (long long)(row + 8 * r) * features + feature(unit, half));
    }
    DEVICE bool exists(int unit, int half, int r) const { return row + 8 * r < rows && feature(unit, half) < features; }
    DEVICE void load_before() {
        UNROLL for (int unit = 0; unit < UNITS; ++unit)
            UNROLL for (int i = 0; i < 4; ++i)
                before[unit][i / 2][i % 2] = epilogue == ADD && exists(unit, i / 2, i % 2) ? *at(unit, i / 2, i % 2) : Vec<T, 2>{};
    }
    // sums: of both halves, row after row.
    DEVICE void write(int unit, const float (&sums)[2][4]) const {
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
                    values[i] = sums[half][2 * r + i] + shift[i] + to_float(before[unit][half][r].at[i]);
                    if (epilogue == SILU) values[i] = silu(values[i]) * (sums[1][2 * r + i] + up_shift[i]);
                }
                *at(unit, half, r) = round_all<T>(values);
            }
        }
    }
};

// Write silu(gate) * up of a tile in FP8, for the GEMM that follows: its features are one group of columns. sums: of gate, then of up.
template <typename T, int ROWS, int N, int GROUPS>
DEVICE void write_quantized(fp8* out, float* scale, float (&sums)[N / 2], float* peaks, int row, int rows, int features, int group) {
    static_assert(ROWS == 64 && GROUPS * N == 2 * BLOCK, "a tile is a group of columns");
    float peak[2] = {};
    UNROLL for (int i = 0; i < N / 4; ++i) {
        sums[i] = to_float(from_float<T>(silu(sums[i]) * sums[N / 4 + i]));
        peak[i / 2 % 2] = fmaxf(peak[i / 2 % 2], fabsf(sums[i]));
    }
    UNROLL for (int r = 0; r < 2; ++r) {
        UNROLL for (int i = 1; i < 4; i *= 2) peak[r] = fmaxf(peak[r], __shfl_xor_sync(0xffffffffu, peak[r], i));
        if (threadIdx.x % 4 == 0) peaks[group * ROWS + row + 8 * r] = peak[r];
    }
    sync_threads(Warps<ROWS, N, GROUPS>::CONSUMERS);
    UNROLL for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= rows) continue;
        UNROLL for (int other = 0; other < GROUPS; ++other) peak[r] = fmaxf(peak[r], peaks[other * ROWS + row + 8 * r]);
        const Quantizer quantizer(peak[r]);
        if (threadIdx.x % 4 == 0 && group == 0) scale[row + 8 * r] = quantizer.scale;
        UNROLL for (int unit = 0; unit < N / 16; ++unit) {
            const float values[2] = {quantizer(sums[4 * unit + 2 * r]), quantizer(sums[4 * unit + 2 * r + 1])};
            *reinterpret_cast<Vec<fp8, 2>*>(out + (long long)(row + 8 * r) * features + 8 * unit) = round_all<fp8>(values);
        }
    }
}

// The grid is tiles of the weight x `sharing`, the blocks of a cluster. O is T; or fp8, and then out_scales is [groups, padded].
template <typename T, typename O, int ROWS, int N, int GROUPS>
__global__ void __launch_bounds__(Warps<ROWS, N, GROUPS>::THREADS, Warps<ROWS, N, GROUPS>::BLOCKS) stream_fp8(
    O* out, float* out_scales, const __grid_constant__ TileMap x, const float* x_scales, const __grid_constant__ TileMap weight,
    const float* scales, const T* bias, int rows, int padded, int features, int size, int blocks, int epilogue, int sharing, int num_stages) {
    typedef Warps<ROWS, N, GROUPS> Threads;
    typedef Stages<ROWS, N, GROUPS> Shape;
    constexpr int UNITS = N / 16, CONSUMERS = Threads::CONSUMERS;
    extern __shared__ __align__(1024) char shared[];
    launch_next();
    const bool gated = epilogue == SILU;
    const int tile = blockIdx.x / sharing, place = blockIdx.x % sharing, stride = gated ? Shape::HALF : N;
    const int columns = (size + LINE - 1) / LINE, all = (columns + Shape::PARTS - 1) / Shape::PARTS, first = all * place / sharing;
    const Shape stages{(unsigned)__cvta_generic_to_shared(shared), num_stages, columns, first, all * (place + 1) / sharing - first};
    int starts[2] = {tile * GROUPS * stride};
    starts[1] = starts[0] + (gated ? features : Shape::HALF);
    if (threadIdx.x == 0) stages.init_barriers();
    if (threadIdx.x == CONSUMERS) prefetch_map(x);  // it is needed at once after the wait
    if (sharing > 1) arrive_without_memory();       // this block has begun
    __syncthreads();

    if (threadIdx.x >= CONSUMERS) {
        if constexpr (Threads::ALONE) release_registers();
        if (threadIdx.x == CONSUMERS) stages.copy(weight, x, x_scales, padded, starts, stride);
        __syncwarp();
        if (sharing > 1) wait_for_cluster(), sync_cluster();  // like the others
        return;
    }
    if constexpr (Threads::ALONE) take_registers(CONSUMERS / 128);
    const int x_group = threadIdx.x / 128 % Threads::X_GROUPS, group = threadIdx.x / 128 / Threads::X_GROUPS, t = threadIdx.x % 4;
    const int row = x_group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    UNROLL for (int& start : starts) start += group * stride;
    const WeightScales weight_scales(scales, blocks, starts, ((gated ? 2 : 1) * features - 1) / BLOCK);
    wait_for_previous();  // before results are read or written
    float sums[N / 2];
    if constexpr (sizeof(O) == 1) {
        stages.multiply(sums, shared, weight_scales, row, group, x_group);
        float* peaks = reinterpret_cast<float*>(shared + stages.received());
        float* scale = out_scales + (long long)tile * padded;
        write_quantized<T, ROWS, N, GROUPS>(out + starts[0] + 2 * t, scale, sums, peaks, row, rows, features, group);
    } else {
        constexpr bool EARLY = N <= 64 || CONSUMERS == 256;  // there are registers for the results before
        Results<T, N> results{out, bias, row, rows, {starts[0] + 2 * t, starts[1] + 2 * t}, features, epilogue, {}};
        if (EARLY) results.load_before();
        stages.multiply(sums, shared, weight_scales, row, group, x_group);
        if (!EARLY) results.load_before();
        // Of each unit one block of the cluster, the owner, adds up the sums. received[block][the owner's units][half][thread]
        const int most = (UNITS + sharing - 1) / sharing;
        float4* const received = reinterpret_cast<float4*>(shared + stages.received()) + threadIdx.x;
        auto owner_of = [&](int unit) { return ((unit + 1) * sharing - 1) / UNITS; };
        auto received_at = [&](int block, int unit, int half) {
            return received + ((block * most + unit - UNITS * owner_of(unit) / sharing) * 2 + half) * CONSUMERS;
        };
        if (sharing > 1) {
            wait_for_cluster();
            UNROLL for (int i = 0; i < 2 * UNITS; ++i)
                store_of_block(received_at(place, i % UNITS, i / UNITS), owner_of(i % UNITS), sums + 4 * i);
            sync_cluster();
        }
        UNROLL for (int unit = 0; unit < UNITS; ++unit) {
            if (owner_of(unit) != place) continue;
            float halves[2][4];
            UNROLL for (int i = 0; i < 8; ++i) halves[i / 4][i % 4] = sharing > 1 ? 0.f : sums[i / 4 * N / 4 + 4 * unit + i % 4];
            for (int block = 0; sharing > 1 && block < sharing; ++block)
                UNROLL for (int half = 0; half < 2; ++half) {
                    const float4 v = *received_at(block, unit, half);
                    halves[half][0] += v.x, halves[half][1] += v.y, halves[half][2] += v.z, halves[half][3] += v.w;
                }
            results.write(unit, halves);
        }
    }
}
