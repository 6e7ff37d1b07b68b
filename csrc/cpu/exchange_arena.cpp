#if defined(__linux__)
#include "../include/cpu/exchange_arena.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <stdexcept>
#include <string>
#include <system_error>

namespace moescale {

namespace {

constexpr size_t kAlignment = 64;            // a cache line
constexpr size_t kAddresses = size_t{1} << 46;  // half of what a process can map on x86-64

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// As long as the machine's memory, since one rank may receive nearly everything; less where a process could not map so
// many arenas.
size_t arena_bytes(int64_t sharers) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page;
  return std::min(memory, round_up(kAddresses / static_cast<size_t>(sharers), page));
}

int anonymous_file(size_t bytes) {
  const int file = memfd_create("moescale exchange", MFD_CLOEXEC);
  if (file < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
  if (ftruncate(file, static_cast<off_t>(bytes)) < 0) {
    const int error = errno;
    ::close(file);
    throw std::system_error(error, std::generic_category(), "ftruncate");
  }
  return file;
}

}  // namespace

Mapping::Mapping(int file, size_t bytes) : bytes_(bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (found == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  start_ = static_cast<char*>(found);
}

Mapping::~Mapping() { munmap(start_, bytes_); }

size_t Mapping::bytes_of(int file) {
  struct stat about;
  if (fstat(file, &about) < 0) throw std::system_error(errno, std::generic_category(), "fstat");
  return static_cast<size_t>(about.st_size);
}

void File::close() {
  if (number_ >= 0) ::close(number_);
  number_ = -1;
}

Arena::Arena(size_t header, int64_t sharers)
    : file_(anonymous_file(arena_bytes(sharers))), bytes_(Mapping::bytes_of(file_.number())), mapping_(file_.number(), bytes_) {
  const size_t first = round_up(header, kAlignment);
  free_[first] = bytes_ - first;
}

size_t Arena::allocate(size_t bytes) {
  const std::lock_guard lock(mutex_);
  const size_t wanted = round_up(std::max<size_t>(bytes, 1), kAlignment);
  const auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& block) { return block.second >= wanted; });
  if (found == free_.end()) {
    throw std::runtime_error("the shared-memory exchange has no room for " + std::to_string(bytes) + " more bytes: its " +
                             std::to_string(bytes_) + " are in use by rows that were received");
  }
  const auto [offset, room] = *found;
  free_.erase(found);
  if (room > wanted) free_[offset + wanted] = room - wanted;
  used_[offset] = wanted;
  return offset;
}

void Arena::release(size_t offset) {
  const std::lock_guard lock(mutex_);
  const auto block = free_.insert(used_.extract(offset)).position;
  if (const auto after = std::next(block); after != free_.end() && block->first + block->second == after->first) {
    block->second += after->second;
    free_.erase(after);
  }
  if (block == free_.begin()) return;
  if (const auto before = std::prev(block); before->first + before->second == block->first) {
    before->second += block->second;
    free_.erase(block);
  }
}

}  // namespace moescale
#endif
