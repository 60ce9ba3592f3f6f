// The results of attention: as they are, or in FP8 for the GEMM that follows.
#pragma once
#include "quantize.cuh"

// Those of a block's heads of one row. In FP8 a head of 128 elements is a group of columns with one scale.
template <typename O> struct HeadResults {
    O* out;  // [group_size, HEAD_DIM]
    float* scales;
    int stride;  // from the scale of a head to that of the next one

    // Store results of head h, of a lane: from `at` on, `step` apart. In FP8 all lanes of the warp have results of this head.
    template <typename T, int WIDTH> DEVICE void store(const T (&results)[WIDTH], int h, int at, int step) const {
        if constexpr (sizeof(O) == sizeof(T)) {
            UNROLL for (int j = 0; j < WIDTH; ++j) out[at + j * step] = results[j];
        } else {
            float peak = 0.f;
            UNROLL for (const T& result : results) peak = fmaxf(peak, fabsf(to_float(result)));
            const Quantizer quantizer(peak_of_warp(peak));
            UNROLL for (int j = 0; j < WIDTH; ++j) out[at + j * step] = from_float<O>(quantizer(to_float(results[j])));
            if (threadIdx.x % 32 == 0) scales[(long long)h * stride] = quantizer.scale;
        }
    }
};
