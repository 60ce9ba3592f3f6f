// The softmax over the keys of a warp, tile by tile. Lane (g, t) = (lane / 4, lane % 4).
#pragma once
#include "mma.cuh"

constexpr float LOG2_E = 1.44269504f;

// The score of a key in units of log2, from its product with the query: capped, softcap * tanh(product * scale).
template <bool CAPPED> struct Score {
    float scale, softcap;
    DEVICE float operator()(float product) const { return CAPPED ? softcap * tanh_of(product * scale) : product * scale; }
};

// A warp's running softmax over its keys: acc = sum of 2^(score - max_score) * value, weight_sum = sum of 2^(score - max_score).
// acc[n][i] is of head 2 t + i % 2, and of the element 2 n + i / 2 of those that the lane has of a value; [i] of the others is of
// head 2 t + i.
template <int HEAD_DIM> struct SoftmaxState {
    float acc[HEAD_DIM / 16][4] = {}, max_score[2] = {-infinity(), -infinity()}, weight_sum[2] = {};

    // Turn the scores of a tile into weights; rescale[i] is the factor for earlier sums of head 2 t + i.
    // s[n][i] is of key `first` + g of group n and of head 2 t + i, s[n][2 + i] of the key 8 after it.
    template <int STRIDE, bool CAPPED, int GROUPS>
    DEVICE void update(float (&s)[GROUPS][4], float (&rescale)[2], Score<CAPPED> score, int first, int end) {
        UNROLL for (int i = 0; i < 2; ++i) {
            float high = max_score[i], sum = 0.f;
            UNROLL for (int n = 0; n < 2 * GROUPS; ++n) {
                float& of_key = s[n / 2][n % 2 * 2 + i];
                of_key = first + group_id() + n / 2 * STRIDE + n % 2 * 8 < end ? score(of_key) : -infinity();
                high = fmaxf(high, of_key);
            }
            UNROLL for (int n = 4; n < 32; n <<= 1) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, n));
            UNROLL for (int n = 0; n < 2 * GROUPS; ++n) sum += s[n / 2][n % 2 * 2 + i] = exp2_of(s[n / 2][n % 2 * 2 + i] - high);
            rescale[i] = exp2_of(max_score[i] - high);
            max_score[i] = high;
            weight_sum[i] = weight_sum[i] * rescale[i] + sum;
        }
    }
};
