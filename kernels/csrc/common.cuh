// Shared by all kernels: vectors of up to 16 bytes, float conversion, reductions over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef __nv_fp8_e4m3 fp8;  // stored only

// V elements that are loaded and stored at once: 16 bytes if shapes and addresses allow, else one element.
template <typename T, int V> struct alignas(sizeof(T) * V) Vec { T at[V]; };

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE float to_float(f16 x) { return __half2float(x); }

template <typename T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> DEVICE f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> DEVICE fp8 from_float<fp8>(float x) { return fp8(x); }  // saturates

// Round a float to T, and that to the type of the cache: what a kernel stores is what another one reads and stores again.
template <typename C, typename T> DEVICE C convert(T x) { return from_float<C>(to_float(x)); }
template <> DEVICE bf16 convert<bf16, bf16>(bf16 x) { return x; }
template <> DEVICE f16 convert<f16, f16>(f16 x) { return x; }
template <> DEVICE float convert<float, float>(float x) { return x; }
template <> DEVICE f16 convert<f16, bf16>(bf16 x) {  // saturates
    const float value = to_float(x);
    return from_float<f16>(value > 65504.f ? 65504.f : value < -65504.f ? -65504.f : value);
}

template <typename T, int V> DEVICE Vec<T, V> round_all(const float (&values)[V]) {
    Vec<T, V> rounded;
    UNROLL for (int i = 0; i < V; ++i) rounded.at[i] = from_float<T>(values[i]);
    return rounded;
}

DEVICE float silu(float x) { return x / (1.f + __expf(-x)); }
DEVICE float fast_silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }  // less code, two more units in the last place
DEVICE float tanh_of(float x) { return 1.f - __fdividef(2.f, 1.f + __expf(2.f * x)); }
DEVICE float exp2_of(float x) {  // 0 where 2^x is subnormal
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float approximate_inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x if both are normal numbers.
DEVICE float inverse_of(float x) {
    const float y = approximate_inverse(x);
    return fmaf(fmaf(-x, y, 1.f), y, y);
}
// x / divisor without the branches and the call of `/`, but its bits, for the inverse from inverse_of and finite x. The sign of 0 is
// lost, and quotients of subnormal numbers may differ.
DEVICE float divide(float x, float divisor, float inverse) {
    float quotient = x * inverse;
    quotient = fmaf(fmaf(-divisor, quotient, x), inverse, quotient);
    return fmaf(fmaf(-divisor, quotient, x), inverse, quotient);
}
DEVICE float infinity() { return __int_as_float(0x7f800000); }  // NVRTC has no INFINITY

// The index of the warp. Because one lane gives it to the others, the compiler knows that they branch alike.
DEVICE int common_warp_id() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); }

DEVICE float warp_sum(float x) {
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// Return the sum over all threads of the block, on every thread; blockDim.x is a multiple of 32.
DEVICE float block_sum(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    const int warps = blockDim.x / 32;
    return warp_sum(threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : 0.f);
}

// sum / count, for a mean of squares.
DEVICE float mean_of(float sum, int count) { return sum < infinity() ? divide(sum, count, inverse_of(count)) : sum; }

// Programmatic dependent launch (sm_90 and later): a kernel launched early may start while the previous kernel still runs. Until it
// has waited for the end of the previous kernel, it reads only memory that was complete when the last ordinary launch started:
// weights, tables of the step, keys of earlier steps.
DEVICE void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Bring a line of 128 bytes to L2: weights that a kernel needs after the wait come from memory otherwise.
DEVICE void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
