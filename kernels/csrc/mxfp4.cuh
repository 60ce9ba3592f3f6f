// Weights in MXFP4, in the order of bits of MXFP4Weight (arguments.py), in which most pairs of numbers take a rotation and a mask.
#pragma once
#include "mma.cuh"

struct mxfp4 { unsigned char pair; };  // two elements

// Where the blocks of a row are: eight rows have their blocks in chunks of four of each row. There are less than 2^32 blocks.
struct RowBlocks {
    unsigned first;     // block of the eight rows
    int place, blocks;  // of the row in the eight; blocks of a row
    DEVICE RowBlocks(long long row, int blocks) : first(row / 8 * 8 * blocks), place(row % 8), blocks(blocks) {}
    DEVICE int in_chunk(int chunk) const { return min(4, blocks - 4 * chunk); }  // blocks of a row; the last chunk may have fewer
    DEVICE unsigned at(int block) const { return first + block / 4 * 32 + place * in_chunk(block / 4) + block % 4; }
};

DEVICE unsigned rotate_left(unsigned word, int bits) { return word << bits | word >> (32 - bits); }

// Return pair 0 .. 3 of a word. Exponent and mantissa in their places of a bf16 are a number that is too small by 2^126, also if it is
// subnormal.
DEVICE unsigned small_pair(unsigned word, int pair) {
    constexpr unsigned NUMBERS = 0x81c081c0u;
    if (pair == 0) return word & NUMBERS;
    if (pair == 1) return rotate_left(word, 10) & NUMBERS;
    if (pair == 2) return rotate_left(word, 13) & NUMBERS;
    return (word & 0x001b001bu) * 0x1084u & NUMBERS;  // moves bits to the left by 2, 7 and 12; no bit of NUMBERS gets two
}

// Return a pair of a word as bf16. LARGE allows scales of more than 128.
template <bool LARGE> DEVICE unsigned widen_mxfp4(unsigned word, int pair, int scale) {
    constexpr unsigned ONE = 0x00800080u;  // 1 in both exponents
    const unsigned scaled = scale_pair(small_pair(word, pair), (LARGE ? min(scale, 128) + 126 : scale + 126) * ONE, bf16());
    return LARGE && scale > 128 ? scale_pair(scaled, (scale - 1) * ONE, bf16()) : scaled;
}
