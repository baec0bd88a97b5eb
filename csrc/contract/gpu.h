// What a rank on a GPU adds to the contract: its private device memory, the page it shares with its
// own host, and the arguments of its kernels.
//
// The control block, the entries and the bases are those of every backend (contract/layout.h,
// contract/records.h); only the words here are never seen by a peer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "contract/args.h"
#include "contract/calls.h"
#include "contract/config.h"
#include "contract/layout.h"
#include "contract/records.h"
#include "contract/shape.h"
#include "contract/status.h"

namespace ep {

inline constexpr int kMaxChunks = 16;  // token ranges that are counted side by side

// What the first kernel of an operation decided, for its later ones.
struct OpState {
    uint64_t seq;        // of the operation; lives here because a graph replays its arguments
    int32_t code;        // kOk once every rank has placed every row; else nothing is moved
    int32_t slot;        // seq % num_slots
    int64_t num_recv;    // unique tokens that arrive here
    int64_t num_rows;    // rows of x in use: compact num_recv, grouped with padding
    int64_t index_rows;  // entries of a row index
    uint32_t finished;   // blocks that are through; atom.inc wraps it back to 0
};

// Ids of a chunk that name no expert: how many, and the lowest t * num_topk + k.
struct BadIds {
    int32_t count;
    unsigned long long first;
};

// Private device memory of a rank. Pointers of one allocation, laid out once (StateLayout).
//
// What outlives the first half of an operation is there once for each lane. Operations whose halves
// are queued together share lane 0; one that is begun and finished later has a lane of its own.
struct State {
    uint64_t* seq;            // of the last operation that entered, on any lane
    OpState* op;              // of the lane
    const int32_t* owner;     // [num_experts] rank
    const int32_t* local;     // [num_experts] id there
    const int32_t* position;  // [num_experts] counted owner by owner
    const int32_t* first;     // [num_ranks + 1] position of each rank's first expert
    uint64_t* expected;       // [num_slots][num_ranks] rows ever announced to us
    int32_t* first_row;       // lane: [num_ranks + 1] first compact row of each source here
    int32_t* group_start;     // lane: [max_local_experts + 1] first row of each expert's group
    int32_t* counts;          // lane: [max_local_experts] selections of each local expert
    int32_t* chunk_row;       // [kMaxChunks][num_ranks] compact row at the owner of a chunk's first
    int32_t* chunk_slot;      // [kMaxChunks][num_experts] row of its first selection, by position
    int32_t* turn;  // [2][num_tokens][num_topk] in its chunk: a token's turn at slot k's rank,
                    // then the selection's at its expert
    int32_t* chunk_counts;  // [kMaxChunks][num_ranks + num_experts] tokens, then selections
    int32_t* sent;    // [num_ranks + 1] what a cached call found in its handle; all zero again
    BadIds* bad_ids;  // [kMaxChunks]
};

inline constexpr int kMaxLanes = kMaxSlots + 1;
// Tokens whose turns fit the state; a call with more brings memory of its own.
inline constexpr int64_t kMostTurns = int64_t{1} << 16;
constexpr int64_t turns_bytes(int64_t num_tokens, int64_t num_topk) {
    return 2 * 4 * num_tokens * num_topk;
}

struct StateLayout {
    Region seq, abort, owner, local, position, first, expected, chunk_row, chunk_slot, turn,
        chunk_counts, bad_ids, sent, control, arena, arena_bytes;
    Region op, first_row, group_start, counts;  // of lane 0; the others follow lane_bytes apart
    int64_t tables_end = 0, lane_bytes = 0, end = 0;

    constexpr explicit StateLayout(const Shape& s) {
        const int64_t ranks = s.num_ranks, experts = s.num_experts;
        Cursor at;
        seq = at.take(8);
        abort = at.take(4);
        owner = at.take(4 * experts);
        local = at.take(4 * experts);
        position = at.take(4 * experts);
        first = at.take(4 * (ranks + 1));
        control = at.take(8 * ranks);  // addresses, see Peers
        arena = at.take(8 * ranks);
        arena_bytes = at.take(8 * ranks);
        tables_end = at.end();
        expected = at.take(8 * s.num_slots * ranks);
        chunk_row = at.take(4 * kMaxChunks * ranks);
        chunk_slot = at.take(4 * kMaxChunks * experts);
        const int64_t tokens = s.max_tokens < kMostTurns ? s.max_tokens : kMostTurns;
        turn = at.take(turns_bytes(tokens, s.num_topk));
        chunk_counts = at.take(4 * kMaxChunks * (ranks + experts));
        bad_ids = at.take(kMaxChunks * int64_t{sizeof(BadIds)});
        sent = at.take(4 * (ranks + 1));
        const int64_t lanes = at.end();
        op = at.take(sizeof(OpState));
        first_row = at.take(4 * (ranks + 1));
        group_start = at.take(int64_t{4} * (s.max_local_experts + 1));
        counts = at.take(int64_t{4} * s.max_local_experts);
        lane_bytes = at.end() - lanes;
        end = lanes + (s.num_slots + 1) * lane_bytes;
    }
};

// Mapped memory of all ranks, our own included.
struct Peers {
    std::byte* const* control;   // [num_ranks] control blocks
    std::byte* const* arena;     // [num_ranks]
    const int64_t* arena_bytes;  // [num_ranks]
    int32_t rank;
};

// What a rank's kernels and its host tell each other: pinned host memory.
struct HostPage {
    Incident incident;        // of the first wait that ran out
    uint64_t incident_valid;  // release-stored last
    uint64_t abort;           // set by the host: leave every wait, see abort_word; 0 = go on
    uint64_t deferred_seen;   // set by the host: `call` of the last deferred report it has read

    struct Report {  // the verdict on a call; `call` is release-stored last
        uint64_t call;
        uint64_t seq;
        Outcome outcome;
        int64_t num_recv, num_rows, index_rows;
    };
    Report sync[kMaxLanes];       // of the last call of each lane whose host waits
    Report deferred;              // of the first call nobody has read of that failed without a host
    uint64_t waiting[kMaxRanks];  // per peer: a wait for it that takes long, see waiting_word
};

// Why the host ends all waits: a code, and whom it blames (-1 = whoever is waited for).
constexpr uint64_t abort_word(int code, int peer) {
    return static_cast<uint64_t>(code) << 32 | static_cast<uint32_t>(peer + 1);
}
EP_HD constexpr int abort_code(uint64_t word) { return static_cast<int>(word >> 32); }
EP_HD constexpr int abort_peer(uint64_t word) { return static_cast<int>(word & 0xffffffffu) - 1; }

// Where a rank waits for a peer, in one word; 0 = it does not.
EP_HD constexpr uint64_t waiting_word(uint64_t seq, OpKind kind, Site site) {
    return seq << 16 | static_cast<uint64_t>(kind) << 8 | static_cast<uint64_t>(site);
}
constexpr uint64_t waiting_seq(uint64_t word) { return word >> 16; }
constexpr OpKind waiting_kind(uint64_t word) { return static_cast<OpKind>(word >> 8 & 0xff); }
constexpr Site waiting_site(uint64_t word) { return static_cast<Site>(word & 0xff); }

// Clocks and the way out of a wait that takes too long.
struct Watch {
    uint32_t* abort;  // device memory: 1 once a wait of this rank gave up
    HostPage* page;   // mapped
    std::byte* const* control;
    int64_t arrival_ns, progress_ns;  // < 0: never
    int64_t post_ns;                  // a wait that takes longer tells the host
    int32_t rank, num_ranks;
};

// All that stays the same from one operation to the next.
struct RankView {
    Shape shape;
    ControlLayout layout;
    Peers peers;
    State state;
    Watch watch;
};

// How a call begins: what it tells every peer, and whom it tells the verdict.
struct Begin {
    EntryRecord entry;          // num_rows and seq are the kernel's
    uint64_t call = 0;          // number the host waits for; 0 = it does not wait
    int32_t lane = 0;           // where it waits
    bool report_later = false;  // a failure is raised by the host's next call
};

// The extents granted to a dispatch before its size is known.
struct Grant {
    int64_t x_offset = -1, meta_offset = -1;
    int64_t max_rows = 0;  // of x, over all local experts
    int64_t max_recv = 0;  // records
    int64_t free_bytes = 0;
};

struct DispatchJob {
    RankView view;
    Begin begin;
    DispatchArgs args;
    Grant grant;
    int32_t num_chunks = 1, tokens_per_chunk = 0;
    int32_t* status = nullptr;    // [1] static: the code of the failure, or 0
    int32_t* num_recv = nullptr;  // [1] static
};
static_assert(std::is_trivially_copyable_v<DispatchJob> && sizeof(DispatchJob) <= 2048);

struct UnpackJob {
    DispatchJob dispatch;
    UnpackArgs out;
    int32_t num_local = 0;  // experts here
};
static_assert(std::is_trivially_copyable_v<UnpackJob> && sizeof(UnpackJob) <= 2048);

struct CombineJob {
    RankView view;
    Begin begin;
    CombineArgs args;
    std::byte* staged = nullptr;  // [num_rows, hidden] copy of what remote sources need; or null
};
static_assert(std::is_trivially_copyable_v<CombineJob> && sizeof(CombineJob) <= 2048);

// Where and how wide a kernel runs.
struct LaunchPlan {
    int32_t num_blocks = 1;
    int32_t num_warps = 1;    // that move rows
    int32_t stage_bytes = 0;  // shared memory of one warp for rows in flight
    int32_t all_blocks = 1;   // of the short steps that wait for nobody, or for rows only
    int32_t num_stages = 1, num_groups = 1;  // of pull: stages of a group, groups of a block
    bool beside = false;  // unpack starts while push runs, on SMs that push left it
};

}  // namespace ep
