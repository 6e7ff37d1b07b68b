// All-to-all between processes of one host: every rank writes what it sends straight into its peers' memory (Linux).
//
// An exchange has two messages in each direction, both a number in shared memory: the receiver offers each sender a
// place in its arena, the sender fills it and says so. A rank that has to wait looks at the number for some
// microseconds, then sleeps (futex) until it changes, its peer ends, or the time is up.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "exchange_arena.h"

namespace moescale {

class SharedExchange {
 public:
  // Writes what goes to peer `place` of the group to `target`, in that peer's arena.
  using Fill = std::function<void(int64_t place, char* target)>;

  // `ranks`: the group's members by their numbers in the world, for messages; `place`: which of them this process is.
  SharedExchange(std::vector<int64_t> ranks, int64_t place, double timeout);

  // How peers find this process's arena, until `close_file`.
  int file() { return arena_.file().number(); }
  void close_file() { arena_.file().close(); }

  // Maps the arena of peer `place`: process `pid`, where it is file number `file`.
  void attach(int64_t place, int64_t pid, int64_t file);

  // A collective of the group. `sent` and `received` are bytes by peer. Returns a block of this rank's arena that
  // holds what came, by peer. Throws std::runtime_error on a peer that ends, says nothing for `timeout` seconds, or has
  // other sizes in mind; the exchange is of no use afterwards.
  size_t exchange(const std::vector<int64_t>& sent, const std::vector<int64_t>& received, const Fill& fill);

  char* at(size_t block) const { return arena_.start() + block; }
  void release(size_t block) { arena_.release(block); }

 private:
  // Where one sender and one receiver meet; in the receiver's arena. Each cache line has one writer.
  struct alignas(64) Slot {
    std::atomic<uint32_t> offered;  // the round that the next two are for
    uint64_t offset;
    int64_t expected;                          // bytes
    alignas(64) std::atomic<uint32_t> filled;  // the round that was delivered
    int64_t bytes;                             // that the sender had
  };
  static_assert(std::atomic<uint32_t>::is_always_lock_free);

  struct Peer {
    std::unique_ptr<Mapping> memory;  // null for this process itself
    std::unique_ptr<File> process;
  };

  char* memory_of(int64_t place) const;
  Slot& slot(int64_t receiver, int64_t sender) const;
  size_t offer(const std::vector<int64_t>& received);
  void deliver(const std::vector<int64_t>& sent, const Fill& fill);
  void collect(const std::vector<int64_t>& received);
  void check(int64_t sender, int64_t bytes, int64_t receiver, int64_t expected) const;
  bool arrived(const std::atomic<uint32_t>& word) const { return word.load(std::memory_order_acquire) == round_; }
  bool spin(const std::atomic<uint32_t>& word) const;
  void wait(std::atomic<uint32_t>& word, int64_t place) const;

  const std::vector<int64_t> ranks_;
  const int64_t place_;
  const double timeout_;
  const bool spins_;  // with more ranks than cores, a rank that spins keeps the one that it waits for from running
  Arena arena_;
  std::vector<Peer> peers_;
  uint32_t round_ = 0;
  std::string failure_;
};

}  // namespace moescale
