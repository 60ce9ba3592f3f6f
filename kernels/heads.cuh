// One head of q, k or v between its projection and attention, the same for all kernels, bit for bit.
#pragma once
#include "tensor.cuh"

// Norm over the head, if it has a weight; rotation by `angles` (cosines, then sines), if there are any; rounding. One warp: lane l
// holds the pairs (x[i], x[size / 2 + i]) for i = l, l + 32, ...: P of them.
template <int P, typename T, typename C>
__device__ __forceinline__ void prepare_head(C* to, const T* from, const T* norm, float eps, const float* angles, int size) {
    const int lane = threadIdx.x % 32, half = size / 2;
    float first[P], second[P], squares = 0.f;
    #pragma unroll
    for (int p = 0; p < P; ++p) {
        const int i = lane + 32 * p;
        first[p] = i < half ? to_float(from[i]) : 0.f;
        second[p] = i < half ? to_float(from[half + i]) : 0.f;
        squares += first[p] * first[p] + second[p] * second[p];
    }
    const float scale = norm ? rsqrtf(warp_sum(squares) / size + eps) : 1.f;
    #pragma unroll
    for (int p = 0; p < P; ++p) {
        const int i = lane + 32 * p;
        if (i >= half) break;
        float a = first[p], b = second[p];
        if (norm) {
            a *= scale * to_float(norm[i]);
            b *= scale * to_float(norm[half + i]);
        }
        if (angles) {
            const float cos = angles[i], sin = angles[half + i], unrotated = a;
            a = a * cos - b * sin;
            b = b * cos + unrotated * sin;
        }
        to[i] = from_float<C>(a);
        to[half + i] = from_float<C>(b);
    }
}
