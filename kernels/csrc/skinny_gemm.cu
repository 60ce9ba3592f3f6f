// skinny_gemm: x @ weight^T for up to 8 rows at the speed of reading the weight, fused with a norm before it and an epilogue.
//
// The weight is the left operand of mma.m16n8k16, 16 of its rows by 16 columns; the rows of x are the right one. A sum over columns
// may be in any order, so lane (g, t) = (lane / 4, lane % 4) gives the tensor core the 8 adjacent elements that it loaded at once:
// columns 8 t .. 8 t + 7 of weight rows g and g + 8, and of row g of x. The weight goes from memory to registers to the tensor core,
// DEPTH chunks ahead. The first chunks load before the kernel that computes x has ended.
// A block goes through its tiles of 16 rows of the weight. Its warps share the columns of a tile; their sums are added at the end.
#include "mma.cuh"

enum Epilogue { STORE, ADD, SILU };  // out = sum, out += sum, out = silu(gate) * up; gemm.py uses these names

constexpr int ROWS = 8;    // the most rows of x
constexpr int CHUNK = 64;  // columns that a warp processes at once: whole 128-byte lines of the weight

// Copy x to shared memory, times the weight of the norm if there is one; squares[row] = the sum of squares of this warp's elements.
template <typename T, int WARPS> DEVICE void stage_x(
    T* staged, float (&squares)[WARPS][ROWS], const T* x, const T* norm, int rows, int size, int stride, int warp, int lane) {
    UNROLL for (int row = 0; row < ROWS; ++row) {
        float square = 0.f;
        for (int at = threadIdx.x * 8; row < rows && at < size; at += 32 * WARPS * 8) {
            Vec<T, 8> v = *reinterpret_cast<const Vec<T, 8>*>(x + (long long)row * size + at);
            if (norm) {
                const Vec<T, 8> n = *reinterpret_cast<const Vec<T, 8>*>(norm + at);
                UNROLL for (int i = 0; i < 8; ++i) {
                    const float value = to_float(v.at[i]);
                    square += value * value;
                    v.at[i] = from_float<T>(value * to_float(n.at[i]));
                }
            }
            *reinterpret_cast<Vec<T, 8>*>(staged + row * stride + at) = v;
        }
        if (norm && row < rows) {
            square = warp_sum(square);
            if (lane == 0) squares[warp][row] = square;
        }
    }
}

// Add the sums of the warps; apply the scale of the norm, the bias and SiLU. `column` is that of the feature in its tile.
template <typename T, int WARPS, bool STAGED, int EPILOGUE> DEVICE float finish_sum(
    const float (&sums)[WARPS][ROWS][17], const float (&squares)[WARPS][ROWS], int row, int column, const T* norm, const T* bias,
    int feature, int features, int size, float eps) {
    float sum = 0.f, gated = 0.f, square = 0.f;
    UNROLL for (int w = 0; w < WARPS; ++w) {
        sum += sums[w][row][column];
        if (EPILOGUE == SILU) gated += sums[w][row][column + 8];
        if (STAGED && norm) square += squares[w][row];
    }
    const float scale = STAGED && norm ? rsqrtf(square / size + eps) : 1.f;
    sum = sum * scale + (bias ? to_float(bias[feature]) : 0.f);
    if (EPILOGUE == SILU) {
        gated = gated * scale + (bias ? to_float(bias[features + feature]) : 0.f);
        sum = sum / (1.f + __expf(-sum)) * gated;
    }
    return sum;
}

// STAGED: x is in shared memory (dynamic: rows * stride elements), times the norm's weight if there is one. The norm's scale, one
// factor per row, is applied to the sums. With SILU a tile is 8 rows of gate and the 8 rows of up that belong to them.
template <typename T, int WARPS, int DEPTH, bool STAGED, int EPILOGUE>
__global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) skinny_gemm(
    T* out, const T* x, const T* __restrict__ weight, const T* __restrict__ norm, const T* __restrict__ bias,
    float eps, int rows, int features, int size) {
    constexpr int WIDTH = EPILOGUE == SILU ? 8 : 16;  // features of a tile
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tiles = (features + WIDTH - 1) / WIDTH, last = (EPILOGUE == SILU ? 2 : 1) * features - 1;
    const int rounds = (size + CHUNK * WARPS * DEPTH - 1) / (CHUNK * WARPS * DEPTH);

    uint4 a[DEPTH][2][2];  // [chunk][half of it][row g or g + 8]
    auto column = [&](int round, int d, int half) { return ((round * DEPTH + d) * WARPS + warp) * CHUNK + half * 32 + t * 8; };
    auto load_weight = [&](int tile, int round, int d) {
        UNROLL for (int r = 0; r < 2; ++r) {
            const int feature = tile * WIDTH + g + (EPILOGUE == SILU ? r * features : 8 * r);
            const T* row = weight + (long long)min(feature, last) * size;
            UNROLL for (int h = 0; h < 2; ++h) {
                const int at = column(round, d, h);
                a[d][h][r] = at < size && tile < tiles ? stream(row + at) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    UNROLL for (int d = 0; d < DEPTH; ++d) load_weight(blockIdx.x, 0, d);
    launch_next();
    wait_for_previous();

    extern __shared__ uint4 shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int stride = (size + CHUNK - 1) / CHUNK * CHUNK + 32;  // lanes (g, t) and (g + 1, t) read different banks
    __shared__ float sums[2][WARPS][ROWS][17], squares[WARPS][ROWS];
    if (STAGED) {
        stage_x<T, WARPS>(staged, squares, x, norm, rows, size, stride, warp, lane);
        __syncthreads();
    }
    auto load_x = [&](int round, int d, int half) {
        const int at = column(round, d, half);
        if (g >= rows || at >= size) return make_uint4(0, 0, 0, 0);
        return *reinterpret_cast<const uint4*>(STAGED ? staged + g * stride + at : x + (long long)g * size + at);
    };

    uint4 b[2];  // if not STAGED: the two halves of a chunk of x, from memory
    if (!STAGED) b[0] = load_x(0, 0, 0), b[1] = load_x(0, 0, 1);
    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        float c[4] = {};
        for (int round = 0; round < rounds; ++round) {
            const bool is_last = round + 1 == rounds;
            const int next_tile = is_last ? tile + gridDim.x : tile, next_round = is_last ? 0 : round + 1;
            UNROLL for (int d = 0; d < DEPTH; ++d) {
                UNROLL for (int h = 0; h < 2; ++h) {
                    const uint4 right = STAGED ? load_x(round, d, h) : b[h], first = a[d][h][0], second = a[d][h][1];
                    multiply(c, first.x, second.x, first.y, second.y, right.x, right.y, T());
                    multiply(c, first.z, second.z, first.w, second.w, right.z, right.w, T());
                    if (!STAGED) b[h] = d + 1 < DEPTH ? load_x(round, d + 1, h) : load_x(next_round, 0, h);
                }
                load_weight(next_tile, next_round, d);
            }
        }

        // Lane (g, t) holds features g (c[0], c[1]) and g + 8 (c[2], c[3]) for rows 2 t and 2 t + 1 of x.
        UNROLL for (int i = 0; i < 4; ++i) sums[buffer][warp][2 * t + i % 2][g + 8 * (i / 2)] = c[i];
        __syncthreads();
        for (int i = threadIdx.x; i < rows * WIDTH; i += 32 * WARPS) {
            const int row = i / WIDTH, feature = tile * WIDTH + i % WIDTH;
            if (feature >= features) continue;
            const float sum = finish_sum<T, WARPS, STAGED, EPILOGUE>(
                sums[buffer], squares, row, i % WIDTH, norm, bias, feature, features, size, eps);
            T* to = out + (long long)row * features + feature;
            *to = from_float<T>(EPILOGUE == ADD ? sum + to_float(*to) : sum);
        }
    }
}
