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
#include "contract/notice.h"
#include "contract/records.h"
#include "contract/shape.h"
#include "contract/stage.h"
#include "contract/status.h"

namespace ep {

inline constexpr int kMaxChunks = 256;  // token ranges that are counted side by side

// What the kernel that decides a dispatch leaves for the kernels behind it.
struct OpState {
    uint64_t seq;            // of the operation; lives here because a graph replays its arguments
    int32_t code;            // kOk once every rank has placed every row; else nothing is moved
    int32_t slot;            // seq % num_slots
    int64_t num_recv;        // unique tokens that arrive here
    int64_t num_rows;        // rows of x in use: compact num_recv, grouped with padding
    int64_t index_rows;      // entries of a row index
    int64_t num_logged = 0;  // across nodes: tokens of our rail that came
};

// Of an operation in two halves: what the first leaves for the second. It lies in memory of the call, so
// that a graph has its own.
struct Begun {
    uint64_t seq;
    int32_t slot, unused;
};

inline constexpr int kMostBlocks = 256;  // of a kernel that waits: a GPU has not as many SMs

// Private device memory of a rank. Pointers of one allocation, laid out once (StateLayout).
struct State {
    uint64_t* seq;            // [2] of the last operation that is over; slot of the next one
    OpState* op;              // of the last dispatch
    const int32_t* owner;     // [num_experts] rank
    const int32_t* local;     // [num_experts] id there
    const int32_t* position;  // [num_experts] counted owner by owner
    const int32_t* first;     // [num_ranks + 1] position of each rank's first expert
    uint64_t* expected;       // [num_slots][num_ranks] rows ever announced to us
    uint64_t* chunks;         // [kMaxChunks][columns] packed, see kernels/tables.cuh
    int32_t* sent;            // [num_ranks] what a cached call found in its handle; all zero again
    uint32_t* finished;       // blocks that have read all notices; 0 again once that is all
    uint64_t* without;        // [2] packed, 32 ranks each: whom a small operation goes without
    uint64_t* lost;           // ranks whose rows stopped coming in this one
    uint64_t* claimed;        // [kMostBlocks / 64] turns of a small batch that blocks send; 0 again
};

struct StateLayout {
    Region seq, abort, owner, local, position, first, expected, chunks, op, sent, finished, without,
        lost, claimed, control, arena, arena_bytes;
    int64_t tables_end = 0, end = 0;

    constexpr explicit StateLayout(const Shape& s) {
        const int64_t ranks = s.num_ranks, experts = s.num_experts;
        Cursor at;
        seq = at.take(16);
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
        chunks = at.take(8 * kMaxChunks * (ranks + experts + 2));
        op = at.take(sizeof(OpState));
        sent = at.take(4 * ranks);
        finished = at.take(4);
        without = at.take(16);
        lost = at.take(8);
        claimed = at.take(kMostBlocks / 8);
        end = at.end();
    }
};

// Mapped memory of all ranks, our own included. Across nodes it is that of the ranks of our own: of
// others there is a blank header, and no arena.
struct Peers {
    std::byte* own;              // our control block
    std::byte* const* control;   // [num_ranks] control blocks
    std::byte* const* arena;     // [num_ranks]
    const int64_t* arena_bytes;  // [num_ranks]
    int32_t rank;
    int32_t near_begin, near_end;  // ranks whose memory we reach
    bool relays = false;           // of others we hear through ranks of our node
};

// Calls whose reports their host has not read yet; before one more it reads the oldest.
inline constexpr int kMaxReports = 32;

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
        int64_t num_recv, num_rows, index_rows, num_logged;
    };
    Report sync[kMaxReports];     // of calls whose host waits; call n has place n % kMaxReports
    Report deferred;              // of the first call nobody has read of that failed without a host
    uint64_t waiting[kMaxRanks];  // per peer: a wait for it that takes long, see waiting_word
    // With masks, per peer. Set by the host, which has lost it: why, a code.
    uint32_t lost[kMaxRanks];
    uint32_t masked[kMaxRanks];  // 1 once a kernel went on without it
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
    int64_t lives;      // where in a control block everybody's life is told
    int64_t masks = 0;  // and which ranks nobody waits for
    uint32_t* abort;    // device memory: 1 once a wait of this rank gave up
    HostPage* page;     // mapped
    std::byte* const* control;
    int64_t arrival_ns, progress_ns;  // < 0: never
    int64_t post_ns;                  // a wait that takes longer tells the host
    int32_t rank, num_ranks;
    int32_t near_begin, near_end;  // see Peers
    bool can_mask = false;         // a wait that ends without its word masks the rank it is for
};

// All that stays the same from one operation to the next. What kernels of small batches name of their parameters stands
// together: each 64 bytes of them cost a block 40 to 125 cycles (bench/latencies.cu), before it can do anything.
struct RankView {
    Shape shape;
    ControlLayout layout;
    Peers peers;
    State state;
    Watch watch;
    // A kernel may take its SMs before the one in front of it has ended. Not where ranks share a GPU: waiting
    // kernels of one would keep the other, whom they wait for, from ever starting. Nor a small batch that was
    // given so many SMs and no more.
    bool overlaps = false;
    // Kernels of so many blocks, or fewer, find SMs while one like them runs.
    int32_t early_blocks = 0;
};

// What a dispatch on a GPU is asked for beside its arguments; addresses 0 = not wanted, or granted.
struct DispatchWants {
    int32_t* status = nullptr;        // [1] the code of the failure, or 0
    int32_t* num_recv = nullptr;      // [1]
    int32_t* offsets = nullptr;       // [num_local_experts + 1]
    int64_t* source_range = nullptr;  // [num_local_experts, num_ranks]
    int32_t* recv_row = nullptr;      // cached: of the handle
    Begun* begun = nullptr;           // [1] for what may go in two halves
    int64_t max_recv = 0;             // cached: of the handle, as max_rows, over all local experts
    int64_t max_rows = 0;
    int32_t num_sms = 0, num_warps = 0;  // 0 = computed
    bool wide_ids = true;
    bool row_index = false, row_token = false;
    bool grants_all = false;  // the memory of all that is wanted; no call without room for it
    bool reports = false;     // the host waits for sizes
    bool by_copies = false;   // rows travel by copy engine
    bool in_halves = false;   // of a small batch: only the first one now
};

// The same of a combine.
struct CombineWants {
    Begun* begun = nullptr;
    int32_t num_sms = 0, num_stages = 0;  // 0 = computed
    bool in_halves = false;
};

// How a call begins: what it tells every rank, and whom it tells the verdict.
struct Begin {
    NoticeHead head;
    Descriptor descriptor;
    Refusal refusal;
    uint64_t call = 0;          // number the host waits for; 0 = it does not wait
    bool report_later = false;  // a failure is raised by the host's next call

    void describe(const Descriptor& d, int64_t num_tokens) {
        descriptor = d;
        sign(head, d);
        head.num_tokens = static_cast<int32_t>(num_tokens);
    }
};

struct DispatchJob {
    RankView view;
    DispatchArgs args;
    UnpackArgs out;  // where what comes beside x will lie
    Begin begin;
    int32_t num_chunks = 1;        // 1: every block counts what comes before its own tokens
    int32_t tokens_per_chunk = 0;  // counted side by side; each block gets its share of a chunk
    int32_t* status = nullptr;     // [1] the code of the failure, or 0
    int32_t* num_recv = nullptr;   // [1]
    Begun* begun = nullptr;        // small batches
};
static_assert(std::is_trivially_copyable_v<DispatchJob> && sizeof(DispatchJob) <= 2048);

struct CombineJob {
    RankView view;
    CombineArgs args;
    Begin begin;
    std::byte* staged =
        nullptr;             // [num_rows, hidden] copy of what remote sources need, per_rank the
                             // sums for all sources; or null
    Begun* begun = nullptr;  // small batches
};
static_assert(std::is_trivially_copyable_v<CombineJob> && sizeof(CombineJob) <= 2048);

// What of an operation of a small batch a kernel does.
enum class Half { kBoth, kSend, kReceive };

// Blocks that have something to do in it: should all ranks bring as much as this one; should they bring all they may.
struct StageBlocks {
    int32_t expected = 1, most = 1;
};

// Where and how wide a kernel runs.
struct LaunchPlan {
    int32_t num_blocks = 1;
    int32_t num_warps = 1;                   // that move rows
    int32_t stage_bytes = 0;                 // shared memory of one warp for rows in flight
    int32_t all_blocks = 1;                  // of the short steps that wait for nobody
    int32_t num_stages = 1, num_groups = 1;  // of pull: stages of a group, groups of a block
};

}  // namespace ep
