// One head of q, k or v between its projection and attention; bitwise identical in all kernels.
#pragma once
#include "mma.cuh"

// A warp processes one head of `size` elements. A lane holds P pairs (x[i], x[size / 2 + i]), in runs of V adjacent i.
// For P = 4, V = 2 and size = 256 the lanes hold these i, and the second elements at 128 + i:
//
//     i     0 1   2 3  ..  62 63   64 65   66 67  ..  126 127
//     lane   0     1   ..    31      0       1    ..     31
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

// Apply the norm over the head if `norm` is not null, rotate each pair (a, b) to (a cos - b sin, b cos + a sin) if `angles`
// (cosines, then sines) is not null, round, and store the head.
template <int P, int V, typename T, typename C>
DEVICE void norm_rotate_store_head(C* to, const Pairs<P>& x, const T* norm, float eps, const float* angles, int size) {
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
    norm_rotate_store_head<P, V>(to, load_head<P, V>(from, size), norm, eps, angles, size);
}
