// wide_gemm: x @ weight^T in 16 bits with an epilogue. A row of the result has the same bits in any batch.
//
// The weight is the left operand of wgmma, so that few rows of x waste nothing. A block computes a tile: WEIGHT_ROWS rows of the weight,
// of which a group of four warps has 64, by up to ROWS rows of x. One thread more has TMA copy both to shared memory, a step of
// LINE bytes of a row at a time and STAGES ahead, the first weights before the kernel that computes x has ended.
// One thread adds all products of a result, 16 columns after 16. No two blocks share columns, so the order is that of every tile.
#include "wgmma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; wide_gemm.py uses these names

// Shared memory: stages of WEIGHT_ROWS rows of the weight, then ROWS of x; two barriers for each stage. Sums overwrite the stages.
template <int WEIGHT_ROWS, int ROWS, int STAGES> struct Tile {
    static constexpr int HALF = WEIGHT_ROWS / 2;       // with SILU one half has gate, the other the same rows of up
    static constexpr int CONSUMERS = 2 * WEIGHT_ROWS;  // threads that multiply
    static constexpr int X = WEIGHT_ROWS * LINE, STAGE = X + ROWS * LINE;
    static constexpr int STRIDE = WEIGHT_ROWS + 4;  // from a row of sums to the next, so that lanes write to different banks
    static_assert(ROWS * STRIDE * 4 <= STAGES * STAGE, "sums fit into the stages");
    unsigned base;

    DEVICE unsigned weight(int step) const { return base + step % STAGES * STAGE; }
    DEVICE unsigned x(int step) const { return weight(step) + X; }
    DEVICE unsigned full(int step) const { return base + STAGES * STAGE + step % STAGES * 16; }
    DEVICE unsigned empty(int step) const { return full(step) + 8; }
    DEVICE void init_barriers() const {
        for (int i = 0; i < STAGES; ++i) init_barrier(full(i), 1), init_barrier(empty(i), CONSUMERS / 32);
        publish_barriers();
    }

    // The thread that has all steps copied. The halves of the tile are rows of the weight from these on.
    DEVICE void copy(const TileMap& weights, const TileMap& rows, int first_half, int second_half, int first_row, int steps) const {
        auto load_weight = [&](int step) {
            arrive_expecting(full(step), STAGE);
            copy_box(weight(step), weights, first_half, step * LINE, full(step));
            copy_box(weight(step) + HALF * LINE, weights, second_half, step * LINE, full(step));
        };
        auto load_x = [&](int step) { copy_box(x(step), rows, first_row, step * LINE, full(step)); };
        const int ahead = min(STAGES, steps);
        for (int step = 0; step < ahead; ++step) load_weight(step);
        wait_for_previous();
        for (int step = 0; step < ahead; ++step) load_x(step);
        for (int step = ahead; step < steps; ++step) {
            wait_for_phase(empty(step), step / STAGES - 1);
            load_weight(step), load_x(step);
        }
    }

    // A thread that multiplies: add the products of its group's rows and all rows of x.
    template <typename T> DEVICE void multiply(float (&sums)[ROWS / 2], int group, int steps, T type) const {
        UNROLL for (float& sum : sums) sum = 0.f;
        for (int step = 0; step < steps; ++step) {
            wait_for_phase(full(step), step / STAGES);
            const unsigned long long a = descriptor(weight(step) + group * 64 * LINE), b = descriptor(x(step));
            begin_multiply();
            UNROLL for (int k = 0; k < LINE / 32; ++k) multiply_async(sums, a + 2 * k, b + 2 * k, type);
            end_multiply();
            __syncwarp();
            if (threadIdx.x % 32 == 0) arrive(empty(step));
        }
    }

    // Write a thread's sums to rows of x by rows of the weight.
    DEVICE void store(float* to, const float (&sums)[ROWS / 2], int group) const {
        const int row = group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        UNROLL for (int i = 0; i < ROWS / 2; ++i) to[row + (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * STRIDE + i / 2 % 2 * 8] = sums[i];
    }
};

// Write the results of `rows` rows of x. A thread has four features of some rows.
template <typename T, typename Tile> struct Results {
    static constexpr int AT_ONCE = 4;  // rows that are loaded before the first is stored
    const float* sums;
    T* out;  // at the first row
    const T* bias;
    int rows, features, epilogue;

    DEVICE Vec<T, 4> load(const T* at, bool exists) const { return exists ? *reinterpret_cast<const Vec<T, 4>*>(at) : Vec<T, 4>{}; }
    DEVICE void write(int tile) const {
        const bool gated = epilogue == SILU;
        const int vectors = (gated ? Tile::HALF : 2 * Tile::HALF) / 4;  // of a row
        const int column = threadIdx.x % vectors * 4, feature = tile * vectors * 4 + column, step = Tile::CONSUMERS / vectors;
        if (feature >= features) return;
        const Vec<T, 4> shift = load(bias + feature, bias), up_shift = load(bias + features + feature, bias && gated);
        for (int first = threadIdx.x / vectors; first < rows; first += AT_ONCE * step) {
            auto at = [&](int i) { return out + (long long)(first + i * step) * features + feature; };
            Vec<T, 4> before[AT_ONCE];
            UNROLL for (int i = 0; i < AT_ONCE; ++i) before[i] = load(at(i), epilogue == ADD && first + i * step < rows);
            UNROLL for (int i = 0; i < AT_ONCE; ++i) {
                if (first + i * step >= rows) break;
                const float* sum = sums + (first + i * step) * Tile::STRIDE + column;
                float values[4];
                UNROLL for (int j = 0; j < 4; ++j) {
                    values[j] = sum[j] + to_float(shift.at[j]) + to_float(before[i].at[j]);
                    if (gated) values[j] = silu(values[j]) * (sum[Tile::HALF + j] + to_float(up_shift.at[j]));
                }
                *reinterpret_cast<Vec<T, 4>*>(at(i)) = round_all<T>(values);
            }
        }
    }
};

// The grid is tiles of the weight x tiles of x.
template <typename T, int WEIGHT_ROWS, int ROWS, int STAGES>
__global__ void __launch_bounds__(Tile<WEIGHT_ROWS, ROWS, STAGES>::CONSUMERS + 32, ROWS <= 128 ? 2 : 1) wide_gemm(
    T* out, const __grid_constant__ TileMap x, const __grid_constant__ TileMap weight, const T* bias, int rows, int features, int size,
    int epilogue) {
    typedef Tile<WEIGHT_ROWS, ROWS, STAGES> Shape;
    extern __shared__ __align__(1024) char shared[];
    const Shape memory{(unsigned)__cvta_generic_to_shared(shared)};
    if (threadIdx.x == 0) memory.init_barriers();
    if (threadIdx.x == Shape::CONSUMERS) prefetch_map(x);  // it is needed at once after the wait
    const int row_tiles = (rows + ROWS - 1) / ROWS, steps = (size * (int)sizeof(T) + LINE - 1) / LINE;
    const int tile = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * ROWS;
    __syncthreads();

    if (threadIdx.x >= Shape::CONSUMERS) {
        const int first_half = tile * (epilogue == SILU ? Shape::HALF : WEIGHT_ROWS);
        const int second_half = first_half + (epilogue == SILU ? features : Shape::HALF);
        if (threadIdx.x == Shape::CONSUMERS) memory.copy(weight, x, first_half, second_half, first_row, steps), launch_next();
        return;
    }
    float sums[ROWS / 2], *to = reinterpret_cast<float*>(shared);
    memory.multiply(sums, threadIdx.x / 128, steps, T());
    sync_threads(Shape::CONSUMERS);  // all have left the stages
    memory.store(to, sums, threadIdx.x / 128);
    sync_threads(Shape::CONSUMERS);  // all sums are there
    wait_for_previous();             // before results are written
    Results<T, Shape>{to, out + (long long)first_row * features, bias, min(ROWS, rows - first_row), features, epilogue}.write(tile);
}
