// The experts' GEMM for few rows of each expert, with weights in 16 bits or in MXFP4: bound by the speed at which it reads the weights.
//
// A warp has 16 rows of one expert's weights. They are the first operand, straight from memory to registers: lane (g, t) loads some
// columns of rows g and g + 8. SPLIT warps of a block take chunks of the same rows in turn, and the last step adds up their sums: few
// rows of x need many warps to load at once. The warps of a block read the same x at about the same time, from L1.
#include "expert_epilogue.cuh"
#include "weight_chunk.cuh"

constexpr int WARPS = 4;

// Widen the eight elements of a word to pairs (i, i + 4) of bf16. Exponent and mantissa, shifted into place, are a number that is too
// small by 2^126, also if it is subnormal; factor corrects that and applies the scale, except for a rest of 2^(scale - 128) if LARGE.
template <bool LARGE> DEVICE void widen_eight(unsigned word, int scale, unsigned (&to)[4]) {
    constexpr unsigned SIGN = 0x80008000u, NUMBER = 0x01c001c0u, ONE = 0x00800080u;  // ONE: 1 in both exponents
    to[0] = (word << 12 & SIGN) | (word << 6 & NUMBER);
    to[1] = (word << 8 & SIGN) | (word << 2 & NUMBER);
    to[2] = (word << 4 & SIGN) | (word >> 2 & NUMBER);
    to[3] = (word & SIGN) | (word >> 6 & NUMBER);
    const unsigned factor = (LARGE ? min(scale, 128) + 126 : scale + 126) * ONE;
    UNROLL for (int i = 0; i < 4; ++i) to[i] = scale_pair(to[i], factor, bf16());
    if (LARGE && scale > 128)
        UNROLL for (int i = 0; i < 4; ++i) to[i] = scale_pair(to[i], (scale - 1) * ONE, bf16());
}

// A chunk of 128 columns in MXFP4: a lane has a block of 32 elements with one scale, of two rows. A piece is eight elements, one word;
// the elements i and i + 4 of a word are a pair, and those of x are paired alike.
template <> struct Chunk<bf16, mxfp4> {
    static constexpr int COLUMNS = 128, PIECES = 4;
    uint4 weights[2];
    int scales[2];

    DEVICE static int block(int chunk) { return chunk * 4 + thread_in_group(); }
    DEVICE static int column(int chunk, int piece) { return block(chunk) * 32 + piece * 8; }
    DEVICE void load(const LaneRows<mxfp4>& from, int chunk) {
        const int blocks = from.width / 32;
        const bool inside = block(chunk) < blocks;
        UNROLL for (int i = 0; i < 2; ++i) {
            const long long at = from.rows[i] * blocks + (inside ? block(chunk) : 0);
            scales[i] = from.scales[at];
            weights[i] = inside ? stream(from.weights + at * 16) : make_uint4(0, 0, 0, 0);
        }
    }
    template <bool LARGE, int TILES> DEVICE void multiply_piece(float (&sums)[TILES][4], int piece, const uint4 (&x)[TILES]) const {
        unsigned a[2][4];
        UNROLL for (int row = 0; row < 2; ++row) {
            const unsigned words[4] = {weights[row].x, weights[row].y, weights[row].z, weights[row].w};
            widen_eight<LARGE>(words[piece], scales[row], a[row]);
        }
        UNROLL for (int n = 0; n < TILES; ++n) {
            const unsigned b0 = __byte_perm(x[n].x, x[n].z, 0x5410), b1 = __byte_perm(x[n].x, x[n].z, 0x7632);
            const unsigned b2 = __byte_perm(x[n].y, x[n].w, 0x5410), b3 = __byte_perm(x[n].y, x[n].w, 0x7632);
            multiply(sums[n], a[0][0], a[1][0], a[0][1], a[1][1], b0, b1, bf16());
            multiply(sums[n], a[0][2], a[1][2], a[0][3], a[1][3], b2, b3, bf16());
        }
    }
    DEVICE bool is_large() const { return __any_sync(0xffffffffu, max(scales[0], scales[1]) > 128); }
};

// The rows of x of a tile, in eights.
template <typename T, int TILES> struct RightRows {
    const T* at[TILES];  // row g of each eight
    int rows, width;

    DEVICE void load(uint4 (&to)[TILES], int column) const {
        UNROLL for (int n = 0; n < TILES; ++n) {
            to[n] = make_uint4(0, 0, 0, 0);
            if (column < width && 8 * n + group_id() < rows) to[n] = *reinterpret_cast<const uint4*>(at[n] + column);
        }
    }
};

// Find the tile of a block without group_pairs: pair p has a tile if the number of pairs before it with the same expert is a multiple of
// ROWS. Write its pairs to `order`; return (expert, 0, rows, 0), with 0 rows if p has none. All threads of the block call it.
template <int ROWS> DEVICE int4 find_tile(int (&order)[ROWS], const long long* expert_ids, int p, int num_pairs, int experts) {
    const long long expert = expert_ids[p];
    if (!exists(expert, experts)) return make_int4(0, 0, 0, 0);
    int before = 0, rows = 0;  // pairs with the expert before p, and from p on
    for (int first = 0; first < num_pairs; first += 32) {
        const int pair = first + lane_id();
        const unsigned same = __ballot_sync(0xffffffffu, pair < num_pairs && expert_ids[min(pair, num_pairs - 1)] == expert);
        const unsigned from_p = p <= first ? same : p < first + 32 ? same & 0xffffffffu << (p - first) : 0u;
        const int at = rows + __popc(from_p & ((1u << lane_id()) - 1));
        if (warp_id() == 0 && (from_p >> lane_id() & 1) && at < ROWS) order[at] = pair;
        before += __popc(same & ~from_p);
        rows += __popc(from_p);
    }
    __syncthreads();
    return make_int4(expert, 0, before % ROWS ? 0 : min(rows, ROWS), 0);
}

// out[p] = weights[expert of p] x[p / pairs_per_row] as in grouped_gemm, for the pairs of a tile of 8 TILES rows and, in a warp, 16
// rows of the weights: 16 columns, or gate and up of 8. SPLIT warps share them. A lane loads DEPTH chunks ahead. Without `tiles` and `order` blocks find their tiles.
// The kernel before may write expert_ids and tiles, unless GATE is PLAIN: that kernel, the GEMM of gate and up, starts this one only
// after they are complete, so the first weights load before its end.
template <typename T, typename W, int TILES, int DEPTH, int SPLIT, Gate GATE>
__global__ void __launch_bounds__(32 * WARPS) skinny_experts(
    T* __restrict__ out, const T* __restrict__ x, const W* __restrict__ weights, const unsigned char* __restrict__ scales,
    const T* __restrict__ bias, const int4* tiles, const int* order, const long long* expert_ids, int num_pairs, int experts,
    int pairs_per_row, int width, int columns, float alpha, float limit) {
    constexpr bool GATED = GATE != PLAIN;
    constexpr int PART = GATED ? 8 : 16;
    typedef Chunk<T, W> Chunk;
    __shared__ float partial[WARPS][8 * TILES][16 + 1];
    __shared__ int in_order[8 * TILES];
    constexpr int BLOCK_PART = PART * WARPS / SPLIT;
    const int parts = (columns + BLOCK_PART - 1) / BLOCK_PART, first_column = blockIdx.x % parts * BLOCK_PART;
    const int number = blockIdx.x / parts, share = warp_id() % SPLIT;
    if (GATED) wait_for_previous();
    const int4 tile = tiles ? tiles[number] : find_tile(in_order, expert_ids, number, num_pairs, experts);
    const int* pairs = tiles ? order + tile.y : in_order;
    const int expert = tile.x, rows = tile.z, g = group_id(), t = thread_in_group();
    const int chunks = (width + Chunk::COLUMNS - 1) / Chunk::COLUMNS;
    LaneRows<W> from = {weights, scales, {}, width};
    UNROLL for (int half = 0; half < 2; ++half) {
        const int column = min(first_column + warp_id() / SPLIT * PART + g + (GATED ? 0 : 8 * half), columns - 1);
        from.rows[half] = (GATED ? expert * 2ll + half : expert) * columns + column;
    }
    Chunk ahead[DEPTH];
    UNROLL for (int d = 0; d < DEPTH; ++d)
        if (rows > 0 && share + d * SPLIT < chunks) ahead[d].load(from, share + d * SPLIT);
    if (!GATED) wait_for_previous();
    launch_next();
    if (rows == 0) return;

    RightRows<T, TILES> right{{}, rows, width};
    UNROLL for (int n = 0; n < TILES; ++n)
        right.at[n] = x + (long long)(pairs[min(8 * n + g, rows - 1)] / pairs_per_row) * width;
    constexpr bool X_AHEAD = TILES == 1;
    uint4 x_ahead[X_AHEAD ? DEPTH : 1][Chunk::PIECES][TILES];
    auto load_x = [&](int d, int chunk) {
        UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) right.load(x_ahead[X_AHEAD ? d : 0][piece], Chunk::column(chunk, piece));
    };
    UNROLL for (int d = 0; d < DEPTH; ++d)
        if (X_AHEAD && share + d * SPLIT < chunks) load_x(d, share + d * SPLIT);
    float sums[TILES][4] = {};
    for (int first = share; first < chunks; first += DEPTH * SPLIT)
        UNROLL for (int d = 0; d < DEPTH; ++d) {
            const int chunk = first + d * SPLIT, next = chunk + DEPTH * SPLIT;
            if (chunk >= chunks) break;
            const bool large = ahead[d].is_large();
            UNROLL for (int piece = 0; piece < Chunk::PIECES; ++piece) {
                uint4(&x_piece)[TILES] = x_ahead[X_AHEAD ? d : 0][piece];
                if (!X_AHEAD) right.load(x_piece, Chunk::column(chunk, piece));
                if (large) ahead[d].template multiply_piece<true>(sums, piece, x_piece);
                else ahead[d].template multiply_piece<false>(sums, piece, x_piece);
            }
            if (next >= chunks) continue;
            ahead[d].load(from, next);
            if (X_AHEAD) load_x(d, next);
        }
    UNROLL for (int n = 0; n < TILES; ++n)
        UNROLL for (int i = 0; i < 4; ++i) partial[warp_id()][8 * n + 2 * t + i % 2][g + i / 2 * 8] = sums[n][i];
    __syncthreads();

    const Epilogue<T> epilogue = epilogue_of<GATE>(bias, expert, columns, alpha, limit);
    for (int i = threadIdx.x; i < rows * BLOCK_PART; i += 32 * WARPS) {
        const int row = i / BLOCK_PART, at = i % BLOCK_PART, column = first_column + at;
        if (column >= columns) continue;
        float both[2] = {};
        UNROLL for (int w = 0; w < SPLIT; ++w)
            UNROLL for (int half = 0; half < (GATED ? 2 : 1); ++half)
                both[half] += partial[at / PART * SPLIT + w][row][at % PART + 8 * half];
        out[(long long)pairs[row] * columns + column] = epilogue.template finish<GATE>(both[0], both[1], column, columns);
    }
}
