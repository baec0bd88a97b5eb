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

// The operation a rank is in. One at a time: operations of a buffer run in the order they were
// begun, so kernels of one operation find here what its first kernel decided.
struct OpState {
    uint64_t seq;      // of the current operation; lives here because a graph replays its arguments
    int32_t code;      // kOk once every rank has placed every row; else nothing is moved
    int32_t slot;      // seq % num_slots
    int64_t num_recv;  // unique tokens that arrive here
    int64_t num_rows;  // rows of x in use: compact num_recv, grouped with padding
    uint32_t finished;  // blocks that are through; atom.inc wraps it back to 0
};

// Ids of a chunk that name no expert: how many, and the lowest t * num_topk + k.
struct BadIds {
    int32_t count;
    unsigned long long first;
};

// Private device memory of a rank. Pointers of one allocation, laid out once (StateLayout).
struct State {
    OpState* op;
    const int32_t* owner;     // [num_experts] rank
    const int32_t* local;     // [num_experts] id there
    const int32_t* position;  // [num_experts] counted owner by owner
    const int32_t* first;     // [num_ranks + 1] position of each rank's first expert
    uint64_t* expected;       // [num_slots][num_ranks] rows ever announced to us
    int32_t* first_row;       // [num_ranks + 1] first compact row of each source here
    int32_t* group_start;     // [max_local_experts + 1] first row of each local expert's group
    int32_t* counts;          // [max_local_experts] selections of each local expert
    int32_t* chunk_row;       // [kMaxChunks][num_ranks] compact row at the owner of a chunk's first
    int32_t* chunk_slot;      // [kMaxChunks][num_experts] row of its first selection, by position
    int32_t* turn;          // [max_tokens][num_topk] a token's turn in its chunk, at slot k's rank
    int32_t* chunk_counts;  // [kMaxChunks][num_ranks + num_experts] tokens, then selections
    BadIds* bad_ids;        // [kMaxChunks]
};

struct StateLayout {
    Region op, abort, owner, local, position, first, expected, first_row, group_start, counts,
        chunk_row, chunk_slot, turn, chunk_counts, bad_ids, control, arena;
    int64_t end = 0;

    constexpr explicit StateLayout(const Shape& s) {
        const int64_t ranks = s.num_ranks, experts = s.num_experts;
        Cursor at;
        op = at.take(sizeof(OpState));
        abort = at.take(4);
        owner = at.take(4 * experts);
        local = at.take(4 * experts);
        position = at.take(4 * experts);
        first = at.take(4 * (ranks + 1));
        expected = at.take(8 * s.num_slots * ranks);
        first_row = at.take(4 * (ranks + 1));
        group_start = at.take(int64_t{4} * (s.max_local_experts + 1));
        counts = at.take(int64_t{4} * s.max_local_experts);
        chunk_row = at.take(4 * kMaxChunks * ranks);
        chunk_slot = at.take(4 * kMaxChunks * experts);
        turn = at.take(4 * s.max_tokens * s.num_topk);
        chunk_counts = at.take(4 * kMaxChunks * (ranks + experts));
        bad_ids = at.take(kMaxChunks * int64_t{sizeof(BadIds)});
        control = at.take(8 * ranks);  // addresses, see Peers
        arena = at.take(8 * ranks);
        end = at.end();
    }
};

// Mapped memory of all ranks, our own included.
struct Peers {
    std::byte* const* control;  // [num_ranks] control blocks
    std::byte* const* arena;    // [num_ranks]
    int32_t rank;
};

// What a rank's kernels tell their own host: one page of pinned memory.
struct HostPage {
    Incident incident;        // of the first wait that ran out
    uint64_t incident_valid;  // release-stored last
    uint64_t abort;           // set by the host: leave every wait

    struct Report {  // the verdict on a call; `call` is release-stored last
        uint64_t call;
        uint64_t seq;
        Outcome outcome;
        int64_t num_recv, num_rows, index_rows;
    };
    Report sync;      // of the last call whose host waits
    Report deferred;  // of the last call that failed and whose host did not wait
};

// Clocks and the way out of a wait that takes too long.
struct Watch {
    uint32_t* abort;  // device memory: 1 once a wait of this rank gave up
    HostPage* page;   // mapped
    std::byte* const* control;
    int64_t arrival_ns, progress_ns;  // < 0: never
    int32_t rank;
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
    int32_t num_warps = 1;
    int32_t stage_bytes = 0;  // shared memory of one warp for rows in flight
    int32_t all_blocks = 1;   // of the short steps that wait for nobody, or for rows only
};

}  // namespace ep
