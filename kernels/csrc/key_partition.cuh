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
        const bool is_longer = rest < 0;
        return (is_longer ? 0 : longer) + (is_longer ? chunk : rest) / (length + is_longer);
    }
};

// A row that several parts have keys of.
struct CutRow { int row, first_chunk, last_chunk; };

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
    DEVICE CutRow cut_row() const { return {row, chunk - first_chunk, chunk - first_chunk + row_chunks - 1}; }
};

// The first keys of a part, and the first chunk of the next part. Blocks load it at once: keys are then two dependent loads away.
struct alignas(16) PartStart {
    KeyRange range;  // its row is -1 if the part does not exist
    int stop;
};

// The tensor that partition_keys writes; PartitionLayout in paged_attention.py mirrors it. A chunk is kv_chunk keys of one
// row; the last chunk of a row may have fewer, and a row has at least one chunk. A part is a run of chunks:
//   num_parts = min(max_parts, num_chunks, max(rows, num_chunks / min_chunks)).
// The parts are equal, or each has equally many whole rows, the last one perhaps fewer. Then no row has to be merged. Parts may be
// longer by fewer than `slack` chunks: than the mean of them if there are `enough_parts`, else than equal parts.
template <typename Int> struct Partition {
    Int* data;  // parts [max_parts] of PartStart, num_parts, num_chunks, starts [rows + 1], counters [rows, groups of heads]
    int max_parts;

    DEVICE PartStart part(int i) const { return reinterpret_cast<const PartStart*>(data)[i]; }
    DEVICE void set_part(int i, const PartStart& to) const { reinterpret_cast<PartStart*>(data)[i] = to; }
    DEVICE Int& num_parts() const { return data[max_parts * (int)sizeof(PartStart) / 4]; }
    DEVICE Int& num_chunks() const { return (&num_parts())[1]; }
    DEVICE EvenParts even_parts() const { return {num_chunks(), num_parts()}; }  // if a row is cut
    DEVICE Int* starts() const { return &num_parts() + 2; }  // the first chunk of each row, then num_chunks
};

// All chunks, one row after the other.
struct KeySequence {
    const int *starts, *positions, *table_rows;
    int window, kv_chunk;

    // Return the keys of a row from this chunk on, up to the chunk `stop`.
    DEVICE KeyRange range_at(int chunk, int row, int stop) const {
        const int row_chunks = starts[row + 1] - starts[row];
        const int first_chunk = chunk - starts[row], end_chunk = min(row_chunks, first_chunk + stop - chunk);
        const int position = positions[row], first = position - num_visible_keys(position, window);
        const int begin = min(position, first + first_chunk * kv_chunk), end = min(position, first + end_chunk * kv_chunk);
        return KeyRange{row, begin, end, position, chunk, first_chunk, end_chunk, row_chunks, table_rows[row]};
    }
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
