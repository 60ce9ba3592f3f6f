// Collectives between the GPUs of one host. peer_protocol.cuh has the exchange of data between ranks.
//
// Sums are in rank order and in float32: bitwise identical on all ranks. The norm of a row has the same bits in each kernel and grid.
#include "two_pushes.cuh"

// out = sum of x over the ranks; every rank reads all slots.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) one_shot_all_reduce(
    T* out, const T* x, long long total, const PeerTable* peers, int slot, int operation) {
    Pull<T, V, N> pull(peers, slot, operation);
    pull.publish(x, total, total);
    pull.arrive_and_wait();
    pull.store_sums(out, 0, total, total);
    pull.release();
}

// The same sum in two steps: each rank sums its chunk in place, in its slot, then reads the chunks of the others.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) two_shot_all_reduce(
    T* out, const T* x, long long total, long long chunk, const PeerTable* peers, int slot, int operation) {
    Pull<T, V, N> pull(peers, slot, operation);
    pull.publish(x, total, chunk);
    pull.arrive_and_wait();
    const long long start = pull.rank * chunk;
    pull.store_sums(pull.local + start, start, chunk, total - start);
    pull.arrive_and_wait();
    typename Pull<T, V, N>::Values sums;
    for_each_vector<V, Pull<T, V, N>::TOGETHER>(
        chunk, chunk,
        [&](int u, long long i) {
            UNROLL for (int p = 0; p < N; ++p)
                if (p * chunk + i < total) load_relaxed(sums[u][p], pull.slots[p] + p * chunk + i);
        },
        [&](int u, long long i) {
            UNROLL for (int p = 0; p < N; ++p)
                if (p * chunk + i < total) store(out + p * chunk + i, unpack<T, V>(sums[u][p]));
        });
    pull.release();
}

// The same sum with the bits of one_shot_all_reduce; every rank has sent x to all.
template <typename T, int V, int N>
__global__ void __launch_bounds__(512, 1) push_all_reduce(T* out, const T* x, long long total, const PeerTable* peers, int operation) {
    Push<T, V, N> push(peers, operation);
    for_each_vector<V>(total, total, [&](long long i) { push.send(x, i); });
    push.read_round();
    for_each_vector<V>(total, total, [&](long long i) {
        float sum[V];
        push.load_sum(sum, i);
        store(out + i, round_all<T>(sum));
    });
}

// out [N, total] = x of every rank, as bytes. With total = 0 it is a barrier.
template <int V, int N>
__global__ void __launch_bounds__(512, 1) all_gather(
    unsigned char* out, const unsigned char* x, long long total, const PeerTable* peers, int slot, int operation) {
    typedef unsigned char Byte;
    Pull<Byte, V, N> pull(peers, slot, operation);
    pull.publish(x, total, total);
    pull.arrive_and_wait();
    for_each_vector<V>(total, total, [&](long long i) {
        Packed<Byte, V> values[N];
        pull.load_all(values, i);
        UNROLL for (int p = 0; p < N; ++p) store(out + p * total + i, unpack<Byte, V>(values[p]));
    });
    pull.release();
}

// The residual stream and its norm. A block has one row at a time, a thread R vectors of it. A block of any size adds the squares
// in the same order: those of 32 neighbouring vectors, then these sums. With EARLY weights and residual are loaded in advance.
template <typename T, int V, int R, bool EARLY> struct RowNorm {
    T *out, *residual;
    const T* weight;
    int size, turn;
    float eps;
    Packed<T, V> weights[R], before[R];  // before: of the residual

    // Before the ranks wait for each other, so that these loads are under way at the same time.
    DEVICE RowNorm(T* out, T* residual, const T* weight, float eps, int size)
        : out(out), residual(residual), weight(weight), size(size), turn(0), eps(eps) {
        if (EARLY) for_each_vector([&](int r, int i) { weights[r] = load<T, V>(weight + i); });
        load_residual(blockIdx.x);
    }

    template <typename F> DEVICE void for_each_vector(F f) const {
        UNROLL for (int r = 0; r < R; ++r) {
            const int i = (r * blockDim.x + threadIdx.x) * V;
            if (i < size) f(r, i);
        }
    }

    DEVICE void load_residual(int row) {
        if (EARLY) for_each_vector([&](int r, int i) { before[r] = load<T, V>(residual + (long long)row * size + i); });
    }

    // residual += sum, out = RMSNorm of the unrounded residual.
    DEVICE void add_and_store(int row, float (&sum)[R][V]) {
        __shared__ float partial[2][16 * R];  // two in turn: a slow thread may still read those of the last row
        float squares[R] = {}, total = 0.f;
        for_each_vector([&](int r, int i) {
            T* place = residual + (long long)row * size + i;
            const Vec<T, V> addend = unpack<T, V>(EARLY ? before[r] : load<T, V>(place));
            UNROLL for (int j = 0; j < V; ++j) {
                sum[r][j] += to_float(addend.at[j]);
                squares[r] += sum[r][j] * sum[r][j];
            }
            store(place, round_all<T>(sum[r]));
        });
        const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
        turn ^= 1;
        UNROLL for (int r = 0; r < R; ++r) squares[r] = warp_sum(squares[r]);
        UNROLL for (int r = 0; r < R; ++r)
            if (lane == 0) partial[turn][r * warps + threadIdx.x / 32] = squares[r];
        __syncthreads();
        UNROLL for (int i = 0; i < 16 * R; i += 32) total += i + lane < R * warps ? partial[turn][i + lane] : 0.f;
        const float scale = rsqrtf(mean_of(warp_sum(total), size) + eps);
        for_each_vector([&](int r, int i) {
            const Vec<T, V> factor = unpack<T, V>(EARLY ? weights[r] : load<T, V>(weight + i));
            UNROLL for (int j = 0; j < V; ++j) sum[r][j] *= scale * to_float(factor.at[j]);
            store(out + (long long)row * size + i, round_all<T>(sum[r]));
        });
    }
};

// residual += sum of x over the ranks, out = RMSNorm of the unrounded residual.
// With TWO_SHOT each rank sums its columns of every row; that sum is rounded, as in two_shot_all_reduce.
template <typename T, int V, int N, int R, bool TWO_SHOT>
__global__ void __launch_bounds__(512, 1) all_reduce_add_rms_norm(
    T* out, const T* x, T* residual, const T* weight, float eps, int rows, int size,
    const PeerTable* peers, int slot, int operation) {
    Pull<T, V, N> pull(peers, slot, operation);
    RowNorm<T, V, R, (R < 4 && R * N <= 8)> norm(out, residual, weight, eps, size);
    for (int row = x != pull.local ? blockIdx.x : rows; row < rows; row += gridDim.x)
        norm.for_each_vector([&](int r, int i) { copy<T, V>(pull.local + (long long)row * size + i, x + (long long)row * size + i); });
    pull.arrive_and_wait();
    const int chunk = (size + N * UNIT - 1) / (N * UNIT) * UNIT;  // columns of a rank
    if (TWO_SHOT) {
        const int first = pull.rank * chunk;
        for_each_row_vector<V>(rows, size, first, min(size, first + chunk), [&](long long at) {
            Packed<T, V> values[N];
            float sum[V];
            pull.load_all(values, at);
            add_all<T, V>(sum, values);
            store(pull.local + at, round_all<T>(sum));
        });
        pull.arrive_and_wait();
    }
    constexpr int SOURCES = TWO_SHOT ? 1 : N, TOGETHER = SOURCES < 8 / R ? SOURCES : 8 / R;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum[R][V];
        UNROLL for (int start = 0; start < SOURCES; start += TOGETHER) {
            Packed<T, V> values[R][TOGETHER];
            norm.for_each_vector([&](int r, int i) {
                UNROLL for (int p = 0; p < TOGETHER; ++p) {
                    if (start + p >= SOURCES) break;
                    const T* from = TWO_SHOT ? pull.slot_of(i / chunk) : pull.slots[start + p];
                    load_relaxed(values[r][p], from + (long long)row * size + i);
                }
            });
            UNROLL for (int r = 0; r < R; ++r)
                UNROLL for (int p = 0; p < TOGETHER && start + p < SOURCES; ++p) add<T, V>(sum[r], values[r][p], start + p == 0);
        }
        norm.add_and_store(row, sum);
        if (row + gridDim.x < rows) norm.load_residual(row + gridDim.x);
    }
    pull.release();
}

// Add what all ranks have sent, row by row, and apply the norm.
template <typename T, int V, int N, int R, bool EARLY>
DEVICE void receive_rows(Push<T, V, N>& push, RowNorm<T, V, R, EARLY>& norm, int rows, int size) {
    push.read_round();
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        float sum[R][V];
        norm.for_each_vector([&](int r, int i) { push.load_sum(sum[r], (long long)row * size + i); });
        norm.add_and_store(row, sum);
        if (row + gridDim.x < rows) norm.load_residual(row + gridDim.x);
    }
}

// The same with the bits of one-shot; every rank has sent x to all.
template <typename T, int V, int N, int R>
__global__ void __launch_bounds__(512, 1) push_all_reduce_add_rms_norm(
    T* out, const T* x, T* residual, const T* weight, float eps, int rows, int size, const PeerTable* peers, int operation) {
    Push<T, V, N> push(peers, operation);
    RowNorm<T, V, R, (R < 4 && R * N <= 8)> norm(out, residual, weight, eps, size);
    for (int row = blockIdx.x; row < rows; row += gridDim.x)
        norm.for_each_vector([&](int r, int i) { push.send(x, (long long)row * size + i); });
    receive_rows(push, norm, rows, size);
}

// The same for an x that the GEMM before it has sent instead of storing it.
template <typename T, int V, int N, int R>
__global__ void __launch_bounds__(512, 1) receive_add_rms_norm(
    T* out, T* residual, const T* weight, float eps, int rows, int size, const PeerTable* peers, int operation) {
    Push<T, V, N> push(peers, operation);
    RowNorm<T, V, R, (R < 4 && R * N <= 8)> norm(out, residual, weight, eps, size);
    receive_rows(push, norm, rows, size);
}

// Two-shot by pushes, with the bits of all_reduce_add_rms_norm: each rank sums its columns of every row. A block sends a row, then the
// sums of its row before that, then applies the norm to the one before: so its exchanges overlap.
template <typename T, int V, int N, int R>
__global__ void __launch_bounds__(512, 1) two_push_add_rms_norm(
    T* out, const T* x, T* residual, const T* weight, float eps, int rows, int size, const PeerTable* peers, int operation) {
    TwoPushes<T, V, N> pushes(peers, operation, size);
    RowNorm<T, V, R, (R < 4)> norm(out, residual, weight, eps, size);
    pushes.read_round();
    const int step = gridDim.x;
    for (int next = blockIdx.x; next < rows + 2 * step; next += step) {
        const int summed = next - step, row = summed - step;
        if (next < rows) norm.for_each_vector([&](int, int i) { pushes.send(x, next, i); });
        if (summed >= 0 && summed < rows)
            for (int i = threadIdx.x * V; i < pushes.chunk; i += blockDim.x * V) pushes.send_sum(x, summed, i);
        if (row < 0) continue;
        float sum[R][V];
        Packed<T, V> values[R];
        pushes.receive(values, row, [&](int r) { return (r * blockDim.x + threadIdx.x) * V; });
        UNROLL for (int r = 0; r < R; ++r) add<T, V>(sum[r], values[r], true);
        norm.add_and_store(row, sum);
        if (row + step < rows) norm.load_residual(row + step);
    }
}
