// One head of q, k or v between its projection and attention; bitwise identical in all kernels.
#pragma once
#include "tensor.cuh"

// A warp has one head. Lane l holds P pairs (x[i], x[size / 2 + i]), for V adjacent i from V l, then from V (l + 32), and so on.
template <int P> struct Pairs { float first[P], second[P]; };

template <int V> DEVICE int pair_at(int p) { return (threadIdx.x % 32 + p / V * 32) * V; }

template <int P, int V, typename T> DEVICE Pairs<P> load_head(const T* from, int size) {
    Pairs<P> x = {};
    UNROLL for (int p = 0; p < P; p += V) {
        const int i = pair_at<V>(p);
        if (i >= size / 2) break;
        const Vec<T, V> first = *reinterpret_cast<const Vec<T, V>*>(from + i);
        const Vec<T, V> second = *reinterpret_cast<const Vec<T, V>*>(from + size / 2 + i);
        UNROLL for (int j = 0; j < V; ++j) x.first[p + j] = to_float(first.at[j]), x.second[p + j] = to_float(second.at[j]);
    }
    return x;
}

// Norm over the head if `norm` is not null, rotation by `angles` (cosines, then sines) if not null, then rounding:
// (a, b) -> (a cos - b sin, b cos + a sin) for each pair.
template <int P, int V, typename T, typename C>
DEVICE void finish_head(C* to, const Pairs<P>& x, const T* norm, float eps, const float* angles, int size) {
    const int half = size / 2;
    float squares = 0.f;
    UNROLL for (int p = 0; p < P; ++p) squares += x.first[p] * x.first[p] + x.second[p] * x.second[p];
    const float scale = norm ? rsqrtf(warp_sum(squares) / size + eps) : 1.f;
    UNROLL for (int p = 0; p < P; p += V) {
        const int i = pair_at<V>(p);
        if (i >= half) break;
        Vec<C, V> first, second;
        UNROLL for (int j = 0; j < V; ++j) {
            float a = x.first[p + j], b = x.second[p + j];
            if (norm) a *= scale * to_float(norm[i + j]), b *= scale * to_float(norm[half + i + j]);
            if (angles) {
                const float cos = angles[i + j], sin = angles[half + i + j], unrotated = a;
                a = a * cos - b * sin;
                b = b * cos + unrotated * sin;
            }
            first.at[j] = from_float<C>(a), second.at[j] = from_float<C>(b);
        }
        *reinterpret_cast<Vec<C, V>*>(to + i) = first;
        *reinterpret_cast<Vec<C, V>*>(to + half + i) = second;
    }
}

template <int P, int V, typename T, typename C>
DEVICE void prepare_head(C* to, const T* from, const T* norm, float eps, const float* angles, int size) {
    finish_head<P, V>(to, load_head<P, V>(from, size), norm, eps, angles, size);
}
