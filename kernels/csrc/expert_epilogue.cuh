// What becomes of the sums of an expert's GEMM before they are rounded: biases and the gated activation.
#pragma once
#include "mma.cuh"

DEVICE bool exists(long long expert, int experts) { return (unsigned long long)expert < (unsigned)experts; }

enum Gate { PLAIN, SILU, CLAMPED };  // what the products of two rows, gate and up, become; PLAIN has one product

template <typename T> struct Epilogue {
    const T* bias;       // of one expert, [columns], or those of gate, then of up; or null
    float alpha, limit;  // of CLAMPED

    // Return the result of a column from its sum, or from those of gate and up.
    template <Gate GATE> DEVICE T finish(float first, float up, int column, int columns) const {
        if (bias) first += to_float(bias[column]);
        if (GATE == PLAIN) return from_float<T>(first);
        if (bias) up += to_float(bias[columns + column]);
        if (GATE == SILU) return from_float<T>(silu(first) * up);
        first = first > limit ? limit : first;  // fminf would hide NaN
        up = up > limit ? limit : up < -limit ? -limit : up;
        return from_float<T>(first / (1.f + __expf(-alpha * first)) * (up + 1.f));
    }
};

// Return the epilogue of one expert; bias has those of all experts, or is null.
template <Gate GATE, typename T> DEVICE Epilogue<T> epilogue_of(const T* bias, long long expert, int columns, float alpha, float limit) {
    return {bias ? bias + expert * (GATE == PLAIN ? 1 : 2) * columns : nullptr, alpha, limit};
}
