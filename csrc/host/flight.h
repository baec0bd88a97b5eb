// A dispatch that has been queued: the memory it was granted, and what it leaves to calls that go by its
// routing.
//
// defines: Out, Lies, Part, Granted, Routing, Flight
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "contract/gpu.h"
#include "host/device_arena.h"

namespace ep {

// What a dispatch is granted: outputs, and memory it needs meanwhile.
enum class Out : uint8_t {
    kX,
    kScales,
    kTokenScales,  // grouped, slab: as they came
    kIds,
    kWeights,
    kSrc,
    kRows,
    kRowIndex,
    kRowToken,
    kRailLog,  // across nodes: what crossed to here, see RailLog
    // of the routing, unless the caller has memory for it
    kSendRow,
    kRankCounts,
    kCounts,
    kOffsets,
    kSourceRange,
    kRankEnds,
    kNumbers,  // int32 [8]: status, tokens received; 16 bytes on, a Begun
    kEnd,
};
inline constexpr int kNumOuts = static_cast<int>(Out::kEnd);
inline constexpr int kBegunAt = 16;  // in kNumbers

// Which extent an output lies in: one of its own, whose end may come back; with what else there is of
// rows; or with what handles keep.
enum class Lies : uint8_t { kAlone, kBeside, kInRouting };

// One of them, and what it needs.
struct Part {
    Out out;
    Lies lies;
    int64_t per_row, per_token, rest;  // bytes

    int64_t bytes(int64_t rows, int64_t tokens) const {
        return rows * per_row + tokens * per_token + rest;
    }
};

// Memory in an extent, which it keeps.
struct Granted {
    std::shared_ptr<StreamHold> hold;
    int64_t at = 0;  // in the extent

    explicit operator bool() const { return hold != nullptr; }
    std::byte* data() const { return hold ? hold->data() + at : nullptr; }
    int64_t offset() const { return hold->extent().offset + at; }  // in the arena
};

// What a dispatch leaves to those that go by its routing, and keeps it.
struct Routing {
    DispatchArgs args;  // of the dispatch
    int32_t *recv_src, *recv_row;
    int64_t num_recv, num_rows;  // rows of recv_src and of x, over all local experts
    uint64_t number;
    std::shared_ptr<StreamHold> hold;
};

// A dispatch that has been queued: where its outputs lie, and what is known of their sizes.
struct Flight {
    explicit Flight(const DispatchJob& j) : job(j) {}
    Flight(const Flight&) = delete;
    Flight& operator=(const Flight&) = delete;
    // What was granted first dies first, and the next call in a loop asks for that first.
    ~Flight() {
        for (Granted& g : granted) g = {};
    }

    DispatchJob job;
    std::vector<Part> parts;
    std::array<Granted, kNumOuts> granted;
    std::shared_ptr<StreamHold> packed;  // by copy engine: rows for others, until they are copied
    Stream stream = nullptr;
    bool is_captured = false;
    uint64_t number = 0;
    int32_t num_blocks = 1;
    Half half = Half::kBoth;    // kSend: the other one is to be queued
    HostPage::Report report{};  // once waited for

    Granted& operator[](Out out) { return granted[static_cast<int>(out)]; }
    const Granted& operator[](Out out) const { return granted[static_cast<int>(out)]; }
    // Declares that a stream uses all of it.
    void use_on(Stream other) const;
    // Of a fresh dispatch that was granted all, once its sizes are known.
    Routing routing() const;
};

}  // namespace ep
