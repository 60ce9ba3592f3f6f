// A warp's chunk of 16 rows of a weight, straight from memory to registers, as the first operand of the tensor cores: lane (g, t) loads
// some columns of rows g and g + 8.
#pragma once
#include "mma.cuh"

// The rows of the weights that a lane reads, and how many columns they have.
template <typename W> struct LaneRows {
    const W* weights;
    const unsigned char* scales;  // of MXFP4
    long long rows[2];
    int width;
};

// A chunk of 64 columns in 16 bits, in two pieces: a lane has eight columns of each, of two rows.
template <typename T, typename W> struct Chunk {
    static constexpr int COLUMNS = 64, PIECES = 2;
    uint4 weights[PIECES][2];

    DEVICE static int column(int chunk, int piece) { return chunk * COLUMNS + piece * 32 + thread_in_group() * 8; }
    DEVICE static int column(int chunk, int piece, int width) { return min(column(chunk, piece), width - 8); }  // within x
    DEVICE static int place(int vector) { return vector; }  // of eight columns, by piece and thread_in_group()
    DEVICE void load(const LaneRows<T>& from, int chunk) {
        UNROLL for (int piece = 0; piece < PIECES; ++piece)
            UNROLL for (int i = 0; i < 2; ++i) {
                const int at = column(chunk, piece);
                weights[piece][i] = at < from.width ? stream(from.weights + from.rows[i] * from.width + at) : make_uint4(0, 0, 0, 0);
            }
    }
    // Multiply a piece by the same columns of row g of each eight rows of x.
    template <bool LARGE, int TILES> DEVICE void multiply_piece(float (&sums)[TILES][4], int piece, const uint4 (&x)[TILES]) const {
        const uint4 &a = weights[piece][0], &b = weights[piece][1];
        UNROLL for (int n = 0; n < TILES; ++n) {
            multiply(sums[n], a.x, b.x, a.y, b.y, x[n].x, x[n].y, T());
            multiply(sums[n], a.z, b.z, a.w, b.w, x[n].z, x[n].w, T());
        }
    }
    DEVICE bool is_large() const { return false; }
};
