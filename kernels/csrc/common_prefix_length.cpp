// The length of the common prefix of two token arrays, for the prefix cache. Mirrors common_prefix_length of reference.py.
#include <cstdint>
#include <cstring>

extern "C" int64_t common_prefix_length(const int32_t* a, const int32_t* b, int64_t n) {
    int64_t i = 0;
    // memcmp of a constant size becomes a few vector compares; a scalar loop with an early exit does not.
    for (; i + 16 <= n; i += 16)
        if (std::memcmp(a + i, b + i, 64) != 0) break;
    while (i < n && a[i] == b[i]) ++i;
    return i;
}
