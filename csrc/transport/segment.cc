#include "transport/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace ep {
namespace {

constexpr int64_t kGuardBytes = 4096;

int64_t round_to_pages(int64_t bytes) {
    return (bytes + kGuardBytes - 1) / kGuardBytes * kGuardBytes;
}

[[noreturn]] void fail(const char* call) { throw SystemError{call, errno}; }

}  // namespace

Segment::Segment(int fd, int64_t bytes) : bytes_(round_to_pages(bytes)) {
    void* reserved = mmap(nullptr, bytes_ + 2 * kGuardBytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) fail("mmap");
    reserved_ = static_cast<std::byte*>(reserved);
    void* data = mmap(reserved_ + kGuardBytes, bytes_, PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
    if (data == MAP_FAILED) {
        const int error = errno;
        munmap(reserved_, bytes_ + 2 * kGuardBytes);
        throw SystemError{"mmap", error};
    }
    data_ = static_cast<std::byte*>(data);
    madvise(data_, bytes_, MADV_DONTDUMP);  // best effort: keeps core files small
}

Segment::~Segment() {
    munmap(reserved_, bytes_ + 2 * kGuardBytes);
    close_fd();
}

void Segment::close_fd() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
}

std::shared_ptr<Segment> Segment::create(const char* label, int64_t bytes) {
    const int fd = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) fail("memfd_create");
    try {
        if (ftruncate(fd, round_to_pages(bytes)) != 0) fail("ftruncate");
        if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("fcntl");
        std::shared_ptr<Segment> segment(new Segment(fd, bytes));
        segment->fd_ = fd;
        return segment;
    } catch (...) {
        close(fd);
        throw;
    }
}

std::shared_ptr<Segment> Segment::map(int fd, int64_t bytes) {
    constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0) fail("fcntl");
    struct stat info;
    if (fstat(fd, &info) != 0) fail("fstat");
    if ((seals & kSeals) != kSeals || bytes <= 0 || bytes > info.st_size) {
        throw SystemError{"unsealed or short memory of a peer", EPERM};
    }
    return std::shared_ptr<Segment>(new Segment(fd, bytes));
}

int64_t Segment::committed_bytes() const {
    struct stat info;
    if (fd_ < 0 || fstat(fd_, &info) != 0) return 0;
    return int64_t{info.st_blocks} * 512;
}

void Segment::discard(int64_t offset, int64_t bytes) {
    const int64_t first = round_to_pages(offset);
    const int64_t last = (offset + bytes) / kGuardBytes * kGuardBytes;
    if (fd_ >= 0 && last > first) {
        fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first, last - first);
    }
}

}  // namespace ep
