// Two-shot sums by pushes: ranks push parts to the owners of columns, and owners push the sums.
#pragma once
#include "peer_protocol.cuh"

// Two pushes of N ranks, for rows of N * `chunk` columns: send, send_sum, receive. The vectors have 16 bytes. An inbox has the rows.
// In the first one of a round a rank finds what rank p sends of its columns in place of the columns of p.
template <typename T, int V, int N> struct TwoPushes : PushRound<N> {
    static_assert(sizeof(T) * V == 16, "four words");
    using Rank::rank, Rank::round, Rank::timed_out;
    T *inboxes[N], *own;    // the first inbox of this round at each rank, and here
    long long second;       // elements from there to the second one, for sums
    int size, chunk, mine;  // columns: of a row, of a rank, and before those of this rank

    DEVICE TwoPushes(const PeerTable* table, int operation, int size)
        : PushRound<N>(table, operation), size(size), chunk(size / N), mine(rank * chunk) {
        const long long bytes = this->peers.inbox_bytes;
        const long long start = HEADER_BYTES + 4 * N * PUSH_BYTES + 3 * this->peers.slot_bytes + round % 2 * 2 * bytes;
        UNROLL for (int p = 0; p < N; ++p) inboxes[p] = reinterpret_cast<T*>(this->memories[p] + start);
        own = reinterpret_cast<T*>(reinterpret_cast<char*>(this->header) + start);
        second = bytes / sizeof(T);
    }

    // Send a vector of x to the owner of its columns, i and those after it.
    DEVICE void send(const T* x, int row, int i) const {
        const int owner = i / chunk;
        T* to = inboxes[0];
        UNROLL for (int p = 1; p < N; ++p) if (owner == p) to = inboxes[p];
        if (owner != rank) put(to + row * size + mine + i - owner * chunk, load<T, V>(x + row * size + i));
    }

    // Send the sums over the ranks of this rank's columns i and those after it, rounded, to all.
    DEVICE void send_sum(const T* x, int row, int i) {
        const int at = row * size + i;
        Packed<T, V> values[N];
        float sum[V];
        take<false>(values, [&](int p) { return p == rank ? x + at + mine : own + at + p * chunk; }, [&](int p) { return p == rank ? -1 : p; });
        add_all<T, V>(sum, values);
        const Vec<T, V> rounded = round_all<T>(sum);
        UNROLL for (int p = 0; p < N; ++p) put(inboxes[p] + second + at + mine, reinterpret_cast<const Packed<T, V>&>(rounded));
    }

    // values[r] = the sums of the columns at column(r) and after it; nothing if that is beyond the row.
    template <int R, typename F> DEVICE void receive(Packed<T, V> (&values)[R], int row, F column) {
        const T* from = own + second + row * size;
        take<true>(values, [&](int r) { return from + min(column(r), size - V); }, [&](int r) { return column(r) < size ? column(r) / chunk : -1; });
    }

private:
    DEVICE void put(T* to, uint4 words) const {
        if (timed_out) return;
        if (words.x == EMPTY) words.x = OTHER_NAN;
        if (words.z == EMPTY) words.z = OTHER_NAN;
        store_relaxed(to, ulonglong2{(unsigned long long)words.y << 32 | words.x, (unsigned long long)words.w << 32 | words.z});
    }

    // Load the vectors at place(k). Wait for those in an inbox, which sender(k) sends, and empty their places. Others have no sender: -1.
    template <bool DEPENDENT, int K, typename F, typename S> DEVICE void take(Packed<T, V> (&values)[K], F place, S sender) {
        ulonglong2 words[K];
        int missing;
        auto have_arrived = [&] {  // else those that are missing are loaded again; one wait for all is less code
            missing = -1;
            UNROLL for (int k = 0; k < K; ++k)
                if (sender(k) >= 0 && ((unsigned)words[k].x == EMPTY || (unsigned)words[k].y == EMPTY))
                    missing = sender(k), load_relaxed(words[k], place(k));
            return missing < 0;
        };
        UNROLL for (int k = 0; k < K; ++k) load_relaxed(words[k], place(k));
        if (!timed_out) timed_out = !this->template wait_for<DEPENDENT>(missing, have_arrived);
        UNROLL for (int k = 0; k < K; ++k) {
            values[k] = {(unsigned)words[k].x, (unsigned)(words[k].x >> 32), (unsigned)words[k].y, (unsigned)(words[k].y >> 32)};
            if (sender(k) >= 0) store(const_cast<T*>(place(k)), unpack<T, V>(Packed<T, V>{EMPTY, EMPTY, EMPTY, EMPTY}));
        }
    }
};
