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

constexpr int LANES = 8, COLUMNS = 16;        // lanes of a column, columns of a head that its threads in a block have
constexpr int HEAD_THREADS = LANES * COLUMNS / 2;  // a thread has two columns, so that a warp reads whole sectors of 32 bytes

// The factor g and the rate beta of one token and head: exp(-exp(A) softplus(a + bias)) and sigmoid(b).
struct Gates {
    float factor, beta;

    // gate: b, then a after `heads` elements, of one token; decay: A, then bias, likewise.
    template <typename T> DEVICE static Gates of(const T* gate, const T* decay, int heads) {
        const float x = to_float(gate[heads]) + to_float(decay[heads]);
        const float softplus = x > 20.f ? x : log1pf(expf(x));
        return {expf(-expf(to_float(decay[0])) * softplus), 1.f / (1.f + expf(-to_float(gate[0])))};
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

// Two columns of a head's state S [E, value_size]: lane l has their elements l, l + LANES, ...
template <int E> struct TwoColumns {
    static constexpr int N = E / LANES;
    Vec<float, 2> s[N];

    DEVICE static int lane() { return threadIdx.x % 32 / 4; }
    DEVICE static int column() { return threadIdx.x % HEAD_THREADS / 32 * 8 + threadIdx.x % 4 * 2; }  // the first, of COLUMNS
    DEVICE static float sum_of_lanes(float x) {
        for (int i = 16; i >= 4; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
        return x;
    }

    DEVICE void load(const float* state, int value_size) {  // at row 0 of the first of COLUMNS
        state += lane() * value_size + column();
        UNROLL for (int n = 0; n < N; ++n) s[n] = *reinterpret_cast<const Vec<float, 2>*>(state + n * LANES * value_size);
    }
    DEVICE void store(float* state, int value_size) const {
        state += lane() * value_size + column();
        UNROLL for (int n = 0; n < N; ++n) *reinterpret_cast<Vec<float, 2>*>(state + n * LANES * value_size) = s[n];
    }

    // S = g S,  d = beta (v - k S),  S = S + k d; return q S. key(i) and query(i) are elements i of k and q.
    template <typename K, typename Q> DEVICE Vec<float, 2> update(const Gates& gates, const float* value, K key, Q query) {
        float predicted[2] = {}, result[2] = {}, delta[2];
        UNROLL for (int n = 0; n < N; ++n) {
            const float k = key(n * LANES + lane());
            UNROLL for (int c = 0; c < 2; ++c) {
                s[n].at[c] *= gates.factor;
                predicted[c] += k * s[n].at[c];
            }
        }
        UNROLL for (int c = 0; c < 2; ++c) delta[c] = gates.beta * (value[column() + c] - sum_of_lanes(predicted[c]));
        UNROLL for (int n = 0; n < N; ++n) {
            const float k = key(n * LANES + lane()), q = query(n * LANES + lane());
            UNROLL for (int c = 0; c < 2; ++c) {
                s[n].at[c] += k * delta[c];
                result[c] += q * s[n].at[c];
            }
        }
        return {sum_of_lanes(result[0]), sum_of_lanes(result[1])};
    }
};
