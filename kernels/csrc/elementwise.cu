// Memory-bound kernels: RMSNorm with residual, SiLU * up, embedding lookup, and updates of the token and page tables.
#include "common.cuh"

// One block per row of `size` elements, N vectors per thread in registers. With a residual: residual += x, norm of the unrounded sum.
template <typename T, int V, int N>
__global__ void __launch_bounds__(256) rms_norm(
    T* __restrict__ out, const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight, int size, float eps) {
    launch_next();
    for (int i = threadIdx.x * V; i < size; i += blockDim.x * V) prefetch_line(weight + i);
    wait_for_previous();
    const long long row = (long long)blockIdx.x * size;
    float value[N][V];
    float squares = 0.f;
    UNROLL for (int n = 0; n < N; ++n) {
        const int i = (n * blockDim.x + threadIdx.x) * V;
        if (i >= size) break;
        const Vec<T, V> in = *reinterpret_cast<const Vec<T, V>*>(x + row + i);
        Vec<T, V> sum;
        if (residual) sum = *reinterpret_cast<const Vec<T, V>*>(residual + row + i);
        UNROLL for (int j = 0; j < V; ++j) {
            const float total = to_float(in.at[j]) + (residual ? to_float(sum.at[j]) : 0.f);
            value[n][j] = total;
            squares += total * total;
            sum.at[j] = from_float<T>(total);
        }
        if (residual) *reinterpret_cast<Vec<T, V>*>(residual + row + i) = sum;
    }
    const float scale = rsqrtf(mean_of(block_sum(squares), size) + eps);
    UNROLL for (int n = 0; n < N; ++n) {
        const int i = (n * blockDim.x + threadIdx.x) * V;
        if (i >= size) break;
        const Vec<T, V> w = *reinterpret_cast<const Vec<T, V>*>(weight + i);
        Vec<T, V> result;
        UNROLL for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(value[n][j] * scale * to_float(w.at[j]));
        *reinterpret_cast<Vec<T, V>*>(out + row + i) = result;
    }
}

// out[t, part]: the sum of squares of the first `first` elements of row t, or of the `second` after them. Grid (T, 2).
template <typename T>
__global__ void __launch_bounds__(256) sum_squares(float* __restrict__ out, const T* __restrict__ x, int columns, int first, int second) {
    launch_next();
    wait_for_previous();
    const T* from = x + (long long)blockIdx.x * columns + (blockIdx.y ? first : 0);
    float squares = 0.f;
    for (int i = threadIdx.x; i < (blockIdx.y ? second : first); i += blockDim.x) squares += to_float(from[i]) * to_float(from[i]);
    squares = block_sum(squares);
    if (threadIdx.x == 0) out[2 * blockIdx.x + blockIdx.y] = squares;
}

struct Silu { DEVICE float operator()(float x) const { return silu(x); } };
struct Gelu {  // the tanh form: sqrt(2 / pi) is 0.79788456
    DEVICE float operator()(float x) const { return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x))); }
};

// x [T, 2 size] -> out [T, size]; grid (T, parts).
template <typename T, int V, typename Activation> DEVICE void gated(T* out, const T* x, int size, Activation activation) {
    launch_next();
    wait_for_previous();
    const T* gate = x + 2ll * blockIdx.x * size;
    const T* up = gate + size;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * V; i < size; i += gridDim.y * blockDim.x * V) {
        const Vec<T, V> a = *reinterpret_cast<const Vec<T, V>*>(gate + i), b = *reinterpret_cast<const Vec<T, V>*>(up + i);
        Vec<T, V> result;
        UNROLL for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(activation(to_float(a.at[j])) * to_float(b.at[j]));
        *reinterpret_cast<Vec<T, V>*>(out + (long long)blockIdx.x * size + i) = result;
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(256) silu_and_mul(T* __restrict__ out, const T* __restrict__ x, int size) {
    gated<T, V>(out, x, size, Silu());
}

template <typename T, int V>
__global__ void __launch_bounds__(256) gelu_and_mul(T* __restrict__ out, const T* __restrict__ x, int size) {
    gated<T, V>(out, x, size, Gelu());
}

// x[t] *= sigmoid(gate[t]), for rows of gate gate_stride apart; grid (T, parts).
template <typename T, int V>
__global__ void __launch_bounds__(256) multiply_by_sigmoid(T* __restrict__ x, const T* __restrict__ gate, long long gate_stride, int size) {
    launch_next();
    wait_for_previous();
    x += (long long)blockIdx.x * size;
    gate += blockIdx.x * gate_stride;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * V; i < size; i += gridDim.y * blockDim.x * V) {
        Vec<T, V> product = *reinterpret_cast<const Vec<T, V>*>(x + i);
        const Vec<T, V> by = *reinterpret_cast<const Vec<T, V>*>(gate + i);
        UNROLL for (int j = 0; j < V; ++j) product.at[j] = from_float<T>(to_float(product.at[j]) / (1.f + __expf(-to_float(by.at[j]))));
        *reinterpret_cast<Vec<T, V>*>(x + i) = product;
    }
}

// out[t] = weight[ids[t] - first_row], or zero if that row is in another shard. Grid (T, parts): a block has a part of a row of
// `vectors` vectors W. One unsigned comparison of a row index checks both bounds.
template <typename W, typename Id>
__global__ void __launch_bounds__(256) gather_rows(
    W* __restrict__ out, const W* __restrict__ weight, const Id* __restrict__ ids, long long first_row, long long rows, int vectors) {
    const long long t = blockIdx.x;
    const unsigned long long row = (unsigned long long)((long long)ids[t] - first_row);
    const bool owned = row < (unsigned long long)rows;
    const W* source = weight + (owned ? row : 0) * vectors;
    W* target = out + t * vectors;
    const int step = blockDim.x * gridDim.y;
    const W zero{};
    #pragma unroll 4
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < vectors; i += step)
        target[i] = owned ? source[i] : zero;
}

// token_ids[b] = tokens[slots[b], positions[b]], and pages[slots[b], positions[b] / page_size] = kv_slots[b] / page_size.
extern "C" __global__ void begin_decode(
    int* __restrict__ token_ids, const int* __restrict__ tokens, long long tokens_stride, int* __restrict__ pages, long long pages_stride,
    const int* __restrict__ slots, const int* __restrict__ positions, const int* __restrict__ kv_slots, int page_size, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    token_ids[row] = tokens[slots[row] * tokens_stride + positions[row]];
    if (kv_slots[row] >= 0) pages[slots[row] * pages_stride + positions[row] / page_size] = kv_slots[row] / page_size;
}

// tokens[slots[b], positions[b] + 1] = new_tokens[b]
extern "C" __global__ void append_tokens(
    int* __restrict__ tokens, long long tokens_stride, const int* __restrict__ slots, const int* __restrict__ positions,
    const int* __restrict__ new_tokens, int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) tokens[slots[row] * tokens_stride + positions[row] + 1] = new_tokens[row];
}
