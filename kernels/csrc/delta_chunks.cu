// The gated delta rule for the prompts of a batch on tensor cores, CHUNK tokens at a time (Yang et al., 2024, 2412.06464, section 3.3).
// With S before a chunk, the products G of the factors g from its start, and x, y as the scales of q and k, the chunk has
//     D = inverse(1 + A) diag(beta) (V - diag(G y) K S)    A[i, j] = beta[i] G[i] / G[j] y[i] y[j] k[i] k[j] for j < i
//     out = diag(G x) Q S + M D                            M[i, j] = G[i] / G[j] x[i] y[j] q[i] k[j] for j <= i
//     S = G[last] S + K^T diag(G[last] / G y) D
// chunk_matrices computes inverse(1 + A) diag(beta) and M of all chunks at the same time, delta_chunks the rest, one chunk after the
// other. K, Q and V have 16 bits; other operands are sums of two such numbers, an upper and a lower half. So the
// result differs from that of gated_delta by little more than the order of the sums.
#include "delta_rule.cuh"
#include "mma.cuh"

constexpr int CHUNK = 32, MATRIX = CHUNK * CHUNK, PAD = 8;  // PAD: of rows in shared memory, so that eight rows have different banks

constexpr int BLOCKS = 2;     // of delta_chunks with 64 columns that a multiprocessor has at the same time
constexpr int MAX_GROUP = 4;  // value heads whose inverses a block of chunk_matrices computes at the same time

struct alignas(32) TokenScales { float outer_k, outer_q, inner_k, chunk_factor, k, log_product; };  // G y, G x, G[last] / G y, G[last], y, log(G)

// Copy a chunk's rows of `columns` elements to rows of columns + PAD in shared memory; rows after the last token are zero.
template <typename T> DEVICE void copy_rows(T* to, const T* from, long long stride, int columns, int count) {
    const unsigned base = __cvta_generic_to_shared(to);
    for (int i = threadIdx.x; i < CHUNK * columns / 8; i += blockDim.x) {
        const int row = i / (columns / 8), column = i % (columns / 8) * 8;
        copy_async(base + (row * (columns + PAD) + column) * 2, from + min(row, max(count - 1, 0)) * stride + column, row < count);
    }
}

// Split two floats into the sums of two T each, an upper and a lower half.
template <typename T> struct Split {
    unsigned high, low;

    DEVICE Split() {}
    DEVICE Split(float x, float y) {
        high = pack<T>(x, y);
        const Vec<T, 2> both = *reinterpret_cast<Vec<T, 2>*>(&high);
        low = pack<T>(x - to_float(both.at[0]), y - to_float(both.at[1]));
    }
};

// Load the operands b of two multiplications, for columns first .. first + 15 of the product and 16 of the sum's terms from k on, from
// rows that are columns of b.
template <typename T> DEVICE void load_columns(unsigned (&b)[4], const T* rows, int stride, int first, int k) {
    const int lane = lane_id();
    load_matrices(b, __cvta_generic_to_shared(rows + (first + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8));
}

// c += a b for the first or the second eight columns of load_columns, and the upper or the lower halves of a. Neighbouring calls should
// have different c, because each waits for the one before it with the same c.
template <typename T> DEVICE void multiply_high(float (&c)[4], const Split<T> (&a)[4], const unsigned (&b)[4], int second) {
    multiply(c, a[0].high, a[1].high, a[2].high, a[3].high, b[2 * second], b[2 * second + 1], T());
}
template <typename T> DEVICE void multiply_low(float (&c)[4], const Split<T> (&a)[4], const unsigned (&b)[4], int second) {
    multiply(c, a[0].low, a[1].low, a[2].low, a[3].low, b[2 * second], b[2 * second + 1], T());
}

// The grid is (T / CHUNK + B, key heads): chunks are numbered as tiles. matrices [chunks, value heads, 4, CHUNK, CHUNK] has the
// halves of the inverse, then those of M; scales is [chunks, value heads, CHUNK].
template <typename T, int E>
__global__ void __launch_bounds__(128) chunk_matrices(
    T* __restrict__ matrices, TokenScales* __restrict__ scales, const T* __restrict__ qkv, const T* __restrict__ gates,
    long long gate_stride, const T* __restrict__ decay, int key_heads, int value_heads, int value_size, int num_rows,
    const int* starts) {
    constexpr int STRIDE = E + PAD;
    __shared__ alignas(16) T rows[2][CHUNK * STRIDE];  // of Q and K
    __shared__ alignas(16) float products[MAX_GROUP][CHUNK][CHUNK + 4];
    __shared__ float lengths[2][CHUNK], logs[MAX_GROUP][CHUNK], betas[MAX_GROUP][CHUNK];
    launch_next();
    const int warp = warp_id(), lane = lane_id(), key_head = blockIdx.y, group = value_heads / key_heads;
    const auto chunk = Tile<CHUNK>::of(starts, num_rows, blockIdx.x);
    const long long width = 2ll * key_heads * E + (long long)value_heads * value_size;
    wait_for_previous();
    if (chunk.count == 0) return;
    const T* from = qkv + (chunk.start + chunk.first) * width + key_head * E;
    for (int i = 0; i < 2; ++i) copy_rows(rows[i], from + i * key_heads * E, width, E, chunk.count);
    wait_all_copies();
    __syncthreads();

    for (int t = warp; t < CHUNK; t += 4) {
        const float2 both =
            scales_of<E>([&](int i) { return make_float2(to_float(rows[0][t * STRIDE + i]), to_float(rows[1][t * STRIDE + i])); });
        if (lane == 0) lengths[0][t] = both.x, lengths[1][t] = both.y;
    }
    const bool is_k = warp / 2;  // the products of k, or of q, with k
    const int first_row = warp % 2 * 16;
    float sums[CHUNK / 8][4] = {};
    UNROLL for (int k = 0; k < E; k += 16) {
        unsigned a[4], b[4];
        load_matrices(a, __cvta_generic_to_shared(rows[is_k] + (first_row + lane % 16) * STRIDE + k + lane / 16 * 8));
        UNROLL for (int n = 0; n < CHUNK / 8; n += 2) {
            load_columns(b, rows[1], STRIDE, 8 * n, k);
            multiply(sums[n], a[0], a[1], a[2], a[3], b[0], b[1], T());
            multiply(sums[n + 1], a[0], a[1], a[2], a[3], b[2], b[3], T());
        }
    }
    for (int first_head = key_head * group; first_head < (key_head + 1) * group; first_head += MAX_GROUP) {
        const int heads = min(MAX_GROUP, (key_head + 1) * group - first_head), head = first_head + warp;
        const long long at = (long long)blockIdx.x * value_heads + head;
        __syncthreads();  // all have the lengths, and have read the last heads' products
        if (warp < heads) {
            const int token = chunk.start + chunk.first + min(lane, chunk.count - 1);
            const Gates of_token = Gates::of(gates + token * gate_stride + head, decay + head, value_heads);
            float sum = of_token.log_factor;
            for (int n = 1; n < 32; n *= 2) {
                const float before = __shfl_up_sync(0xffffffffu, sum, n);
                if (lane >= n) sum += before;
            }
            logs[warp][lane] = sum, betas[warp][lane] = of_token.beta;
            __syncwarp();
            const float product = expf(sum), x = lengths[0][lane], y = lengths[1][lane], last = logs[warp][chunk.count - 1];
            scales[at * CHUNK + lane] = {product * y, product * x, y * expf(last - sum), expf(last), y, sum};
        }
        __syncthreads();
        for (int h = 0; h < heads; ++h) {
            T* masked = matrices + (at - warp + h) * 4 * MATRIX + 2 * MATRIX;
            UNROLL for (int n = 0; n < CHUNK / 8; ++n)
                UNROLL for (int half = 0; half < 2; ++half) {
                    const int i = first_row + group_id() + 8 * half, j = 8 * n + 2 * thread_in_group();
                    float scaled[2];
                    UNROLL for (int c = 0; c < 2; ++c) {
                        const bool inside = is_k ? j + c < i : j + c <= i;
                        const float factor = inside ? expf(logs[h][i] - logs[h][j + c]) * lengths[is_k][i] * lengths[1][j + c] : 0.f;
                        scaled[c] = sums[n][2 * half + c] * factor;
                    }
                    if (is_k) {
                        products[h][i][j] = betas[h][i] * scaled[0], products[h][i][j + 1] = betas[h][i] * scaled[1];
                    } else {
                        const Split<T> split(scaled[0], scaled[1]);
                        *reinterpret_cast<unsigned*>(masked + i * CHUNK + j) = split.high;
                        *reinterpret_cast<unsigned*>(masked + MATRIX + i * CHUNK + j) = split.low;
                    }
                }
        }
        __syncthreads();
        if (warp >= heads) continue;
        T* inverse = matrices + at * 4 * MATRIX;
        float column[CHUNK];  // of the inverse, by substitution
        UNROLL for (int i = 0; i < CHUNK; ++i) {
            float sum[4] = {i == lane ? 1.f : 0.f};
            UNROLL for (int j = 0; j < i; ++j) sum[j % 4] -= products[warp][i][j] * column[j];
            column[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            const float scaled = column[i] * betas[warp][lane];
            const T high = from_float<T>(scaled);
            inverse[i * CHUNK + lane] = high;
            inverse[MATRIX + i * CHUNK + lane] = from_float<T>(scaled - to_float(high));
        }
    }
}

// c += a b^T for a lower triangular b of the halves `high` and `low`, [CHUNK, CHUNK + PAD]; all of them transposed: a warp has 16 columns.
template <typename T>
DEVICE void multiply_triangular(float (&c)[CHUNK / 8][4], const Split<T> (&a)[CHUNK / 16][4], const T* high, const T* low) {
    UNROLL for (int k = 0; k < CHUNK / 16; ++k) {
        unsigned upper[CHUNK / 16][4], lower[CHUNK / 16][4];
        UNROLL for (int n = k; n < CHUNK / 16; ++n) {
            load_columns(upper[n], high, CHUNK + PAD, 16 * n, 16 * k);
            load_columns(lower[n], low, CHUNK + PAD, 16 * n, 16 * k);
        }
        UNROLL for (int n = 2 * k; n < CHUNK / 8; ++n) multiply_high(c[n], a[k], upper[n / 2], n % 2);
        UNROLL for (int n = 2 * k; n < CHUNK / 8; ++n) multiply_low(c[n], a[k], upper[n / 2], n % 2);
        UNROLL for (int n = 2 * k; n < CHUNK / 8; ++n) multiply_high(c[n], a[k], lower[n / 2], n % 2);
    }
}

// Return the halves of a product's tiles as an operand.
template <typename T> DEVICE void split_tiles(Split<T> (&a)[4], const float (&first)[4], const float (&second)[4]) {
    a[0] = {first[0], first[1]}, a[1] = {first[2], first[3]};
    a[2] = {second[0], second[1]}, a[3] = {second[2], second[3]};
}

// A warp has 16 columns of the state of one head, in the layout of mma.cuh's c for their transpose [16, E], and a block COLUMNS of them.
// Grid (B * value heads, value_size / COLUMNS).
template <typename T, int E, int COLUMNS>
__global__ void __launch_bounds__(2 * COLUMNS, BLOCKS * 64 / COLUMNS) delta_chunks(
    T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ matrices, const TokenScales* __restrict__ scales,
    float* states, int key_heads, int value_heads, int value_size, const int* slots, const int* starts, const int* saves) {
    constexpr int STRIDE = E + PAD, V_STRIDE = COLUMNS + PAD, SQUARE = CHUNK * (CHUNK + PAD);
    struct Stage {
        T q[CHUNK * STRIDE], k[CHUNK * STRIDE], v[CHUNK * V_STRIDE], matrices[4 * SQUARE];
        TokenScales scales[CHUNK];
    };
    extern __shared__ __align__(128) char memory[];
    Stage* stages = reinterpret_cast<Stage*>(memory);  // two
    launch_next();
    const int row = blockIdx.x / value_heads, head = blockIdx.x % value_heads, key_head = head / (value_heads / key_heads);
    const int first_column = blockIdx.y * COLUMNS, t = thread_in_group(), lane = lane_id(), start = starts[row], stop = starts[row + 1];
    const long long width = 2ll * key_heads * E + (long long)value_heads * value_size;
    const Rows rows = {slots, starts, saves};
    auto state_of = [&](int index) {
        return states + ((long long)index * value_heads + head) * E * value_size + first_column + warp_id() * 16 + group_id();
    };
    float state[E / 8][4];  // elements 8 n + 2 t + i % 2 of columns group_id() + i / 2 * 8 of the warp's
    auto place_of = [&](int n, int i) { return (8ll * n + 2 * t + i % 2) * value_size + i / 2 * 8; };
    UNROLL for (int n = 0; n < E / 8; ++n)
        UNROLL for (int i = 0; i < 4; ++i) state[n][i] = state_of(slots[row])[place_of(n, i)];  // of an earlier step
    wait_for_previous();

    auto copy_chunk = [&](int chunk) {
        Stage& to = stages[chunk % 2];
        const int first = start + chunk * CHUNK, count = min(CHUNK, stop - first);
        const T *from = qkv + first * width, *values = from + 2 * key_heads * E + head * value_size + first_column;
        copy_rows(to.q, from + key_head * E, width, E, count);
        copy_rows(to.k, from + (key_heads + key_head) * E, width, E, count);
        copy_rows(to.v, values, width, COLUMNS, count);
        const long long at = (long long)(start / CHUNK + row + chunk) * value_heads + head;
        for (int i = threadIdx.x; i < 4 * MATRIX / 8; i += 2 * COLUMNS)
            copy_async(to.matrices + i / 4 * (CHUNK + PAD) + i % 4 * 8, matrices + at * 4 * MATRIX + i * 8);
        const char* numbers = reinterpret_cast<const char*>(scales + at * CHUNK);
        for (int i = threadIdx.x * 16; i < sizeof(to.scales); i += 2 * COLUMNS * 16)
            copy_async(reinterpret_cast<char*>(to.scales) + i, numbers + i);
        commit_copies();
    };
    // Call f(n, sums) with `factor` times tile n of the state, and D times `inner` of each token times K added to it.
    auto add_tokens = [&](const Stage& from, const float (&delta)[CHUNK / 8][4], float factor, auto inner, auto f) {
        Split<T> a[CHUNK / 16][4];
        UNROLL for (int k = 0; k < CHUNK / 16; ++k) {
            float scaled[2][4];
            UNROLL for (int i = 0; i < 8; ++i)
                scaled[i / 4][i % 4] = delta[2 * k + i / 4][i % 4] * inner(16 * k + i / 4 * 8 + 2 * t + i % 2);
            split_tiles(a[k], scaled[0], scaled[1]);
        }
        UNROLL for (int n = 0; n < E / 8; n += 4) {
            float sums[4][4];
            UNROLL for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = state[n + i / 4][i % 4] * factor;
            UNROLL for (int k = 0; k < CHUNK / 16; ++k) {
                unsigned b[2][4];
                UNROLL for (int i = 0; i < 2; ++i)
                    load_transposed_matrices(
                        b[i], __cvta_generic_to_shared(from.k + (16 * k + lane % 16) * STRIDE + 8 * n + 16 * i + lane / 16 * 8));
                UNROLL for (int i = 0; i < 4; ++i) multiply_high(sums[i], a[k], b[i / 2], i % 2);
                UNROLL for (int i = 0; i < 4; ++i) multiply_low(sums[i], a[k], b[i / 2], i % 2);
            }
            UNROLL for (int i = 0; i < 4; ++i) f(n + i, sums[i]);
        }
    };

    const int chunks = (stop - start + CHUNK - 1) / CHUNK;
    if (chunks > 0) copy_chunk(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage& from = stages[chunk % 2];
        const int first = start + chunk * CHUNK, count = min(CHUNK, stop - first);
        if (chunk + 1 < chunks) copy_chunk(chunk + 1), wait_copies<1>();
        else wait_all_copies();
        __syncthreads();
        float predicted[CHUNK / 8][4] = {}, result[CHUNK / 8][4] = {}, delta[CHUNK / 8][4] = {};
        UNROLL for (int k = 0; k < E / 16; ++k) {  // K S and Q S
            Split<T> a[4];
            split_tiles(a, state[2 * k], state[2 * k + 1]);
            unsigned keys[CHUNK / 16][4], queries[CHUNK / 16][4];
            UNROLL for (int n = 0; n < CHUNK / 16; ++n) {
                load_columns(keys[n], from.k, STRIDE, 16 * n, 16 * k);
                load_columns(queries[n], from.q, STRIDE, 16 * n, 16 * k);
            }
            UNROLL for (int n = 0; n < CHUNK / 8; ++n) multiply_high(predicted[n], a, keys[n / 2], n % 2);
            UNROLL for (int n = 0; n < CHUNK / 8; ++n) multiply_high(result[n], a, queries[n / 2], n % 2);
            UNROLL for (int n = 0; n < CHUNK / 8; ++n) multiply_low(predicted[n], a, keys[n / 2], n % 2);
            UNROLL for (int n = 0; n < CHUNK / 8; ++n) multiply_low(result[n], a, queries[n / 2], n % 2);
        }
        UNROLL for (int n = 0; n < CHUNK / 8; n += 2) {
            unsigned values[4];  // of tokens 8 n + 2 t and the next one, of the warp's first and second eight columns; then of n + 1
            load_transposed_matrices(
                values, __cvta_generic_to_shared(from.v + (8 * n + lane / 16 * 8 + lane % 8) * V_STRIDE + warp_id() * 16 + lane / 8 % 2 * 8));
            UNROLL for (int i = 0; i < 8; ++i) {
                const int token = 8 * (n + i / 4) + 2 * t + i % 2;
                const float value = to_float(reinterpret_cast<const Vec<T, 2>*>(&values[i / 2])->at[i % 2]);
                predicted[n + i / 4][i % 4] = value - from.scales[token].outer_k * predicted[n + i / 4][i % 4];
                result[n + i / 4][i % 4] *= from.scales[token].outer_q;
            }
        }
        Split<T> a[CHUNK / 16][4];
        UNROLL for (int k = 0; k < CHUNK / 16; ++k) split_tiles(a[k], predicted[2 * k], predicted[2 * k + 1]);
        multiply_triangular(delta, a, from.matrices, from.matrices + SQUARE);
        UNROLL for (int k = 0; k < CHUNK / 16; ++k) split_tiles(a[k], delta[2 * k], delta[2 * k + 1]);
        multiply_triangular(result, a, from.matrices + 2 * SQUARE, from.matrices + 3 * SQUARE);
        UNROLL for (int n = 0; n < CHUNK / 8; ++n)
            UNROLL for (int half = 0; half < 2; ++half) {
                const unsigned pair = transpose(pack<T>(result[n][2 * half], result[n][2 * half + 1]));
                const int token = 8 * n + group_id(), column = first_column + warp_id() * 16 + half * 8 + 2 * t;
                if (token < count)
                    *reinterpret_cast<unsigned*>(out + ((first + token) * (long long)value_heads + head) * value_size + column) = pair;
            }
        for (int i = 0; saves && i < NUM_SAVES; ++i) {
            const int *pair = saves + (row * NUM_SAVES + i) * 2, last = pair[0] - 1 - chunk * CHUNK;
            if (last < 0 || last >= count) continue;
            float* to = state_of(pair[1]);
            const float log_last = from.scales[last].log_product;
            auto inner = [&](int token) {
                return token <= last ? from.scales[token].k * expf(log_last - from.scales[token].log_product) : 0.f;
            };
            add_tokens(from, delta, expf(log_last), inner, [&](int n, const float (&sums)[4]) {
                UNROLL for (int i = 0; i < 4; ++i) to[place_of(n, i)] = sums[i];
            });
        }
        add_tokens(
            from, delta, from.scales[0].chunk_factor, [&](int token) { return token < count ? from.scales[token].inner_k : 0.f; },
            [&](int n, const float (&sums)[4]) { UNROLL for (int i = 0; i < 4; ++i) state[n][i] = sums[i]; });
        __syncthreads();  // the stage has been read
    }
    UNROLL for (int n = 0; n < E / 8; ++n)
        UNROLL for (int i = 0; i < 4; ++i) state_of(slots[row])[place_of(n, i)] = state[n][i];
}
