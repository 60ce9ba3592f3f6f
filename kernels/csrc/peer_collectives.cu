// Collectives between the GPUs of one host, over memory of each rank that all other ranks have mapped.
//
// A rank publishes its input in a slot of its buffer, unless a GEMM has written it there. It signals the same block of every peer,
// waits for their signals, and reads their slots. Sums are in rank order and in float32: bitwise identical on all ranks. A signal is
// the number of a round, which each block counts on the device. It only grows, so that a graph can be replayed. Block b reads only
// what blocks b of the peers have published: the shares depend on sizes and grid, which are equal on all ranks.
// BufferRotation in comm/peer_buffers.py proves that no rank writes into a slot that a slow peer still reads.
//
// A wait ends at a timeout, or when the host sets `stop`. The rank's results are then invalid, and it never signals its peers
// again: they time out as well. The host finds the missing ranks in `missing`.
#include "common.cuh"

constexpr int RANKS = 8, BLOCKS = 64;  // the maxima
constexpr int HEADER_BYTES = 4096;     // before the first slot
constexpr int UNIT = 16;               // elements: the share of a block is a multiple of it, for any vector width
constexpr int POLLS = 256;             // polls of a signal between two reads of the clock and of `stop`

struct Header {                              // at the start of a buffer, zero at first
    unsigned signals[BLOCKS][RANKS];         // the round that a block of each peer has reached; written by the peers
    unsigned rounds[BLOCKS], has_timed_out;  // the state of this rank's blocks
};

struct PeerTable {  // one rank's view of all ranks, constant; its fields are those of table_fields() in peer_memory.py
    char* buffers[RANKS];
    unsigned long long* missing;  // on the host: for each rank (operation << 32 | round) of the wait that timed out
    const unsigned* stop;         // on the host: not zero ends all waits
    long long timeout_ns, slot_bytes, rank, alone;  // alone: no other rank shares this GPU, so the next kernel may start early
};

// Stores and loads between ranks. Loads never come from L1, which does not see the writes of peers.
DEVICE void store_release(unsigned* flag, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(value) : "memory");
}
DEVICE unsigned load_acquire(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
DEVICE void store_relaxed(unsigned long long* word, unsigned long long value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(word), "l"(value) : "memory");
}
#define LOAD_RELAXED(T, SUFFIX, REGISTER, Loaded) \
    DEVICE void load_relaxed(T& v, const void* from) { \
        Loaded loaded; \
        asm volatile("ld.relaxed.sys.global." SUFFIX " %0, [%1];" : REGISTER(loaded) : "l"(from) : "memory"); \
        v = loaded; \
    }
LOAD_RELAXED(unsigned char, "u8", "=r", unsigned)
LOAD_RELAXED(unsigned short, "u16", "=h", unsigned short)
LOAD_RELAXED(unsigned, "u32", "=r", unsigned)
DEVICE void load_relaxed(uint4& v, const void* from) {
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
}
DEVICE long long now_ns() {
    long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<16> { typedef uint4 type; };
template <typename T, int V> DEVICE Vec<T, V> load_from_peer(const T* from) {
    typename Word<sizeof(T) * V>::type word;
    load_relaxed(word, from);
    return *reinterpret_cast<Vec<T, V>*>(&word);
}

template <typename T, int V> DEVICE void copy(T* to, const T* from) {
    *reinterpret_cast<Vec<T, V>*>(to) = *reinterpret_cast<const Vec<T, V>*>(from);
}

// Call f(i) for each vector in this block's share of `count` elements, of which only `length` exist.
template <int V, typename F> DEVICE void for_each_vector(long long count, long long length, F f) {
    const unsigned units = (count + UNIT - 1) / UNIT, share = (units + gridDim.x - 1) / gridDim.x;
    const long long first = (long long)blockIdx.x * share * UNIT, stop = min(min(count, length), first + (long long)share * UNIT);
    for (long long i = first + threadIdx.x * V; i < stop; i += blockDim.x * V) f(i);
}

// One block's part in a collective of N ranks: publish, arrive_and_wait, read the slots, release.
template <typename T, int V, int N> struct Collective {
    const PeerTable& peers;
    Header* header;
    T* slots[N];  // of all ranks
    unsigned round;
    int rank, slot, operation;
    bool timed_out;

    DEVICE Collective(const PeerTable* peers, int slot, int operation) : peers(*peers), slot(slot), operation(operation) {
        if (peers->alone) launch_next();
        rank = peers->rank;
        header = reinterpret_cast<Header*>(peers->buffers[rank]);
        UNROLL for (int p = 0; p < N; ++p) slots[p] = slot_of(p);
        wait_for_previous();
        load_relaxed(round, &header->rounds[blockIdx.x]);
        timed_out = load_from_peer<unsigned, 1>(&header->has_timed_out).at[0];
    }

    DEVICE T* slot_of(int peer) const { return reinterpret_cast<T*>(peers.buffers[peer] + HEADER_BYTES + slot * peers.slot_bytes); }

    DEVICE T* local_slot() const { return slot_of(rank); }

    // Copy x, chunks of `chunk` elements, into this rank's slot: each block the shares that it reads of its peers.
    DEVICE void publish(const T* x, long long total, long long chunk) {
        T* to = local_slot();
        if (x == to) return;
        for (long long start = 0; start < total; start += chunk)
            for_each_vector<V>(chunk, total - start, [&](long long i) { copy<T, V>(to + start + i, x + start + i); });
    }

    // A barrier of the blocks of all ranks. What a peer wrote before is visible after.
    DEVICE void arrive_and_wait() {
        __syncthreads();
        ++round;
        const int peer = threadIdx.x;
        bool failed = false;
        if (peer < N && peer != rank && !timed_out) {
            store_release(&reinterpret_cast<Header*>(peers.buffers[peer])->signals[blockIdx.x][rank], round);
            failed = !wait_for(peer);
        }
        timed_out |= __syncthreads_or(failed);
    }

    DEVICE bool wait_for(int peer) {
        const unsigned* signal = &header->signals[blockIdx.x][peer];
        long long start = 0;
        for (unsigned polls = 1; (int)(load_acquire(signal) - round) < 0; ++polls) {
            if (polls % POLLS) continue;
            const long long now = now_ns();
            if (start == 0) start = now;
            const bool stopped = load_from_peer<unsigned, 1>(peers.stop).at[0];
            if (!stopped && now - start < peers.timeout_ns) continue;
            if (!stopped) store_relaxed(peers.missing + peer, (unsigned long long)operation << 32 | round);
            header->has_timed_out = 1;
            return false;
        }
        return true;
    }

    // Slot 0 is released only when all peers have read it.
    DEVICE void release() {
        if (slot == 0) arrive_and_wait();
        if (threadIdx.x == 0) header->rounds[blockIdx.x] = round;
    }

    // sum = the sum over the ranks of the vector at this place of the slots.
    DEVICE void load_sum(float (&sum)[V], long long at) const {
        Vec<T, V> values[N];
        UNROLL for (int p = 0; p < N; ++p) values[p] = load_from_peer<T, V>(slots[p] + at);
        UNROLL for (int j = 0; j < V; ++j) {
            sum[j] = to_float(values[0].at[j]);
            UNROLL for (int p = 1; p < N; ++p) sum[j] += to_float(values[p].at[j]);
        }
    }

    DEVICE void store_sum(T* to, long long at) const {
        float sum[V];
        load_sum(sum, at);
        *reinterpret_cast<Vec<T, V>*>(to) = round_all<T>(sum);
    }
};

// out = sum of x over the ranks; every rank reads all slots.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) one_shot_all_reduce(
    T* out, const T* x, long long total, const PeerTable* peers, int slot, int operation) {
    Collective<T, V, N> collective(peers, slot, operation);
    collective.publish(x, total, total);
    collective.arrive_and_wait();
    for_each_vector<V>(total, total, [&](long long i) { collective.store_sum(out + i, i); });
    collective.release();
}

// The same sum in two steps: each rank sums its chunk in place, in its slot, then reads the chunks of the others.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) two_shot_all_reduce(
    T* out, const T* x, long long total, long long chunk, const PeerTable* peers, int slot, int operation) {
    Collective<T, V, N> collective(peers, slot, operation);
    collective.publish(x, total, chunk);
    collective.arrive_and_wait();
    const long long start = collective.rank * chunk;
    T* local = collective.local_slot() + start;
    for_each_vector<V>(chunk, total - start, [&](long long i) { collective.store_sum(local + i, start + i); });
    collective.arrive_and_wait();
    for_each_vector<V>(chunk, chunk, [&](long long i) {
        Vec<T, V> sums[N];
        UNROLL for (int p = 0; p < N; ++p)
            if (p * chunk + i < total) sums[p] = load_from_peer<T, V>(collective.slots[p] + p * chunk + i);
        UNROLL for (int p = 0; p < N; ++p)
            if (p * chunk + i < total) *reinterpret_cast<Vec<T, V>*>(out + p * chunk + i) = sums[p];
    });
    collective.release();
}

// out [N, total] = x of every rank, as bytes. With total = 0 it is a barrier.
template <int V, int N>
__global__ void __launch_bounds__(512, 1) all_gather(
    unsigned char* out, const unsigned char* x, long long total, const PeerTable* peers, int slot, int operation) {
    Collective<unsigned char, V, N> collective(peers, slot, operation);
    collective.publish(x, total, total);
    collective.arrive_and_wait();
    for_each_vector<V>(total, total, [&](long long i) {
        Vec<unsigned char, V> values[N];
        UNROLL for (int p = 0; p < N; ++p) values[p] = load_from_peer<unsigned char, V>(collective.slots[p] + i);
        UNROLL for (int p = 0; p < N; ++p) *reinterpret_cast<Vec<unsigned char, V>*>(out + p * total + i) = values[p];
    });
    collective.release();
}

// residual += sum of x over the ranks, out = RMSNorm of the unrounded residual. A block has whole rows, a thread R vectors of a row.
// With TWO_SHOT each rank sums its columns of every row; that sum is rounded, as in two_shot_all_reduce.
template <typename T, int V, int N, int R, bool TWO_SHOT>
__global__ void __launch_bounds__(512, 1) all_reduce_add_rms_norm(
    T* out, const T* x, T* residual, const T* __restrict__ weight, float eps, int rows, int size,
    const PeerTable* peers, int slot, int operation) {
    Collective<T, V, N> collective(peers, slot, operation);
    T* local = collective.local_slot();
    auto for_each_row_vector = [&](int first, int stop, auto f) {  // of columns [first, stop) in the rows of this block
        for (int row = blockIdx.x; row < rows; row += gridDim.x)
            for (int i = first + threadIdx.x * V; i < stop; i += blockDim.x * V) f((long long)row * size + i);
    };
    if (x != local) for_each_row_vector(0, size, [&](long long at) { copy<T, V>(local + at, x + at); });
    collective.arrive_and_wait();
    const int chunk = (size + N * UNIT - 1) / (N * UNIT) * UNIT;  // columns of a rank
    if (TWO_SHOT) {
        const int first = collective.rank * chunk;
        for_each_row_vector(first, min(size, first + chunk), [&](long long at) { collective.store_sum(local + at, at); });
        collective.arrive_and_wait();
    }
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float value[R][V], squares = 0.f;
        UNROLL for (int r = 0; r < R; ++r) {
            const int i = (r * blockDim.x + threadIdx.x) * V;
            if (i >= size) break;
            const long long at = (long long)row * size + i;
            Vec<T, V> total = *reinterpret_cast<const Vec<T, V>*>(residual + at);
            if (TWO_SHOT) {
                const Vec<T, V> sum = load_from_peer<T, V>(collective.slot_of(i / chunk) + at);
                UNROLL for (int j = 0; j < V; ++j) value[r][j] = to_float(sum.at[j]);
            } else collective.load_sum(value[r], at);
            UNROLL for (int j = 0; j < V; ++j) {
                value[r][j] += to_float(total.at[j]);
                squares += value[r][j] * value[r][j];
                total.at[j] = from_float<T>(value[r][j]);
            }
            *reinterpret_cast<Vec<T, V>*>(residual + at) = total;
        }
        const float scale = rsqrtf(block_sum(squares) / size + eps);
        UNROLL for (int r = 0; r < R; ++r) {
            const int i = (r * blockDim.x + threadIdx.x) * V;
            if (i >= size) break;
            const Vec<T, V> w = *reinterpret_cast<const Vec<T, V>*>(weight + i);
            Vec<T, V> result;
            UNROLL for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(value[r][j] * scale * to_float(w.at[j]));
            *reinterpret_cast<Vec<T, V>*>(out + (long long)row * size + i) = result;
        }
        __syncthreads();  // before the next row: block_sum has one buffer
    }
    collective.release();
}
