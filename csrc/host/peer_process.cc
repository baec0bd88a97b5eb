#include "host/peer_process.h"

#include <poll.h>

#include <cstdio>
#include <cstring>

namespace ep {

namespace {

// What /proc tells about a process: its state as one letter, and flags of the kernel.
struct Stat {
    char state = '?';
    unsigned flags = 0;
};

Stat stat_of(int64_t pid) {
    Stat stat;
    if (pid <= 0) return stat;
    char path[48];
    std::snprintf(path, sizeof(path), "/proc/%lld/stat", static_cast<long long>(pid));
    std::FILE* file = std::fopen(path, "re");
    if (file == nullptr) return stat;
    char line[512] = {0};
    const size_t got = std::fread(line, 1, sizeof(line) - 1, file);
    std::fclose(file);
    const char* name_end = got > 0 ? std::strrchr(line, ')') : nullptr;
    if (name_end == nullptr) return stat;
    std::sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %u", &stat.state, &stat.flags);
    return stat;
}

}  // namespace

bool is_gone(const PeerProcess& process) {
    pollfd fds[2];
    nfds_t count = 0;
    if (process.pidfd >= 0) fds[count++] = {process.pidfd, POLLIN, 0};
    if (process.socket >= 0) fds[count++] = {process.socket, POLLRDHUP, 0};
    if (count == 0 || poll(fds, count, 0) <= 0) return false;
    for (nfds_t i = 0; i < count; ++i) {
        if ((fds[i].revents & (POLLIN | POLLRDHUP | POLLHUP | POLLERR)) != 0) return true;
    }
    return false;
}

bool is_ending(const PeerProcess& process) {
    constexpr unsigned kExiting = 0x4;  // PF_EXITING, include/linux/sched.h
    return (stat_of(process.pid).flags & kExiting) != 0;
}

bool is_stopped(const PeerProcess& process) {
    const char state = stat_of(process.pid).state;
    return state == 'T' || state == 't';
}

}  // namespace ep
