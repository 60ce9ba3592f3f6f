// Rows of hidden states between two GEMMs: RMSNorm with residual, SiLU * up.
#include "common.cuh"

// One block per row of `size` elements, N vectors per thread in registers. With a residual: residual += x, norm of the unrounded
// sum.
template <typename T, int V, int N>
__global__ void __launch_bounds__(256) rms_norm(
    T* __restrict__ out, const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight, int size, float eps) {
    launch_next();
    wait_for_previous();
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

// x [T, 2 size] -> out [T, size]; grid (T, parts).
template <typename T, int V>
__global__ void __launch_bounds__(256) silu_and_mul(T* __restrict__ out, const T* __restrict__ x, int size) {
    launch_next();
    wait_for_previous();
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
