// A layer of the gated delta rule for one token of each row: the convolution, the rule and the gated norm in one launch. All of a
// token's arithmetic is that of gated_delta.cu, in the same order: the results are bitwise identical.
//
// A block has COLUMNS columns of one value head. The blocks of the value heads of a key head are a cluster: they have all read the
// inputs of the convolution before one of them overwrites these, and those of a head exchange sums for the norm. A block stores
// the state after its arrival at the cluster's barrier, because an arrival lasts until earlier stores have ended.
#include "cluster.cuh"
#include "delta_rule.cuh"

// x [B, 2 key heads E + value heads value_size], z [B, value heads value_size] and gates [B, 2 value heads] have rows x_stride, z_stride
// and gate_stride apart. inputs [states, K - 1, channels] and sums [states, value heads, E, value_size] are the states. A thread has W
// columns. The grid is (B * value heads * value_size / COLUMNS, 1), and a cluster the blocks of `group` value heads.
template <typename T, int E, int K, int W, int COLUMNS>
__global__ void __launch_bounds__(LANES * COLUMNS / W, 512 / (LANES * COLUMNS / W)) delta_step(
    T* __restrict__ out, const T* __restrict__ x, long long x_stride, const T* __restrict__ z, long long z_stride,
    const T* __restrict__ gates, long long gate_stride, const T* __restrict__ taps, const T* __restrict__ decay,
    const T* __restrict__ norm, T* inputs, float* sums, int key_heads, int group, int value_size, float eps, const int* slots,
    const int* starts, const int* saves) {
    constexpr int THREADS = LANES * COLUMNS / W, CHANNELS = 2 * E + COLUMNS, TURNS = (CHANNELS + THREADS - 1) / THREADS;
    extern __shared__ __align__(16) float memory[];
    float *results = memory, *squares = results + COLUMNS, *mixed = squares + 32;  // squares: sums for four columns each, of the whole head
    launch_next();
    arrive_without_memory();  // waited for before blocks write to each other's memory
    const int parts = value_size / COLUMNS, blocks = parts * group, place = blockIdx.x % blocks, part = place % parts;
    const int first_column = part * COLUMNS, value_heads = key_heads * group, row = blockIdx.x / blocks / key_heads;
    const int key_head = blockIdx.x / blocks % key_heads, head = key_head * group + place / parts, lane = threadIdx.x % 32;
    const long long channels = 2ll * key_heads * E + (long long)value_heads * value_size;
    const Rows rows = {slots, starts, saves};
    auto channel_of = [&](int i) {  // of the block's q, k and v
        if (i < 2 * E) return (i / E * key_heads + key_head) * E + i % E;
        return 2 * key_heads * E + head * value_size + first_column + i - 2 * E;
    };
    auto inputs_of = [&](int state, int channel) { return inputs + state * (K - 1) * channels + channel; };
    auto sums_of = [&](int state) { return sums + ((long long)state * value_heads + head) * E * value_size + first_column; };

    // The states are those of an earlier step: they load before the kernel that computes x has ended.
    const int slot = slots[row];
    StateColumns<E, W> state;
    state.load(sums_of(slot), value_size);
    T recent[TURNS][K];  // recent[K - 1] is the present input
    Vec<T, K> weights[TURNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int channel = channel_of(min(turn * THREADS + (int)threadIdx.x, CHANNELS - 1));
        weights[turn] = *reinterpret_cast<const Vec<T, K>*>(taps + channel * K);
        UNROLL for (int j = 0; j < K - 1; ++j) recent[turn][j] = inputs_of(slot, channel)[j * channels];
    }
    const T rate = decay[head], bias = decay[value_heads + head];
    prefetch_line(norm + first_column);
    wait_for_previous();

    UNROLL for (int turn = 0; turn < TURNS; ++turn)  // all loads before the first use
        recent[turn][K - 1] = x[row * x_stride + channel_of(min(turn * THREADS + (int)threadIdx.x, CHANNELS - 1))];
    const T b = gates[row * gate_stride + head], a = gates[row * gate_stride + value_heads + head];
    const bool finishes = threadIdx.x < COLUMNS;  // one column
    const T gate = finishes ? z[row * z_stride + head * value_size + first_column + threadIdx.x] : from_float<T>(0.f);
    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS) break;
        float sum = 0.f;
        UNROLL for (int j = 0; j < K; ++j) sum += to_float(weights[turn].at[j]) * to_float(recent[turn][j]);
        mixed[i] = to_float(from_float<T>(silu(sum)));
    }
    const Gates token = Gates::of(to_float(b), to_float(a), to_float(rate), to_float(bias));
    __syncthreads();
    const float2 scales = scales_of<E>([&](int i) { return make_float2(mixed[i], mixed[E + i]); });
    const Vec<float, W> result = state.update(
        token, mixed + 2 * E, [&](int i) { return mixed[E + i] * scales.y; }, [&](int i) { return mixed[i] * scales.x; });
    // The norm's sums over four adjacent columns, in order; with two columns a thread continues the sum of the thread before.
    float rounded[W], square = 0.f;
    UNROLL for (int c = 0; c < W; ++c) rounded[c] = to_float(from_float<T>(result.at[c]));
    UNROLL for (int c = 0; c < W; ++c) square += rounded[c] * rounded[c];
    if (W == 2) {
        float sum = __shfl_up_sync(0xffffffffu, square, 1);
        UNROLL for (int c = 0; c < W; ++c) sum += rounded[c] * rounded[c];
        if (threadIdx.x % 2) square = sum;
    }
    wait_for_cluster();
    if (state.lane() == 0) {
        UNROLL for (int c = 0; c < W; ++c) results[state.column() + c] = rounded[c];
        float* of_norm = squares + (first_column + state.column()) / 4;
        if (W == 4 || threadIdx.x % 2)
            ROLLED for (int p = 0; p < parts; ++p) store_float_of_block(of_norm, place - part + p, square);
    }
    arrive_at_cluster();  // with results, and with the inputs read; it would wait for stores that are under way
    state.store(sums_of(slot), value_size);
    rows.for_each_save(row, 1, [&](int saved) { state.store(sums_of(saved), value_size); });
    const T norm_weight = finishes ? norm[first_column + threadIdx.x] : from_float<T>(0.f);
    wait_for_cluster();

    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS || (i < 2 * E && i * blocks / (2 * E) != place)) continue;
        auto store = [&](int to) {
            UNROLL for (int j = 0; j < K - 1; ++j) inputs_of(to, channel_of(i))[j * channels] = recent[turn][j + 1];
        };
        store(slot);
        rows.for_each_save(row, 1, store);
    }
    if (threadIdx.x / 32 * 32 >= COLUMNS) return;  // whole warps
    const float scale = rsqrtf(warp_sum(lane < value_size / 4 ? squares[lane] : 0.f) / value_size + eps);
    if (!finishes) return;
    const int i = first_column + threadIdx.x;
    out[((long long)row * value_heads + head) * value_size + i] =
        from_float<T>(results[threadIdx.x] * scale * to_float(norm_weight) * silu(to_float(gate)));
}
