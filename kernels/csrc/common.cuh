// Shared by all kernels: vectors of up to 16 bytes, float conversion, reductions over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef __nv_fp8_e4m3 fp8;  // stored only

// V elements that are loaded and stored at once: 16 bytes if shapes and addresses allow, else one element.
template <typename T, int V> struct alignas(sizeof(T) * V) Vec { T at[V]; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ fp8 from_float<fp8>(float x) { return fp8(x); }  // saturates

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }  // NVRTC has no INFINITY

__device__ __forceinline__ float warp_sum(float x) {
    for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

// The sum over all threads of the block, on every thread; blockDim.x is a multiple of 32.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    const int warps = blockDim.x / 32;
    return warp_sum(threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : 0.f);
}

// Programmatic dependent launch (sm_90 and later): a kernel launched early may start while the previous kernel still runs. It reads
// only memory that no kernel writes, such as weights, before it waits for the previous kernel to end and its writes to be visible.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
