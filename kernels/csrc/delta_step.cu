// A layer of the gated delta rule for one token of each row: the convolution, the rule and the gated norm in one launch. All of a
// token's arithmetic is that of gated_delta.cu, in the same order: the results are bitwise identical.
//
// A block has COLUMNS columns of one value head. The blocks of the value heads of a key head are a cluster: they have all read the
// inputs of the convolution before one of them overwrites these, and those of a head exchange their results for the norm. A block stores
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
    float *results = memory, *mixed = results + COLUMNS;
    launch_next();
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
    float recent[TURNS][K];  // recent[K - 1] is the present input
    Vec<T, K> weights[TURNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int channel = channel_of(min(turn * THREADS + (int)threadIdx.x, CHANNELS - 1));
        weights[turn] = *reinterpret_cast<const Vec<T, K>*>(taps + channel * K);
        UNROLL for (int j = 0; j < K - 1; ++j) recent[turn][j] = to_float(inputs_of(slot, channel)[j * channels]);
    }
    prefetch_line(decay + head + threadIdx.x % 2 * value_heads);
    prefetch_line(norm + first_column);
    wait_for_previous();

    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS) break;
        recent[turn][K - 1] = to_float(x[row * x_stride + channel_of(i)]);
        float sum = 0.f;
        UNROLL for (int j = 0; j < K; ++j) sum += to_float(weights[turn].at[j]) * recent[turn][j];
        mixed[i] = to_float(from_float<T>(silu(sum)));
    }
    float gate = 0.f, norm_weight = 0.f;  // of the column that this thread writes
    if (threadIdx.x < COLUMNS) {
        gate = to_float(z[row * z_stride + head * value_size + first_column + threadIdx.x]);
        norm_weight = to_float(norm[first_column + threadIdx.x]);
    }
    const Gates token = Gates::of(gates + row * gate_stride + head, decay + head, value_heads);
    __syncthreads();
    const float2 scales = scales_of<E>([&](int i) { return make_float2(mixed[i], mixed[E + i]); });
    const Vec<float, W> result = state.update(
        token, mixed + 2 * E, [&](int i) { return mixed[E + i] * scales.y; }, [&](int i) { return mixed[i] * scales.x; });
    if (state.lane() == 0)
        UNROLL for (int c = 0; c < W; ++c) results[state.column() + c] = to_float(from_float<T>(result.at[c]));
    arrive_at_cluster();  // with results, and with the inputs read; it would wait for stores that are under way
    state.store(sums_of(slot), value_size);
    rows.for_each_save(row, 1, [&](int saved) { state.store(sums_of(saved), value_size); });
    wait_for_cluster();

    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS || (i < 2 * E && i * blocks / (2 * E) != place)) continue;
        auto store = [&](int to) {
            UNROLL for (int j = 0; j < K - 1; ++j) inputs_of(to, channel_of(i))[j * channels] = from_float<T>(recent[turn][j + 1]);
        };
        store(slot);
        rows.for_each_save(row, 1, store);
    }
    if (threadIdx.x / 32 * 32 < COLUMNS) {  // whole warps
        const float scale = norm_scale(value_size, eps, [&](int i) {
            const float* at = results + i % COLUMNS;
            return parts > 1 ? load_float_of_block(at, place - part + i / COLUMNS) : *at;
        });
        if (threadIdx.x < COLUMNS) {
            const int i = first_column + threadIdx.x;
            out[((long long)row * value_heads + head) * value_size + i] =
                from_float<T>(results[threadIdx.x] * scale * norm_weight * silu(gate));
        }
    }
    if (parts > 1) {  // no block ends, and gives its memory back, before the others have read it
        arrive_without_memory();
        wait_for_cluster();
    }
}
