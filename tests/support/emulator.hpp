// Enough of CUDA to run our kernels on a CPU. Threads are fibers that run in random order between barriers. Background copies
// happen at the wait for them, not before. A kernel of one GPU runs one cluster of blocks after the other; only dynamic shared memory
// is apart for each block of a cluster. Kernels of several ranks, which wait for each other, run with all blocks at the same time: see
// "Ranks" below. emulator.cpp has what need not be in a header.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
#define __align__(n) alignas(n)
#define __grid_constant__

template <typename T> constexpr T max(T a, T b) { return a < b ? b : a; }
template <typename T> constexpr T min(T a, T b) { return b < a ? b : a; }
struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
struct float4 { float x, y, z, w; };
struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
struct int4 { int x, y, z, w; };
struct int2 { int x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
struct longlong2 { long long x, y; };
struct ulonglong2 { unsigned long long x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
struct Dim { int x, y; };
extern Dim threadIdx, blockIdx, blockDim, gridDim;

template <typename To, typename From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __int_as_float(int x) { return bit_cast<float>(x); }
inline int __float_as_int(float x) { return bit_cast<int>(x); }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
struct __nv_fp8_e4m3 {
    uint8_t bits;
    explicit __nv_fp8_e4m3(float x) {  // round to nearest, ties to even
        int nearest = 0;
        for (int code = 1; code < 127; ++code) {
            const float best = std::fabs(std::fabs(x) - magnitude(nearest)), error = std::fabs(std::fabs(x) - magnitude(code));
            if (error < best || (error == best && code % 2 == 0)) nearest = code;
        }
        bits = nearest | (std::signbit(x) ? 128 : 0);
    }
    __nv_fp8_e4m3() = default;
    static float magnitude(int code) { return code < 8 ? code * 0x1p-9f : std::ldexp(8.f + code % 8, code / 8 - 10); }
    static float value(uint8_t bits) { return (bits & 128 ? -1 : 1) * magnitude(bits & 127); }
};
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(x.bits << 16); }
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_int(x);
    return {(uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float value_of(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float value_of(uint16_t bits, __half) { return bit_cast<_Float16>(bits); }

inline uint16_t rounded_bits(float x, __nv_bfloat16) { return __float2bfloat16_rn(x).bits; }
inline uint16_t rounded_bits(float x, __half) { return bit_cast<uint16_t>(__float2half_rn(x)); }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
unsigned __byte_perm(unsigned x, unsigned y, unsigned selector);
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence() {}
template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T, typename V> T atomicAdd(T* to, V value) { return std::exchange(*to, *to + value); }
template <typename T> T atomicMax(T* to, T value) { return std::exchange(*to, max(*to, value)); }

namespace emulator {

constexpr int STACK = 256 << 10, SHARED = 256 << 10, MAX_CLUSTER = 8;
extern char shared[MAX_CLUSTER * SHARED];  // of the blocks of a cluster; static variables are within 32 bits of it

struct Barrier { int expected = 0; std::vector<int> waiting; };
struct Warp { Barrier barrier; int buffer[32] = {}; char words[2][32][32]; };
struct Copy { void* to; const void* from; bool inside; int bytes = 16; };
typedef std::map<char*, std::string> Writes;  // address -> bytes
struct Fiber {
    ucontext_t context;  // in which it begins
    jmp_buf place;       // at which it waits: swapcontext would save the mask of signals by a system call
    bool began;
    std::unique_ptr<char[]> stack{new char[STACK]};
    std::vector<std::vector<Copy>> groups;  // the closed groups of copies, then the open one
    std::vector<std::function<void()>> multiplications;  // of wgmma with operands in registers that have begun
    Writes writes;                          // to memory of a rank, since the last barrier of the block
    int cluster_phase = 0;                  // at which it arrived at the barrier of its cluster
};
struct Grid {
    void (*kernel)(void**);
    void** arguments;
    Dim size, threads;
    int rank = 0, running = 0;  // threads that have not ended
};
struct Block {
    Grid* grid;
    Dim index;
    int place = 0;  // in its cluster
    Barrier barrier, some;  // of all threads, and of sync_threads
    int any = 0;  // of __syncthreads_or
    std::vector<Warp> warps;
    std::deque<Fiber> fibers;
    std::map<int, std::string> arrays;  // the shared variables by their places in the source
    Writes writes;                      // to memory of a rank before the last barrier, not released
};
extern Block* here;  // the block of the current thread
extern int current;  // its index in the block
inline char* block_memory() { return shared + here->place * SHARED; }

void leave();
void arrive_and_wait(Barrier& barrier);

// An mbarrier in shared memory, and the copies that it reports; they happen when a thread waits for them.
struct PhaseBarrier { int16_t count, missing; int32_t phase : 1, bytes : 31; };
extern std::vector<std::pair<PhaseBarrier*, std::function<int()>>> box_copies;
inline PhaseBarrier& phase_barrier(unsigned at) { return *(PhaseBarrier*)(shared + (int)at); }

// A shared variable of the current block, NaN at first.
template <int PLACE, typename T> T& shared_variable() {
    std::string& bytes = here->arrays[PLACE];
    if (bytes.empty()) bytes.assign(sizeof(T) + 64, '\xff');
    return *reinterpret_cast<T*>(((uintptr_t)bytes.data() + 63) / 64 * 64);
}

// A barrier of the warp; return the words of all its lanes.
template <typename T> const T* exchange(T word) {
    Warp& warp = here->warps[current / 32];
    auto* words = warp.words[warp.buffer[current % 32] ^= 1];
    static_assert(sizeof(T) <= sizeof(words[0]));
    memcpy(words[current % 32], &word, sizeof(T));
    arrive_and_wait(warp.barrier);
    static T received[32];
    for (int lane = 0; lane < 32; ++lane) memcpy(&received[lane], words[lane], sizeof(T));
    return received;
}
void wait_for_copies(size_t pending);

template <typename... A, size_t... I> void call(void (*function)(A...), void** values, std::index_sequence<I...>) { function(*(A*)values[I]...); }
template <typename... A> void call(void (*function)(A...), void** values) { call(function, values, std::index_sequence_for<A...>()); }
const char* launch(int width, int height, int threads, int shared_bytes, int cluster_size, void (*body)(void**), void** values);

// Ranks. Each has a queue of grids, which run one after the other. A plain write into memory of a rank (`memories`) reaches only
// the threads of the block that are past the next barrier; a store with release, or the end of the grid, brings it to the others.
// Words that were pushed arrive one by one, in any order. One rank at a time is slow.

struct Word { char* to; unsigned long long value; int rank; };
extern std::vector<std::pair<char*, char*>> memories;  // first byte and end
extern std::vector<Word> in_flight;
extern long long turns;  // of threads: the clock

void apply(Writes& writes);
template <typename T> void write(void* to, const T& value) {
    for (auto& memory : memories)
        if (to >= memory.first && to < memory.second) {
            here->fibers[current].writes[(char*)to].assign((const char*)&value, sizeof(T));
            return;
        }
    memcpy(to, &value, sizeof(T));
}
void wait_a_while();
struct RankQueue {
    std::deque<Grid> grids;  // the first one runs
    std::deque<Block> blocks;

    void begin();
    void end(int rank);
};
extern std::deque<RankQueue> ranks;

const char* run_ranks();

}  // namespace emulator

inline void __trap() { __builtin_trap(); }
inline void __syncthreads() { emulator::arrive_and_wait(emulator::here->barrier); }
int __syncthreads_or(int predicate);
int __any_sync(unsigned, int predicate);
unsigned __ballot_sync(unsigned, bool predicate);
unsigned __reduce_max_sync(unsigned, unsigned x);
unsigned __reduce_min_sync(unsigned, unsigned x);
inline void __syncwarp() { emulator::arrive_and_wait(emulator::here->warps[emulator::current / 32].barrier); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulator::exchange(x)[threadIdx.x % 32 ^ mask]; }
template <typename T> T __shfl_sync(unsigned, T x, int lane) { return emulator::exchange(x)[lane]; }
template <typename T> T __shfl_up_sync(unsigned, T x, int by) { return emulator::exchange(x)[max(0, threadIdx.x % 32 - by)]; }
inline unsigned __cvta_generic_to_shared(const void* at) { return (const char*)at - emulator::shared; }

// The kernels' assembly, in C++.
inline float exp2_of(float x) { return std::exp2(x); }
inline int place_in_cluster() { return emulator::here->place; }
int cluster_index();
inline float approximate_inverse(float x) { return 1 / x; }
inline unsigned stream_word(const void* from) { return *(const unsigned*)from; }
inline float stream_float(const float* from) { return *from; }
inline uint2 stream_half(const void* from) { return *(const uint2*)from; }
inline uint4 stream(const void* from) { return *(const uint4*)from; }
inline uint4 load_written(const void* from) { return *(const uint4*)from; }
void copy_async(unsigned to, const void* from, bool inside = true);
inline void copy_async(void* to, const void* from) { copy_async(__cvta_generic_to_shared(to), from); }
void copy_word_async(void* to, const void* from);
void commit_copies();
template <int N> void wait_copies() { emulator::wait_for_copies(N); }
inline void wait_all_copies() { commit_copies(), emulator::wait_for_copies(0); }

template <typename T> void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, T type) {
    struct Word { uint16_t a[4][2], b[2][2]; };
    const Word* words = emulator::exchange(bit_cast<Word>(std::array{a0, a1, a2, a3, b0, b1}));
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int lane = k % 8 / 2;
            c[i] += value_of(words[g * 4 + lane].a[i / 2 + k / 8 * 2][k % 2], type) * value_of(words[(2 * t + i % 2) * 4 + lane].b[k / 8][k % 2], type);
        }
}
template <typename T> unsigned scale_pair(unsigned x, unsigned factor, T type) {
    unsigned pair = 0;
    for (int i = 0; i < 32; i += 16) {
        const float product = value_of((uint16_t)(x >> i), type) * value_of((uint16_t)(factor >> i), type);
        pair |= (unsigned)rounded_bits(product, type) << i;
    }
    return pair;
}
unsigned transpose(unsigned x);
void load_matrices(unsigned (&to)[4], unsigned row);
void load_transposed_matrices(unsigned (&to)[4], unsigned row);
void store_release(unsigned* flag, unsigned value);
inline unsigned load_acquire(const unsigned* flag) {
    emulator::wait_a_while();
    return *flag;
}
inline void store_relaxed(unsigned long long* word, unsigned long long value) { *word = value; }
void store_relaxed(void* to, ulonglong2 v);
template <typename T> void load_relaxed(T& v, const void* from) {
    emulator::wait_a_while();
    for (auto* writes : {&emulator::here->fibers[emulator::current].writes, &emulator::here->writes}) {
        const auto write = writes->find((char*)from);
        if (write == writes->end()) continue;
        memcpy(&v, write->second.data(), sizeof(T));
        return;
    }
    memcpy(&v, from, sizeof(T));
}
inline long long now_ns() { return emulator::turns; }
inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned value) { return std::exchange(*at, *at == expected ? value : *at); }
inline unsigned atomicInc(unsigned* at, unsigned last) { return std::exchange(*at, *at >= last ? 0 : *at + 1); }
void arrive_at_cluster();
void arrive_without_memory();
void wait_for_cluster();
void sync_cluster();
inline void send_to_block(float* at, float2 value, int block, unsigned barrier) {
    const int there = (block - emulator::here->place) * emulator::SHARED;
    emulator::box_copies.push_back({&emulator::phase_barrier(barrier + there), [=] { return memcpy((char*)at + there, &value, sizeof(value)), (int)sizeof(value); }});
}
inline void store_float_of_block(float* at, int block, float v) { *(float*)((char*)at + (block - emulator::here->place) * emulator::SHARED) = v; }
inline void store_of_block(float4* at, int block, const float* v) { memcpy((char*)at + (block - emulator::here->place) * emulator::SHARED, v, sizeof(*at)); }
inline float4 load_of_block(const float* at, int block) {
    float4 v;
    memcpy(&v, (const char*)at + (block - emulator::here->place) * emulator::SHARED, sizeof(v));
    return v;
}
inline void prefetch_line(const void*) {}
template <typename Map> void prefetch_map(const Map&) {}
inline void init_barrier(unsigned at, int count) { emulator::phase_barrier(at) = {(int16_t)count, (int16_t)count, 0, 0}; }
inline void publish_barriers() {}
void arrive_expecting(unsigned at, int bytes);
inline void arrive(unsigned at) { arrive_expecting(at, 0); }
void wait_for_phase(unsigned at, int phase);
inline void wait_for_blocks(unsigned at, int phase) { wait_for_phase(at, phase); }
struct EmulatedMap { const char* data; long long rows, columns, box_rows; };  // of tile_map in emulator.py
template <typename Map> void copy_box(unsigned to, const Map& map, int row, int column, unsigned barrier) {
    EmulatedMap m;
    memcpy(&m, &map, sizeof(m));
    emulator::box_copies.push_back({&emulator::phase_barrier(barrier), [=] {
        for (int i = 0; i < m.box_rows * 128; ++i) {
            const int r = row + i / 128, c = column + i % 128;
            const bool inside = r >= 0 && r < m.rows && c >= 0 && c < m.columns;
            emulator::shared[(int)to + (i ^ (i >> 7 & 7) << 4)] = inside ? m.data[r * m.columns + c] : 0;
        }
        return (int)m.box_rows * 128;
    }});
}
struct EmulatedParts { const char* data; long long rows, columns, box_rows, halves, parts; };  // of part_map in emulator.py
template <typename Map> void copy_parts(unsigned to, const Map& map, int row, int first_part, unsigned barrier) {
    EmulatedParts m;
    memcpy(&m, &map, sizeof(m));
    emulator::box_copies.push_back({&emulator::phase_barrier(barrier), [=] {
        const int bytes = m.parts * m.halves * m.box_rows * 128;
        for (int i = 0; i < bytes; ++i) {
            const long long line = i / 128, r = row + line % m.box_rows, half = line / m.box_rows % m.halves;
            const long long part = first_part + line / m.box_rows / m.halves, c = part * 128 + i % 128;
            const bool inside = r < m.rows && part * 128 < m.columns;
            emulator::shared[(int)to + (i ^ (i >> 7 & 7) << 4)] = inside ? m.data[(half * m.rows + r) * m.columns + c] : 0;
        }
        return bytes;
    }});
}
inline bool is_elected() { return threadIdx.x % 32 == 0; }
void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier);
inline void sync_threads(int threads) {
    emulator::here->some.expected = threads;
    emulator::arrive_and_wait(emulator::here->some);
}
inline void begin_multiply() {}
inline void end_multiply() {}
// Return an element of a row of a matrix that wgmma reads with this descriptor: rows of 128 bytes, chunks of 16 swizzled by row.
template <typename Bits> Bits wgmma_operand(unsigned long long descriptor, int row, int k) {
    const unsigned at = (unsigned)(descriptor & 0x3fff) * 16 + row * 128 + k * sizeof(Bits);
    Bits bits;
    memcpy(&bits, emulator::block_memory() + (at ^ (at >> 7 & 7) << 4), sizeof(bits));
    return bits;
}
template <int SIZE, typename F> void multiply_operands(float (&d)[SIZE], int columns, F product) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    for (int i = 0; i < SIZE; ++i)
        for (int k = 0; k < columns; ++k) d[i] += product(row + i / 2 % 2 * 8, i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, k);
}
template <int SIZE> void multiply_async(float (&d)[SIZE], unsigned long long a, unsigned long long b, int add) {
    if (!add) for (float& sum : d) sum = 0.f;
    auto value = [](unsigned long long of, int row, int k) { return __nv_fp8_e4m3::value(wgmma_operand<uint8_t>(of, row, k)); };
    multiply_operands(d, 32, [&](int row, int column, int k) { return value(a, row, k) * value(b, column, k); });
}
template <int SIZE, typename T> auto multiply_async(float (&d)[SIZE], unsigned long long a, unsigned long long b, T type) -> decltype((void)value_of(0, type)) {
    auto value = [=](unsigned long long of, int row, int k) { return value_of(wgmma_operand<uint16_t>(of, row, k), type); };
    multiply_operands(d, 16, [&](int row, int column, int k) { return value(a, row, k) * value(b, column, k); });
}
inline void commit_multiply() {}
inline void publish_copies() {}
// Do what multiply_async of registers has begun: as late as the source allows, when other threads may have overwritten b.
void wait_multiply();
inline void wait_multiply_but_last() {}
inline void compute_later(float&) {}
inline void release_registers() {}
inline void take_registers(int) {}
template <int SIZE> void multiply_async(float (&d)[SIZE], const unsigned (&a)[4], unsigned long long b) {
    struct Word { uint16_t a[4][2]; };
    const Word* words = emulator::exchange(bit_cast<Word>(std::array{a[0], a[1], a[2], a[3]}));
    std::array<Word, 4> row;
    memcpy(&row, words + threadIdx.x % 32 / 4 * 4, sizeof(row));
    emulator::here->fibers[emulator::current].multiplications.push_back([=, &d] {
        for (int i = 0; i < SIZE; ++i)
            for (int k = 0; k < 16; ++k) {
                const uint16_t x = wgmma_operand<uint16_t>(b, i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, k);
                d[i] += value_of(row[k % 8 / 2].a[i / 2 % 2 + k / 8 * 2][k % 2], __nv_bfloat16()) * value_of(x, __nv_bfloat16());
            }
    });
}
