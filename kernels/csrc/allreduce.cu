// Collectives between the GPUs of one host, over memory of each rank that all others have mapped.
//
// A rank puts its input into a slot of its own arena, unless a product has written it there; tells the same block of every
// peer; waits until these have told it; and reads their slots. Sums go in rank order and in float32: the same bits on all ranks.
// What is told is a round, which each block counts on the device: it only grows, so that a graph can be replayed. Block b reads
// nothing but what the peers' blocks b have offered: which part that is depends on sizes and grid, which are equal on all ranks.
// Why nobody writes into a slot that a slow peer still reads: comm/symmetric.py.
//
// A wait ends at a deadline, or when the host says so. This rank has garbage then, and never tells the peers again that it has
// come: they give up as well. The host finds in `missing` who did not come.
#include "common.cuh"

constexpr int RANKS = 8, BLOCKS = 64;  // at most
constexpr int HEADER_BYTES = 4096;     // before the first slot
constexpr int UNIT = 16;               // elements: the part of a block is a multiple of it, whatever the size of its vectors
constexpr int LOOK = 256;              // turns of a waiting loop between two looks at the clock and at the host's word

struct Header {                      // at the start of an arena, zero at first
    unsigned flags[BLOCKS][RANKS];   // the round to which a block of each peer has come; the peers write it
    unsigned rounds[BLOCKS], ended;  // this rank's own: its rounds, and whether it has given up
};

struct Group {  // one rank's view, which does not change
    char* arenas[RANKS];
    unsigned long long* missing;  // on the host, for each rank: (kind, round) in which it was waited for in vain
    const unsigned* stop;         // on the host: not zero if nobody shall wait any more
    long long patience_ns, slot_bytes, rank, alone;  // alone on its GPU: the next kernel may take the rest of it early
};

// What passes between ranks: never from L1, which does not see what others write.
__device__ __forceinline__ void tell(unsigned* flag, unsigned round) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(flag), "r"(round) : "memory");
}

__device__ __forceinline__ unsigned told(const unsigned* flag) {
    unsigned round;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(round) : "l"(flag) : "memory");
    return round;
}

__device__ __forceinline__ unsigned look(const unsigned* word) {
    unsigned value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void report(unsigned long long* word, unsigned long long value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" :: "l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ void pull(unsigned char& v, const void* from) {
    unsigned wide;
    asm volatile("ld.relaxed.sys.global.u8 %0, [%1];" : "=r"(wide) : "l"(from) : "memory");
    v = wide;
}

__device__ __forceinline__ void pull(unsigned short& v, const void* from) {
    asm volatile("ld.relaxed.sys.global.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
}

__device__ __forceinline__ void pull(unsigned& v, const void* from) {
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
}

__device__ __forceinline__ void pull(uint4& v, const void* from) {
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
}

__device__ __forceinline__ long long now_ns() {
    long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<16> { typedef uint4 type; };

template <typename T, int V> __device__ __forceinline__ Vec<T, V> vector_at(const T* from) {
    typename Word<sizeof(T) * V>::type word;
    pull(word, from);
    return *reinterpret_cast<Vec<T, V>*>(&word);
}

template <typename T, int V> __device__ __forceinline__ void copy(T* to, const T* from) {
    *reinterpret_cast<Vec<T, V>*>(to) = *reinterpret_cast<const Vec<T, V>*>(from);
}

// f(i) for this block's vectors of a chunk of `whole` elements, of which `length` are there.
template <int V, typename F> __device__ __forceinline__ void share(long long whole, long long length, F f) {
    const unsigned units = (whole + UNIT - 1) / UNIT, part = (units + gridDim.x - 1) / gridDim.x;
    const long long first = (long long)blockIdx.x * part * UNIT, stop = min(min(whole, length), first + (long long)part * UNIT);
    for (long long i = first + threadIdx.x * V; i < stop; i += blockDim.x * V) f(i);
}

// One block's side of a collective. Slot 0 is left only when all peers have read it.
template <typename T, int V, int N> struct Meeting {
    const Group& group;
    Header* header;
    T* slots[N];  // of all ranks
    unsigned round;
    int rank, slot, kind;
    bool ended;

    __device__ __forceinline__ Meeting(const Group* group, int slot, int kind) : group(*group), slot(slot), kind(kind) {
        if (group->alone) launch_next();
        rank = group->rank;
        header = reinterpret_cast<Header*>(group->arenas[rank]);
        #pragma unroll
        for (int p = 0; p < N; ++p) slots[p] = slot_of(p);
        wait_for_previous();
        round = look(&header->rounds[blockIdx.x]);
        ended = look(&header->ended);
    }

    __device__ __forceinline__ T* slot_of(int peer) const {
        return reinterpret_cast<T*>(group.arenas[peer] + HEADER_BYTES + slot * group.slot_bytes);
    }

    __device__ __forceinline__ T* own() const { return slot_of(rank); }

    // Every peer's block comes here; what it wrote before can be read after.
    __device__ __forceinline__ void meet() {
        __syncthreads();
        ++round;
        const int peer = threadIdx.x;
        bool vain = false;
        if (peer < N && peer != rank && !ended) {
            tell(&reinterpret_cast<Header*>(group.arenas[peer])->flags[blockIdx.x][rank], round);
            vain = !wait_for(peer);
        }
        ended |= __syncthreads_or(vain);
    }

    __device__ __forceinline__ bool wait_for(int peer) {
        const unsigned* flag = &header->flags[blockIdx.x][peer];
        long long since = 0;
        for (unsigned turn = 1; (int)(told(flag) - round) < 0; ++turn) {
            if (turn % LOOK) continue;
            const long long now = now_ns();
            if (since == 0) since = now;
            const bool stopped = look(group.stop);
            if (!stopped && now - since < group.patience_ns) continue;
            if (!stopped) report(group.missing + peer, (unsigned long long)kind << 32 | round);
            header->ended = 1;
            return false;
        }
        return true;
    }

    __device__ __forceinline__ void leave() {
        if (slot == 0) meet();
        if (threadIdx.x == 0) header->rounds[blockIdx.x] = round;
    }

    // Put x, which consists of chunks of `each` elements, into this rank's slot; each block those parts that it will read of a peer.
    __device__ __forceinline__ void offer(const T* x, long long total, long long each) {
        T* to = own();
        if (x == to) return;
        for (long long start = 0; start < total; start += each)
            share<V>(each, total - start, [&](long long i) { copy<T, V>(to + start + i, x + start + i); });
    }

    __device__ __forceinline__ void add_up(float (&sum)[V], long long at) const {
        Vec<T, V> parts[N];
        #pragma unroll
        for (int p = 0; p < N; ++p) parts[p] = vector_at<T, V>(slots[p] + at);
        #pragma unroll
        for (int j = 0; j < V; ++j) {
            sum[j] = to_float(parts[0].at[j]);
            #pragma unroll
            for (int p = 1; p < N; ++p) sum[j] += to_float(parts[p].at[j]);
        }
    }

    __device__ __forceinline__ void store_sum(T* to, long long at) const {
        float sum[V];
        add_up(sum, at);
        Vec<T, V> result;
        #pragma unroll
        for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(sum[j]);
        *reinterpret_cast<Vec<T, V>*>(to) = result;
    }
};

// out = the sum of x over the ranks; of its chunk `rank` only, where x [total] has more than one chunk of `each` elements.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) one_shot_all_reduce(
    T* out, const T* x, long long total, long long each, const Group* group, int slot, int kind) {
    Meeting<T, V, N> meeting(group, slot, kind);
    meeting.offer(x, total, each);
    meeting.meet();
    const long long start = each < total ? meeting.rank * each : 0;
    share<V>(each, each, [&](long long i) { meeting.store_sum(out + i, start + i); });
    meeting.leave();
}

// The same sum in two steps: each rank adds up its chunk, in the place of its own, and reads the others' when they have done.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) two_shot_all_reduce(
    T* out, const T* x, long long total, long long each, const Group* group, int slot, int kind) {
    Meeting<T, V, N> meeting(group, slot, kind);
    meeting.offer(x, total, each);
    meeting.meet();
    const long long start = meeting.rank * each;
    T* own = meeting.own() + start;
    share<V>(each, total - start, [&](long long i) { meeting.store_sum(own + i, start + i); });
    meeting.meet();
    share<V>(each, each, [&](long long i) {
        Vec<T, V> parts[N];
        #pragma unroll
        for (int p = 0; p < N; ++p)
            if (p * each + i < total) parts[p] = vector_at<T, V>(meeting.slots[p] + p * each + i);
        #pragma unroll
        for (int p = 0; p < N; ++p)
            if (p * each + i < total) *reinterpret_cast<Vec<T, V>*>(out + p * each + i) = parts[p];
    });
    meeting.leave();
}

// out [N, total] = x of every rank; as bytes. Without any it is a barrier.
template <int V, int N>
__global__ void __launch_bounds__(512, 1) all_gather(
    unsigned char* out, const unsigned char* x, long long total, const Group* group, int slot, int kind) {
    Meeting<unsigned char, V, N> meeting(group, slot, kind);
    meeting.offer(x, total, total);
    meeting.meet();
    share<V>(total, total, [&](long long i) {
        Vec<unsigned char, V> parts[N];
        #pragma unroll
        for (int p = 0; p < N; ++p) parts[p] = vector_at<unsigned char, V>(meeting.slots[p] + i);
        #pragma unroll
        for (int p = 0; p < N; ++p) *reinterpret_cast<Vec<unsigned char, V>*>(out + p * total + i) = parts[p];
    });
    meeting.leave();
}

// residual += sum of x over the ranks, out = RMSNorm of the unrounded residual; a block takes whole rows, R vectors of one a thread.
// In two steps, a rank adds up its columns of every row; this sum is rounded, as that of reduce_and_gather.
template <typename T, int V, int N, int R, bool TWO_STEPS>
__global__ void __launch_bounds__(512, 1) all_reduce_add_rms_norm(
    T* out, const T* x, T* residual, const T* __restrict__ weight, float eps, int rows, int size,
    const Group* group, int slot, int kind) {
    Meeting<T, V, N> meeting(group, slot, kind);
    T* own = meeting.own();
    auto for_rows = [&](int first, int stop, auto f) {  // the vectors of columns [first, stop) in the rows of this block
        for (int row = blockIdx.x; row < rows; row += gridDim.x)
            for (int i = first + threadIdx.x * V; i < stop; i += blockDim.x * V) f((long long)row * size + i);
    };
    if (x != own) for_rows(0, size, [&](long long at) { copy<T, V>(own + at, x + at); });
    meeting.meet();
    const int each = (size + N * UNIT - 1) / (N * UNIT) * UNIT;  // columns of a rank
    if (TWO_STEPS) {
        const int first = meeting.rank * each;
        for_rows(first, min(size, first + each), [&](long long at) { meeting.store_sum(own + at, at); });
        meeting.meet();
    }
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float value[R][V], squares = 0.f;
        #pragma unroll
        for (int r = 0; r < R; ++r) {
            const int i = (r * blockDim.x + threadIdx.x) * V;
            if (i >= size) break;
            const long long at = (long long)row * size + i;
            Vec<T, V> total = *reinterpret_cast<const Vec<T, V>*>(residual + at);
            if (TWO_STEPS) {
                const Vec<T, V> sum = vector_at<T, V>(meeting.slot_of(i / each) + at);
                #pragma unroll
                for (int j = 0; j < V; ++j) value[r][j] = to_float(sum.at[j]);
            } else {
                meeting.add_up(value[r], at);
            }
            #pragma unroll
            for (int j = 0; j < V; ++j) {
                value[r][j] += to_float(total.at[j]);
                squares += value[r][j] * value[r][j];
                total.at[j] = from_float<T>(value[r][j]);
            }
            *reinterpret_cast<Vec<T, V>*>(residual + at) = total;
        }
        const float scale = rsqrtf(block_sum(squares) / size + eps);
        #pragma unroll
        for (int r = 0; r < R; ++r) {
            const int i = (r * blockDim.x + threadIdx.x) * V;
            if (i >= size) break;
            const Vec<T, V> w = *reinterpret_cast<const Vec<T, V>*>(weight + i);
            Vec<T, V> result;
            #pragma unroll
            for (int j = 0; j < V; ++j) result.at[j] = from_float<T>(value[r][j] * scale * to_float(w.at[j]));
            *reinterpret_cast<Vec<T, V>*>(out + (long long)row * size + i) = result;
        }
        __syncthreads();  // before the next row: block_sum has one place for its parts
    }
    meeting.leave();
}
