// rotate_and_store: all that happens to q, k and v between their projection and attention, one warp for each head of a token.
#include "common.cuh"

// Lane l holds the pairs (x[i], x[half + i]) for i = l, l + 32, ...: P of them. Heads of a token: q's, then k's, then v's.
template <typename T, typename C, int P>
__global__ void __launch_bounds__(128) rotate_and_store(
    T* __restrict__ q_out, const T* __restrict__ qkv, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows,
    C* __restrict__ k_cache, C* __restrict__ v_cache, long long page_stride, long long slot_stride,
    const int* __restrict__ slots, int page_size, int num_slots, int tokens, int heads, int kv_heads, int head_dim) {
    const long long warp = blockIdx.x * 4ll + threadIdx.x / 32;
    const int token = warp / heads, head = warp % heads, lane = threadIdx.x % 32, half = head_dim / 2;
    if (token >= tokens) return;
    const int q_heads = heads - 2 * kv_heads;
    const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
    const int slot = slots[token];
    if (!is_q && (slot < 0 || slot >= num_slots)) return;

    const T* x = qkv + (long long)token * heads * head_dim + head * head_dim;
    float first[P], second[P], squares = 0.f;
    #pragma unroll
    for (int p = 0; p < P; ++p) {
        const int i = lane + 32 * p;
        first[p] = i < half ? to_float(x[i]) : 0.f;
        second[p] = i < half ? to_float(x[half + i]) : 0.f;
        squares += first[p] * first[p] + second[p] * second[p];
    }
    const T* norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    if (norm) {
        const float scale = rsqrtf(warp_sum(squares) / head_dim + eps);
        #pragma unroll
        for (int p = 0; p < P; ++p) {
            const int i = lane + 32 * p;
            if (i >= half) break;
            first[p] *= scale * to_float(norm[i]);
            second[p] *= scale * to_float(norm[half + i]);
        }
    }
    const int position = positions[token];
    if (!is_v && position >= 0 && position < table_rows) {
        const float* row = cos_sin + (long long)position * head_dim;
        #pragma unroll
        for (int p = 0; p < P; ++p) {
            const int i = lane + 32 * p;
            if (i >= half) break;
            const float cos = row[i], sin = row[half + i], a = first[p], b = second[p];
            first[p] = a * cos - b * sin;
            second[p] = b * cos + a * sin;
        }
    }
    const long long at = (slot / page_size) * page_stride + (slot % page_size) * slot_stride;
    C* cached = is_q ? nullptr : is_v ? v_cache + at + (head - q_heads - kv_heads) * head_dim : k_cache + at + (head - q_heads) * head_dim;
    T* out = q_out + ((long long)token * q_heads + head) * head_dim;
    #pragma unroll
    for (int p = 0; p < P; ++p) {
        const int i = lane + 32 * p;
        if (i >= half) break;
        if (is_q) {
            out[i] = from_float<T>(first[p]);
            out[half + i] = from_float<T>(second[p]);
        } else {
            cached[i] = from_float<C>(first[p]);
            cached[half + i] = from_float<C>(second[p]);
        }
    }
}
