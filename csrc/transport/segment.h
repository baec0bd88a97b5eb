// Shared memory of one rank: a sealed memfd, mapped between guard pages. Nothing has a name, so
// nothing stays behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ep {

// Thrown when the system refuses memory or a descriptor; Python makes E405 or E407 of it.
struct SystemError {
    std::string call;
    int error;
};

class Segment {
public:
    // Creates zeroed memory of `bytes` (rounded up to pages) that nobody can resize or open by
    // name.
    static std::shared_ptr<Segment> create(const char* label, int64_t bytes);
    // Maps a peer's memory. Refuses a descriptor that is not sealed or is smaller than `bytes`.
    // Keeps no descriptor.
    static std::shared_ptr<Segment> map(int fd, int64_t bytes);

    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    int fd() const { return fd_; }    // -1 for a mapped one
    void close_fd();                  // after every peer has mapped it
    int64_t committed_bytes() const;  // memory actually used, by whoever touched it first
    void discard(int64_t offset,
                 int64_t bytes);  // gives whole pages back to the system; they read as zero

private:
    Segment(int fd, int64_t bytes);

    std::byte* reserved_ = nullptr;  // guard page, data, guard page
    std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
    int fd_ = -1;
};

}  // namespace ep
