// Thread block clusters (sm_90 and later): blocks that run together and read each other's shared memory.
#pragma once
#include "common.cuh"

// The barrier of a cluster: all threads arrive, and then wait until all have arrived. What a thread wrote before it arrived is visible
// after the wait: so an arrival lasts until its earlier stores have ended. Without memory it orders no loads and stores.
DEVICE void arrive_at_cluster() { asm volatile("barrier.cluster.arrive;" ::: "memory"); }
DEVICE void arrive_without_memory() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
DEVICE void sync_cluster() { asm volatile("barrier.cluster.arrive; barrier.cluster.wait;" ::: "memory"); }
// The block's place in its cluster, and the cluster's in the grid.
DEVICE int place_in_cluster() {
    int place;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(place));
    return place;
}
DEVICE int cluster_index() {
    int index;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}
// Read from the shared memory of another block of the cluster, at an address of this block's.
DEVICE float4 load_of_block(const float* at, int block) {
    float4 v;
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a]; }"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"((unsigned)__cvta_generic_to_shared(at)), "r"(block) : "memory");
    return v;
}
// Write to the shared memory of another block, which must have started: let it arrive at the cluster's barrier before.
DEVICE void store_of_block(float4* at, int block, const float* v) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.v4.f32 [a], {%2,%3,%4,%5}; }"
                 ::"r"((unsigned)__cvta_generic_to_shared(at)), "r"(block), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
DEVICE void store_float_of_block(float* at, int block, float v) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.f32 [a], %2; }"
                 :: "r"((unsigned)__cvta_generic_to_shared(at)), "r"(block), "f"(v) : "memory");
}
// Write to the shared memory of a block of the cluster, at an address of this block's; a barrier there (mbarrier) counts the bytes.
DEVICE void send_to_block(float* at, float2 pair, int block, unsigned barrier) {
    asm volatile("{ .reg .b32 a, b; mapa.shared::cluster.u32 a, %0, %1; mapa.shared::cluster.u32 b, %2, %1;"
                 " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {%3,%4}, [b]; }"
                 ::"r"((unsigned)__cvta_generic_to_shared(at)), "r"(block), "r"(barrier), "f"(pair.x), "f"(pair.y) : "memory");
}
// Wait until a phase of the barrier has ended, as wait_for_phase does, for what other blocks of the cluster have sent.
DEVICE void wait_for_blocks(unsigned at, int phase) {
    unsigned ended = 0;
    while (!ended)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(ended) : "r"(at), "r"(phase & 1) : "memory");
}
