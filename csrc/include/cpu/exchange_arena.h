// Memory that one process hands out in blocks and other processes of its host write into (Linux).
//
// The memory is an anonymous file (memfd): it has no name, so nothing is left behind however its processes end, and it
// is bounded by the machine's memory, not by the size of /dev/shm. It is as long as the machine's memory from the
// start, but a page costs nothing before it is first written to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace moescale {

// A file as memory of this process.
class Mapping {
 public:
  Mapping(int file, size_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // How long a file is.
  static size_t bytes_of(int file);

  char* start() const { return start_; }

 private:
  char* start_;
  size_t bytes_;
};

// An open file that is closed again.
class File {
 public:
  explicit File(int number) : number_(number) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int number() const { return number_; }
  void close();

 private:
  int number_;
};

class Arena {
 public:
  // `header` bytes at the start are zero and never handed out. `sharers`: arenas that one process maps.
  Arena(size_t header, int64_t sharers);

  File& file() { return file_; }
  char* start() const { return mapping_.start(); }

  // Offset of a block: the lowest that fits, so that pages written to before are used again. Blocks are released in
  // any order, from any thread.
  size_t allocate(size_t bytes);
  void release(size_t offset);

 private:
  File file_;
  size_t bytes_;
  Mapping mapping_;
  std::mutex mutex_;
  std::map<size_t, size_t> free_, used_;  // offset -> bytes
};

}  // namespace moescale
