// What a rank knows about the process of a peer: whether it is there, and whether it runs.
#pragma once

#include <cstdint>

namespace ep {

struct PeerProcess {
    int pidfd = -1;   // readable once the process is gone; -1 = same process, or unknown
    int socket = -1;  // the bootstrap connection, readable (EOF) once the process is gone
    int64_t pid = 0;  // 0 = not visible from here
};

// Its process ended, or closed its end of the connection. False when nothing is known.
bool is_gone(const PeerProcess& process);

// Its process has begun to end. With a GPU that takes its time: a second passes while the driver frees
// memory, and only then do its descriptors close.
bool is_ending(const PeerProcess& process);

// Alive, but its heart does not beat (SIGSTOP, debugger).
bool is_stopped(const PeerProcess& process);

}  // namespace ep
