// rotate_and_store: norm and rotation of q and k, and the store of k and v, between their projection and attention.
#include "head_norm_rope.cuh"

constexpr int WARPS = 4;  // warps of a block, which processes one token

// P and V are as in head_norm_rope.cuh. The heads of a token are those of q, then of k, then of v.
template <typename T, typename C, int P, int V>
__global__ void __launch_bounds__(32 * WARPS, 8) rotate_and_store(
    T* __restrict__ q_out, const T* __restrict__ qkv, long long qkv_stride, const T* __restrict__ q_norm,
    const T* __restrict__ k_norm, float eps,
       const int* __restrict__ positions, const float* __restrict__ cos_sin, int table_rows, int rotary,
    C* __restrict__ k_cache, C* __restrict__ v_cache, long long page_stride, long long slot_stride, int head_stride,
    const int* __restrict__ kv_slots, int page_size, int num_slots, int heads, int kv_heads, int head_dim) {
    constexpr int AT_ONCE = P < 4 ? 4 : P < 8 ? 2 : 1;  // heads of a warp that load together
    launch_next();
    wait_for_previous();
    const long long token = blockIdx.x;
    const int q_heads = heads - 2 * kv_heads, position = positions[token], slot = kv_slots[token];
    const bool stores = slot >= 0 && slot < num_slots;
    const long long at = stores ? (slot / page_size) * page_stride + (slot % page_size) * slot_stride : 0;
    const float* angles = position >= 0 && position < table_rows ? cos_sin + position * (long long)rotary : nullptr;
    for (int first = threadIdx.x / 32; first < (stores ? heads : q_heads); first += WARPS * AT_ONCE) {
        Pairs<P> loaded[AT_ONCE];
        UNROLL for (int n = 0; n < AT_ONCE; ++n) {
            const int head = first + n * WARPS;
            if (head < heads) loaded[n] = load_head<P, V>(qkv + token * qkv_stride + head * head_dim, rotary, head_dim);
        }
        UNROLL for (int n = 0; n < AT_ONCE; ++n) {
            const int head = first + n * WARPS;
            if (head < q_heads)
                norm_rotate_store_head<P, V>(q_out + (token * q_heads + head) * head_dim, loaded[n], q_norm, eps, angles, rotary, head_dim);
            else if (stores && head < q_heads + kv_heads)
                norm_rotate_store_head<P, V>(k_cache + at + (head - q_heads) * head_stride, loaded[n], k_norm, eps, angles, rotary, head_dim);
            else if (stores && head < heads)
                norm_rotate_store_head<P, V>(
                    v_cache + at + (head - q_heads - kv_heads) * head_stride, loaded[n], (const T*)nullptr, eps, nullptr, rotary, head_dim);
        }
    }
}
