// One head of q, k or v between its projection and attention; bitwise identical in all kernels.
#pragma once
#include "mma.cuh"

// A warp processes one head of `size` elements, of which the first `rotary` are rotated. A lane holds P pairs, in runs of V
// adjacent i < size / 2. Pair i is (x[i], x[rotary / 2 + i]) if it is rotated; the others are (x[rotary / 2 + i], x[size / 2 + i]).
// For P = 4, V = 2 and size = rotary = 256 the lanes hold these i, and the second elements at 128 + i:
//
//     i     0 1   2 3  ..  62 63   64 65   66 67  ..  126 127
//     lane   0     1   ..    31      0       1    ..     31
template <int P> struct Pairs { float first[P], second[P]; };

template <int V> DEVICE int pair_at(int p) { return (threadIdx.x % 32 + p / V * 32) * V; }
DEVICE int first_of(int i, int rotary) { return i < rotary / 2 ? i : rotary / 2 + i; }
DEVICE int second_of(int i, int rotary, int size) { return i < rotary / 2 ? rotary / 2 + i : size / 2 + i; }

template <int P, int V, typename T> DEVICE Pairs<P> load_head(const T* from, int rotary, int size) {
    Pairs<P> x = {};
    UNROLL for (int p = 0; p < P; p += V) {
        const int i = pair_at<V>(p);
        if (i >= size / 2) break;
        const Vec<T, V> first = *reinterpret_cast<const Vec<T, V>*>(from + first_of(i, rotary));
        const Vec<T, V> second = *reinterpret_cast<const Vec<T, V>*>(from + second_of(i, rotary, size));
        UNROLL for (int j = 0; j < V; ++j) x.first[p + j] = to_float(first.at[j]), x.second[p + j] = to_float(second.at[j]);
    }
    return x;
}

// Apply the norm over the head if `norm` is not null, rotate pairs (a, b) to (a cos - b sin, b cos + a sin) if `angles`
// (rotary / 2 cosines, then as many sines) is not null, round, and store the head.
template <int P, int V, typename T, typename C>
DEVICE void norm_rotate_store_head(C* to, const Pairs<P>& x, const T* norm, float eps, const float* angles, int rotary, int size) {
    float squares = 0.f;
    UNROLL for (int p = 0; p < P; ++p) squares += x.first[p] * x.first[p] + x.second[p] * x.second[p];
    const float scale = norm ? rsqrtf(mean_of(warp_sum(squares), size) + eps) : 1.f;
    UNROLL for (int p = 0; p < P; p += V) {
        const int i = pair_at<V>(p);
        if (i >= size / 2) break;
        const int at_first = first_of(i, rotary), at_second = second_of(i, rotary, size);
        Vec<C, V> first, second;
        UNROLL for (int j = 0; j < V; ++j) {
            float a = x.first[p + j], b = x.second[p + j];
            if (norm) a *= scale * to_float(norm[at_first + j]), b *= scale * to_float(norm[at_second + j]);
            if (angles && i < rotary / 2) {
                const float cos = angles[i + j], sin = angles[rotary / 2 + i + j], unrotated = a;
                a = a * cos - b * sin;
                b = b * cos + unrotated * sin;
            }
            first.at[j] = convert<C>(from_float<T>(a)), second.at[j] = convert<C>(from_float<T>(b));
        }
        *reinterpret_cast<Vec<C, V>*>(to + at_first) = first;
        *reinterpret_cast<Vec<C, V>*>(to + at_second) = second;
    }
}

template <int P, int V, typename T, typename C>
DEVICE void prepare_head(C* to, const T* from, const T* norm, float eps, const float* angles, int rotary, int size) {
    norm_rotate_store_head<P, V>(to, load_head<P, V>(from, rotary, size), norm, eps, angles, rotary, size);
}
