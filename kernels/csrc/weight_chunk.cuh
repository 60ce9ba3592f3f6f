// A warp's chunk of 16 rows of a weight, straight from memory to registers, as the first operand of the tensor cores: lane (g, t) loads
// some columns of rows g and g + 8.
#pragma once
#include "mma.cuh"

// Two rows of a weight. Columns that do not exist are 0.
template <typename T> struct PaddedRows {
    const T* weight;
    long long rows[2];
    int width;

    // Load this lane's vector of the 32 columns from `first` on.
    DEVICE uint4 load(int row, int first) const {
        const int column = first + thread_in_group() * 8;
        return column < width ? stream(weight + rows[row] * width + column) : make_uint4(0, 0, 0, 0);
    }
};

// A chunk of 64 columns in 16 bits, in two pieces: a lane has eight columns of each, of two rows.
template <typename T, typename W> struct Chunk {
    static constexpr int COLUMNS = 64, PIECES = 2;
    static constexpr bool MXFP4 = false;
    uint4 weights[PIECES][2];

    DEVICE static int column(int chunk, int piece, int) { return chunk * COLUMNS + piece * 32 + thread_in_group() * 8; }
    DEVICE static int place(int vector) { return vector; }  // of eight columns, by piece and thread_in_group()
    template <typename Rows> DEVICE void load(const Rows& from, int chunk) {
        UNROLL for (int piece = 0; piece < PIECES; ++piece)
            UNROLL for (int i = 0; i < 2; ++i) weights[piece][i] = from.load(i, chunk * COLUMNS + piece * 32);
    }
    // Multiply a piece by the same columns of row g of each eight rows of x.
    template <bool LARGE, int TILES> DEVICE void multiply_piece(float (&sums)[TILES][4], int piece, const uint4 (&x)[TILES]) const {
        const uint4 &a = weights[piece][0], &b = weights[piece][1];
        UNROLL for (int n = 0; n < TILES; ++n) {
            multiply(sums[n], a.x, b.x, a.y, b.y, x[n].x, x[n].y, T());
            multiply(sums[n], a.z, b.z, a.w, b.w, x[n].z, x[n].w, T());
        }
    }
    DEVICE int greatest_scale() const { return 0; }
};
