// The experts' GEMM for many rows of each expert, with weights in MXFP4, on sm_90a.
//
// The weight is the left operand of wgmma: its numbers go from shared memory to registers, where a group of warps widens them while
// another one multiplies. x is the right operand, in shared memory. A block has GROUPS groups of four warps, each with 64 rows of
// the weight, and up to N rows of x. A stage has 128 columns: chunks of four blocks of the weight, and two parts of x.
#include "expert_epilogue.cuh"
#include "mxfp4.cuh"
#include "wgmma.cuh"

constexpr int COLUMNS = 128, BLOCKS = COLUMNS / 32;  // of a stage

// Return the scales of a row's blocks in a chunk, one in each byte. A last chunk may have fewer; then others repeat the last.
DEVICE unsigned load_scales(const unsigned char* scales, const RowBlocks& row, int chunk) {
    const int in_chunk = row.in_chunk(chunk);
    const unsigned char* at = scales + row.at(chunk * BLOCKS);
    if (in_chunk == BLOCKS) return *reinterpret_cast<const unsigned*>(at);
    unsigned all = 0;
    UNROLL for (int i = 0; i < BLOCKS; ++i) all |= (unsigned)at[min(i, in_chunk - 1)] << 8 * i;
    return all;
}

// Widen a lane's words of two blocks, [block][row g or g + 8], to the operands of four multiplications of 16 columns.
template <bool LARGE> DEVICE void widen_blocks(unsigned (&to)[4][4], const unsigned (&words)[2][2], const unsigned (&scales)[2], int first_block) {
    UNROLL for (int i = 0; i < 4; ++i)
        UNROLL for (int pair = 0; pair < 2; ++pair)
            UNROLL for (int row = 0; row < 2; ++row) {
                const int scale = scales[row] >> 8 * (first_block + i / 2) & 255;
                to[i][2 * pair + row] = widen_mxfp4<LARGE>(words[i / 2][row], i % 2 * 2 + pair, scale);
            }
}

// out[p] as in grouped_gemm, for the pairs of a tile and a part of the columns. Gate and up alternate every eight rows of the weight.
template <int GROUPS, int N, int STAGES, Gate GATE>
__global__ void __launch_bounds__(128 * GROUPS, 4 / GROUPS) wide_experts(
    bf16* __restrict__ out, const bf16* __restrict__ x, const mxfp4* __restrict__ weights, const unsigned char* __restrict__ scales,
    const bf16* __restrict__ bias, const int4* __restrict__ tiles, const int* __restrict__ order, int pairs_per_row, int width, int columns,
    float alpha, float limit) {
    constexpr bool GATED = GATE != PLAIN;
    constexpr int THREADS = 128 * GROUPS, TILE = 64 * GROUPS, PART = GATED ? TILE / 2 : TILE;
    constexpr int X = N * LINE, WEIGHTS = 2 * X, STAGE = WEIGHTS + TILE * BLOCKS * 16;  // a stage: two parts of x, then weights
    constexpr int STEP = THREADS / 16, COPIES = (N + STEP - 1) / STEP;                  // STEP: rows of x copied at once
    extern __shared__ __align__(1024) char stages[];
    const int parts = (columns + PART - 1) / PART, first_column = blockIdx.x % parts * PART;
    wait_for_previous();
    launch_next();
    const int4 tile = tiles[blockIdx.x / parts];
    const int expert = tile.x, rows = tile.z;
    if (rows == 0) return;
    const int* pairs = order + tile.y;
    const int blocks = width / 32, chunks = (blocks + BLOCKS - 1) / BLOCKS;
    auto row_blocks = [&](int row) {
        const int column = min(first_column + (GATED ? row / 16 * 8 + row % 8 : row), columns - 1);
        return RowBlocks((GATED ? expert * 2ll + row / 8 % 2 : expert) * columns + column, blocks);
    };

    const unsigned memory = (unsigned)__cvta_generic_to_shared(stages);
    const int vector = threadIdx.x % 16, copied_row = threadIdx.x / 16;
    const bf16* x_rows[COPIES];
    int ends[COPIES];  // of the columns that are not zeros
    UNROLL for (int i = 0; i < COPIES; ++i) {
        const int row = copied_row + i * STEP;
        x_rows[i] = x + (long long)(pairs[min(row, rows - 1)] / pairs_per_row) * width + vector * 8;
        ends[i] = row < rows ? width - vector * 8 : 0;
    }
    const int x_at = vector / 8 * X + copied_row * LINE + (vector % 8 ^ copied_row % 8) * 16;
    const int block = threadIdx.x % BLOCKS, copied_weight = threadIdx.x / BLOCKS;  // and the row half a tile further
    const RowBlocks weight_rows[2] = {row_blocks(copied_weight), row_blocks(copied_weight + TILE / 2)};
    const int weight_at = WEIGHTS + copied_weight * BLOCKS * 16 + (block ^ copied_weight / 2 % 4) * 16;
    const auto load = [&](int chunk, int stage) {
        UNROLL for (int i = 0; i < COPIES; ++i)
            if (N % STEP == 0 || copied_row + i * STEP < N)
                copy_async(memory + stage + x_at + i * STEP * LINE, x_rows[i] + chunk * COLUMNS, chunk * COLUMNS < ends[i]);
        UNROLL for (int i = 0; i < 2; ++i) {
            const unsigned from = weight_rows[i].at(chunk * BLOCKS) + block;
            copy_async(memory + stage + weight_at + i * TILE / 2 * BLOCKS * 16, weights + from * 16ll, chunk * BLOCKS + block < blocks);
        }
    };

    const int warp = warp_id(), g = group_id(), t = thread_in_group();
    const RowBlocks lane_rows[2] = {row_blocks(16 * warp + g), row_blocks(16 * warp + g + 8)};
    unsigned next_scales[2] = {load_scales(scales, lane_rows[0], 0), load_scales(scales, lane_rows[1], 0)};
    UNROLL for (int chunk = 0; chunk < STAGES - 2; ++chunk) {
        if (chunk < chunks) load(chunk, chunk * STAGE);
        commit_copies();
    }
    int stage = 0, next_stage = (STAGES - 2) * STAGE;
    const auto advance = [](int& at) { at = at == (STAGES - 1) * STAGE ? 0 : at + STAGE; };
    float sums[N / 2] = {};
    unsigned operands[4][4];  // of 64 columns; one group widens while another multiplies
    for (int chunk = 0; chunk < chunks; ++chunk) {
        wait_copies<STAGES - 3>();
        publish_copies();
        __syncthreads();  // all copies of this chunk are done, and all have multiplied the chunk before the last
        if (chunk + STAGES - 2 < chunks) load(chunk + STAGES - 2, next_stage);
        advance(next_stage);
        commit_copies();
        const unsigned of_rows[2] = {next_scales[0], next_scales[1]};
        UNROLL for (int row = 0; row < 2; ++row) next_scales[row] = load_scales(scales, lane_rows[row], min(chunk + 1, chunks - 1));
        const bool large = __any_sync(0xffffffffu, (of_rows[0] | of_rows[1]) & 0x80808080u);
        UNROLL for (int half = 0; half < 2; ++half) {
            unsigned words[2][2];
            UNROLL for (int i = 0; i < 4; ++i) {
                const char* row = stages + stage + WEIGHTS + (16 * warp + g + i % 2 * 8) * BLOCKS * 16;
                words[i / 2][i % 2] = *reinterpret_cast<const unsigned*>(row + (2 * half + i / 2 ^ g / 2) * 16 + t * 4);
            }
            wait_multiply();
            if (large) widen_blocks<true>(operands, words, of_rows, 2 * half);
            else widen_blocks<false>(operands, words, of_rows, 2 * half);
            begin_multiply();
            UNROLL for (int i = 0; i < 4; ++i) multiply_async(sums, operands[i], descriptor(memory + stage + half * X) + 2 * i);
            commit_multiply();
        }
        advance(stage);
    }
    wait_multiply();

    const Epilogue<bf16> epilogue = epilogue_of<GATE>(bias, expert, columns, alpha, limit);
    const int column = first_column + (GATED ? 8 : 16) * warp + g;  // of row g; PLAIN has one more of row g + 8
    UNROLL for (int i = 0; i < N / 4; ++i) {
        const int row = i / 2 * 8 + 2 * t + i % 2, at = i / 2 * 4 + i % 2;
        if (row >= rows) continue;
        bf16* to = out + (long long)pairs[row] * columns;
        if (column < columns) to[column] = epilogue.finish<GATE>(sums[at], sums[at + 2], column, columns);
        if (!GATED && column + 8 < columns) to[column + 8] = epilogue.finish<GATE>(sums[at + 2], 0.f, column + 8, columns);
    }
}
