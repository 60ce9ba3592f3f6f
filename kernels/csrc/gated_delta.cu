// Layers of the gated delta rule (Yang et al., 2024, 2412.06464): a causal convolution, the rule, and its gated norm, for any number of
// tokens in a row of the batch.
#include "delta_rule.cuh"

constexpr int CONV_TOKENS = 8;  // of a block of causal_conv; at least K - 1

// out[t, c] = silu(sum_j weight[c, j] * x[t - K + 1 + j, c]); what is before a row's first token is in its state [K - 1, channels].
// A thread has V channels and the tokens of a tile. Grid (channels / (128 V), T / CONV_TOKENS + B).
template <typename T, int K, int V>
__global__ void __launch_bounds__(128) causal_conv(
    T* __restrict__ out, const T* __restrict__ x, long long stride, const T* __restrict__ weight, T* states, int channels, int num_rows,
    const int* slots, const int* starts, const int* saves) {
    typedef Vec<T, V> Inputs;
    launch_next();
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    const auto tile = Tile<CONV_TOKENS>::of(starts, num_rows, blockIdx.y);
    wait_for_previous();
    if (channel >= channels || tile.count == 0) return;
    T* state = states + slots[tile.row] * (K - 1ll) * channels + channel;
    auto at = [&](T* of, int place) -> Inputs& { return *reinterpret_cast<Inputs*>(of + (long long)place * channels); };
    auto input = [&](int t) { return *reinterpret_cast<const Inputs*>(x + (tile.start + t) * stride + channel); };  // of the row's token t
    Inputs window[K - 1 + CONV_TOKENS];  // all loads before the first use
    UNROLL for (int j = 0; j < K - 1; ++j) {
        const T* from = tile.first == 0 ? state + (long long)j * channels : x + (tile.start + tile.first - K + 1 + j) * stride + channel;
        window[j] = *reinterpret_cast<const Inputs*>(from);
    }
    UNROLL for (int t = 0; t < CONV_TOKENS; ++t) window[K - 1 + t] = input(tile.first + min(t, tile.count - 1));
    float taps[V][K];
    UNROLL for (int v = 0; v < V; ++v)
        UNROLL for (int j = 0; j < K; ++j) taps[v][j] = to_float(weight[(channel + v) * K + j]);
    UNROLL for (int t = 0; t < CONV_TOKENS; ++t) {
        Inputs result;
        UNROLL for (int v = 0; v < V; ++v) {
            float sum = 0.f;
            UNROLL for (int j = 0; j < K; ++j) sum += taps[v][j] * to_float(window[t + j].at[v]);
            result.at[v] = from_float<T>(silu(sum));
        }
        if (t < tile.count) at(out + channel, tile.start + tile.first + t) = result;
    }
    if (tile.first > 0) return;  // the only block that reads the state writes it
    auto store = [&](T* to, int end) {  // also to the state itself, from its first element on
        UNROLL for (int j = 0; j < K - 1; ++j) at(to, j) = j + end < K - 1 ? at(state, j + end) : input(j + end - K + 1);
    };
    for (int i = 0; saves && i < NUM_SAVES; ++i) {
        const int* pair = saves + (tile.row * NUM_SAVES + i) * 2;
        if (pair[0]) store(states + pair[1] * (K - 1ll) * channels + channel, pair[0]);
    }
    store(state, starts[tile.row + 1] - tile.start);
}

constexpr int STAGED = 16;  // tokens that are staged together
constexpr int COLUMNS = 16, THREADS = LANES * COLUMNS / 2;  // of a block of gated_delta; a thread has two columns

// The rule for one value head and COLUMNS of its columns; S [E, value_size] is the head's state, all in float32:
//     S = g S,  d = beta (v - k S),  S = S + k d,  out = q S
// with q and k scaled to length E^-0.5 and 1, g = exp(-exp(A) softplus(a + bias)) and beta = sigmoid(b).
// qkv [T, 2 key heads E + value heads value_size], gates [T, 2 value heads] with b, then a, rows gate_stride apart; decay
// [2, value heads] with A, then bias. Grid (B * value heads, value_size / COLUMNS).
template <typename T, int E>
__global__ void __launch_bounds__(THREADS, 8) gated_delta(
    T* __restrict__ out, const T* __restrict__ qkv, const T* __restrict__ gates, long long gate_stride, const T* __restrict__ decay,
    float* states, int key_heads, int value_heads, int value_size, const int* slots, const int* starts, const int* saves) {
    constexpr int PARTS = E / 32;
    __shared__ float queries[STAGED][E], keys[STAGED][E], values[STAGED][COLUMNS];
    __shared__ Gates tile_gates[STAGED];
    launch_next();
    const int row = blockIdx.x / value_heads, head = blockIdx.x % value_heads, key_head = head / (value_heads / key_heads);
    const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32, first_column = blockIdx.y * COLUMNS;
    const long long width = 2ll * key_heads * E + (long long)value_heads * value_size;
    const Rows rows = {slots, starts, saves};
    auto state_of = [&](int index) { return states + ((long long)index * value_heads + head) * E * value_size + first_column; };
    StateColumns<E, 2> state;
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
    for (int tile = first; tile < stop; tile += STAGED) {
        const int count = min(STAGED, stop - tile);
        __syncthreads();  // the tile before has been read
        for (int slot = warp; slot < count; slot += THREADS / 32) stage(slot, tile + slot);
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

// out = weight * RMSNorm(x) * silu(gate), for each head of `size` elements, a multiple of V; a warp has one of `count` heads of all
// tokens, and a lane V elements at once.
template <typename T, int V>
__global__ void __launch_bounds__(256) gated_rms_norm(
    T* __restrict__ out, const T* __restrict__ x, const T* __restrict__ gate, long long gate_stride, const T* __restrict__ weight,
    int size, int heads, int count, float eps) {
    typedef Vec<T, V> Elements;
    launch_next();
    const int index = blockIdx.x * 8 + threadIdx.x / 32;
    wait_for_previous();
    if (index >= count) return;
    x += (long long)index * size, out += (long long)index * size, gate += index / heads * gate_stride + index % heads * size;
    const float scale = norm_scale(size, eps, [&](int i) { return to_float(x[i]); });
    for (int i = threadIdx.x % 32 * V; i < size; i += 32 * V) {
        const Elements here = *reinterpret_cast<const Elements*>(x + i), by = *reinterpret_cast<const Elements*>(weight + i);
        const Elements gates = *reinterpret_cast<const Elements*>(gate + i);
        Elements result;
        UNROLL for (int v = 0; v < V; ++v)
            result.at[v] = from_float<T>(to_float(here.at[v]) * scale * to_float(by.at[v]) * silu(to_float(gates.at[v])));
        *reinterpret_cast<Elements*>(out + i) = result;
    }
}
