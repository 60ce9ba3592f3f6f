// skinny_gemm: x @ weight^T for up to 8 rows at the speed of reading the weight, fused with a norm before it and an epilogue.
//
// The weight is the left operand of mma.m16n8k16, 16 of its rows by 16 columns; the rows of x are the right one. A sum over columns
// may be in any order, so lane (g, t) = (lane / 4, lane % 4) gives the tensor core the 8 adjacent elements that it loaded at once:
// columns 8 t .. 8 t + 7 of weight rows g and g + 8, and of row g of x. The weight goes from memory to registers to the tensor core,
// DEPTH chunks ahead. The first chunks load before the kernel that computes x has ended.
// An FP8 weight is widened in registers: a lane loads 16 columns, and a chunk, which lies in one block of scales, is summed apart and
// added times its scale. Widening to float16 is one instruction for two numbers, to bfloat16 it is many. So x in bfloat16
// is staged in float16. Each warp stages the columns that it multiplies, times a power of two for each row that brings their greatest
// element near float16's maximum.
// A block goes through its tiles of 16 rows of the weight. Its warps share the columns of a tile; their sums are added at the end.
#include "mma.cuh"
#include "peer_protocol.cuh"

enum Epilogue { STORE, ADD, SILU, PUSH };  // out = sum, out += sum, out = silu(gate) * up, send the sum to all ranks; gemm.py uses these names

constexpr int ROWS = 8;    // the most rows of x
constexpr int LINE = 128;  // bytes of a weight row that a warp processes at once
#if __CUDA_ARCH__ == 900
constexpr int MAX_ORDERED_WARPS = 20;  // of a block that multiplies an FP8 weight and keeps the order of loads
#else
constexpr int MAX_ORDERED_WARPS = 16;  // on compute capability 10.0 more would spill registers
#endif

// The scales of an FP8 weight; see FP8Weight of arguments.py. Columns are counted from the begin of the block of column 0.
struct Scales {
    const float* __restrict__ at;
    int row_shift, column_shift, groups;  // binary logarithms of a block's rows and columns; blocks across the matrix
    DEVICE float of(int row, int column) const { return stream_float(at + (row >> row_shift) * groups + (column >> column_shift)); }
};

// The power of two that brings `peak` to 2^14 .. 2^15, and its reciprocal.
DEVICE int exponent_of(float peak) { return max(__float_as_int(peak) >> 23, 30); }
DEVICE float staging_factor(float peak) { return __int_as_float((268 - exponent_of(peak)) << 23); }
DEVICE float staging_divisor(float peak) { return __int_as_float((exponent_of(peak) - 14) << 23); }

template <typename T> struct IsBF16 { static constexpr bool value = false; };
template <> struct IsBF16<bf16> { static constexpr bool value = true; };

// Multiply two bf16 numbers by the norm's weight, as float products that are rounded would; add their squares.
DEVICE unsigned apply_norm(unsigned x, unsigned weight, float& square) {
    const float low = __int_as_float(x << 16), high = __int_as_float(x & 0xffff0000u);
    square += low * low, square += high * high;
    return scale_pair(x, weight, bf16());
}
// The same for a vector; return the sum of its squares.
DEVICE float apply_norm(uint4& x, const uint4& weight) {
    float square = 0.f;
    x.x = apply_norm(x.x, weight.x, square), x.y = apply_norm(x.y, weight.y, square);
    x.z = apply_norm(x.z, weight.z, square), x.w = apply_norm(x.w, weight.w, square);
    return square;
}

// Of two numbers, keep the second in lanes with this bit, the first in the others; add the one that the lane on the other side has.
DEVICE float fold(float first, float second, int lane, int bit) {
    return (lane & bit ? second : first) + __shfl_xor_sync(0xffffffffu, lane & bit ? first : second, bit);
}
// Return the sum over the warp of the numbers of row lane / 8 of four.
DEVICE float sum_of_row(const float (&rows)[4], int lane) {
    float sum = fold(fold(rows[0], rows[2], lane, 16), fold(rows[1], rows[3], lane, 16), lane, 8);
    for (int i = 4; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    return sum;
}
// Return the maximum over the warp of numbers that are not negative: their bits have the same order.
DEVICE float maximum_of_warp(float x) { return __int_as_float(__reduce_max_sync(0xffffffffu, (unsigned)__float_as_int(x))); }

// A warp's part of x for an FP8 weight, in float16: it stages the chunks that it multiplies, and reads only what its own lanes have copied.
template <int WARPS, int CHUNK> struct Float16Stage {
    static constexpr int VECTORS = CHUNK / 8, STEP = 32 / VECTORS * WARPS * CHUNK;  // lanes of a chunk; from a lane's vector to the next
    static constexpr int AT_ONCE = 4;  // rows whose registers are in use at once
    char* shared;  // rows of x, then the norm's weight
    int rows, size, stride, before, warp, lane;

    template <typename T> DEVICE Vec<T, 8>* at(int row, int column) const {
        return reinterpret_cast<Vec<T, 8>*>(reinterpret_cast<T*>(shared) + row * stride + column);
    }
    template <typename F> DEVICE void for_columns(const F& process) const {
        #pragma unroll 1
        for (int c = (warp + WARPS * (lane / VECTORS)) * CHUNK + lane % VECTORS * 8 - before; c < size; c += STEP)
            if (c >= 0) process(c);
    }
    template <typename T> DEVICE void copy(int row, const T* from) const {
        for_columns([&](int column) { copy_async(at<T>(row, column), from + column); });
    }
    // Call `process` for each vector of AT_ONCE rows of x: with row, from FIRST, column, values, and values times the norm's weight.
    template <int FIRST, bool NORMED, typename F> DEVICE void for_vectors(const F& process) const {
        for_columns([&](int column) {
            Vec<bf16, 8> n;
            if (NORMED) n = *at<bf16>(rows, column);
            UNROLL for (int row = 0; row < AT_ONCE; ++row) {
                if (FIRST + row >= rows) break;
                const Vec<bf16, 8> v = *at<bf16>(FIRST + row, column);
                float values[8], products[8];
                UNROLL for (int i = 0; i < 8; ++i) values[i] = to_float(v.at[i]), products[i] = NORMED ? values[i] * to_float(n.at[i]) : values[i];
                process(row, column, values, products);
            }
        });
    }

    // Convert AT_ONCE rows of what was copied; squares[row] = the sum of squares of this warp's elements, if there is a norm;
    // divisor[i] = the reciprocal of the factor of row 2 t + i.
    template <int FIRST, bool NORMED> DEVICE void convert(float (&squares)[WARPS][ROWS], float (&divisor)[2]) const {
        float square[AT_ONCE] = {}, peak[AT_ONCE] = {};
        for_vectors<FIRST, NORMED>([&](int row, int, const float (&values)[8], const float (&products)[8]) {
            UNROLL for (int i = 0; i < 8; ++i) {
                if (NORMED) square[row] += values[i] * values[i];
                peak[row] = fmaxf(peak[row], fabsf(products[i]));
            }
        });
        UNROLL for (int row = 0; row < AT_ONCE; ++row) {
            if (FIRST + row >= rows) break;
            peak[row] = maximum_of_warp(peak[row]);
            if ((FIRST + row) / 2 == lane % 4) divisor[row % 2] = staging_divisor(peak[row]);
        }
        if (NORMED) {
            const float sum = sum_of_row(square, lane);
            if (lane % 8 == 0) squares[warp][FIRST + lane / 8] = sum;
        }
        for_vectors<FIRST, NORMED>([&](int row, int column, const float (&)[8], const float (&products)[8]) {
            const float factor = staging_factor(peak[row]);
            float scaled[8];
            UNROLL for (int i = 0; i < 8; ++i) scaled[i] = products[i] * factor;
            *at<f16>(FIRST + row, column) = round_all<f16>(scaled);
        });
    }
    template <bool NORMED> DEVICE void convert_all(float (&squares)[WARPS][ROWS], float (&divisor)[2]) const {
        convert<0, NORMED>(squares, divisor);
        if (rows > AT_ONCE) convert<AT_ONCE, NORMED>(squares, divisor);
    }
};

// The same for a weight in 16 bits. A warp begins to multiply when the first chunks are here. Loops are rolled: the code of the kernels
// of a layer must fit into the instruction cache.
template <typename T, int WARPS, int CHUNK, bool NORMED> struct ChunkStage {
    static_assert(!NORMED || IsBF16<T>::value, "apply_norm");
    static constexpr int VECTORS = CHUNK / 8;  // lanes of a chunk
    T* shared;  // rows of x, then the norm's weight
    int rows, size, stride, warp, lane;
    float square[2] = {};  // the sums of squares of what this lane has of rows lane / 8 and lane / 8 + 4, if there is a norm

    DEVICE int column(int chunk) const { return (chunk * WARPS + warp) * CHUNK + lane % VECTORS * 8; }
    // Copy the warp's chunks from `begin` to `end` of `count` rows, from row `to` on. The lanes have one chunk of four rows at a time, or
    // four chunks of one row, or two of two.
    DEVICE void copy(int to, const T* from, int count, int begin, int end) const {
        const int shift = count > 4 ? 3 : count > 2 ? 2 : count > 1 ? 1 : 0;  // binary logarithm of the rows, rounded up
        ROLLED for (int i = (begin << shift) + lane / VECTORS; i < end << shift; i += 32 / VECTORS) {
            const int row = i & ((1 << shift) - 1), at = column(i >> shift);
            if (row < count && at < size) copy_async(shared + (to + row) * stride + at, from + row * size + at);
        }
        commit_copies();
    }
    // Let the warp read chunks that its lanes have copied, times the norm's weight.
    DEVICE void publish(int begin, int end) {
        __syncwarp();
        if constexpr (!NORMED) return;
        ROLLED for (int chunk = begin; chunk < end && column(chunk) < size; ++chunk) {
            const uint4 weight = *at(rows, chunk);
            UNROLL for (int i = 0; i < 2; ++i)
                if (lane / 8 + 4 * i < rows) square[i] += apply_norm(*at(lane / 8 + 4 * i, chunk), weight);
        }
        __syncwarp();
    }
    DEVICE uint4* at(int row, int chunk) const { return reinterpret_cast<uint4*>(shared + row * stride + column(chunk)); }
    DEVICE void store_squares(float (&squares)[WARPS][ROWS]) {
        UNROLL for (int i = 0; i < 2; ++i) {
            UNROLL for (int bit = 1; bit < 8; bit *= 2) square[i] += __shfl_xor_sync(0xffffffffu, square[i], bit);
            if (lane % 8 == 0) squares[warp][lane / 8 + 4 * i] = square[i];
        }
    }
};

// Multiply what the lanes have loaded of weight rows g and g + 8, and of x, whose type is T.
template <typename T> DEVICE void multiply_lane(float (&c)[4], const uint4 (&a)[2], const uint4 (&x)[1], T type) {
    multiply(c, a[0].x, a[1].x, a[0].y, a[1].y, x[0].x, x[0].y, type);
    multiply(c, a[0].z, a[1].z, a[0].w, a[1].w, x[0].z, x[0].w, type);
}
template <typename T> DEVICE void multiply_widened(float (&c)[4], unsigned first, unsigned second, unsigned x0, unsigned x1, T type) {
    unsigned low[2], high[2];
    widen(first, low[0], high[0], type), widen(second, low[1], high[1], type);
    multiply(c, low[0], low[1], high[0], high[1], x0, x1, type);
}
template <typename T> DEVICE void multiply_lane(float (&c)[4], const uint4 (&a)[2], const uint4 (&x)[2], T type) {
    multiply_widened(c, a[0].x, a[1].x, x[0].x, x[0].y, type);
    multiply_widened(c, a[0].y, a[1].y, x[0].z, x[0].w, type);
    multiply_widened(c, a[0].z, a[1].z, x[1].x, x[1].y, type);
    multiply_widened(c, a[0].w, a[1].w, x[1].z, x[1].w, type);
}

// The type of the operands: float16 for an FP8 weight if x is staged.
template <typename T, bool HALVED> struct Operand { typedef T type; };
template <typename T> struct Operand<T, true> { typedef f16 type; };

// Add the sums of the warps; apply the scale of the norm, the bias and SiLU. `column` is that of the feature in its tile.
template <typename T, int WARPS, int EPILOGUE> DEVICE float finish_sum(
    const float (&sums)[WARPS][ROWS][17], const float (&squares)[WARPS][ROWS], int row, int column, bool normed, const T* bias,
    int feature, int features, int size, float eps) {
    float sum = 0.f, gated = 0.f, square = 0.f;
    UNROLL for (int w = 0; w < WARPS; ++w) {
        sum += sums[w][row][column];
        if (EPILOGUE == SILU) gated += sums[w][row][column + 8];
        if (normed) square += squares[w][row];
    }
    const float scale = normed ? rsqrtf(square / size + eps) : 1.f;
    sum = sum * scale + (bias ? to_float(bias[feature]) : 0.f);
    if (EPILOGUE == SILU) {
        gated = gated * scale + (bias ? to_float(bias[features + feature]) : 0.f);
        sum = sum / (1.f + __expf(-sum)) * gated;
    }
    return sum;
}

// STAGED: x is in shared memory (dynamic: rows * stride elements), times the norm's weight if there is one. The norm's scale, one
// factor per row, is applied to the sums. With SILU a tile is 8 rows of gate and the 8 rows of up that belong to them.
// W is the type of the weight, T or fp8. `first` is the place of column 0 in its block of scales.
// A 16-bit kernel is compiled for a norm (NORMED) or none, with little code. With an FP8 weight the same, and a rolled conversion,
// made steps up to 3 % slower: NORMED is false there, and `norm` decides.
template <typename T, typename W, int WARPS, int DEPTH, bool STAGED, bool NORMED, int EPILOGUE>
__global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) skinny_gemm(
    T* out, const T* x, const W* __restrict__ weight, const T* __restrict__ norm, const T* __restrict__ bias,
    float eps, int rows, int features, int size, const float* __restrict__ scale, int row_shift, int column_shift, int groups, int first,
    const PeerTable* peers, int ranks) {
    constexpr bool SCALED = sizeof(W) == 1, HALVED = SCALED && STAGED && IsBF16<T>::value;
    const bool normed = SCALED ? STAGED && norm : NORMED;
    typedef typename Operand<T, HALVED>::type M;
    constexpr int CHUNK = LINE / sizeof(W), LANE = 16 / sizeof(W);  // columns of a warp, and of a lane's load
    constexpr int WIDTH = EPILOGUE == SILU ? 8 : 16;  // features of a tile
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tiles = (features + WIDTH - 1) / WIDTH, last = (EPILOGUE == SILU ? 2 : 1) * features - 1;
    const Scales scales{scale, row_shift, column_shift, groups};
    const int before = SCALED ? first : 0, rounds = (before + size + CHUNK * WARPS * DEPTH - 1) / (CHUNK * WARPS * DEPTH);

    if (!SCALED && bias && threadIdx.x == 0) prefetch_line(bias + blockIdx.x * WIDTH);  // the results would wait for it
    uint4 a[DEPTH][2][2];  // [chunk][half of it][row g or g + 8]
    auto chunk = [&](int round, int d) { return ((round * DEPTH + d) * WARPS + warp) * CHUNK; };
    auto column = [&](int round, int d, int half) { return chunk(round, d) + half * (CHUNK / 2) + t * LANE - before; };
    auto inside = [&](int at) { return SCALED ? (unsigned)at < (unsigned)size : at < size; };
    auto load_weight = [&](int tile, int round, int d) {
        UNROLL for (int r = 0; r < 2; ++r) {
            const int feature = tile * WIDTH + g + (EPILOGUE == SILU ? r * features : 8 * r);
            const W* row = weight + (long long)min(feature, last) * size;
            UNROLL for (int h = 0; h < 2; ++h) {
                const int at = column(round, d, h);
                a[d][h][r] = inside(at) && tile < tiles ? stream(row + at) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    float factor[DEPTH][2] = {};  // the scales of the chunks, if the weight has scales
    auto load_factor = [&](int tile, int round, int d) {
        UNROLL for (int r = 0; r < 2; ++r) {
            const int feature = min(tile * WIDTH + g + (EPILOGUE == SILU ? r * features : 8 * r), last);
            if (SCALED && chunk(round, d) < before + size) factor[d][r] = scales.of(feature, chunk(round, d));
        }
    };
    UNROLL for (int d = 0; d < DEPTH; ++d) load_weight(blockIdx.x, 0, d), load_factor(blockIdx.x, 0, d);
    extern __shared__ uint4 shared[];
    T* staged = reinterpret_cast<T*>(shared);
    const int stride = (size + CHUNK - 1) / CHUNK * CHUNK + (SCALED ? 8 : 32);  // lanes (g, t) and (g + 1, t) read different banks
    const Float16Stage<WARPS, CHUNK> halves{reinterpret_cast<char*>(shared), rows, size, stride, before, warp, lane};
    ChunkStage<T, WARPS, CHUNK, NORMED> stage{staged, rows, size, stride, warp, lane};
    if constexpr (HALVED) {
        if (norm) halves.copy(rows, norm);
    } else if (NORMED) {
        stage.copy(rows, norm, 1, 0, rounds * DEPTH);
    }
    launch_next();
    wait_for_previous();
    __shared__ NextPush push;
    if (EPILOGUE == PUSH && threadIdx.x == 0) push.read(peers);

    __shared__ float sums[2][WARPS][ROWS][17], squares[WARPS][ROWS];
    float divisor[2] = {1.f, 1.f};  // of the sums of rows 2 t and 2 t + 1
    if constexpr (STAGED && SCALED) {
        for (int row = 0; row < rows; ++row) halves.copy(row, x + (long long)row * size);
        wait_all_copies();
        if constexpr (HALVED)
            norm ? halves.template convert_all<true>(squares, divisor) : halves.template convert_all<false>(squares, divisor);
        __syncwarp();
    } else if (STAGED) {
        stage.copy(0, x, rows, 0, DEPTH);
        stage.copy(0, x, rows, DEPTH, rounds * DEPTH);
    }
    struct Right { uint4 at[LANE / 8]; };  // x at the columns of a lane's load
    auto load_x = [&](int round, int d, int half) {
        const int at = column(round, d, half);
        Right right = {};
        if (g >= rows || !inside(at)) return right;
        UNROLL for (int i = 0; i < LANE / 8; ++i)
            right.at[i] = *reinterpret_cast<const uint4*>((STAGED ? staged + g * stride : x + (long long)g * size) + at + 8 * i);
        return right;
    };

    Right b[2];  // if not STAGED: the two halves of a chunk of x, from memory
    if (!STAGED) b[0] = load_x(0, 0, 0), b[1] = load_x(0, 0, 1);
    static_assert(ROWS * WIDTH <= 32 * WARPS, "a thread has one result of a tile, or none");
    const int result_row = threadIdx.x / WIDTH;
    auto result_feature = [&](int tile) { return tile * WIDTH + (int)threadIdx.x % WIDTH; };
    auto has_result = [&](int tile) { return result_row < rows && result_feature(tile) < features; };
    auto result = [&](int tile) { return out + (long long)result_row * features + result_feature(tile); };
    auto load_residual = [&](int tile) { return EPILOGUE == ADD && has_result(tile) ? *result(tile) : T(); };
    int buffer = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
        T residual;  // with five chunks there is no register for it during the products
        if (DEPTH < 5) residual = load_residual(tile);
        float c[4] = {};
        for (int round = 0; round < rounds; ++round) {
            const bool is_last = round + 1 == rounds;
            if (STAGED && !SCALED && round < 2 && tile == blockIdx.x) {
                round == 0 ? wait_copies<1>() : wait_all_copies();
                stage.publish(round * DEPTH, round == 0 ? DEPTH : rounds * DEPTH);
            }
            const int next_tile = is_last ? tile + gridDim.x : tile, next_round = is_last ? 0 : round + 1;
            UNROLL for (int d = 0; d < DEPTH; ++d) {
                float sum[2][4] = {};
                UNROLL for (int h = 0; h < 2; ++h) {
                    const Right right = STAGED ? load_x(round, d, h) : b[h];
                    multiply_lane(SCALED ? sum[h] : c, a[d][h], right.at, M());
                    if (!STAGED) b[h] = d + 1 < DEPTH ? load_x(round, d + 1, h) : load_x(next_round, 0, h);
                }
                if (SCALED)
                    UNROLL for (int i = 0; i < 4; ++i) c[i] += factor[d][i / 2] * (sum[0][i] + sum[1][i]);
                load_weight(next_tile, next_round, d);
                load_factor(next_tile, next_round, d);
                if (SCALED && WARPS <= MAX_ORDERED_WARPS && d + 1 < DEPTH) end_basic_block(size, d);
            }
        }

        if (NORMED && tile == blockIdx.x) stage.store_squares(squares);
        if (DEPTH >= 5) residual = load_residual(tile);
        // Lane (g, t) holds features g (c[0], c[1]) and g + 8 (c[2], c[3]) for rows 2 t and 2 t + 1 of x.
        UNROLL for (int i = 0; i < 4; ++i) sums[buffer][warp][2 * t + i % 2][g + 8 * (i / 2)] = HALVED ? c[i] * divisor[i % 2] : c[i];
        __syncthreads();
        if constexpr (EPILOGUE == PUSH) {
            // Two adjacent features are a word, which a thread sends to one rank.
            constexpr int PAIRS = WIDTH / 2;
            ROLLED for (int i = threadIdx.x; i < ranks * rows * PAIRS; i += 32 * WARPS) {
                const int row = i / PAIRS % rows, peer = i / PAIRS / rows, at = i % PAIRS * 2, feature = tile * WIDTH + at;
                if (feature >= features || push.ended) continue;
                float pair[2];
                UNROLL for (int j = 0; j < 2; ++j)
                    pair[j] = finish_sum<T, WARPS, EPILOGUE>(sums[buffer], squares, row, at + j, normed, bias, feature + j, features, size, eps);
                push.send(peers, ranks, peer, (long long)row * features + feature, pack<T>(pair[0], pair[1]));
            }
            continue;
        }
        if (!has_result(tile)) continue;
        const float sum = finish_sum<T, WARPS, EPILOGUE>(
            sums[buffer], squares, result_row, threadIdx.x % WIDTH, normed, bias, result_feature(tile), features, size, eps);
        *result(tile) = from_float<T>(EPILOGUE == ADD ? sum + to_float(residual) : sum);
    }
}
