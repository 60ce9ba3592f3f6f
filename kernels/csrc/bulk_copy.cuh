// Copies to shared memory that one thread starts, and whose end a barrier (mbarrier) reports; sm_90 and later.
#pragma once
#include "common.cuh"

// Barriers, at addresses of shared memory. A phase ends when `count` threads have arrived, and all expected bytes, too.
DEVICE void init_barrier(unsigned at, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void arrive(unsigned at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
DEVICE void arrive_expecting(unsigned at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Wait until phase 0, 1, 2 ... of the barrier has ended; only the phase's parity counts.
DEVICE void wait_for_phase(unsigned at, int phase) {
    unsigned ended = 0;
    while (!ended)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(ended) : "r"(at), "r"(phase & 1) : "memory");
}

// Copy bytes, a multiple of 16.
DEVICE void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
