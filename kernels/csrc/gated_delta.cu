// Layers of the gated delta rule (Yang et al., 2024, 2412.06464): a causal convolution, the rule, and its gated norm, for any number of
// tokens in a row of the batch.
#include "delta_rule.cuh"

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

constexpr int TILE = 16;  // tokens that are staged together

// The rule for one value head and COLUMNS of its columns; S [E, value_size] is the head's state, all in float32:
//     S = g S,  d = beta (v - k S),  S = S + k d,  out = q S
// with q and k scaled to length E^-0.5 and 1, g = exp(-exp(A) softplus(a + bias)) and beta = sigmoid(b).
// qkv [T, 2 key heads E + value heads value_size], gates [T, 2 value heads] with b, then a, rows gate_stride apart; decay
// [2, value heads] with A, then bias. Grid (B * value heads, value_size / COLUMNS).
template <typename T, int E>
__global__ void __launch_bounds__(HEAD_THREADS, 8) gated_delta(
    T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ gates, long long gate_stride, const T* __restrict__ decay,
    float* states, int key_heads, int value_heads, int value_size, const int* slots, const int* starts, const int* saves) {
    constexpr int PARTS = E / 32;
    __shared__ float queries[TILE][E], keys[TILE][E], values[TILE][COLUMNS];
    __shared__ Gates tile_gates[TILE];
    launch_next();
    const int row = blockIdx.x / value_heads, head = blockIdx.x % value_heads, key_head = head / (value_heads / key_heads);
    const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32, first_column = blockIdx.y * COLUMNS;
    const long long width = 2ll * key_heads * E + (long long)value_heads * value_size;
    const Rows rows = {slots, starts, saves};
    auto state_of = [&](int index) { return states + ((long long)index * value_heads + head) * E * value_size + first_column; };
    TwoColumns<E> state;
    state.load(state_of(slots[row]), value_size);  // of an earlier step
    wait_for_previous();

    auto stage = [&](int slot, long long t) {  // by one warp
        const T* from = qkv + t * width + key_head * E;
        float q[PARTS], k[PARTS];
        const float2 scales = scales_of<E>([&](int i) {
            q[i / 32] = to_float(from[i]), k[i / 32] = to_float(from[key_heads * E + i]);
            return make_float2(q[i / 32], k[i / 32]);
        });
        UNROLL for (int i = 0; i < PARTS; ++i) {
            queries[slot][i * 32 + in_warp] = q[i] * scales.x;
            keys[slot][i * 32 + in_warp] = k[i] * scales.y;
        }
        if (in_warp < COLUMNS)
            values[slot][in_warp] = to_float(qkv[t * width + 2 * key_heads * E + head * value_size + first_column + in_warp]);
        if (in_warp == 0) tile_gates[slot] = Gates::of(gates + t * gate_stride + head, decay + head, value_heads);
    };
    const int first = starts[row], stop = starts[row + 1];
    for (int tile = first; tile < stop; tile += TILE) {
        const int count = min(TILE, stop - tile);
        __syncthreads();  // the tile before has been read
        for (int slot = warp; slot < count; slot += HEAD_THREADS / 32) stage(slot, tile + slot);
        __syncthreads();
        for (int slot = 0; slot < count; ++slot) {
            const float *key = keys[slot], *query = queries[slot];
            const Vec<float, 2> result =
                state.update(tile_gates[slot], values[slot], [&](int i) { return key[i]; }, [&](int i) { return query[i]; });
            if (state.lane() == 0) {
                T* to = out + ((long long)(tile + slot) * value_heads + head) * value_size + first_column + state.column();
                *reinterpret_cast<Vec<T, 2>*>(to) = {from_float<T>(result.at[0]), from_float<T>(result.at[1])};
            }
            rows.for_each_save(row, tile + slot + 1 - first, [&](int saved) { state.store(state_of(saved), value_size); });
        }
    }
    state.store(state_of(slots[row]), value_size);
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
