// What only sm_90a has: wgmma, the MMA of four warps whose operands stand in shared memory, and TMA, copies of boxes of a matrix to
// shared memory, whose end a barrier (mbarrier) reports. The emulator has all of this in C++.
#pragma once
#include "bulk_copy.cuh"
#include "cluster.cuh"

constexpr int LINE = 128;  // bytes of a row of a box; its chunks of 16 bytes are swizzled, eight rows make 1024 bytes

// wgmma: d (+)= a b^T for 64 rows of a, N rows of b, and 32 columns of FP8. Lane (g, t) = (lane / 4, lane % 4) of warp w holds rows
// 16 w + g and 16 w + g + 8 of d, at columns 8 j + 2 t and 8 j + 2 t + 1: d[4 j .. 4 j + 3].
#define EIGHT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SIXTY_FOUR(i) EIGHT(i), EIGHT(i + 8), EIGHT(i + 16), EIGHT(i + 24), EIGHT(i + 32), EIGHT(i + 40), EIGHT(i + 48), EIGHT(i + 56)
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_24 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define REGISTERS_40 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGISTERS_48 REGISTERS_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_56 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define REGISTERS_64 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_128 REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
                      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA(N, REGISTERS, A, B, ADD) \
    "{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B ", p, 1, 1; }"
DEVICE void multiply_async(float (&d)[8], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(16, REGISTERS_8, "%8", "%9", "%10") : EIGHT(0) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[16], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(32, REGISTERS_16, "%16", "%17", "%18") : EIGHT(0), EIGHT(8) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[32], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(64, REGISTERS_32, "%32", "%33", "%34") : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[24], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(48, REGISTERS_24, "%24", "%25", "%26") : EIGHT(0), EIGHT(8), EIGHT(16) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[40], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(80, REGISTERS_40, "%40", "%41", "%42")
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[48], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(96, REGISTERS_48, "%48", "%49", "%50")
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40) : "l"(a), "l"(b), "r"(add));
}
DEVICE void multiply_async(float (&d)[56], unsigned long long a, unsigned long long b, int add) {
    asm volatile(WGMMA(112, REGISTERS_56, "%56", "%57", "%58")
                 : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48) : "l"(a), "l"(b), "r"(add));
}
// The same for 16 columns of bf16 or f16, with both operands in shared memory. It is added.
#define WGMMA_HALF(TYPE, N, REGISTERS, A, B) \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPE "." #TYPE " {" REGISTERS "}, " A ", " B ", 1, 1, 1, 0, 0;"
#define MULTIPLY_ASYNC(T) \
    DEVICE void multiply_async(float (&d)[8], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 16, REGISTERS_8, "%8", "%9") : EIGHT(0) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[16], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 32, REGISTERS_16, "%16", "%17") : EIGHT(0), EIGHT(8) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[32], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 64, REGISTERS_32, "%32", "%33") : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[24], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 48, REGISTERS_24, "%24", "%25") : EIGHT(0), EIGHT(8), EIGHT(16) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[40], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 80, REGISTERS_40, "%40", "%41") : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[48], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 96, REGISTERS_48, "%48", "%49") : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[56], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 112, REGISTERS_56, "%56", "%57") \
                     : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[64], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 128, REGISTERS_64, "%64", "%65") : SIXTY_FOUR(0) : "l"(a), "l"(b)); \
    } \
    DEVICE void multiply_async(float (&d)[128], unsigned long long a, unsigned long long b, T) { \
        asm volatile(WGMMA_HALF(T, 256, REGISTERS_128, "%128", "%129") : SIXTY_FOUR(0), SIXTY_FOUR(64) : "l"(a), "l"(b)); \
    }
MULTIPLY_ASYNC(bf16)
MULTIPLY_ASYNC(f16)
// The same for 16 columns of bf16, of which a is in registers: those of a [16, 16] of `multiply` in each of four warps. It is added.
#define WGMMA_BF16(N, REGISTERS, A, B) \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {" A "}, " B ", 1, 1, 1, 0;"
#define OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
DEVICE void multiply_async(float (&d)[16], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(WGMMA_BF16(32, REGISTERS_16, "%16,%17,%18,%19", "%20") : EIGHT(0), EIGHT(8) : OPERANDS);
}
DEVICE void multiply_async(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(WGMMA_BF16(64, REGISTERS_32, "%32,%33,%34,%35", "%36") : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24) : OPERANDS);
}
DEVICE void multiply_async(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(WGMMA_BF16(128, REGISTERS_64, "%64,%65,%66,%67", "%68") : SIXTY_FOUR(0) : OPERANDS);
}
DEVICE void commit_multiply() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wait_multiply() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Wait for all groups of multiplications but the last one.
DEVICE void wait_multiply_but_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
// Let nothing be computed from a sum before this place, such as before the wait for its multiplication.
DEVICE void compute_later(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }
// Let wgmma see what this thread's finished copies by copy_async have written.
DEVICE void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void begin_multiply() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_multiply() { asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Return wgmma's descriptor of rows that TMA has copied to `at`, a multiple of 1024; 32 columns further are 2 more.
DEVICE unsigned long long descriptor(unsigned at) { return 1ull << 62 | 64ull << 32 | 1ull << 16 | (at & 0x3ffff) >> 4; }

// A matrix of bytes in global memory whose boxes TMA copies; tile_map and part_map of kernel_launch.py make it.
struct alignas(64) TileMap { char bytes[128]; };

DEVICE void prefetch_map(const TileMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Copy the box of the matrix that begins at this row and column; what is outside of the matrix becomes zeros.
DEVICE void copy_box(unsigned to, const TileMap& map, int row, int column, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// Copy a box of a map with parts, one part after the other: LINE bytes of rows from `row` on, then the next LINE bytes of them.
DEVICE void copy_parts(unsigned to, const TileMap& map, int row, int first_part, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2, %4}], [%5];"
                 ::"r"(to), "l"(&map), "r"(0), "r"(row), "r"(first_part), "r"(barrier) : "memory");
}
// Return true in one thread of the warp, always the same one. The compiler knows that, and issues a copy without a loop over threads.
DEVICE bool is_elected() {
    unsigned elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
    return elected;
}
// A barrier of this many threads of the block, without those that copy.
DEVICE void sync_threads(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
