// The gated delta rule for one token and some columns of a head's state, and the rows of a batch that it runs over.
//
// A row of the batch is a run of tokens of one request, tokens [starts[row], starts[row + 1]). It reads and writes the state that
// slots[row] names. `saves` has two pairs (count, state) for each row: after `count` of its tokens the state is also written there;
// no pair has count 0. A token's result depends on its own request alone: it is bitwise identical in any batch and any chunk.
#pragma once
#include "common.cuh"

constexpr int NUM_SAVES = 2;

struct Rows {
    const int *slots, *starts, *saves;  // [B], [B + 1], [B, NUM_SAVES, 2] or null

    // Call f(state) for each state to which that of `row` is to be written after `count` of its tokens.
    template <typename F> DEVICE void for_each_save(int row, int count, F f) const {
        if (!saves) return;
        const int* pairs = saves + row * NUM_SAVES * 2;
        UNROLL for (int i = 0; i < NUM_SAVES; ++i)
            if (pairs[2 * i] == count) f(pairs[2 * i + 1]);
    }
};

// SIZE tokens of a row of the batch, or its last ones. The tiles of row `row` are numbered from starts[row] / SIZE + row on: there are
// up to T / SIZE + B numbers, and some of them are of no tokens.
template <int SIZE> struct Tile {
    int row, start, first, count;  // the row's first token in the batch; the tile's first token in the row, and its tokens

    DEVICE static Tile of(const int* starts, int rows, int number) {  // all lanes of a warp call it
        int row = -1;
        for (int i = threadIdx.x % 32; i - threadIdx.x % 32 < rows; i += 32)
            row += __popc(__ballot_sync(0xffffffffu, i < rows && starts[i] / SIZE + i <= number));
        if (row < 0) return {0, 0, 0, 0};
        const int start = starts[row], first = (number - start / SIZE - row) * SIZE;
        return {row, start, first, max(0, min(SIZE, starts[row + 1] - start - first))};
    }
};

constexpr int LANES = 8;  // lanes of a column

// The logarithm of the factor g, -exp(A) softplus(a + bias), and the rate beta, sigmoid(b), of one token and head.
struct Gates {
    float log_factor, beta;

    DEVICE float factor() const { return expf(log_factor); }

    // gate: b, then a after `heads` elements, of one token; decay: A, then bias, likewise.
    template <typename T> DEVICE static Gates of(const T* gate, const T* decay, int heads) {
        return of(to_float(gate[0]), to_float(gate[heads]), to_float(decay[0]), to_float(decay[heads]));
    }
    DEVICE static Gates of(float b, float a, float rate, float bias) {
        const float x = a + bias, softplus = x > 20.f ? x : log1pf(expf(x));
        return {-expf(rate) * softplus, 1.f / (1.f + expf(-b))};
    }
};

// The scales of q and k of one token and head, which bring them to length E^-0.5 and 1.
template <int E, typename F> DEVICE float2 scales_of(F q_and_k) {  // q_and_k(i): elements i of both; all lanes of a warp call it
    float q_squares = 0.f, k_squares = 0.f;
    UNROLL for (int i = 0; i < E / 32; ++i) {
        const float2 both = q_and_k(i * 32 + threadIdx.x % 32);
        q_squares += both.x * both.x;
        k_squares += both.y * both.y;
    }
    return make_float2(rsqrtf(warp_sum(q_squares) + 1e-6f) * rsqrtf(E), rsqrtf(warp_sum(k_squares) + 1e-6f));
}

// The scale of a RMSNorm over `size` elements; all lanes of a warp call it, and lane l has four elements from 4 l on at once.
template <typename F> DEVICE float norm_scale(int size, float eps, F element) {
    float squares = 0.f;
    for (int first = threadIdx.x % 32 * 4; first < size; first += 128)
        UNROLL for (int i = first; i < first + 4; ++i)
            if (i < size) squares += element(i) * element(i);
    return rsqrtf(warp_sum(squares) / size + eps);
}

// W adjacent columns of a head's state S [E, value_size] in each thread: lane l has their elements l, l + LANES, ... A warp has 4 W
// columns, and reads whole sectors of 32 bytes.
template <int E, int W> struct StateColumns {
    static constexpr int N = E / LANES;
    Vec<float, W> s[N];

    DEVICE static int lane() { return threadIdx.x % 32 / 4; }
    DEVICE static int column() { return (threadIdx.x / 32 * 4 + threadIdx.x % 4) * W; }  // the first one, counted over the block
    DEVICE static float sum_of_lanes(float x) {
        for (int i = 16; i >= 4; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
        return x;
    }

    DEVICE void load(const float* state, int value_size) {  // at row 0 of the block's first column
        state += lane() * value_size + column();
        UNROLL for (int n = 0; n < N; ++n) s[n] = *reinterpret_cast<const Vec<float, W>*>(state + n * LANES * value_size);
    }
    DEVICE void store(float* state, int value_size) const {
        state += lane() * value_size + column();
        UNROLL for (int n = 0; n < N; ++n) *reinterpret_cast<Vec<float, W>*>(state + n * LANES * value_size) = s[n];
    }

    // S = g S,  d = beta (v - k S),  S = S + k d; return q S. key(i) and query(i) are elements i of k and q.
    template <typename K, typename Q> DEVICE Vec<float, W> update(const Gates& gates, const float* value, K key, Q query) {
        const float factor = gates.factor();
        float predicted[W] = {}, delta[W];
        Vec<float, W> result = {};
        UNROLL for (int n = 0; n < N; ++n) {
            const float k = key(n * LANES + lane());
            UNROLL for (int c = 0; c < W; ++c) {
                s[n].at[c] *= factor;
                predicted[c] += k * s[n].at[c];
            }
        }
        UNROLL for (int c = 0; c < W; ++c) delta[c] = gates.beta * (value[column() + c] - sum_of_lanes(predicted[c]));
        UNROLL for (int n = 0; n < N; ++n) {
            const float k = key(n * LANES + lane()), q = query(n * LANES + lane());
            UNROLL for (int c = 0; c < W; ++c) {
                s[n].at[c] += k * delta[c];
                result.at[c] += q * s[n].at[c];
            }
        }
        UNROLL for (int c = 0; c < W; ++c) result.at[c] = sum_of_lanes(result.at[c]);
        return result;
    }
};
