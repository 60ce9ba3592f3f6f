// How the GPUs of one host exchange data, over memory of each rank that all other ranks have mapped.
//
// Pull (one-shot, two-shot, all-gather): a rank publishes its input in a slot of its buffer, unless a GEMM has written it there. It
// signals the same block of every peer, waits for their signals, and reads their slots. A signal is the number of a round, which each
// block counts on the device. It only grows, so that a graph can be replayed. Block b reads only what blocks b of the peers have
// published: the shares depend on sizes and grid, which are equal on all ranks.
// BufferRotation in comm/peer_buffers.py proves that no rank writes into a slot that a slow peer still reads.
//
// Push: a rank writes its input into a mailbox at every peer, and with each 4 bytes the number of the round. A word whose round is
// there has arrived: no signal, no fence and no answer, but twice the bytes. All pushes of a rank count rounds together, and rounds
// alternate between two mailboxes. A rank writes into one in round r only after its round r - 1 has ended, for which every peer has
// sent words. A peer sends these after its round r - 2 has ended, in which it read this mailbox last.
// The words of a round may be sent by its kernel or by a GEMM before it (PUSH of skinny_gemm.cu): peers see no difference. The GEMM
// sends after its wait for the kernel before it, when round r - 1 has ended: no other push lies between the GEMM and its round.
//
// Two pushes: ranks send columns to their owners, and owners send the sums to all, into inboxes. A vector there has arrived when two
// of its words are not EMPTY, a NaN that no rank sends. So nothing but the data is sent. Who reads a vector makes its place EMPTY again.
// These rounds count together with those of the other pushes, and alternate between two pairs of inboxes for the same reason.
//
// A wait ends at a timeout, or when the host sets `stop`. The rank's results are then invalid, and it never signals its peers
// or sends to them again: they time out as well. The host finds the missing ranks in `missing`.
#pragma once
#include "common.cuh"

constexpr int RANKS = 8, BLOCKS = 1024;  // the maxima
constexpr int HEADER_BYTES = 65536;      // before the mailboxes
constexpr int PUSH_BYTES = 262144;       // the largest input that is pushed
constexpr int UNIT = 16;                 // elements: the share of a block is a multiple of it, for any vector width
constexpr unsigned EMPTY = 0xffffffffu, OTHER_NAN = 0x7fff7fffu;  // words of an inbox: not arrived, and what is sent for it
constexpr int POLLS = 256;               // polls of a signal between two reads of the clock
constexpr int STOP_SHIFT = 17;           // a GPU reads `stop` once in 2^17 ns, 0.13 ms
constexpr unsigned TIMED_OUT = 1, STOPPED = 2;

struct Header {                               // at the start of a buffer, zero at first
    unsigned signals[BLOCKS][RANKS];          // the round that a block of each peer has reached; written by the peers
    unsigned rounds[BLOCKS], end, stop_read;  // of this rank: its blocks' rounds, TIMED_OUT or STOPPED, when `stop` was read
    unsigned push_round, push_blocks;         // the last round that all blocks have read, and how many have read the next one
};

struct PeerTable {  // one rank's view of all ranks, constant; its fields are those of table_fields() in peer_memory.py
    char* buffers[RANKS];
    unsigned long long* missing;  // on the host: for each rank (operation << 32 | round) of the wait that timed out
    const unsigned* stop;         // on the host: not zero ends all waits
    long long timeout_ns, slot_bytes, inbox_bytes, rank, alone;  // alone: no other rank shares this GPU: the next kernel may start early
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
DEVICE void load_relaxed(ulonglong2& v, const void* from) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(from) : "memory");
}
DEVICE void store_relaxed(void* to, ulonglong2 v) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1,%2};" :: "l"(to), "l"(v.x), "l"(v.y) : "memory");
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
// V elements as they are loaded: registers keep words better than parts of words.
template <typename T, int V> using Packed = typename Word<sizeof(T) * V>::type;
template <typename T, int V> DEVICE Vec<T, V> unpack(const Packed<T, V>& x) { return reinterpret_cast<const Vec<T, V>&>(x); }
template <typename T, int V> DEVICE Packed<T, V> load(const T* from) { return *reinterpret_cast<const Packed<T, V>*>(from); }
template <typename T, int V> DEVICE void store(T* to, const Vec<T, V>& x) { *reinterpret_cast<Vec<T, V>*>(to) = x; }
template <typename T, int V> DEVICE void copy(T* to, const T* from) { *reinterpret_cast<Packed<T, V>*>(to) = load<T, V>(from); }

DEVICE unsigned load_word(const unsigned* from) {
    unsigned word;
    load_relaxed(word, from);
    return word;
}

// Add the vector of one rank to the sum of those before it.
template <typename T, int V> DEVICE void add(float (&sum)[V], const Packed<T, V>& packed, bool is_first) {
    const Vec<T, V> value = unpack<T, V>(packed);
    UNROLL for (int j = 0; j < V; ++j) sum[j] = is_first ? to_float(value.at[j]) : sum[j] + to_float(value.at[j]);
}
template <typename T, int V, int N> DEVICE void add_all(float (&sum)[V], const Packed<T, V> (&values)[N]) {
    UNROLL for (int p = 0; p < N; ++p) add<T, V>(sum, values[p], p == 0);
}

// For each vector in this block's share of `count` elements, of which only `length` exist: load(u, i) for U of them, then use(u, i).
template <int V, int U, typename L, typename F> DEVICE void for_each_vector(long long count, long long length, L load, F use) {
    const unsigned units = (count + UNIT - 1) / UNIT, share = (units + gridDim.x - 1) / gridDim.x, step = blockDim.x * V;
    const long long first = (long long)blockIdx.x * share * UNIT, stop = min(min(count, length), first + (long long)share * UNIT);
    for (long long i = first + threadIdx.x * V; i < stop; i += U * step) {
        UNROLL for (int u = 0; u < U; ++u) if (i + u * step < stop) load(u, i + u * step);
        UNROLL for (int u = 0; u < U; ++u) if (i + u * step < stop) use(u, i + u * step);
    }
}
template <int V, typename F> DEVICE void for_each_vector(long long count, long long length, F use) {
    for_each_vector<V, 1>(count, length, [](int, long long) {}, [&](int, long long i) { use(i); });
}

// Call f(place) for each vector in columns [first, stop) of this block's rows: blockIdx.x, blockIdx.x + gridDim.x, ...
template <int V, typename F> DEVICE void for_each_row_vector(int rows, int size, int first, int stop, F f) {
    const int width = (stop - first) / V, count = width > 0 ? (rows - 1 - (int)blockIdx.x) / (int)gridDim.x + 1 : 0;
    for (int k = threadIdx.x; k < count * width; k += blockDim.x)
        f((blockIdx.x + (long long)(k / width) * gridDim.x) * size + first + k % width * V);
}

// One block's part in a collective, and its waits for peers.
struct Rank {
    const PeerTable& peers;
    Header* header;
    int rank, operation;
    unsigned round;
    bool timed_out;

    DEVICE Rank(const PeerTable* table, int operation) : peers(*table), operation(operation) {
        if (peers.alone) launch_next();
        rank = peers.rank;
        header = reinterpret_cast<Header*>(peers.buffers[rank]);
    }

    DEVICE void wait_for_inputs(const unsigned* last_round) {
        wait_for_previous();
        round = load_word(last_round);
        timed_out = load_word(&header->end);
    }

    // Many waiting threads call it, and one of them reads `stop`: reads of a word on the host take 0.6 us each, one after the other.
    // A rank that read it 500 times would make its peers wait so long that they would do so next, and all would be slow for good.
    DEVICE bool is_stopped(long long now) {
        const unsigned time = now >> STOP_SHIFT, last = load_word(&header->stop_read);
        return time != last && atomicCAS(&header->stop_read, last, time) == last && load_word(peers.stop);
    }

    // Return false if the wait has ended without has_arrived(), which may change `peer`. A DEPENDENT wait is for what a peer sends after a
    // wait of its own. So it ends later, and does not name that peer when another wait has timed out.
    template <bool DEPENDENT = false, typename F> DEVICE bool wait_for(const int& peer, F has_arrived) {
        const long long timeout = peers.timeout_ns + (DEPENDENT ? peers.timeout_ns / 8 : 0);
        long long start = 0;
        for (unsigned polls = 1; !has_arrived(); ++polls) {
            if (polls % POLLS) continue;
            const long long now = now_ns();
            if (start == 0) start = now;
            unsigned end = load_word(&header->end);
            if (!end && is_stopped(now)) end = STOPPED;
            const bool is_late = !end && now - start >= timeout;
            if (is_late) end = TIMED_OUT;
            if (!end) continue;
            if (is_late || (end == TIMED_OUT && !DEPENDENT)) store_relaxed(peers.missing + peer, (unsigned long long)operation << 32 | round);
            header->end = end;
            return false;
        }
        return true;
    }
};

// A pull of N ranks: publish, arrive_and_wait, read the slots, release.
template <typename T, int V, int N> struct Pull : Rank {
    static constexpr int TOGETHER = N < 8 ? 8 / N : 1;  // vectors that a thread loads from each rank before it adds
    typedef Packed<T, V> Values[TOGETHER][N];
    T *slots[N], *local;  // of all ranks, and of this one
    unsigned* signal;     // of this rank, at the peer that this thread waits for
    int slot;

    DEVICE Pull(const PeerTable* table, int slot, int operation) : Rank(table, operation), slot(slot) {
        UNROLL for (int p = 0; p < N; ++p) slots[p] = slot_of(p);
        local = slot_of(rank);
        signal = reinterpret_cast<Header*>(peers.buffers[threadIdx.x % N])->signals[blockIdx.x] + rank;
        wait_for_inputs(&header->rounds[blockIdx.x]);
    }

    DEVICE T* slot_of(int peer) const {
        return reinterpret_cast<T*>(peers.buffers[peer] + HEADER_BYTES + 4 * N * PUSH_BYTES + slot * peers.slot_bytes);
    }

    // Copy x, chunks of `chunk` elements, into this rank's slot: each block the shares that it reads of its peers.
    DEVICE void publish(const T* x, long long total, long long chunk) {
        if (x == local) return;
        for (long long start = 0; start < total; start += chunk)
            for_each_vector<V>(chunk, total - start, [&](long long i) { copy<T, V>(local + start + i, x + start + i); });
    }

    // A barrier of the blocks of all ranks. What a peer wrote before is visible after.
    DEVICE void arrive_and_wait() {
        __syncthreads();
        ++round;
        const int peer = threadIdx.x;
        bool failed = false;
        if (peer < N && peer != rank && !timed_out) {
            store_release(signal, round);
            failed = !wait_for(peer, [&] { return (int)(load_acquire(&header->signals[blockIdx.x][peer]) - round) >= 0; });
        }
        timed_out |= __syncthreads_or(failed);
    }

    // Slot 0 is released only when all peers have read it.
    DEVICE void release() {
        if (slot == 0) arrive_and_wait();
        if (threadIdx.x == 0) header->rounds[blockIdx.x] = round;
    }

    // values = the vector at this place of all slots.
    DEVICE void load_all(Packed<T, V> (&values)[N], long long at) const {
        UNROLL for (int p = 0; p < N; ++p) load_relaxed(values[p], slots[p] + at);
    }

    // to[i] = the sum over the ranks of from[i] in their slots, for this block's share.
    DEVICE void store_sums(T* to, long long from, long long count, long long length) const {
        Values values;
        for_each_vector<V, TOGETHER>(
            count, length, [&](int u, long long i) { load_all(values[u], from + i); },
            [&](int u, long long i) {
                float sum[V];
                add_all<T, V>(sum, values[u]);
                store(to + i, round_all<T>(sum));
            });
    }
};

// A round of pushes of N ranks.
template <int N> struct PushRound : Rank {
    char* memories[N];  // of all ranks

    DEVICE PushRound(const PeerTable* table, int operation) : Rank(table, operation) {
        UNROLL for (int p = 0; p < N; ++p) memories[p] = peers.buffers[p];
        wait_for_inputs(&header->push_round);
        ++round;
    }

    // Call it once. The last block to read the round of this push counts it for the next one.
    DEVICE void read_round() {
        __syncthreads();
        if (threadIdx.x == 0 && atomicInc(&header->push_blocks, gridDim.x - 1) == gridDim.x - 1) header->push_round = round;
    }
};

// A push of N ranks: send, read_round, load_sum. The vectors have 16 bytes.
template <typename T, int V, int N> struct Push : PushRound<N> {
    static_assert(sizeof(T) * V == 16, "four words");
    using Rank::rank, Rank::round, Rank::timed_out;
    char *outgoing[N], *incoming[N];  // mailboxes at each peer for this rank, and here for each peer

    DEVICE Push(const PeerTable* table, int operation) : PushRound<N>(table, operation) {
        const int turn = round % 2 * N;
        UNROLL for (int p = 0; p < N; ++p) {
            outgoing[p] = this->memories[p] + HEADER_BYTES + (turn + rank) * 2ll * PUSH_BYTES;
            incoming[p] = reinterpret_cast<char*>(this->header) + HEADER_BYTES + (turn + p) * 2ll * PUSH_BYTES;
        }
    }

    // The halves of a vector lie PUSH_BYTES apart, so that neighbouring threads write neighbouring bytes.
    DEVICE void send(const T* x, long long at) const {
        uint4 words;
        load_relaxed(words, x + at);  // the compiler would put a plain load after the branch
        const unsigned long long flag = (unsigned long long)round << 32;
        if (timed_out) return;
        UNROLL for (int p = 0; p < N; ++p) {
            store_relaxed(outgoing[p] + at * (long long)sizeof(T), ulonglong2{flag | words.x, flag | words.y});
            store_relaxed(outgoing[p] + at * (long long)sizeof(T) + PUSH_BYTES, ulonglong2{flag | words.z, flag | words.w});
        }
    }

    // sum = the sum over the ranks of what each has sent at this place.
    DEVICE void load_sum(float (&sum)[V], long long at) {
        constexpr int TOGETHER = N < 4 ? N : 4;  // peers whose vectors are loaded before the first wait
        Packed<T, V> values[N];
        UNROLL for (int start = 0; start < N; start += TOGETHER) {
            ulonglong2 halves[TOGETHER][2];
            auto load_halves = [&](int k) {
                UNROLL for (int h = 0; h < 2; ++h) load_relaxed(halves[k][h], incoming[start + k] + at * (long long)sizeof(T) + h * PUSH_BYTES);
            };
            auto is_here = [&](const ulonglong2& half) { return half.x >> 32 == round && half.y >> 32 == round; };
            int missing;  // the first peer whose vector is not there
            auto all_have_arrived = [&] {  // else those that are missing are loaded again; one wait for all is less code
                missing = N;
                UNROLL for (int k = TOGETHER - 1; k >= 0; --k)
                    if (start + k < N && !(is_here(halves[k][0]) && is_here(halves[k][1]))) missing = start + k, load_halves(k);
                return missing == N;
            };
            UNROLL for (int k = 0; k < TOGETHER && start + k < N; ++k) load_halves(k);
            if (!timed_out) timed_out = !this->wait_for(missing, all_have_arrived);
            UNROLL for (int k = 0; k < TOGETHER && start + k < N; ++k) {
                const ulonglong2 *h = halves[k];
                values[start + k] = {(unsigned)h[0].x, (unsigned)h[0].y, (unsigned)h[1].x, (unsigned)h[1].y};
            }
        }
        add_all<T, V>(sum, values);
    }
};

// The next push of a rank, whose words a GEMM sends. Read it after the wait for the kernel before: the last push has ended then.
struct NextPush {
    unsigned round, ended;  // ended: a wait of this rank has, so it sends nothing

    DEVICE void read(const PeerTable* peers) {
        const Header* header = reinterpret_cast<const Header*>(peers->buffers[peers->rank]);
        round = load_word(&header->push_round) + 1;
        ended = load_word(&header->end);
    }

    // Send elements `at` and `at` + 1 of the input, of 16 bits each, to one of `ranks` peers, as Push::send does. `at` is even.
    DEVICE void send(const PeerTable* peers, int ranks, int peer, long long at, unsigned word) const {
        const int half = at % 8 / 4, place = at % 4 / 2;
        char* box = peers->buffers[peer] + HEADER_BYTES + (round % 2 * ranks + peers->rank) * 2ll * PUSH_BYTES;
        char* to = box + at / 8 * 16 + half * PUSH_BYTES + place * 8;
        store_relaxed(reinterpret_cast<unsigned long long*>(to), (unsigned long long)round << 32 | word);
    }
};
