// The tensor cores' matrix multiply-accumulate (MMA), and asynchronous copies of 16 bytes from global to shared memory.
#pragma once
#include "common.cuh"

DEVICE int warp_id() { return threadIdx.x / 32; }
DEVICE int lane_id() { return threadIdx.x % 32; }
DEVICE int group_id() { return lane_id() / 4; }         // g
DEVICE int thread_in_group() { return lane_id() % 4; }  // t

// c += a b for a [16, 16] by rows, b [16, 8] by columns, and c [16, 8] float, distributed over a warp: lane (g, t) holds columns
// 2 t and 2 t + 1 of rows g and g + 8 of c.
#define MULTIPLY(T, NAME) \
    DEVICE void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, T) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); \
    }
MULTIPLY(bf16, "bf16")
MULTIPLY(f16, "f16")

// Multiply pairs of T by a power of two; exact.
#define SCALE_PAIR(T, NAME) \
    DEVICE unsigned scale_pair(unsigned x, unsigned factor, T) { \
        unsigned y; \
        asm("fma.rn." NAME " %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(factor), "r"(0x80008000u)); \
        return y; \
    }
SCALE_PAIR(bf16, "bf16x2")
SCALE_PAIR(f16, "f16x2")

// Widen the FP8 numbers in bytes 1 and 3 to T. Exponent and mantissa, shifted into place, are a number that is too small by the
// difference of the exponents' biases, also if it is subnormal; the multiplication corrects that.
DEVICE unsigned widen_pair(unsigned pair, bf16 type) {
    return scale_pair((pair & 0x80008000u) | (pair >> 4 & 0x07f007f0u), 0x7b807b80u, type);  // 2^120: biases 127 and 7
}
DEVICE unsigned widen_pair(unsigned pair, f16 type) {
    return scale_pair((pair & 0x80008000u) | (pair >> 1 & 0x3f803f80u), 0x5c005c00u, type);  // 2^8: biases 15 and 7
}

// Widen four FP8 numbers to T, in their order.
template <typename T> DEVICE void widen(unsigned four, unsigned& low, unsigned& high, T type) {
    low = widen_pair(__byte_perm(four, 0, 0x1404), type);
    high = widen_pair(__byte_perm(four, 0, 0x3424), type);
}
#if __CUDA_ARCH__ >= 890
DEVICE void widen(unsigned four, unsigned& low, unsigned& high, f16) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
        : "=r"(low), "=r"(high) : "r"(four));
}
#endif

// Load data that is read once, and need not stay in L1. volatile keeps the load where it is written: before the wait.
DEVICE uint4 stream(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// Load data that the kernel before has written. volatile keeps the load where it is written: it waits for no other one.
DEVICE uint4 load_written(const void* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

DEVICE uint2 stream_half(const void* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
    return v;
}

DEVICE unsigned stream_word(const void* from) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

// Load a number that a block of a weight shares; volatile as in `stream`.
DEVICE float stream_float(const float* from) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}

// Keep the loads before this where they are. The assembler moves instructions within a basic block only, and there it may delay the
// loads of a chunk behind the products of the next one, for which a warp then waits with nothing under way. The branch, which ends the
// block, is never taken: `size` is not negative. A branch for each `place`: of two with one condition the second would be removed.
DEVICE void end_basic_block(int size, int place) {
    if (size == -1 - place) __trap();
}

template <typename T> DEVICE unsigned pack(float low, float high) {
    Vec<T, 2> both = {from_float<T>(low), from_float<T>(high)};
    return *reinterpret_cast<unsigned*>(&both);
}

DEVICE void copy_async(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

DEVICE void copy_word_async(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
}

// Copy 16 bytes past L1, or write zeros without reading if not `inside`.
DEVICE void copy_async(unsigned to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// commit_copies closes a group of copies, also an empty one; wait_copies waits until at most N of this thread's groups are under way.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEVICE void wait_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Transpose an 8 x 8 matrix of 16-bit elements, of which lane l has elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
DEVICE unsigned transpose(unsigned x) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Load four matrices of 8 x 8. Lanes 8 i .. 8 i + 7 have the addresses of the rows of matrix i; lane l gets the elements 2 (l % 4)
// and 2 (l % 4) + 1 of row l / 4 of each.
DEVICE void load_matrices(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// The same, each matrix transposed.
DEVICE void load_transposed_matrices(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}
