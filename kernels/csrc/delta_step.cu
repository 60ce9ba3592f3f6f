// A layer of the gated delta rule for one token of each row: the convolution, the rule and the gated norm in one launch. All of a
// token's arithmetic is that of gated_delta.cu, in the same order: the results are bitwise identical.
//
// A block has COLUMNS columns of the GROUP value heads of one key head. The blocks of a key head are a cluster: together they read the
// inputs of the convolution before one of them overwrites these, and they exchange their results for the norm.
#include "cluster.cuh"
#include "delta_rule.cuh"

// x [B, 2 key heads E + value heads value_size], z [B, value heads value_size] and gates [B, 2 value heads] have rows x_stride, z_stride
// and gate_stride apart. inputs [states, K - 1, channels] and sums [states, value heads, E, value_size] are the states. The grid is
// (B * key heads * value_size / COLUMNS, 1), and a cluster value_size / COLUMNS blocks.
template <typename T, int E, int K, int GROUP>
__global__ void __launch_bounds__(HEAD_THREADS * GROUP) delta_step(
    T* __restrict__ out, const T* __restrict__ x, long long x_stride, const T* __restrict__ z, long long z_stride,
    const T* __restrict__ gates, long long gate_stride, const T* __restrict__ taps, const T* __restrict__ decay,
    const T* __restrict__ norm, T* inputs, float* sums, int key_heads, int value_size, float eps, const int* slots, const int* starts,
    const int* saves) {
    constexpr int THREADS = HEAD_THREADS * GROUP, CHANNELS = 2 * E + GROUP * COLUMNS, TURNS = (CHANNELS + THREADS - 1) / THREADS;
    extern __shared__ __align__(16) float memory[];
    float *results = memory, *head_results = results + GROUP * COLUMNS, *mixed = head_results + GROUP * value_size;
    launch_next();
    const int parts = value_size / COLUMNS, part = blockIdx.x % parts, first_column = part * COLUMNS;
    const int key_head = blockIdx.x / parts % key_heads, row = blockIdx.x / parts / key_heads, value_heads = key_heads * GROUP;
    const int in_group = threadIdx.x / HEAD_THREADS, head = key_head * GROUP + in_group, lane = threadIdx.x % 32;
    const long long channels = 2ll * key_heads * E + (long long)value_heads * value_size;
    const Rows rows = {slots, starts, saves};
    auto channel_of = [&](int i) {  // of the block's q, k and v
        if (i < 2 * E) return (i / E * key_heads + key_head) * E + i % E;
        return 2 * key_heads * E + (key_head * GROUP + (i - 2 * E) / COLUMNS) * value_size + first_column + i % COLUMNS;
    };
    auto inputs_of = [&](int state, int channel) { return inputs + state * (K - 1) * channels + channel; };
    auto sums_of = [&](int state) { return sums + ((long long)state * value_heads + head) * E * value_size + first_column; };

    // The states are those of an earlier step: they load before the kernel that computes x has ended.
    const int slot = slots[row];
    TwoColumns<E> state;
    state.load(sums_of(slot), value_size);
    float recent[TURNS][K];  // recent[K - 1] is the present input
    Vec<T, K> weights[TURNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int channel = channel_of(min(turn * THREADS + (int)threadIdx.x, CHANNELS - 1));
        weights[turn] = *reinterpret_cast<const Vec<T, K>*>(taps + channel * K);
        UNROLL for (int j = 0; j < K - 1; ++j) recent[turn][j] = to_float(inputs_of(slot, channel)[j * channels]);
    }
    wait_for_previous();

    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS) break;
        recent[turn][K - 1] = to_float(x[row * x_stride + channel_of(i)]);
        float sum = 0.f;
        UNROLL for (int j = 0; j < K; ++j) sum += to_float(weights[turn].at[j]) * recent[turn][j];
        mixed[i] = to_float(from_float<T>(silu(sum)));
    }
    float gate = 0.f, norm_weight = 0.f;  // of the column that this lane writes
    if (lane < COLUMNS) {
        gate = to_float(z[row * z_stride + head * value_size + first_column + lane]);
        norm_weight = to_float(norm[first_column + lane]);
    }
    const Gates token = Gates::of(gates + row * gate_stride + head, decay + head, value_heads);
    __syncthreads();
    const float2 scales = scales_of<E>([&](int i) { return make_float2(mixed[i], mixed[E + i]); });
    const Vec<float, 2> result = state.update(
        token, mixed + 2 * E + in_group * COLUMNS, [&](int i) { return mixed[E + i] * scales.y; },
        [&](int i) { return mixed[i] * scales.x; });
    if (state.lane() == 0)
        UNROLL for (int c = 0; c < 2; ++c)
            results[in_group * COLUMNS + state.column() + c] = to_float(from_float<T>(result.at[c]));
    state.store(sums_of(slot), value_size);
    rows.for_each_save(row, 1, [&](int saved) { state.store(sums_of(saved), value_size); });
    sync_cluster();  // all blocks have read the inputs, and have their results

    UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * THREADS + threadIdx.x;
        if (i >= CHANNELS || (i < 2 * E && i * parts / (2 * E) != part)) continue;
        auto store = [&](int to) {
            UNROLL for (int j = 0; j < K - 1; ++j) inputs_of(to, channel_of(i))[j * channels] = from_float<T>(recent[turn][j + 1]);
        };
        store(slot);
        rows.for_each_save(row, 1, store);
    }
    if (threadIdx.x % HEAD_THREADS < 32) {  // one warp of each head
        float* whole = head_results + in_group * value_size;
        if (lane * 4 < value_size) {
            const float4 four = load_of_block(results + in_group * COLUMNS + lane % (COLUMNS / 4) * 4, lane / (COLUMNS / 4));
            *reinterpret_cast<float4*>(whole + lane * 4) = four;
        }
        __syncwarp();
        float squares = 0.f;
        for (int i = lane; i < value_size; i += 32) squares += whole[i] * whole[i];
        const float scale = rsqrtf(warp_sum(squares) / value_size + eps);
        if (lane < COLUMNS) {
            const int i = first_column + lane;
            out[((long long)row * value_heads + head) * value_size + i] = from_float<T>(whole[i] * scale * norm_weight * silu(gate));
        }
    }
    sync_cluster();  // no block ends, and gives its memory back, before the others have read it
}
