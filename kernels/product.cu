// product: x @ weight^T for up to 32 rows at the speed of reading the weight, with the norm before it and what follows it inside.
//
// The weight is the left operand of mma.m16n8k16, 16 of its rows by 16 columns; 8 rows of x, a set, are the right one. A sum over
// columns may be taken in any order, so lane (g, t) = (lane / 4, lane % 4) gives the tensor core whatever 8 neighbours it loaded
// at once: columns 8 t .. 8 t + 7 of weight rows g and g + 8, and of row g of a set. The weight goes from memory to registers to the
// tensor core, DEPTH chunks ahead, and the first of them before the kernel that computes x has ended.
// A cluster of blocks goes through its tiles, TILES times 16 rows of the weight; its warps share the columns of a tile and add up at
// the end. So a block keeps its share of x's columns only.
#include "tensor.cuh"

enum Finish { STORE, ADD, SILU };

constexpr int CHUNK = 64;  // columns that a warp takes at once: whole 128-byte lines of the weight

// x goes through shared memory, times the norm's weight if there is one; the norm's scale, one factor a row, is applied to the sums.
// A lane brings in, scales and reads its own columns only, so the first tile waits for its first chunk and not for all of x. If
// `keeps`, x stays for the tiles that follow; else DEPTH chunks of it have room, and each tile brings it in anew.
// With SILU a tile is 8 TILES rows of gate and those of up that go with them.
template <typename T, int WARPS, int DEPTH, int SETS, int TILES, int CLUSTER, int FINISH>
__global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) product(
    T* out, const T* x, const T* __restrict__ weight, const T* __restrict__ norm, const T* __restrict__ bias,
    float eps, int rows, int features, int size, int keeps) {
    constexpr int ROWS = 8 * SETS, EACH = FINISH == SILU ? 8 : 16, WIDTH = EACH * TILES;  // features of a tile
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int tiles = (features + WIDTH - 1) / WIDTH, last = (FINISH == SILU ? 2 : 1) * features - 1;
    const int chunks = (size + CHUNK * WARPS * CLUSTER - 1) / (CHUNK * WARPS * CLUSTER);  // of a warp
    const int rounds = (chunks + DEPTH - 1) / DEPTH;

    auto column = [&](int chunk, int half) { return ((chunk * CLUSTER + rank) * WARPS + warp) * CHUNK + half * 32 + t * 8; };
    uint4 a[DEPTH][2][TILES][2];  // [chunk][half of it][16 rows][row g or g + 8]
    auto fetch = [&](int tile, int chunk, int d) {
        #pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int feature = tile * WIDTH + i / 2 * EACH + g + i % 2 * (FINISH == SILU ? features : 8);
            const T* row = weight + (long long)min(feature, last) * size;
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int at = column(chunk, h);
                a[d][h][i / 2][i % 2] = at < size && tile < tiles ? stream(row + at) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d) fetch(cluster, d, d);

    // Shared memory: sums of the warps for two tiles in turn, and of squares; the norm's weight if there is one; x, by lanes.
    extern __shared__ uint4 shared[];
    auto sums = reinterpret_cast<float(*)[WARPS][ROWS][16 * TILES + 1]>(shared);
    auto squares = reinterpret_cast<float(*)[ROWS]>(sums + 2);
    uint4* scales = reinterpret_cast<uint4*>(squares + WARPS) + warp * chunks * 8 + t;
    uint4* mine = reinterpret_cast<uint4*>(squares + WARPS) + (norm ? WARPS * chunks * 8 : 0) + t;
    auto address = [](const uint4* of) { return (unsigned)__cvta_generic_to_shared(of); };
    auto place = [&](int chunk, int d, int half, int row) {
        const int within = keeps ? warp * chunks + chunk : warp * DEPTH + d;
        return mine + ((within * 2 + half) * rows + row) * 4;
    };
    for (int i = 0; norm && g == 0 && i < 2 * chunks; ++i) {
        const int at = column(i / 2, i % 2);
        copy_async(address(scales + 4 * i), norm + min(at, size - 8), at < size);
    }
    launch_next();
    wait_for_previous();

    auto bring = [&](int chunk, int d) {
        #pragma unroll
        for (int i = 0; i < 2 * SETS; ++i) {
            const int row = i / 2 * 8 + g, at = column(chunk, i % 2);
            if (row < rows && chunk < chunks)
                copy_async(address(place(chunk, d, i % 2, row)), x + (long long)row * size + min(at, size - 8), at < size);
        }
        commit_copies();
    };
    #pragma unroll
    for (int d = 0; d < DEPTH; ++d) bring(d, d);
    float square[SETS] = {};
    int turn = 0;
    for (int tile = cluster; tile < tiles; tile += clusters, turn ^= 1) {
        const bool first = tile == cluster, fresh = first || !keeps;
        float c[TILES][SETS][4] = {};
        for (int round = 0; round < rounds; ++round) {
            const bool ends = round + 1 == rounds;
            const int next_tile = ends ? tile + clusters : tile, next_round = ends ? 0 : round + 1;
            #pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                const int chunk = round * DEPTH + d, next = next_round * DEPTH + d;
                if (fresh) {
                    wait_copies<DEPTH - 1>();  // this chunk of x is there
                    __syncwarp();              // and the norm's weight, which four lanes brought
                }
                #pragma unroll
                for (int i = 0; i < 2 * SETS && chunk < chunks; ++i) {
                    const int h = i % 2, s = i / 2, row = s * 8 + g;
                    uint4 right = row < rows ? *place(chunk, d, h, row) : make_uint4(0, 0, 0, 0);
                    if (fresh && norm && row < rows) {
                        const uint4 scale = scales[(chunk * 2 + h) * 4];
                        T* v = reinterpret_cast<T*>(&right);
                        const T* n = reinterpret_cast<const T*>(&scale);
                        #pragma unroll
                        for (int k = 0; k < 8; ++k) {
                            const float value = to_float(v[k]);
                            if (first) square[s] += value * value;
                            v[k] = from_float<T>(value * to_float(n[k]));
                        }
                        *place(chunk, d, h, row) = right;
                    }
                    #pragma unroll
                    for (int k = 0; k < TILES; ++k) {
                        const uint4 upper = a[d][h][k][0], lower = a[d][h][k][1];
                        multiply(c[k][s], upper.x, lower.x, upper.y, lower.y, right.x, right.y, T());
                        multiply(c[k][s], upper.z, lower.z, upper.w, lower.w, right.z, right.w, T());
                    }
                }
                fetch(next_tile, next, d);
                if (fresh) bring(keeps ? chunk + DEPTH : next, d);
            }
        }
        if (norm && first) {
            #pragma unroll
            for (int s = 0; s < SETS; ++s) {
                square[s] += __shfl_xor_sync(0xffffffffu, square[s], 1);
                square[s] += __shfl_xor_sync(0xffffffffu, square[s], 2);
                if (t == 0) squares[warp][s * 8 + g] = square[s];
            }
        }

        // Lane (g, t) holds features g (c[0], c[1]) and g + 8 (c[2], c[3]) of 16 for rows 2 t and 2 t + 1 of a set.
        #pragma unroll
        for (int i = 0; i < 4 * SETS * TILES; ++i) {
            const int k = i / 4 / SETS, s = i / 4 % SETS;
            sums[turn][warp][s * 8 + 2 * t + i % 2][k * 16 + g + i % 4 / 2 * 8] = c[k][s][i % 4];
        }
        if (CLUSTER > 1) cluster_meet();
        else __syncthreads();
        auto of = [&](int block, const float& sum) { return CLUSTER > 1 ? read_in_cluster(&sum, block) : sum; };
        for (int i = rank * 32 * WARPS + threadIdx.x; i < rows * WIDTH; i += CLUSTER * 32 * WARPS) {
            const int row = i / WIDTH, within = i % WIDTH, at = tile * WIDTH + within;
            const int feature = within / EACH * 16 + within % EACH;
            if (at >= features) continue;
            float sum = 0.f, gated = 0.f, total = 0.f;
            #pragma unroll 1
            for (int block = 0; block < CLUSTER; ++block) {
                #pragma unroll 8
                for (int w = 0; w < WARPS; ++w) {
                    sum += of(block, sums[turn][w][row][feature]);
                    if (FINISH == SILU) gated += of(block, sums[turn][w][row][feature + 8]);
                    if (norm) total += of(block, squares[w][row]);
                }
            }
            const float scale = norm ? rsqrtf(total / size + eps) : 1.f;
            sum = sum * scale + (bias ? to_float(bias[at]) : 0.f);
            if (FINISH == SILU) {
                gated = gated * scale + (bias ? to_float(bias[features + at]) : 0.f);
                sum = sum / (1.f + __expf(-sum)) * gated;
            }
            T* to = out + (long long)row * features + at;
            *to = from_float<T>(FINISH == ADD ? sum + to_float(*to) : sum);
        }
    }
    if (CLUSTER > 1) cluster_meet();  // others may still read here
}
