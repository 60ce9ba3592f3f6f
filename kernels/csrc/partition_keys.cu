// partition_keys: the division of a decode step's keys among the blocks of decode_attention, once per step for all layers.
#include "key_partition.cuh"

// The grid is one block.
extern "C" __global__ void __launch_bounds__(1024) partition_keys(
    int* __restrict__ data, const int* __restrict__ positions, const int* __restrict__ table_rows, int rows, int window, int kv_chunk,
    int min_chunks, int max_parts, int slack, int enough_parts) {
    const Partition<int> partition{data, max_parts};
    int* starts = partition.starts();
    const int total = scan_chunks(starts, positions, rows, window, kv_chunk);
    const int parts = min(max_parts, min(total, max(rows, total / min_chunks))), part_rows = (rows + parts - 1) / parts;
    if (threadIdx.x == 0) starts[rows] = total;
    __syncthreads();
    const int whole_parts = (rows + part_rows - 1) / part_rows;
    const bool whole = have_about_one_length(starts, rows, part_rows, whole_parts < enough_parts ? parts : whole_parts, slack);
    if (threadIdx.x == 0) partition.num_parts() = whole ? whole_parts : parts, partition.num_chunks() = total;
    const EvenParts even(total, parts);
    const KeySequence keys{starts, positions, table_rows, window, kv_chunk};
    for (int part = threadIdx.x; part < max_parts; part += blockDim.x) {
        const int chunk = whole ? starts[min(rows, part * part_rows)] : min(total, even.first_chunk(part));
        const int stop = whole ? starts[min(rows, (part + 1) * part_rows)] : min(total, even.first_chunk(part + 1));
        partition.set_part(part, {chunk < total ? keys.range_at(chunk, row_of(starts, rows, chunk), stop) : KeyRange{-1}, stop});
    }
}
