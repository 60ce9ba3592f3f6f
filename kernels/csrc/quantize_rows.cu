// quantize_rows: rows of activations in FP8 with a scale for each row or for each 128 columns, after a norm, or after SiLU of a GEMM's results.
#include "quantize.cuh"

constexpr int GROUP = 128;      // columns of a scale

// What is quantized: x; its RMSNorm with a weight; or silu(gate) * up of the halves of x, each plus its half of a bias.
enum Source { PLAIN, NORMED, GATED };

// Return 8 columns of a row before their quantization, rounded to T as where they are not quantized; `scale` is that of the norm.
template <typename T, int SOURCE> struct Row {
    const T *x, *vector;  // the weight of the norm, or the bias
    int size;
    float scale;

    DEVICE Vec<T, 8> load(const T* from, int at) const { return *reinterpret_cast<const Vec<T, 8>*>(from + at); }
    DEVICE float bias(int column) const { return vector ? to_float(vector[column]) : 0.f; }
    DEVICE void values(float (&out)[8], int at) const {
        if (at < 0 || at >= size) return;
        const Vec<T, 8> row = load(x, at), factors = SOURCE == NORMED ? load(vector, at) : row, up = SOURCE == GATED ? load(x, size + at) : row;
        UNROLL for (int i = 0; i < 8; ++i) {
            out[i] = to_float(row.at[i]);
            if (SOURCE == NORMED) out[i] = to_float(from_float<T>(out[i] * scale * to_float(factors.at[i])));
            if (SOURCE == GATED) out[i] = to_float(from_float<T>(silu(out[i] + bias(at + i)) * (to_float(up.at[i]) + bias(size + at + i))));
        }
    }
};

DEVICE float greatest(const float (&values)[8]) {
    float peak = 0.f;
    UNROLL for (int i = 0; i < 8; ++i) peak = fmaxf(peak, fabsf(values[i]));
    return peak;
}

// The grid is (T, parts of a row). GROUPED: scales[group * stride + row], else scales[row], and the grid is (T, 1). `first` is the place
// of column 0 in its group.
template <typename T, int SOURCE, bool GROUPED>
__global__ void __launch_bounds__(SOURCE == GATED ? 256 : 1024) quantize_rows(
    fp8* __restrict__ out, float* __restrict__ scales, const T* __restrict__ x, const T* __restrict__ vector, float eps, int size, int first,
    int stride) {
    launch_next();
    wait_for_previous();
    const long long row = blockIdx.x;
    Row<T, SOURCE> source{x + row * size * (SOURCE == GATED ? 2 : 1), vector, size, 1.f};
    if (SOURCE == NORMED) {
        float square = 0.f;
        for (int at = threadIdx.x * 8; at < size; at += blockDim.x * 8) {
            const Vec<T, 8> v = source.load(source.x, at);
            UNROLL for (int i = 0; i < 8; ++i) square += to_float(v.at[i]) * to_float(v.at[i]);
        }
        source.scale = rsqrtf(mean_of(block_sum(square), size) + eps);
    }
    float values[8] = {}, peak = 0.f;
    if (!GROUPED) {
        __shared__ float peaks[32];
        for (int at = threadIdx.x * 8; at < size; at += blockDim.x * 8) source.values(values, at), peak = fmaxf(peak, greatest(values));
        peak = peak_of_warp(peak);
        if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
        __syncthreads();
        for (int w = 0; w < blockDim.x / 32; ++w) peak = fmaxf(peak, peaks[w]);
    }
    const int end = (first + size + GROUP - 1) / GROUP * GROUP;  // whole half-warps leave the loop
    for (int place = (blockIdx.y * blockDim.x + threadIdx.x) * 8; place < end; place += gridDim.y * blockDim.x * 8) {
        const int at = place - first;
        if (GROUPED) UNROLL for (int i = 0; i < 8; ++i) values[i] = 0.f;
        source.values(values, at);
        if (GROUPED) {
            peak = greatest(values);
            const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
            for (int i = 8; i > 0; i >>= 1) peak = fmaxf(peak, __shfl_xor_sync(half, peak, i));
        }
        const Quantizer quantizer(peak);
        if (GROUPED ? threadIdx.x % 16 == 0 : place == 0) scales[GROUPED ? place / GROUP * (long long)stride + row : row] = quantizer.scale;
        if (at < 0 || at >= size) continue;
        UNROLL for (float& value : values) value = quantizer(value);
        *reinterpret_cast<Vec<fp8, 8>*>(out + row * size + at) = round_all<fp8>(values);
    }
}

// Apply the bias to the result of a GEMM; then SiLU * up, or add to `out`; grid (T, parts of a row).
enum Finish { STORE, ADD, SILU };
template <typename T, int FINISH>
__global__ void __launch_bounds__(256) finish_products(
    T* __restrict__ out, const T* __restrict__ products, const T* __restrict__ bias, int features) {
    launch_next();
    wait_for_previous();
    const long long row = blockIdx.x;
    const T* from = products + row * (FINISH == SILU ? 2 : 1) * features;
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8; at < features; at += gridDim.y * blockDim.x * 8) {
        auto finished = [&](int column, float product) { return product + (bias ? to_float(bias[column]) : 0.f); };
        const Vec<T, 8> first = *reinterpret_cast<const Vec<T, 8>*>(from + at);
        const Vec<T, 8> second = FINISH == SILU ? *reinterpret_cast<const Vec<T, 8>*>(from + features + at) : first;
        Vec<T, 8>* to = reinterpret_cast<Vec<T, 8>*>(out + row * features + at);
        const Vec<T, 8> before = FINISH == ADD ? *to : first;
        float values[8];
        UNROLL for (int i = 0; i < 8; ++i) {
            values[i] = finished(at + i, to_float(first.at[i]));
            if (FINISH == SILU) values[i] = silu(values[i]) * finished(features + at + i, to_float(second.at[i]));
            if (FINISH == ADD) values[i] += to_float(before.at[i]);
        }
        *to = round_all<T>(values);
    }
}
