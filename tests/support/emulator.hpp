// Enough of CUDA to run our kernels on a CPU. Threads are fibers that run in random order between barriers. Background copies
// happen at the wait for them, not before. A kernel of one GPU runs one cluster of blocks after the other; only dynamic shared memory
// is apart for each block of a cluster. Kernels of several ranks, which wait for each other, run with all blocks at the same time: see
// "Ranks" below.
#pragma once
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
inline Dim threadIdx, blockIdx, blockDim, gridDim;

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
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __threadfence() {}
template <typename T> T __ldg(const T* from) { return *from; }
template <typename T> T __ldcg(const T* from) { return *from; }
template <typename T, typename V> T atomicAdd(T* to, V value) { return std::exchange(*to, *to + value); }
template <typename T> T atomicMax(T* to, T value) { return std::exchange(*to, max(*to, value)); }

namespace emulator {

constexpr int STACK = 256 << 10, SHARED = 256 << 10, MAX_CLUSTER = 8;
alignas(1024) inline char shared[MAX_CLUSTER * SHARED];  // of the blocks of a cluster; static variables are within 32 bits of it

inline unsigned random_below(size_t count) {  // Knuth's linear congruential generator
    static uint64_t state = 1;
    state = state * 6364136223846793005 + 1442695040888963407;
    return (state >> 33) % count;
}

struct Barrier { int expected = 0; std::vector<int> waiting; };
struct Warp { Barrier barrier; int buffer[32] = {}; char words[2][32][32]; };
struct Copy { void* to; const void* from; bool inside; int bytes = 16; };
typedef std::map<char*, std::string> Writes;  // address -> bytes
struct Fiber {
    ucontext_t context;
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
struct Thread { Block* block; int index; };
inline std::vector<Thread> ready;
inline ucontext_t scheduler;
inline Block* here;  // the block of the current thread
inline int current;  // its index in the block
inline char* block_memory() { return shared + here->place * SHARED; }

inline void release_if_complete(Barrier& barrier) {
    if (barrier.expected == 0 || (int)barrier.waiting.size() < barrier.expected) return;
    for (int thread : barrier.waiting) ready.push_back({here, thread});
    barrier.waiting.clear();
    if (&barrier != &here->barrier) return;
    for (Fiber& fiber : here->fibers) {
        for (auto& write : fiber.writes) here->writes[write.first] = write.second;
        fiber.writes.clear();
    }
}
inline void leave() { swapcontext(&here->fibers[current].context, &scheduler); }
inline void arrive_and_wait(Barrier& barrier) {
    barrier.waiting.push_back(current);
    release_if_complete(barrier);
    leave();
}
inline void run_thread() {
    here->grid->kernel(here->grid->arguments);
    for (Barrier* barrier : {&here->barrier, &here->warps[current / 32].barrier}) {
        --barrier->expected;
        release_if_complete(*barrier);
    }
    --here->grid->running;
}
inline void start(Block& block, Grid& grid, Dim index) {
    const int threads = grid.threads.x;
    block.grid = &grid, block.index = index, block.barrier = {threads, {}}, block.some = {}, block.any = 0;
    block.warps.assign(threads / 32, Warp{{32, {}}});
    block.arrays.clear();
    block.fibers.resize(max(block.fibers.size(), (size_t)threads));
    grid.running += threads;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.groups.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_thread, 0);
        ready.push_back({&block, i});
    }
}
// Let the thread at a place in `ready` run until it waits.
inline void run(size_t place) {
    std::swap(ready[place], ready.back());
    here = ready.back().block, current = ready.back().index;
    ready.pop_back();
    threadIdx = {current, 0}, blockIdx = here->index, blockDim = here->grid->threads, gridDim = here->grid->size;
    swapcontext(&scheduler, &here->fibers[current].context);
}
struct Cluster {
    std::deque<Block> blocks;
    std::vector<Thread> waiting;  // at its barrier
    int arrived = 0, phase = 0;
};
inline Cluster cluster;
inline void arrive(Cluster& cluster) {
    here->fibers[current].cluster_phase = cluster.phase;
    int expected = 0;
    for (Block& block : cluster.blocks) expected += block.barrier.expected;
    if (++cluster.arrived < expected) return;
    ready.insert(ready.end(), cluster.waiting.begin(), cluster.waiting.end());
    cluster.waiting.clear();
    cluster.arrived = 0, ++cluster.phase;
}
inline void wait(Cluster& cluster) {
    const bool complete = here->fibers[current].cluster_phase != cluster.phase;
    (complete ? ready : cluster.waiting).push_back({here, current});
    leave();
}

// An mbarrier in shared memory, and the copies that it reports; they happen when a thread waits for them.
struct PhaseBarrier { int16_t count, missing; int32_t phase : 1, bytes : 31; };
inline std::vector<std::pair<PhaseBarrier*, std::function<int()>>> box_copies;
inline PhaseBarrier& phase_barrier(unsigned at) { return *(PhaseBarrier*)(shared + (int)at); }
inline void end_phase_if_complete(PhaseBarrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.count, barrier.phase = ~barrier.phase;
}
inline void copy_boxes(PhaseBarrier& barrier) {
    for (size_t i = 0; i < box_copies.size(); ++i)
        if (box_copies[i].first == &barrier) {
            barrier.bytes -= box_copies[i].second();
            box_copies.erase(box_copies.begin() + i--);
            end_phase_if_complete(barrier);
        }
}

// Return an error, or null.
inline const char* run_cluster(Grid& grid, int size, Dim first, int shared_bytes) {
    memset(shared, 0xff, size * SHARED);  // NaN, for reads of unwritten memory
    cluster.blocks.resize(size), cluster.waiting.clear(), cluster.arrived = 0;
    box_copies.clear();  // of a kernel that has not waited for them
    for (int i = 0; i < size; ++i) {
        cluster.blocks[i].place = i;
        start(cluster.blocks[i], grid, {first.x + i, first.y});
    }
    while (!ready.empty()) run(random_below(ready.size()));
    for (Block& block : cluster.blocks)
        if (block.barrier.expected > 0) return "threads wait for each other forever";
    for (int i = 0; i < size * SHARED; ++i)
        if (i % SHARED >= shared_bytes && shared[i] != (char)0xff) return "a block has written beyond its shared memory";
    return nullptr;
}
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
inline void wait_for_copies(size_t pending) {
    auto& groups = here->fibers[current].groups;
    for (; groups.size() > pending + 1; groups.erase(groups.begin()))
        for (const Copy& copy : groups[0]) copy.inside ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
}

template <typename... A, size_t... I> void call(void (*function)(A...), void** values, std::index_sequence<I...>) { function(*(A*)values[I]...); }
template <typename... A> void call(void (*function)(A...), void** values) { call(function, values, std::index_sequence_for<A...>()); }
inline const char* launch(int width, int height, int threads, int shared_bytes, int cluster_size, void (*body)(void**), void** values) {
    Grid grid{body, values, {width, height}, {threads, 1}};
    std::vector<int> clusters;
    for (int i = 0; i < width / cluster_size * height; ++i) clusters.push_back(i), std::swap(clusters[i], clusters[random_below(i + 1)]);
    for (int i : clusters) {
        const int at = i * cluster_size;
        if (const char* fault = run_cluster(grid, cluster_size, {at % width, at / width}, shared_bytes)) return fault;
    }
    return nullptr;
}

// Ranks. Each has a queue of grids, which run one after the other. A plain write into memory of a rank (`memories`) reaches only
// the threads of the block that are past the next barrier; a store with release, or the end of the grid, brings it to the others.
// Words that were pushed arrive one by one, in any order. One rank at a time is slow.

struct Word { char* to; unsigned long long value; int rank; };
inline std::vector<std::pair<char*, char*>> memories;  // first byte and end
inline std::vector<Word> in_flight;
inline long long turns;  // of threads: the clock

inline void apply(Writes& writes) {
    for (auto& write : writes) memcpy(write.first, write.second.data(), write.second.size());
    writes.clear();
}
inline void deliver(size_t place) {
    memcpy(in_flight[place].to, &in_flight[place].value, 8);
    in_flight.erase(in_flight.begin() + place);
}
template <typename T> void write(void* to, const T& value) {
    for (auto& memory : memories)
        if (to >= memory.first && to < memory.second) {
            here->fibers[current].writes[(char*)to].assign((const char*)&value, sizeof(T));
            return;
        }
    memcpy(to, &value, sizeof(T));
}
inline void wait_a_while() {
    ready.push_back({here, current});
    leave();
}
struct RankQueue {
    std::deque<Grid> grids;  // the first one runs
    std::deque<Block> blocks;

    void begin() {
        if (grids.empty()) return;
        Grid& grid = grids.front();
        blocks.clear();
        for (int i = 0; i < grid.size.x; ++i) start(blocks.emplace_back(), grid, {i, 0});
    }
    void end(int rank) {
        for (Block& block : blocks) {
            for (Fiber& fiber : block.fibers) apply(fiber.writes);
            apply(block.writes);
        }
        for (size_t i = in_flight.size(); i-- > 0;)
            if (in_flight[i].rank == rank) deliver(i);
        grids.pop_front();
    }
};
inline std::deque<RankQueue> ranks;

inline const char* run_ranks() {
    for (RankQueue& queue : ranks) queue.begin();
    for (int slow = 0; !ready.empty(); ++turns) {
        if (turns % 5000 == 0) slow = random_below(ranks.size());
        size_t place = random_below(ready.size());
        for (int tries = 0; tries < 8 && ready[place].block->grid->rank == slow; ++tries) place = random_below(ready.size());
        const int rank = ready[place].block->grid->rank;
        run(place);
        if (!in_flight.empty() && random_below(2)) deliver(random_below(in_flight.size()));
        RankQueue& queue = ranks[rank];
        if (queue.grids.front().running > 0) continue;
        queue.end(rank);
        queue.begin();
    }
    for (RankQueue& queue : ranks)
        if (!queue.grids.empty()) return "threads wait for each other forever";
    ranks.clear(), memories.clear();
    return nullptr;
}

}  // namespace emulator

inline void __syncthreads() { emulator::arrive_and_wait(emulator::here->barrier); }
inline int __syncthreads_or(int predicate) {
    emulator::here->any |= predicate;
    __syncthreads();
    const int result = emulator::here->any;
    __syncthreads();  // all have read
    emulator::here->any = 0;
    __syncthreads();  // all have reset it: the next call may set it
    return result;
}
inline int __any_sync(unsigned, int predicate) {
    const int* predicates = emulator::exchange(predicate);
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= predicates[lane];
    return any;
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    const int* predicates = emulator::exchange<int>(predicate);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (unsigned)predicates[lane] << lane;
    return ballot;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    const unsigned* values = emulator::exchange(x);
    return *std::max_element(values, values + 32);
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
    const unsigned* values = emulator::exchange(x);
    return *std::min_element(values, values + 32);
}
inline void __syncwarp() { emulator::arrive_and_wait(emulator::here->warps[emulator::current / 32].barrier); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulator::exchange(x)[threadIdx.x % 32 ^ mask]; }
template <typename T> T __shfl_sync(unsigned, T x, int lane) { return emulator::exchange(x)[lane]; }
template <typename T> T __shfl_up_sync(unsigned, T x, int by) { return emulator::exchange(x)[max(0, threadIdx.x % 32 - by)]; }
inline unsigned __cvta_generic_to_shared(const void* at) { return (const char*)at - emulator::shared; }

// The kernels' assembly, in C++.
inline float exp2_of(float x) { return std::exp2(x); }
inline unsigned stream_word(const void* from) { return *(const unsigned*)from; }
inline uint2 stream_half(const void* from) { return *(const uint2*)from; }
inline uint4 stream(const void* from) { return *(const uint4*)from; }
inline uint4 load_written(const void* from) { return *(const uint4*)from; }
inline void copy_async(unsigned to, const void* from, bool inside = true) {
    emulator::here->fibers[emulator::current].groups.back().push_back({emulator::shared + (int)to, from, inside});
}
inline void copy_async(void* to, const void* from) { copy_async(__cvta_generic_to_shared(to), from); }
inline void copy_word_async(void* to, const void* from) {
    emulator::here->fibers[emulator::current].groups.back().push_back({to, from, true, 4});
}
inline void commit_copies() { emulator::here->fibers[emulator::current].groups.emplace_back(); }
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
inline unsigned transpose(unsigned x) {
    struct Word { uint16_t of[2]; };
    const Word* words = emulator::exchange(bit_cast<Word>(x));
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    return words[column * 4 + row / 2].of[row % 2] | words[(column + 1) * 4 + row / 2].of[row % 2] << 16;
}
inline void load_matrices(unsigned (&to)[4], unsigned row) {
    const unsigned* rows = emulator::exchange(row);
    unsigned at[32];
    memcpy(at, rows, sizeof(at));
    for (int i = 0; i < 4; ++i) memcpy(&to[i], emulator::shared + (int)at[8 * i + threadIdx.x % 32 / 4] + threadIdx.x % 4 * 4, 4);
}
inline void load_transposed_matrices(unsigned (&to)[4], unsigned row) {
    load_matrices(to, row);
    for (unsigned& matrix : to) matrix = transpose(matrix);
}
inline void store_release(unsigned* flag, unsigned value) {
    emulator::apply(emulator::here->fibers[emulator::current].writes);
    emulator::apply(emulator::here->writes);
    *flag = value;
}
inline unsigned load_acquire(const unsigned* flag) {
    emulator::wait_a_while();
    return *flag;
}
inline void store_relaxed(unsigned long long* word, unsigned long long value) { *word = value; }
inline void store_relaxed(void* to, ulonglong2 v) {
    emulator::in_flight.push_back({(char*)to, v.x, emulator::here->grid->rank});
    emulator::in_flight.push_back({(char*)to + 8, v.y, emulator::here->grid->rank});
}
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
inline void arrive_at_cluster() { emulator::arrive(emulator::cluster); }
inline void arrive_without_memory() { emulator::arrive(emulator::cluster); }
inline void wait_for_cluster() { emulator::wait(emulator::cluster); }
inline void sync_cluster() { arrive_at_cluster(), wait_for_cluster(); }
inline float load_float_of_block(const float* at, int block) {
    return *(const float*)((const char*)at + (block - emulator::here->place) * emulator::SHARED);
}
inline float4 load_of_block(const float* at, int block) {
    float4 v;
    memcpy(&v, (const char*)at + (block - emulator::here->place) * emulator::SHARED, sizeof(v));
    return v;
}
inline void prefetch_line(const void*) {}
template <typename Map> void prefetch_map(const Map&) {}
inline void init_barrier(unsigned at, int count) { emulator::phase_barrier(at) = {(int16_t)count, (int16_t)count, 0, 0}; }
inline void publish_barriers() {}
inline void arrive_expecting(unsigned at, int bytes) {
    auto& barrier = emulator::phase_barrier(at);
    --barrier.missing, barrier.bytes += bytes;
    emulator::end_phase_if_complete(barrier);
}
inline void arrive(unsigned at) { arrive_expecting(at, 0); }
inline void wait_for_phase(unsigned at, int phase) {
    auto& barrier = emulator::phase_barrier(at);
    for (int turns = 0; emulator::copy_boxes(barrier), (barrier.phase & 1) == (phase & 1); ++turns)
        turns < 3'000 ? emulator::wait_a_while() : emulator::leave();  // at last forever
}
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
inline void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier) {
    emulator::box_copies.push_back({&emulator::phase_barrier(barrier), [=] { return memcpy(emulator::shared + (int)to, from, bytes), bytes; }});
}
inline void sync_threads(int threads) {
    emulator::here->some.expected = threads;
    emulator::arrive_and_wait(emulator::here->some);
}
inline void begin_multiply() {}
inline void end_multiply() {}
// Return byte k of a row of a matrix that wgmma reads with this descriptor: rows of 128 bytes, chunks of 16 swizzled by row.
inline float wgmma_operand(unsigned long long descriptor, int row, int k) {
    const unsigned at = (unsigned)(descriptor & 0x3fff) * 16 + row * 128 + k;
    return __nv_fp8_e4m3::value(emulator::block_memory()[at ^ (at >> 7 & 7) << 4]);
}
template <int SIZE> void multiply_async(float (&d)[SIZE], unsigned long long a, unsigned long long b, int add) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    for (int i = 0; i < SIZE; ++i) {
        float sum = add ? d[i] : 0.f;
        for (int k = 0; k < 32; ++k)
            sum += wgmma_operand(a, row + i / 2 % 2 * 8, k) * wgmma_operand(b, i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, k);
        d[i] = sum;
    }
}
inline void commit_multiply() {}
inline void publish_copies() {}
// Do what multiply_async of registers has begun: as late as the source allows, when other threads may have overwritten b.
inline void wait_multiply() {
    auto& begun = emulator::here->fibers[emulator::current].multiplications;
    for (auto& multiply : begun) multiply();
    begun.clear();
}
template <int SIZE> void multiply_async(float (&d)[SIZE], const unsigned (&a)[4], unsigned long long b) {
    struct Word { uint16_t a[4][2]; };
    const Word* words = emulator::exchange(bit_cast<Word>(std::array{a[0], a[1], a[2], a[3]}));
    std::array<Word, 4> row;
    memcpy(&row, words + threadIdx.x % 32 / 4 * 4, sizeof(row));
    emulator::here->fibers[emulator::current].multiplications.push_back([=, &d] {
        for (int i = 0; i < SIZE; ++i)
            for (int k = 0; k < 16; ++k) {
                const unsigned at = (unsigned)(b & 0x3fff) * 16 + (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2) * 128 + 2 * k;
                uint16_t x;
                memcpy(&x, emulator::block_memory() + (at ^ (at >> 7 & 7) << 4), 2);
                d[i] += value_of(row[k % 8 / 2].a[i / 2 % 2 + k / 8 * 2][k % 2], __nv_bfloat16()) * value_of(x, __nv_bfloat16());
            }
    });
}
