// store_kv: write the keys and values of T tokens into their pages, in one launch. The layout of the cache is two strides.
#include "common.cuh"

// Grid (T, 2): y = 0 copies a row of keys, y = 1 a row of values, so that both are in flight at once. Strides in elements.
template <typename T, typename C, int V>
__global__ void __launch_bounds__(256) store_kv(
    const T* __restrict__ k, const T* __restrict__ v, long long k_stride, long long v_stride,
    C* __restrict__ k_cache, C* __restrict__ v_cache, long long page_stride, long long slot_stride,
    const int* __restrict__ slots, int page_size, int num_slots, int width) {
    const int slot = slots[blockIdx.x];
    if (slot < 0 || slot >= num_slots) return;
    const bool is_v = blockIdx.y;
    const T* source = (is_v ? v + blockIdx.x * v_stride : k + blockIdx.x * k_stride);
    C* target = (is_v ? v_cache : k_cache) + (slot / page_size) * page_stride + (slot % page_size) * slot_stride;
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
        const Vec<T, V> in = *reinterpret_cast<const Vec<T, V>*>(source + i);
        Vec<C, V> out;
        #pragma unroll
        for (int j = 0; j < V; ++j) out.at[j] = from_float<C>(to_float(in.at[j]));
        *reinterpret_cast<Vec<C, V>*>(target + i) = out;
    }
}
