// The experts' GEMM for few rows of each expert, with weights in 16 bits or in MXFP4: bound by the speed at which it reads the weights.
//
// A warp has 16 rows of one expert's weights. They are the first operand, straight from memory to registers: lane (g, t) loads some
// columns of rows g and g + 8. SPLIT warps of a block take chunks of the same rows in turn, and the last step adds up their sums: few
// rows of x need many warps to load at once. Up to 8 rows of x are in shared memory: registers do not suffice to load them ahead too.
// The warps of a block read more rows at about the same time, from L1.
#include "expert_epilogue.cuh"
#include "mxfp4.cuh"
#include "weight_chunk.cuh"

constexpr int WARPS = 4;

// The two rows of the weights that a lane reads. Other columns take the place of those that do not exist: for these x is 0.
template <typename W> struct LaneRows {
    const W* at[2];  // the lane's first column
    int last;        // vector of a row, counted from there

    DEVICE LaneRows(const W* weights, const unsigned char*, long long first, long long second, int width)
        : at{row(weights, first * width), row(weights, second * width)}, last(width - 8 - thread_in_group() * 8) {
        asm volatile("" : "+l"(at[0]), "+l"(at[1]), "+r"(last));  // or the compiler would compute them again for each load
    }
    DEVICE static const W* row(const W* weights, long long first) { return weights + first + thread_in_group() * 8; }
    DEVICE uint4 load(int row, int first) const { return stream(at[row] + min(first, last)); }
};

template <> struct LaneRows<mxfp4> {
    const mxfp4* weights;
    const unsigned char* scales;
    RowBlocks rows[2];

    DEVICE LaneRows(const mxfp4* weights, const unsigned char* scales, long long first, long long second, int width)
        : weights(weights), scales(scales), rows{{first, width / 32}, {second, width / 32}} {}
};

// A chunk of 128 columns in MXFP4: a lane has a block of 32 elements with one scale, of two rows. A piece is eight elements, one pair of
// each of the block's four words.
template <> struct Chunk<bf16, mxfp4> {
    static constexpr int COLUMNS = 128, PIECES = 4, OUTSIDE = -126;  // OUTSIDE: a scale that makes every weight 0
    static constexpr bool MXFP4 = true;
    uint4 weights[2];
    int scales[2];

    DEVICE static int block(int chunk) { return chunk * 4 + thread_in_group(); }
    DEVICE static int place(int vector) { return vector % 4 * 4 + vector / 4; }  // of eight columns, by piece and t
    DEVICE static int column(int chunk, int piece, int width) { return min(block(chunk), width / 32 - 1) * 32 + piece * 8; }
    DEVICE void load(const LaneRows<mxfp4>& from, int chunk) {
        const int t = thread_in_group();
        UNROLL for (int i = 0; i < 2; ++i) {
            const RowBlocks& row = from.rows[i];
            const int in_chunk = row.in_chunk(chunk);
            const unsigned at = row.at(4 * chunk) + min(t, in_chunk - 1);
            scales[i] = t < in_chunk ? from.scales[at] : OUTSIDE;
            weights[i] = stream(from.weights + at * 16ll);
        }
    }
    template <bool LARGE, int TILES> DEVICE void multiply_piece(float (&sums)[TILES][4], int piece, const uint4 (&x)[TILES]) const {
        unsigned a[2][4];
        UNROLL for (int row = 0; row < 2; ++row) {
            const unsigned words[4] = {weights[row].x, weights[row].y, weights[row].z, weights[row].w};
            UNROLL for (int i = 0; i < 4; ++i) a[row][i] = widen_mxfp4<LARGE>(words[i], piece, scales[row]);
        }
        UNROLL for (int n = 0; n < TILES; ++n) {
            multiply(sums[n], a[0][0], a[1][0], a[0][1], a[1][1], x[n].x, x[n].y, bf16());
            multiply(sums[n], a[0][2], a[1][2], a[0][3], a[1][3], x[n].z, x[n].w, bf16());
        }
    }
    DEVICE int greatest_scale() const { return max(scales[0], scales[1]); }
};

// Rows of x in shared memory: for each chunk the vectors of its pieces, and for each piece those of t = 0 .. 3. With the padding eight
// lanes read from all banks. Behind the last column are zeros.
template <typename T, typename Chunk> struct StagedRows {
    static constexpr int VECTORS = Chunk::PIECES * 4;  // of a chunk
    uint4* memory;
    int chunks;
    DEVICE int stride() const { return chunks * VECTORS + 4; }

    // Copy a row, by all threads of the block.
    DEVICE void copy(int row, const T* from, int width) const {
        ROLLED for (int v = threadIdx.x; v < chunks * VECTORS; v += 32 * WARPS) {
            uint4* to = memory + row * stride() + v / VECTORS * VECTORS + Chunk::place(v % VECTORS);
            if (v * 8 < width) copy_async(to, from + v * 8);
            else *to = make_uint4(0, 0, 0, 0);
        }
    }
    DEVICE uint4 at(int row, int chunk, int piece) const {
        return memory[row * stride() + chunk * VECTORS + piece * 4 + thread_in_group()];
    }
};

// The rows of x of a tile, in eights. Others take the place of rows that do not exist: only sums that nobody reads are theirs.
template <typename T, int TILES> struct LoadedRows {
    const T* at[TILES];  // row g of each eight
    int width;

    // Load the columns of a piece. Those that do not exist are 0, or others if their weights are 0.
    template <typename Chunk> DEVICE void load(uint4 (&to)[TILES], const Chunk&, int chunk, int piece) const {
        const int column = Chunk::column(chunk, piece, width);
        UNROLL for (int n = 0; n < TILES; ++n) {
            const bool exists = Chunk::MXFP4 || column < width;
            to[n] = exists ? *reinterpret_cast<const uint4*>(at[n] + column) : make_uint4(0, 0, 0, 0);
        }
    }
};

// Add the products of a chunk to sums, by x in shared memory. Parts of sums are independent of each other.
template <bool LARGE, typename T, typename Chunk, int PARTS>
DEVICE void multiply_chunk(float (&sums)[PARTS][1][4], const Chunk& weights, const StagedRows<T, Chunk>& x, int row, int chunk) {
    UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) {
        const uint4 right[1] = {x.at(row, chunk, piece)};
        weights.template multiply_piece<LARGE>(sums[piece % PARTS], piece, right);
    }
}

// Do the same by x in registers; replace x by the columns of the chunk `next`.
template <bool LARGE, typename T, typename Chunk, int TILES> DEVICE void multiply_chunk(
    float (&sums)[1][TILES][4], const Chunk& weights, uint4 (&x)[Chunk::PIECES][TILES], const LoadedRows<T, TILES>& rows, int next) {
    UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) {
        weights.template multiply_piece<LARGE>(sums[0], piece, x[piece]);
        rows.load(x[piece], weights, next, piece);
    }
}

// Return whether a lane has a scale that takes widen_mxfp4<true>; all lanes of a warp call it.
DEVICE bool is_large(int scale) { return __any_sync(0xffffffffu, scale > 128); }

// Find the tile of a block without group_pairs: pair p has a tile if the number of pairs before it with the same expert is a multiple of
// `most`, its most rows. Write its pairs to `order`; return (expert, 0, rows, 0), with 0 rows if p has none. All threads of the block call it.
template <int ROWS> DEVICE int4 find_tile(int (&order)[ROWS], const long long* expert_ids, int p, int num_pairs, int experts, int most) {
    const int expert = expert_ids[p];
    int before = 0, rows = 0;  // pairs with the expert before p, and from p on
    ROLLED for (int first = 0; first < num_pairs; first += 32) {
        const int pair = first + lane_id();
        const unsigned same = __ballot_sync(0xffffffffu, pair < num_pairs && (int)expert_ids[min(pair, num_pairs - 1)] == expert);
        const unsigned from_p = p <= first ? same : p < first + 32 ? same & 0xffffffffu << (p - first) : 0u;
        const int at = rows + __popc(from_p & ((1u << lane_id()) - 1));
        if (warp_id() == 0 && (from_p >> lane_id() & 1) && at < most) order[at] = pair;
        before += __popc(same & ~from_p);
        rows += __popc(from_p);
    }
    __syncthreads();
    const bool begins = before == 0 || (before >= most && before % most == 0);  // most warps leave the division out
    return make_int4(expert, 0, (unsigned)expert < (unsigned)experts && begins ? min(rows, most) : 0, 0);
}

// out[p] = weights[expert of p] x[p / pairs_per_row] as in grouped_gemm, for the pairs of a tile of 8 TILES rows and, in a warp, 16
// rows of the weights: 16 columns, or gate and up of 8. SPLIT warps share them. A lane loads DEPTH chunks ahead. Without `tiles` and
// `order` blocks find their tiles, of up to `most` rows. Dynamic shared memory of TILES = 1: StagedRows of so many rows.
// The grid is (parts of the columns, tiles).
// The kernel before may write expert_ids and tiles, unless GATE is PLAIN: that kernel, the GEMM of gate and up, starts this one only
// after they are complete, so the first weights load before its end.
template <typename T, typename W, int TILES, int DEPTH, int SPLIT, Gate GATE>
__global__ void __launch_bounds__(32 * WARPS, TILES > 1 ? 1 : sizeof(W) == 1 ? 6 : 5) skinny_experts(
    T* __restrict__ out, const T* __restrict__ x, const W* __restrict__ weights, const unsigned char* __restrict__ scales,
    const T* __restrict__ bias, const int4* tiles, const int* order, const long long* expert_ids, int num_pairs, int experts, int most,
    int pairs_per_row, int width, int columns, float alpha, float limit) {
    constexpr bool GATED = GATE != PLAIN;
    constexpr int PART = GATED ? 8 : 16;
    typedef Chunk<T, W> Chunk;
    extern __shared__ uint4 memory[];
    __shared__ float partial[WARPS][8 * TILES][16 + 1];
    __shared__ int in_order[8 * TILES];
    constexpr int BLOCK_PART = PART * WARPS / SPLIT;
    const int first_column = blockIdx.x * BLOCK_PART, number = blockIdx.y, share = warp_id() % SPLIT;
    const int chunks = (width + Chunk::COLUMNS - 1) / Chunk::COLUMNS;
    const StagedRows<T, Chunk> staged = {memory, chunks};
    const bool has_one_row = GATED && TILES == 1 && num_pairs == pairs_per_row;
    if (GATED) wait_for_previous();
    if (has_one_row) staged.copy(0, x, width);  // behind the weights it would arrive late
    const int4 tile = tiles ? tiles[number] : find_tile(in_order, expert_ids, number, num_pairs, experts, most);
    const int* pairs = tiles ? order + tile.y : in_order;
    const int expert = tile.x, rows = tile.z, g = group_id(), t = thread_in_group();
    const auto matrix_row = [&](int half) {
        const int column = min(first_column + warp_id() / SPLIT * PART + g + (GATED ? 0 : 8 * half), columns - 1);
        return (GATED ? expert * 2ll + half : expert) * columns + column;
    };
    const LaneRows<W> from(weights, scales, matrix_row(0), matrix_row(1), width);
    Chunk ahead[DEPTH];
    UNROLL for (int d = 0; d < DEPTH; ++d)
        if (rows > 0 && share + d * SPLIT < chunks) ahead[d].load(from, share + d * SPLIT);
    const Epilogue<T> epilogue = epilogue_of<GATE>(bias, expert, columns, alpha, limit);
    if (bias && rows > 0 && threadIdx.x < (GATED ? 2 : 1)) prefetch_line(epilogue.bias + threadIdx.x * columns + first_column);
    if (!GATED) wait_for_previous();
    launch_next();
    if (rows == 0) return;

    constexpr int PARTS = TILES == 1 ? 2 : 1;
    float sums[PARTS][TILES][4] = {};
    const auto for_chunks = [&](const auto& multiply) {
        for (int first = share; first < chunks; first += DEPTH * SPLIT)
            UNROLL for (int d = 0; d < DEPTH; ++d) {
                const int chunk = first + d * SPLIT;
                if (chunk >= chunks) break;
                multiply(ahead[d], chunk);
                if (chunk + DEPTH * SPLIT < chunks) ahead[d].load(from, chunk + DEPTH * SPLIT);
            }
    };
    const auto row_of_x = [&](int row) { return x + (long long)(pairs[min(row, rows - 1)] / pairs_per_row) * width; };
    if constexpr (TILES == 1) {
        ROLLED for (int row = 0; row < rows && !has_one_row; ++row) staged.copy(row, row_of_x(row), width);
        wait_all_copies();
        __syncthreads();
        const int row = has_one_row ? 0 : min(g, rows - 1);
        int scale = 0;  // the greatest one
        for_chunks([&](const Chunk& now, int chunk) {
            multiply_chunk<false>(sums, now, staged, row, chunk);
            scale = max(scale, now.greatest_scale());
        });
        if (Chunk::MXFP4 && is_large(scale)) {  // rare: the sums are nonsense, and code beside that of the others would slow these down
            UNROLL for (int i = 0; i < PARTS * 4; ++i) sums[i / 4][0][i % 4] = 0.f;
            ROLLED for (int chunk = share; chunk < chunks; chunk += SPLIT) {
                ahead[0].load(from, chunk);
                multiply_chunk<true>(sums, ahead[0], staged, row, chunk);
            }
        }
    } else {
        LoadedRows<T, TILES> loaded;
        loaded.width = width;
        UNROLL for (int n = 0; n < TILES; ++n) loaded.at[n] = row_of_x(8 * n + g);
        uint4 x_now[Chunk::PIECES][TILES];  // a chunk takes long enough to hide the loads of x of the next one
        UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) loaded.load(x_now[piece], ahead[0], share, piece);
        for_chunks([&](const Chunk& now, int chunk) {
            if (Chunk::MXFP4 && is_large(now.greatest_scale())) multiply_chunk<true>(sums, now, x_now, loaded, chunk + SPLIT);
            else multiply_chunk<false>(sums, now, x_now, loaded, chunk + SPLIT);
        });
    }
    UNROLL for (int n = 0; n < TILES; ++n)
        UNROLL for (int i = 0; i < 4; ++i) {
            float sum = sums[0][n][i];
            UNROLL for (int part = 1; part < PARTS; ++part) sum += sums[part][n][i];
            partial[warp_id()][8 * n + 2 * t + i % 2][g + i / 2 * 8] = sum;
        }
    __syncthreads();

    ROLLED for (int i = threadIdx.x; i < rows * BLOCK_PART; i += 32 * WARPS) {
        const int row = i / BLOCK_PART, at = i % BLOCK_PART, column = first_column + at;
        if (column >= columns) continue;
        float both[2] = {};
        UNROLL for (int w = 0; w < SPLIT; ++w)
            UNROLL for (int half = 0; half < (GATED ? 2 : 1); ++half)
                both[half] += partial[at / PART * SPLIT + w][row][at % PART + 8 * half];
        out[(long long)pairs[row] * columns + column] = epilogue.template finish<GATE>(both[0], both[1], column, columns);
    }
}

// out[t] = sum over k of scores[t, k] y[k], y[k] = weights[e] x[t K + k] + bias[e] and e = expert_ids[t, k], and add_to[t] if it is not
// null, which may be out. This is the GEMM of down and weighted_sum of few tokens in one, with their roundings and order. K is CHOICES.
// A block has eight columns of a token: grid (T, parts of a row). Rows 0 .. 7 of a warp's first operand are weights of one choice, rows
// 8 .. 15 of the next. Even columns of the second operand are x of one, odd columns of the other: half of the sums are used. SPLIT warps
// share the chunks of two choices, as in skinny_experts. Dynamic shared memory: StagedRows of two rows for each two choices.
// The kernel before is the GEMM of gate and up. It starts this one only after all that was launched before it has ended, so this one
// reads the choice, the scores and add_to before its wait.
template <typename T, typename W, int CHOICES, int SPLIT, int DEPTH>
__global__ void __launch_bounds__((CHOICES + 1) / 2 * SPLIT * 32, sizeof(W) == 1 ? 3 : 2) sum_experts(
    T* out, const T* __restrict__ x, const W* __restrict__ weights, const unsigned char* __restrict__ scales, const T* __restrict__ bias,
    const float* scores, const long long* expert_ids, const T* add_to, int experts, int width, int columns) {
    typedef Chunk<T, W> Chunk;
    typedef StagedRows<T, Chunk> Rows;
    extern __shared__ uint4 memory[];
    __shared__ float partial[(CHOICES + 1) / 2 * 2][SPLIT][8], products[CHOICES][8], score[CHOICES];
    const int first_column = blockIdx.y * 8, g = group_id(), t = thread_in_group();
    const int first_choice = warp_id() / SPLIT * 2, share = warp_id() % SPLIT, chunks = (width + Chunk::COLUMNS - 1) / Chunk::COLUMNS;
    const long long first_pair = (long long)blockIdx.x * CHOICES;
    const auto choice = [&](int half) { return min(first_choice + half, CHOICES - 1); };
    const long long first = expert_ids[first_pair + choice(0)], second = expert_ids[first_pair + choice(1)];
    const bool any = exists(first, experts) || exists(second, experts);
    const auto matrix_row = [&](long long expert, long long other) {  // of the other one if there is no such expert
        return (exists(expert, experts) ? expert : other) * columns + first_column + g;
    };
    const LaneRows<W> from(weights, scales, matrix_row(first, second), matrix_row(second, first), width);
    Chunk ahead[DEPTH];
    UNROLL for (int d = 0; d < DEPTH; ++d)
        if (any && share + d * SPLIT < chunks) ahead[d].load(from, share + d * SPLIT);

    const int of = threadIdx.x / 8, column = threadIdx.x % 8;  // the choice and the column that a thread finishes
    const bool finishes = of < CHOICES;
    const long long expert = finishes ? expert_ids[first_pair + of] : -1;
    const float factor = exists(expert, experts) ? scores[first_pair + of] : 0.f;
    const long long at = (long long)blockIdx.x * columns + first_column + column;
    T added = from_float<T>(0.f), before = added;  // floats only when they are needed: the wait is not for them
    if (bias && exists(expert, experts)) added = bias[expert * columns + first_column + column];
    if (add_to && of == 0) before = add_to[at];
    const Rows staged = {memory + first_choice * Rows{nullptr, chunks}.stride(), chunks};
    const int row = lane_id() / Rows::VECTORS, vector = lane_id() % Rows::VECTORS;  // that a lane copies
    int from_column = share * Chunk::COLUMNS + vector * 8;
    const T* copied = x + (first_pair + choice(row)) * width + from_column;
    uint4* copy = staged.memory + row * staged.stride() + share * Rows::VECTORS + Chunk::place(vector);
    wait_for_previous();
    launch_next();

    ROLLED for (int chunk = share; row < 2 && chunk < chunks; chunk += SPLIT) {
        if (from_column < width) copy_async(copy, copied);
        else *copy = make_uint4(0, 0, 0, 0);
        from_column += SPLIT * Chunk::COLUMNS, copied += SPLIT * Chunk::COLUMNS, copy += SPLIT * Rows::VECTORS;
    }
    wait_all_copies();
    __syncwarp();  // a warp reads what its own lanes have copied
    constexpr int PARTS = 2;
    float sums[PARTS][1][4] = {};
    int scale = 0;  // the greatest one
    for (int begin = share; any && begin < chunks; begin += DEPTH * SPLIT)
        UNROLL for (int d = 0; d < DEPTH; ++d) {
            const int chunk = begin + d * SPLIT;
            if (chunk >= chunks) break;
            multiply_chunk<false>(sums, ahead[d], staged, g % 2, chunk);
            scale = max(scale, ahead[d].greatest_scale());
            if (chunk + DEPTH * SPLIT < chunks) ahead[d].load(from, chunk + DEPTH * SPLIT);
        }
    if (Chunk::MXFP4 && is_large(scale)) {  // rare: the sums are nonsense
        UNROLL for (int i = 0; i < PARTS * 4; ++i) sums[i / 4][0][i % 4] = 0.f;
        ROLLED for (int chunk = share; chunk < chunks; chunk += SPLIT) {
            ahead[0].load(from, chunk);
            multiply_chunk<true>(sums, ahead[0], staged, g % 2, chunk);
        }
    }
    if (t == 0)
        UNROLL for (int half = 0; half < 2; ++half)
            partial[first_choice + half][share][g] = sums[0][0][3 * half] + sums[1][0][3 * half];
    __syncthreads();

    if (finishes) {
        float sum = 0.f;
        UNROLL for (int w = 0; w < SPLIT; ++w) sum += partial[of][w][column];
        products[of][column] = exists(expert, experts) ? to_float(from_float<T>(sum + to_float(added))) : 0.f;
        score[of] = factor;
    }
    __syncthreads();
    if (of > 0) return;
    float sum = 0.f;
    UNROLL for (int k = 0; k < CHOICES; ++k) sum += score[k] * products[k][column];
    out[at] = from_float<T>(sum + to_float(before));
}
