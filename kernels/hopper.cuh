// What sm_90a adds: a copy engine that brings tiles of a matrix, barriers that count its bytes, and tensor cores that four warps
// drive together, from tiles in shared memory. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" and "Tensor copies".
#pragma once
#include "tensor.cuh"

struct alignas(64) TensorMap { unsigned char opaque[128]; };  // of a matrix and its tiles; the host encodes it

__device__ __forceinline__ unsigned shared_address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }

// A barrier's phases end when `count` have arrived and as many bytes as these have announced. Others wait for the end of the
// phase of a parity; phases begin with parity 0.
__device__ __forceinline__ void init_barrier(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void publish_barriers() { asm volatile("fence.proxy.async.shared::cta; fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_barrier(unsigned barrier, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
}

// Bring the tile at these coordinates, the fastest first. What lies outside of the matrix arrives as zeros.
__device__ __forceinline__ void bring(unsigned to, const TensorMap& map, unsigned barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void bring(unsigned to, const TensorMap& map, unsigned barrier, int column, int row, int part, int group) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(part), "r"(group) : "memory");
}

// Have the tile brought into L2 only.
__device__ __forceinline__ void bring_near(const TensorMap& map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" :: "l"(&map), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void bring_near(const TensorMap& map, int column, int row, int part, int group) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];"
                 :: "l"(&map), "r"(column), "r"(row), "r"(part), "r"(group) : "memory");
}

// The blocks of a cluster, which run at the same time and read each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ int cluster_size() {
    int size;
    asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(size));
    return size;
}

// All threads of the cluster that have not ended come here; what they wrote before can be read after.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 16 bytes at the place in shared memory of block `rank` that is `address` here.
__device__ __forceinline__ float4 of_block(unsigned address, int rank) {
    float4 v;
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}

// How a product finds a tile: rows of 128 bytes, the 16-byte pieces of 8 rows swizzled, blocks of 8 rows one after the other.
__device__ __forceinline__ unsigned long long tile_at(unsigned address) {
    return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// c += a b for a [64, 16] and b [N, 16] by rows, or c = a b if not keep. Warp w of the four has rows 16 w .. 16 w + 15 of c; lane (g, t)
// has of each 8 columns the same four elements as after multiply(). Begun by begin_products, in flight until wait_products.
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
    ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_128 REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
    ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
    ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define C_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C_8(i) C_4(i), C_4(i + 4)
#define C_16(i) C_8(i), C_8(i + 8)
#define C_32(i) C_16(i), C_16(i + 16)
#define C_64(i) C_32(i), C_32(i + 32)
#define C_128(i) C_64(i), C_64(i + 64)
#define ACCUMULATE(N, COUNT, A, B, KEEP, T, NAME)                                                                            \
    __device__ __forceinline__ void accumulate(float (&c)[COUNT], unsigned long long a, unsigned long long b, int keep, T) { \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " KEEP ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME \
                     " {" REGISTERS_##COUNT "}, " A ", " B ", p, 1, 1, 0, 0; }" : C_##COUNT(0) : "l"(a), "l"(b), "r"(keep));     \
    }
#define ACCUMULATE_BOTH(N, COUNT, A, B, KEEP) ACCUMULATE(N, COUNT, A, B, KEEP, bf16, "bf16") ACCUMULATE(N, COUNT, A, B, KEEP, f16, "f16")
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
ACCUMULATE_BOTH(16, 8, "%8", "%9", "%10")
ACCUMULATE_BOTH(32, 16, "%16", "%17", "%18")
ACCUMULATE_BOTH(64, 32, "%32", "%33", "%34")
ACCUMULATE_BOTH(128, 64, "%64", "%65", "%66")
ACCUMULATE_BOTH(256, 128, "%128", "%129", "%130")

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Those since the last time are one group.
__device__ __forceinline__ void close_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// At most IN_FLIGHT groups are not yet complete afterwards.
template <int IN_FLIGHT> __device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(IN_FLIGHT) : "memory"); }
#endif
