// The division of a step's keys among thread blocks.
#pragma once
#include "common.cuh"

// Return how many keys in the cache a row attends to, excluding its new key.
DEVICE int num_visible_keys(int position, int window) { return window > 0 ? min(position, window - 1) : position; }

// The division of chunks into parts of `length` chunks, of which the first `longer` have one more.
struct EvenParts {
    int length, longer;

    DEVICE EvenParts(int num_chunks, int num_parts) : length(num_chunks / num_parts), longer(num_chunks % num_parts) {}
    DEVICE int first_chunk(int part) const { return part * length + min(part, longer); }
    DEVICE int part_of(int chunk) const {
        const int rest = chunk - longer * (length + 1);  // chunks after the longer parts
        return rest < 0 ? chunk / (length + 1) : longer + rest / length;
    }
};

// The tensor that partition_keys writes; PartitionLayout in paged_attention.py mirrors it. A chunk is kv_chunk keys of one
// row; the last chunk of a row may have fewer, and a row has at least one chunk. A part is a run of chunks:
//   num_parts = min(max_parts, num_chunks, max(rows, num_chunks / min_chunks)).
// The parts are equal, or each has equally many whole rows, the last one perhaps fewer. Then no row has to be merged, but parts may
// be longer: by fewer than `slack` chunks.
template <typename Int> struct Partition {
    Int* data;  // num_parts, num_chunks, starts [rows + 1], part_starts [max_parts + 1, 2], counters [rows, groups of heads]
    int rows;

    DEVICE Int& num_parts() const { return data[0]; }
    DEVICE Int& num_chunks() const { return data[1]; }
    DEVICE EvenParts even_parts() const { return {num_chunks(), num_parts()}; }  // if a row is cut
    DEVICE Int* starts() const { return data + 2; }  // the first chunk of each row, then num_chunks
    // The first chunk of a part and its row; num_chunks and `rows` for parts that do not exist.
    DEVICE Int& first_chunk(int part) const { return starts()[rows + 1 + 2 * part]; }
    DEVICE Int& first_row(int part) const { return starts()[rows + 2 + 2 * part]; }
};

// Write the first chunk of each row; return the number of chunks.
DEVICE int scan_chunks(int* starts, const int* __restrict__ positions, int rows, int window, int kv_chunk) {
    __shared__ int warp_totals[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int total = 0;
    for (int first = 0; first < rows; first += blockDim.x) {
        const int row = first + threadIdx.x;
        const int chunks = row < rows ? max(1, (num_visible_keys(positions[row], window) + kv_chunk - 1) / kv_chunk) : 0;
        int before = chunks;  // inclusive prefix sum over the warp
        for (int i = 1; i < 32; i <<= 1) {
            const int other = __shfl_up_sync(0xffffffffu, before, i);
            if (lane >= i) before += other;
        }
        if (lane == 31) warp_totals[warp] = before;
        __syncthreads();
        before += total - chunks;
        for (int w = 0; w < blockDim.x / 32; ++w) {
            if (w < warp) before += warp_totals[w];
            total += warp_totals[w];
        }
        if (row < rows) starts[row] = before;
        __syncthreads();
    }
    return total;
}

// Return, on all threads, whether each run of part_rows rows has fewer than total / parts + slack chunks.
DEVICE bool have_about_one_length(const int* starts, int rows, int part_rows, int parts, int slack) {
    bool is_long = false;
    for (int row = threadIdx.x * part_rows; row < rows; row += blockDim.x * part_rows)
        is_long |= (starts[min(rows, row + part_rows)] - starts[row] - slack) * parts >= starts[rows];
    return !__syncthreads_or(is_long);
}

// Return the row of a chunk: starts[row] <= chunk < starts[row + 1].
DEVICE int row_of(const int* starts, int rows, int chunk) {
    int low = 0, high = rows;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (starts[middle] <= chunk ? low : high) = middle;
    }
    return low;
}

// The keys of one row in a part.
struct KeyRange {
    int row, begin, end;         // the keys [begin, end) of the row
    int position;                // the position of the row's new token
    int chunk;                   // the index of the first chunk in the sequence of all chunks
    int first_chunk, end_chunk;  // the chunks [first_chunk, end_chunk) of the row
    int row_chunks;
    int table_row;  // of the page table

    DEVICE bool has_new_token() const { return end_chunk == row_chunks; }
    DEVICE bool is_whole_row() const { return end_chunk - first_chunk == row_chunks; }
};
