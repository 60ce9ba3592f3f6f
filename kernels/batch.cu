// batch_product: x @ weight^T for some 9 to 256 rows, on Hopper, with what follows it inside.
//
// At these sizes a product still waits for the weight, and for the kernel before it. One warp keeps the copy engine busy: tiles of
// the weight are on their way before the kernel that computes x has ended, then x follows. Two warpgroups multiply from shared memory.
// The weight is the left operand, so that few rows of x leave nothing of the tensor cores' 64 rows unused.
//
// A cluster of blocks takes a tile, each block a share of the columns. Where that is several, they lay their sums open to each other, and
// each adds up and finishes a share of the rows, in the order of the blocks. Shares do not depend on the number of rows: a row's result
// has the same bits in any batch.
#include "hopper.cuh"

constexpr int TILE = 128;  // rows of the weight
constexpr int STEP = 64;   // columns: 128 bytes
constexpr int WARPS = 8;   // that multiply; one more brings the tiles

// With SILU a tile is 64 features: 8 rows of gate, the 8 of up that go with them, and so on; the map of the weight has four
// dimensions then: columns, 8 rows, gate or up, and the groups of 8. Without, it has columns and rows.
// A cluster of several blocks has one tile only, and one of a single block any number.
template <typename T, int ROWS, int STAGES, int FINISH, int NEAR>
__global__ void __launch_bounds__(32 * (WARPS + 1), ROWS > 128 ? 1 : 2) batch_product(
    const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, T* out, const T* __restrict__ bias,
    int rows, int features, int size) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int WIDTH = FINISH == SILU ? TILE / 2 : TILE;  // features of a tile
    constexpr int WEIGHT_BYTES = TILE * STEP * 2, STAGE_BYTES = WEIGHT_BYTES + ROWS * STEP * 2;
    constexpr int GROUPS = ROWS / 8, AT_ONCE = ROWS > 64 ? 2 : GROUPS < 4 ? GROUPS : 4;  // groups of 8 rows of x
    extern __shared__ unsigned char dynamic[];
    __shared__ alignas(8) unsigned long long barriers[2][STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int share = cluster_rank(), shares = cluster_size(), cluster = blockIdx.x / shares, clusters = gridDim.x / shares;
    const int tiles = (features + WIDTH - 1) / WIDTH, steps = (size + STEP - 1) / STEP;
    const int first = steps * share / shares, each = steps * (share + 1) / shares - first;  // steps of this block in a tile
    const unsigned stages = (shared_address(dynamic) + 1023) & ~1023u;
    auto stage = [&](int n) { return stages + n % STAGES * STAGE_BYTES; };
    auto full = [&](int n) { return shared_address(&barriers[0][n % STAGES]); };
    auto empty = [&](int n) { return shared_address(&barriers[1][n % STAGES]); };
    if (threadIdx.x == 0) {
        for (int n = 0; n < STAGES; ++n) init_barrier(full(n), 1), init_barrier(empty(n), WARPS);
        publish_barriers();
    }
    __syncthreads();
    launch_next();

    if (warp == WARPS) {
        if (lane != 0) return;
        auto tile_of = [&](int n) { return cluster + n / each * clusters; };
        auto column_of = [&](int n) { return (first + n % each) * STEP; };
        auto bring_weight = [&](int n) {
            arrive_expecting(full(n), STAGE_BYTES);
            if (FINISH == SILU) bring(stage(n), weight, full(n), column_of(n), 0, 0, tile_of(n) * (WIDTH / 8));
            else bring(stage(n), weight, full(n), column_of(n), tile_of(n) * TILE);
        };
        auto bring_weight_near = [&](int n) {
            if (FINISH == SILU) bring_near(weight, column_of(n), 0, 0, tile_of(n) * (WIDTH / 8));
            else bring_near(weight, column_of(n), tile_of(n) * TILE);
        };
        auto bring_x = [&](int n) { bring(stage(n) + WEIGHT_BYTES, x, full(n), column_of(n), 0); };
        const int count = (tiles - cluster + clusters - 1) / clusters * each, ahead = min(STAGES, count);
        for (int n = 0; n < ahead; ++n) bring_weight(n);
        for (int n = ahead; n < min(ahead + NEAR, count); ++n) bring_weight_near(n);
        wait_for_previous();
        for (int n = 0; n < ahead; ++n) bring_x(n);
        for (int n = ahead; n < count; ++n) {
            wait_barrier(empty(n), n / STAGES + 1 & 1);
            bring_weight(n);
            bring_x(n);
        }
        return;
    }

    wait_for_previous();
    const int half_tile = warp / 4 * (WEIGHT_BYTES / 2), groups = (rows + 7) / 8;
    auto release = [&](int n) { if (lane == 0) arrive(empty(n)); };
    float c[ROWS / 2];
    for (int tile = cluster, n = 0; tile < tiles; tile += clusters) {
        for (int step = 0; step < each; ++step, ++n) {
            wait_barrier(full(n), n / STAGES & 1);
            begin_products();
            #pragma unroll
            for (int k = 0; k < STEP / 16; ++k)
                accumulate(c, tile_at(stage(n) + half_tile + 32 * k), tile_at(stage(n) + WEIGHT_BYTES + 32 * k), step + k > 0, T());
            close_group();
            wait_products<1>();
            if (step > 0) release(n - 1);
        }
        wait_products<0>();
        release(n - 1);

        // Element 2 h + i of group j: feature 8 h + g of this warp's 16 (with SILU: up of feature g, for h = 1), row 8 j + 2 t + i of x.
        auto finish = [&](int j, int stop, float (&sum)[AT_ONCE][4]) {
            constexpr int HALVES = FINISH == SILU ? 1 : 2;
            const int feature = tile * WIDTH + 8 * HALVES * warp;
            T* to = out + (long long)(8 * j + g) * features + feature + 2 * t;
            unsigned both[AT_ONCE][HALVES];
            auto has = [&](int i, int h) { return j + i < stop && 8 * (j + i) + g < rows && feature + 8 * h < features; };
            auto at = [&](int i, int h) { return reinterpret_cast<unsigned*>(to + 8ll * i * features + 8 * h); };
            #pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                #pragma unroll
                for (int h = 0; h < HALVES; ++h) both[i][h] = FINISH == ADD && has(i, h) ? *at(i, h) : 0u;
            #pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                const bool exists = bias && feature + 8 * h < features;
                const float add = exists ? to_float(bias[feature + 8 * h + g]) : 0.f, add_up = FINISH == SILU && exists ? to_float(bias[features + feature + g]) : 0.f;
                #pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    float2 value = make_float2(sum[i][2 * h] + add, sum[i][2 * h + 1] + add);
                    if (FINISH == SILU) {
                        value.x = value.x / (1.f + __expf(-value.x)) * (sum[i][2] + add_up);
                        value.y = value.y / (1.f + __expf(-value.y)) * (sum[i][3] + add_up);
                    }
                    if (FINISH == ADD) {
                        const float2 before = unpack<T>(transpose(both[i][h]));
                        value.x += before.x, value.y += before.y;
                    }
                    both[i][h] = transpose(pack<T>(value.x, value.y));
                }
            }
            #pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                #pragma unroll
                for (int h = 0; h < HALVES; ++h) if (has(i, h)) *at(i, h) = both[i][h];
        };
        if (shares == 1) {
            #pragma unroll
            for (int j = 0; j < GROUPS; j += AT_ONCE) {
                if (j >= groups) break;
                float sum[AT_ONCE][4];
                #pragma unroll
                for (int i = 0; i < 4 * AT_ONCE; ++i) sum[i / 4][i % 4] = c[4 * j + i];
                finish(j, groups, sum);
            }
            continue;
        }
        // The only tile: its stages are free once both warpgroups have read them.
        asm volatile("bar.sync 1, %0;" :: "n"(32 * WARPS) : "memory");
        auto place = [&](int j) { return stages + 16 * (j * 32 * WARPS + threadIdx.x); };
        #pragma unroll
        for (int j = 0; j < GROUPS; ++j)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(place(j)), "f"(c[4 * j]), "f"(c[4 * j + 1]), "f"(c[4 * j + 2]), "f"(c[4 * j + 3]) : "memory");
        meet_cluster();
        const int stop = groups * (share + 1) / shares;
        for (int j = groups * share / shares; j < stop; j += AT_ONCE) {
            float sum[AT_ONCE][4] = {};
            for (int block = 0; block < shares; ++block) {
                #pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    if (j + i >= stop) continue;
                    const float4 part = of_block(place(j + i), block);
                    sum[i][0] += part.x, sum[i][1] += part.y, sum[i][2] += part.z, sum[i][3] += part.w;
                }
            }
            finish(j, stop, sum);
        }
        meet_cluster();  // nobody leaves while others read what it has laid open
    }
#endif
}
