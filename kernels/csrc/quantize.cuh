// The quantization of activations to FP8: numbers of one group share a scale.
#pragma once
#include "common.cuh"

constexpr float MAXIMUM = 448.f;  // of FP8

DEVICE float peak_of_warp(float peak) {
    for (int i = 16; i > 0; i >>= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, i));
    return peak;
}

// The scale of a group whose greatest magnitude is `peak`, and its numbers divided by it.
struct Quantizer {
    float scale, divisor, inverse;

    DEVICE explicit Quantizer(float peak) {
        const bool is_finite = peak < infinity();
        scale = is_finite ? divide(fmaxf(peak, 1e-10f), MAXIMUM, 1.f / MAXIMUM) : peak;
        divisor = is_finite ? scale : 0.f, inverse = is_finite ? inverse_of(scale) : 0.f;  // 0: x / infinity is 0 or NaN
    }
    DEVICE float operator()(float value) const {
        const float quotient = copysignf(divide(value, divisor, inverse), value);  // -0 stays -0
        return fminf(fmaxf(quotient, -MAXIMUM), MAXIMUM);
    }
};
