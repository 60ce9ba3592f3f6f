// quantize_rows: rows of activations in FP8 with a scale for each row or for each 128 columns, after a norm or SiLU * up.
#include "common.cuh"

enum Source { PLAIN, NORM, SILU };  // x, its RMSNorm, or silu(first half) * second half; scaled_gemm.py uses these names

constexpr int GROUP = 128;      // columns of a scale
constexpr float MAXIMUM = 448.f;  // of FP8

// Return 8 columns of a row before their quantization, rounded to T as where they are not quantized; `scale` is that of the norm.
template <typename T, int SOURCE> struct Row {
    const T *x, *norm;
    int size;
    float scale;

    DEVICE Vec<T, 8> load(const T* from, int at) const { return *reinterpret_cast<const Vec<T, 8>*>(from + at); }
    DEVICE void values(float (&out)[8], int at) const {
        const Vec<T, 8> first = load(x, at), second = SOURCE == SILU ? load(x + size, at) : SOURCE == NORM ? load(norm, at) : first;
        UNROLL for (int i = 0; i < 8; ++i) {
            const float value = to_float(first.at[i]), other = to_float(second.at[i]);
            out[i] = SOURCE == PLAIN ? value : to_float(from_float<T>(SOURCE == NORM ? value * scale * other : silu(value) * other));
        }
    }
};

DEVICE float greatest(const float (&values)[8]) {
    float peak = 0.f;
    UNROLL for (int i = 0; i < 8; ++i) peak = fmaxf(peak, fabsf(values[i]));
    return peak;
}

// The grid is T rows; size is a multiple of GROUP. GROUPED: scales[group * stride + row], else scales[row].
template <typename T, int SOURCE, bool GROUPED>
__global__ void __launch_bounds__(256) quantize_rows(
    fp8* __restrict__ out, float* __restrict__ scales, const T* __restrict__ x, const T* __restrict__ norm, float eps, int size, int stride) {
    launch_next();
    wait_for_previous();
    const long long row = blockIdx.x;
    Row<T, SOURCE> source{x + row * (SOURCE == SILU ? 2 : 1) * size, norm, size, 1.f};
    if (SOURCE == NORM) {
        float square = 0.f;
        for (int at = threadIdx.x * 8; at < size; at += blockDim.x * 8) {
            const Vec<T, 8> v = source.load(source.x, at);
            UNROLL for (int i = 0; i < 8; ++i) square += to_float(v.at[i]) * to_float(v.at[i]);
        }
        source.scale = rsqrtf(block_sum(square) / size + eps);
    }
    float values[8], peak = 0.f;
    if (!GROUPED) {
        __shared__ float peaks[32];
        for (int at = threadIdx.x * 8; at < size; at += blockDim.x * 8) source.values(values, at), peak = fmaxf(peak, greatest(values));
        for (int i = 16; i > 0; i >>= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, i));
        if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
        __syncthreads();
        for (int w = 0; w < blockDim.x / 32; ++w) peak = fmaxf(peak, peaks[w]);
    }
    for (int at = threadIdx.x * 8; at < size; at += blockDim.x * 8) {  // sizes are such that whole half-warps leave
        source.values(values, at);
        if (GROUPED) {
            peak = greatest(values);
            const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
            for (int i = 8; i > 0; i >>= 1) peak = fmaxf(peak, __shfl_xor_sync(half, peak, i));
        }
        const float scale = fmaxf(peak, 1e-10f) / MAXIMUM;
        if (GROUPED ? threadIdx.x % 16 == 0 : at == 0) scales[GROUPED ? at / GROUP * (long long)stride + row : row] = scale;
        UNROLL for (int i = 0; i < 8; ++i) values[i] = fminf(fmaxf(values[i] / scale, -MAXIMUM), MAXIMUM);
        *reinterpret_cast<Vec<fp8, 8>*>(out + row * size + at) = round_all<fp8>(values);
    }
}

// Apply the scales of a GEMM of FP8 numbers, and the bias; then SiLU * up, or add to `out`; grid (T, parts of a row).
enum Finish { STORE, ADD, GATE };
template <typename T, int FINISH>
__global__ void __launch_bounds__(256) scale_products(
    T* __restrict__ out, const T* __restrict__ products, const float* __restrict__ row_scales, const float* __restrict__ column_scales,
    int row_shift, const T* __restrict__ bias, int features) {
    launch_next();
    wait_for_previous();
    const long long row = blockIdx.x;
    const T* from = products + row * (FINISH == GATE ? 2 : 1) * features;
    const float scale = row_scales ? row_scales[row] : 1.f;
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8; at < features; at += gridDim.y * blockDim.x * 8) {
        auto finished = [&](int column, float product) {
            return product * scale * (column_scales ? column_scales[column >> row_shift] : 1.f) + (bias ? to_float(bias[column]) : 0.f);
        };
        const Vec<T, 8> first = *reinterpret_cast<const Vec<T, 8>*>(from + at);
        const Vec<T, 8> second = FINISH == GATE ? *reinterpret_cast<const Vec<T, 8>*>(from + features + at) : first;
        Vec<T, 8>* to = reinterpret_cast<Vec<T, 8>*>(out + row * features + at);
        const Vec<T, 8> before = FINISH == ADD ? *to : first;
        float values[8];
        UNROLL for (int i = 0; i < 8; ++i) {
            values[i] = finished(at + i, to_float(first.at[i]));
            if (FINISH == GATE) values[i] = silu(values[i]) * finished(features + at + i, to_float(second.at[i]));
            if (FINISH == ADD) values[i] += to_float(before.at[i]);
        }
        *to = round_all<T>(values);
    }
}
