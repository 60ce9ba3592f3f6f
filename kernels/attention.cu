// rotate_and_store: all that happens to q, k and v between their projection and attention, one warp for each head of a token.
#include "heads.cuh"

// P: pairs of elements that a lane holds. Heads of a token: q's, then k's, then v's.
template <typename T, typename C, int P>
__global__ void __launch_bounds__(128, 8) rotate_and_store(
    T* __restrict__ q_out, const T* __restrict__ qkv, const T* __restrict__ q_norm, const T* __restrict__ k_norm, float eps,
    const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows,
    C* __restrict__ k_cache, C* __restrict__ v_cache, long long page_stride, long long slot_stride,
    const int* __restrict__ slots, int page_size, int num_slots, int tokens, int heads, int kv_heads, int head_dim) {
    launch_next();
    wait_for_previous();
    const long long warp = blockIdx.x * 4ll + threadIdx.x / 32;
    const int token = warp / heads, head = warp % heads;
    if (token >= tokens) return;
    const int q_heads = heads - 2 * kv_heads;
    const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
    const int slot = slots[token];
    if (!is_q && (slot < 0 || slot >= num_slots)) return;

    const T* x = qkv + (long long)token * heads * head_dim + head * head_dim;
    const int position = positions[token];
    const float* angles = !is_v && position >= 0 && position < table_rows ? cos_sin + (long long)position * head_dim : nullptr;
    const T* norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    if (is_q) {
        prepare_head<P>(q_out + ((long long)token * q_heads + head) * head_dim, x, norm, eps, angles, head_dim);
    } else {
        const long long at = (slot / page_size) * page_stride + (slot % page_size) * slot_stride;
        C* cached = is_v ? v_cache + at + (head - q_heads - kv_heads) * head_dim : k_cache + at + (head - q_heads) * head_dim;
        prepare_head<P>(cached, x, norm, eps, angles, head_dim);
    }
}
