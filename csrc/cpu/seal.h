// Paranoid mode: what seals a row and its record, so that damage on the way is found.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ep::cpu {

// Closes a metadata record. The sum covers the row, the record before the seal, and everything that
// says which row this is: a row that went elsewhere, or of another operation, does not fit either.
struct Seal {
    uint64_t sum;
    int32_t row;    // where the row was pushed
    int32_t token;  // of its source
};
static_assert(sizeof(Seal) == 16 && std::is_trivially_copyable_v<Seal>);

// Every step is a bijection of the state, so one changed word always changes the result.
inline uint64_t digest(uint64_t state, const std::byte* data, int64_t bytes) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;
    for (int64_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        std::memcpy(&word, data + i, bytes - i < 8 ? bytes - i : 8);
        state = (state ^ word) * kOdd;
        state ^= state >> 29;
    }
    return state;
}

// The sum of a seal whose other fields are filled.
inline uint64_t sum_of(const Seal& seal, uint64_t seq, int src, const std::byte* row,
                       int64_t row_bytes, const std::byte* record, int64_t record_bytes) {
    const int64_t names[] = {static_cast<int64_t>(seq), src, seal.row, seal.token};
    uint64_t state = digest(0x45505f5345414c21, reinterpret_cast<const std::byte*>(names), 32);
    return digest(digest(state, row, row_bytes), record, record_bytes);
}

}  // namespace ep::cpu
