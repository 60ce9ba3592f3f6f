// What happens to a row of hidden states between two matrix products: norm with residual, rotary positions, SiLU * up.
#include "common.cuh"

// One block a row of `size` elements, N vectors a thread, held in registers. With a residual: residual += x, norm of the unrounded sum.
template <typename T, int V, int N>
__global__ void __launch_bounds__(256) rms_norm(
    T* __restrict__ out, const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight, int size, float eps) {
    const long long row = (long long)blockIdx.x * size;
    float value[N][V];
    float squares = 0.f;
    #pragma unroll
    for (int n = 0; n < N; ++n) {
        const int i = (n * blockDim.x + threadIdx.x) * V;
        if (i >= size) break;
        const Vec<T, V> in = *reinterpret_cast<const Vec<T, V>*>(x + row + i);
        Vec<T, V> sum;
        if (residual) sum = *reinterpret_cast<const Vec<T, V>*>(residual + row + i);
        #pragma unroll
        for (int j = 0; j < V; ++j) {
            const float total = to_float(in.at[j]) + (residual ? to_float(sum.at[j]) : 0.f);
            value[n][j] = total;
            squares += total * total;
            sum.at[j] = from_float<T>(total);
        }
        if (residual) *reinterpret_cast<Vec<T, V>*>(residual + row + i) = sum;
    }
    const float scale = rsqrtf(block_sum(squares) / size + eps);
    #pragma unroll
    for (int n = 0; n < N; ++n) {
        const int i = (n * blockDim.x + threadIdx.x) * V;
        if (i >= size) break;
        const Vec<T, V> w = *reinterpret_cast<const Vec<T, V>*>(weight + i);
        Vec<T, V> result;
        #pragma unroll
        for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(value[n][j] * scale * to_float(w.at[j]));
        *reinterpret_cast<Vec<T, V>*>(out + row + i) = result;
    }
}

// Grid (T), threads over (head, pair); the first q_heads heads are q's, the others k's. Strides of a token in elements.
template <typename T, typename Position>
__global__ void __launch_bounds__(256) rope(
    T* __restrict__ q, T* __restrict__ k, const Position* __restrict__ positions, const float* __restrict__ cos_sin,
    int rows, int q_heads, int heads, int head_dim, long long q_stride, long long k_stride) {
    if ((unsigned long long)positions[blockIdx.x] >= rows) return;  // beyond the table: leave the token alone
    const int half = head_dim / 2;
    const float* row = cos_sin + (long long)positions[blockIdx.x] * head_dim;
    for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
        const int head = i / half, pair = i % half;
        T* x = head < q_heads ? q + blockIdx.x * q_stride + head * head_dim : k + blockIdx.x * k_stride + (head - q_heads) * head_dim;
        const float cos = row[pair], sin = row[half + pair], first = to_float(x[pair]), second = to_float(x[half + pair]);
        x[pair] = from_float<T>(first * cos - second * sin);
        x[half + pair] = from_float<T>(second * cos + first * sin);
    }
}

// x [T, 2 size] -> out [T, size]; grid (T, parts).
template <typename T, int V>
__global__ void __launch_bounds__(256) silu_and_mul(T* __restrict__ out, const T* __restrict__ x, int size) {
    const T* gate = x + 2ll * blockIdx.x * size;
    const T* up = gate + size;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * V; i < size; i += gridDim.y * blockDim.x * V) {
        const Vec<T, V> a = *reinterpret_cast<const Vec<T, V>*>(gate + i), b = *reinterpret_cast<const Vec<T, V>*>(up + i);
        Vec<T, V> result;
        #pragma unroll
        for (int j = 0; j < V; ++j) {
            const float g = to_float(a.at[j]);
            result.at[j] = from_float<T>(g / (1.f + __expf(-g)) * to_float(b.at[j]));
        }
        *reinterpret_cast<Vec<T, V>*>(out + (long long)blockIdx.x * size + i) = result;
    }
}
