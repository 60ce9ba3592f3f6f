// Layers of the gated delta rule (Yang et al., 2024, 2412.06464): a causal convolution, the rule, and its gated norm.
//
// A row of the batch is a run of tokens of one request, tokens [starts[row], starts[row + 1]). It reads and writes the state that
// slots[row] names. `saves` has two pairs (count, state) for each row: after `count` of its tokens the state is also written there;
// no pair has count 0. A token's result depends on its own request alone: it is bitwise identical in any batch and any chunk.
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

// out[t, c] = silu(sum_j weight[c, j] * x[t - K + 1 + j, c]); what is before a row's first token is in its state [K - 1, channels].
// Grid (channels / 128, B), one thread for each channel.
template <typename T, int K>
__global__ void __launch_bounds__(128) causal_conv(
    T* __restrict__ out, const T* __restrict__ x, long long stride, const T* __restrict__ weight, T* states, int channels,
    const int* slots, const int* starts, const int* saves) {
    launch_next();
    const int row = blockIdx.y, channel = blockIdx.x * blockDim.x + threadIdx.x;
    wait_for_previous();
    if (channel >= channels) return;
    const Rows rows = {slots, starts, saves};
    const long long size = (long long)(K - 1) * channels;
    T* state = states + slots[row] * size + channel;
    float taps[K], recent[K];  // recent[K - 1] is the present input
    UNROLL for (int j = 0; j < K; ++j) taps[j] = to_float(weight[channel * K + j]);
    UNROLL for (int j = 0; j < K - 1; ++j) recent[j + 1] = to_float(state[j * channels]);
    auto store = [&](T* to) { UNROLL for (int j = 0; j < K - 1; ++j) to[j * channels] = from_float<T>(recent[j + 1]); };
    const int first = starts[row], stop = starts[row + 1];
    for (int t = first; t < stop; ++t) {
        UNROLL for (int j = 0; j < K - 1; ++j) recent[j] = recent[j + 1];
        recent[K - 1] = to_float(x[t * stride + channel]);
        float sum = 0.f;
        UNROLL for (int j = 0; j < K; ++j) sum += taps[j] * recent[j];
        out[(long long)t * channels + channel] = from_float<T>(silu(sum));
        rows.for_each_save(row, t + 1 - first, [&](int saved) { store(states + saved * size + channel); });
    }
    store(state);
}

constexpr int LANES = 8, COLUMNS = 16, TILE = 16;  // lanes of a column, columns of a block, tokens that are staged together

// The rule for one value head and COLUMNS of its columns; S [E, value_size] is the head's state, all in float32:
//     S = g S,  d = beta (v - k S),  S = S + k d,  out = q S
// with q and k scaled to length E^-0.5 and 1, g = exp(-exp(A) softplus(a + bias)) and beta = sigmoid(b).
// qkv [T, 2 key heads E + value heads value_size], gates [T, 2 value heads] with b, then a; decay [2, value heads] with A, then bias.
// Grid (B * value heads, value_size / COLUMNS). Lane l of a column has the elements l, l + LANES, ... of that column.
template <typename T, int E>
__global__ void __launch_bounds__(LANES * COLUMNS, 6) gated_delta(
    T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ gates, const T* __restrict__ decay, float* states,
    int key_heads, int value_heads, int value_size, const int* slots, const int* starts, const int* saves) {
    constexpr int N = E / LANES, PARTS = E / 32;
    __shared__ float queries[TILE][E], keys[TILE][E], values[TILE][COLUMNS], factors[TILE], betas[TILE];
    launch_next();
    const int row = blockIdx.x / value_heads, head = blockIdx.x % value_heads, key_head = head / (value_heads / key_heads);
    const int column = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
    const int first_column = blockIdx.y * COLUMNS;
    const long long width = 2ll * key_heads * E + (long long)value_heads * value_size;
    wait_for_previous();
    const Rows rows = {slots, starts, saves};
    auto state_of = [&](int index) {
        return states + (((long long)index * value_heads + head) * E + lane) * value_size + first_column + column;
    };
    float s[N];
    auto store = [&](float* to) { UNROLL for (int n = 0; n < N; ++n) to[n * LANES * value_size] = s[n]; };
    const float* state = state_of(slots[row]);
    UNROLL for (int n = 0; n < N; ++n) s[n] = state[n * LANES * value_size];

    auto stage = [&](int slot, long long t) {  // by one warp
        const T* from = qkv + t * width + key_head * E;
        float q[PARTS], k[PARTS], q_squares = 0.f, k_squares = 0.f;
        UNROLL for (int i = 0; i < PARTS; ++i) {
            q[i] = to_float(from[i * 32 + in_warp]);
            k[i] = to_float(from[key_heads * E + i * 32 + in_warp]);
            q_squares += q[i] * q[i];
            k_squares += k[i] * k[i];
        }
        const float q_scale = rsqrtf(warp_sum(q_squares) + 1e-6f) * rsqrtf(E), k_scale = rsqrtf(warp_sum(k_squares) + 1e-6f);
        UNROLL for (int i = 0; i < PARTS; ++i) {
            queries[slot][i * 32 + in_warp] = q[i] * q_scale;
            keys[slot][i * 32 + in_warp] = k[i] * k_scale;
        }
        if (in_warp < COLUMNS)
            values[slot][in_warp] = to_float(qkv[t * width + 2 * key_heads * E + head * value_size + first_column + in_warp]);
        if (in_warp == 0) {
            const T* gate = gates + t * 2 * value_heads + head;
            const float x = to_float(gate[value_heads]) + to_float(decay[value_heads + head]);
            const float softplus = x > 20.f ? x : log1pf(expf(x));
            betas[slot] = 1.f / (1.f + expf(-to_float(gate[0])));
            factors[slot] = expf(-expf(to_float(decay[head])) * softplus);
        }
    };
    auto column_sum = [](float x) {
        for (int i = LANES / 2; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
        return x;
    };
    const int first = starts[row], stop = starts[row + 1];
    for (int tile = first; tile < stop; tile += TILE) {
        const int count = min(TILE, stop - tile);
        __syncthreads();  // the tile before has been read
        for (int slot = warp; slot < count; slot += LANES * COLUMNS / 32) stage(slot, tile + slot);
        __syncthreads();
        for (int slot = 0; slot < count; ++slot) {
            float predicted = 0.f;
            UNROLL for (int n = 0; n < N; ++n) {
                s[n] *= factors[slot];
                predicted += keys[slot][n * LANES + lane] * s[n];
            }
            const float delta = betas[slot] * (values[slot][column] - column_sum(predicted));
            float result = 0.f;
            UNROLL for (int n = 0; n < N; ++n) {
                s[n] += keys[slot][n * LANES + lane] * delta;
                result += queries[slot][n * LANES + lane] * s[n];
            }
            result = column_sum(result);
            if (lane == 0)
                out[((long long)(tile + slot) * value_heads + head) * value_size + first_column + column] = from_float<T>(result);
            rows.for_each_save(row, tile + slot + 1 - first, [&](int saved) { store(state_of(saved)); });
        }
    }
    store(state_of(slots[row]));
}

// out = weight * RMSNorm(x) * silu(gate), for each head of `size` elements; grid (T, heads), one warp for each.
template <typename T>
__global__ void __launch_bounds__(32) gated_rms_norm(
    T* __restrict__ out, const T* __restrict__ x, const T* __restrict__ gate, long long gate_stride, const T* __restrict__ weight,
    int size, float eps) {
    launch_next();
    wait_for_previous();
    const long long at = ((long long)blockIdx.x * gridDim.y + blockIdx.y) * size;
    gate += blockIdx.x * gate_stride + blockIdx.y * size;
    float squares = 0.f;
    for (int i = threadIdx.x; i < size; i += 32) squares += to_float(x[at + i]) * to_float(x[at + i]);
    const float scale = rsqrtf(warp_sum(squares) / size + eps);
    for (int i = threadIdx.x; i < size; i += 32)
        out[at + i] = from_float<T>(to_float(x[at + i]) * scale * to_float(weight[i]) * silu(to_float(gate[i])));
}
