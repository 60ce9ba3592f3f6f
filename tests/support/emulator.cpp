// The functions that emulator.hpp declares. They are compiled once: as a part of each kernel they took four times as long as the kernel.
#include "emulator.hpp"

Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

alignas(1024) char shared[MAX_CLUSTER * SHARED];
struct Thread { Block* block; int index; };
struct Cluster {
    std::deque<Block> blocks;
    std::vector<Thread> waiting;  // at its barrier
    int arrived = 0, phase = 0;
};
std::vector<Thread> ready;
jmp_buf scheduler;
Block* here;
int current;
Cluster cluster;
std::vector<std::pair<PhaseBarrier*, std::function<int()>>> box_copies;
std::vector<std::pair<char*, char*>> memories;
std::vector<Word> in_flight;
long long turns;
std::deque<RankQueue> ranks;

unsigned random_below(size_t count) {  // Knuth's linear congruential generator
    static uint64_t state = 1;
    state = state * 6364136223846793005 + 1442695040888963407;
    return (state >> 33) % count;
}
void release_if_complete(Barrier& barrier) {
    if (barrier.expected == 0 || (int)barrier.waiting.size() < barrier.expected) return;
    for (int thread : barrier.waiting) ready.push_back({here, thread});
    barrier.waiting.clear();
    if (&barrier != &here->barrier) return;
    for (Fiber& fiber : here->fibers) {
        for (auto& write : fiber.writes) here->writes[write.first] = write.second;
        fiber.writes.clear();
    }
}
void leave() {
    if (_setjmp(here->fibers[current].place) == 0) _longjmp(scheduler, 1);
}
void arrive_and_wait(Barrier& barrier) {
    barrier.waiting.push_back(current);
    release_if_complete(barrier);
    leave();
}
void run_thread() {
    here->grid->kernel(here->grid->arguments);
    for (Barrier* barrier : {&here->barrier, &here->warps[current / 32].barrier}) {
        --barrier->expected;
        release_if_complete(*barrier);
    }
    --here->grid->running;
    _longjmp(scheduler, 1);
}
void start(Block& block, Grid& grid, Dim index) {
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
        fiber.began = false;
        makecontext(&fiber.context, run_thread, 0);
        ready.push_back({&block, i});
    }
}
// Let the thread at a place in `ready` run until it waits.
void run(size_t place) {
    std::swap(ready[place], ready.back());
    here = ready.back().block, current = ready.back().index;
    ready.pop_back();
    threadIdx = {current, 0}, blockIdx = here->index, blockDim = here->grid->threads, gridDim = here->grid->size;
    Fiber& fiber = here->fibers[current];
    if (_setjmp(scheduler) != 0) return;
    if (std::exchange(fiber.began, true)) _longjmp(fiber.place, 1);
    setcontext(&fiber.context);
}
void arrive(Cluster& cluster) {
    here->fibers[current].cluster_phase = cluster.phase;
    int expected = 0;
    for (Block& block : cluster.blocks) expected += block.barrier.expected;
    if (++cluster.arrived < expected) return;
    ready.insert(ready.end(), cluster.waiting.begin(), cluster.waiting.end());
    cluster.waiting.clear();
    cluster.arrived = 0, ++cluster.phase;
}
void wait(Cluster& cluster) {
    const bool complete = here->fibers[current].cluster_phase != cluster.phase;
    (complete ? ready : cluster.waiting).push_back({here, current});
    leave();
}
void end_phase_if_complete(PhaseBarrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.count, barrier.phase = ~barrier.phase;
}
void copy_boxes(PhaseBarrier& barrier) {
    for (size_t i = 0; i < box_copies.size(); ++i)
        if (box_copies[i].first == &barrier) {
            barrier.bytes -= box_copies[i].second();
            box_copies.erase(box_copies.begin() + i--);
            end_phase_if_complete(barrier);
        }
}
// Return an error, or null.
const char* run_cluster(Grid& grid, int size, Dim first, int shared_bytes) {
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
void wait_for_copies(size_t pending) {
    auto& groups = here->fibers[current].groups;
    for (; groups.size() > pending + 1; groups.erase(groups.begin()))
        for (const Copy& copy : groups[0]) copy.inside ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
}
const char* launch(int width, int height, int threads, int shared_bytes, int cluster_size, void (*body)(void**), void** values) {
    Grid grid{body, values, {width, height}, {threads, 1}};
    std::vector<int> clusters;
    for (int i = 0; i < width / cluster_size * height; ++i) clusters.push_back(i), std::swap(clusters[i], clusters[random_below(i + 1)]);
    for (int i : clusters) {
        const int at = i * cluster_size;
        if (const char* fault = run_cluster(grid, cluster_size, {at % width, at / width}, shared_bytes)) return fault;
    }
    return nullptr;
}
void apply(Writes& writes) {
    for (auto& write : writes) memcpy(write.first, write.second.data(), write.second.size());
    writes.clear();
}
void deliver(size_t place) {
    memcpy(in_flight[place].to, &in_flight[place].value, 8);
    in_flight.erase(in_flight.begin() + place);
}
void wait_a_while() {
    ready.push_back({here, current});
    leave();
}
void RankQueue::begin() {
    if (grids.empty()) return;
    Grid& grid = grids.front();
    blocks.clear();
    for (int i = 0; i < grid.size.x; ++i) start(blocks.emplace_back(), grid, {i, 0});
}
void RankQueue::end(int rank) {
    for (Block& block : blocks) {
        for (Fiber& fiber : block.fibers) apply(fiber.writes);
        apply(block.writes);
    }
    for (size_t i = in_flight.size(); i-- > 0;)
        if (in_flight[i].rank == rank) deliver(i);
    grids.pop_front();
}
const char* run_ranks() {
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

int __syncthreads_or(int predicate) {
    emulator::here->any |= predicate;
    __syncthreads();
    const int result = emulator::here->any;
    __syncthreads();  // all have read
    emulator::here->any = 0;
    __syncthreads();  // all have reset it: the next call may set it
    return result;
}
int __any_sync(unsigned, int predicate) {
    const int* predicates = emulator::exchange(predicate);
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= predicates[lane];
    return any;
}
unsigned __ballot_sync(unsigned, bool predicate) {
    const int* predicates = emulator::exchange<int>(predicate);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (unsigned)predicates[lane] << lane;
    return ballot;
}
unsigned __reduce_max_sync(unsigned, unsigned x) {
    const unsigned* values = emulator::exchange(x);
    return *std::max_element(values, values + 32);
}
unsigned __reduce_min_sync(unsigned, unsigned x) {
    const unsigned* values = emulator::exchange(x);
    return *std::min_element(values, values + 32);
}
void copy_async(unsigned to, const void* from, bool inside) {
    emulator::here->fibers[emulator::current].groups.back().push_back({emulator::shared + (int)to, from, inside});
}
void copy_word_async(void* to, const void* from) {
    emulator::here->fibers[emulator::current].groups.back().push_back({to, from, true, 4});
}
void commit_copies() { emulator::here->fibers[emulator::current].groups.emplace_back(); }
unsigned transpose(unsigned x) {
    struct Word { uint16_t of[2]; };
    const Word* words = emulator::exchange(bit_cast<Word>(x));
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    return words[column * 4 + row / 2].of[row % 2] | words[(column + 1) * 4 + row / 2].of[row % 2] << 16;
}
void load_matrices(unsigned (&to)[4], unsigned row) {
    const unsigned* rows = emulator::exchange(row);
    unsigned at[32];
    memcpy(at, rows, sizeof(at));
    for (int i = 0; i < 4; ++i) memcpy(&to[i], emulator::shared + (int)at[8 * i + threadIdx.x % 32 / 4] + threadIdx.x % 4 * 4, 4);
}
void load_transposed_matrices(unsigned (&to)[4], unsigned row) {
    load_matrices(to, row);
    for (unsigned& matrix : to) matrix = transpose(matrix);
}
void store_release(unsigned* flag, unsigned value) {
    emulator::apply(emulator::here->fibers[emulator::current].writes);
    emulator::apply(emulator::here->writes);
    *flag = value;
}
void store_relaxed(void* to, ulonglong2 v) {
    emulator::in_flight.push_back({(char*)to, v.x, emulator::here->grid->rank});
    emulator::in_flight.push_back({(char*)to + 8, v.y, emulator::here->grid->rank});
}
void arrive_expecting(unsigned at, int bytes) {
    auto& barrier = emulator::phase_barrier(at);
    --barrier.missing, barrier.bytes += bytes;
    emulator::end_phase_if_complete(barrier);
}
void wait_for_phase(unsigned at, int phase) {
    auto& barrier = emulator::phase_barrier(at);
    for (int turns = 0; emulator::copy_boxes(barrier), (barrier.phase & 1) == (phase & 1); ++turns)
        turns < 3'000 ? emulator::wait_a_while() : emulator::leave();  // at last forever
}
void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier) {
    emulator::box_copies.push_back({&emulator::phase_barrier(barrier), [=] { return memcpy(emulator::shared + (int)to, from, bytes), bytes; }});
}
void wait_multiply() {
    auto& begun = emulator::here->fibers[emulator::current].multiplications;
    for (auto& multiply : begun) multiply();
    begun.clear();
}
unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
void arrive_at_cluster() { emulator::arrive(emulator::cluster); }
void arrive_without_memory() { emulator::arrive(emulator::cluster); }
void wait_for_cluster() { emulator::wait(emulator::cluster); }
void sync_cluster() { arrive_at_cluster(), wait_for_cluster(); }
int cluster_index() { return blockIdx.x / (int)emulator::cluster.blocks.size(); }
