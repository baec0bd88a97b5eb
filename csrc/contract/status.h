// What goes wrong, as numbers: error codes, wait sites and the incident record.
//
// The table of codes, classes and sentences is docs/errors.md; Python turns an Outcome into one of
// them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contract/config.h"

namespace ep {

enum Code : int32_t {
    kOk = 0,
    kInterrupted = 1,   // a signal handler raised while we waited; never leaves the process
    kPeerAbsent = 101,  // peer never entered the op
    kStalled = 102,     // peer entered, then nothing new arrived
    kPeerDied = 110,
    kPeerLeft = 111,
    kPeerFault = 112,  // its CUDA context broke
    kMasked = 113,     // the others go on without this rank
    kBadDtype = 200,
    kBadShape = 201,
    kBadExpertId = 213,
    kCallDiffers = 220,
    kOverCapacity = 230,
    kOutOfArena = 231,
    kBadCount = 240,
    kBadEpoch = 241,
    kMiscount = 242,
    kNeedsAll = 311,  // a call that no rank can be left out of, while one is masked
    kStaleHandle = 320,
    kOutOfStep = 330,
    kClosed = 340,  // this rank closed while the call waited; never leaves the process
};

// `want` of a kBadEpoch that is no number: the row of token `have` does not fit its checksum.
inline constexpr int64_t kBadSeal = -1;

// Codes a rank may give its peers as the reason why a call will not happen; any other number in
// these fields is damage.
EP_HD constexpr bool may_poison_entry(int code) {
    return (code >= 200 && code <= 203) || (code >= 210 && code <= 213) || code == kOverCapacity ||
           code == kOutOfArena || code == 310 || code == kNeedsAll || code == kStaleHandle;
}
EP_HD constexpr bool may_poison_base(int code) {
    return code == kOverCapacity || code == kOutOfArena || code == kStaleHandle;
}

// Where a rank waits. Names are exported to Python for the sentence a user reads.
enum class Site : uint8_t {
    kNone = 0,
    kSlot,
    kEntry,
    kBase,
    kRows,
    kPulled,
    kLine,
    kRailNotice,  // across nodes: the notice of the rank at the other end of our rail
    kRailChunk,   // a chunk from there
    kRailCredit,  // room there for one of ours
};

// One expired or refused wait. 64 bytes; on a GPU it lies in mapped host memory.
struct Incident {
    uint32_t magic = kMagic;
    uint16_t code = 0;
    Site site = Site::kNone;
    uint8_t op = 0;  // OpKind
    int16_t rank = -1, peer = -1;
    uint32_t epoch = 0;     // low half of the sequence number compared with
    uint64_t seq = 0;       // my operation
    uint64_t peer_seq = 0;  // last operation the peer entered
    uint64_t waited_ns = 0;
    int64_t want = 0, have = 0;
    uint32_t generation = 0;
    uint32_t flags = 0;

    static constexpr uint32_t kMagic = 0x49505045;  // "EPPI"
};
static_assert(sizeof(Incident) == 64 && std::is_trivially_copyable_v<Incident>);

inline constexpr int kReasonBytes = 112;

// The verdict on an operation: kOk, or an incident with the numbers its sentence needs.
struct Outcome {
    Incident incident;
    // E213: count, token, slot, id. E220: field. E230: rows, limit. E231: need, free.
    // E1xx, E330 told by a peer: 1 + the rank that found out, the number of its operation.
    int64_t detail[4] = {0, 0, 0, 0};
    char reason[kReasonBytes] = {0};  // E20x of a peer: "topk_idx: got int16, want int32 or int64"

    EP_HD bool ok() const { return incident.code == kOk; }
};

}  // namespace ep
