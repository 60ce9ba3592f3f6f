// Copies of runs of bytes to shared memory on all architectures.
#pragma once
#include "bulk_copy.cuh"
#include "mma.cuh"

// Copies by one warp of runs that are multiples of 16 bytes. All of its threads call `expect` with the bytes of a phase, then `copy` for
// each run; all threads of the block call `wait`. Before sm_90 these are ordinary asynchronous copies.
struct RunCopies {
    unsigned long long* barrier;  // in shared memory

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    DEVICE void init() const {}
    DEVICE void expect(int bytes) const {}
    DEVICE void copy(void* to, const void* from, int bytes) const {
        ROLLED for (int i = threadIdx.x % 32 * 16; i < bytes; i += 16 * 32) copy_async((char*)to + i, (const char*)from + i);
    }
    DEVICE void wait(int phase) const {
        wait_all_copies();
        __syncthreads();
    }
#else
    DEVICE unsigned at() const { return (unsigned)__cvta_generic_to_shared(barrier); }
    DEVICE void init() const {
        if (threadIdx.x % 32 == 0) init_barrier(at(), 1), publish_barriers();
    }
    DEVICE void expect(int bytes) const {
        if (threadIdx.x % 32 == 0) arrive_expecting(at(), bytes);
    }
    DEVICE void copy(void* to, const void* from, int bytes) const {
        if (threadIdx.x % 32 == 0) copy_bytes((unsigned)__cvta_generic_to_shared(to), from, bytes, at());
    }
    DEVICE void wait(int phase) const { wait_for_phase(at(), phase); }
#endif
};
