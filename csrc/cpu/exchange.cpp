#if defined(__linux__)
#include "../include/cpu/exchange.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <ctime>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace moescale {

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(50);  // about what falling asleep and being woken costs
constexpr long kSleep = 100'000'000;                   // nanoseconds between two looks at whether the peer lives

int cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

uint32_t* futex_word(std::atomic<uint32_t>& word) { return reinterpret_cast<uint32_t*>(&word); }

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  const timespec patience{0, kSleep};
  syscall(SYS_futex, futex_word(word), FUTEX_WAIT, value, &patience, nullptr, 0);
}

void publish(std::atomic<uint32_t>& word, uint32_t value) {
  word.store(value, std::memory_order_release);
  syscall(SYS_futex, futex_word(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// A process descriptor becomes readable when its process ends.
bool ended(const File& process) {
  pollfd asked{process.number(), POLLIN, 0};
  return poll(&asked, 1, 0) > 0;
}

int open_or_throw(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) throw std::system_error(errno, std::generic_category(), "open " + path);
  return file;
}

int process_descriptor(int64_t pid) {
  const int file = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
  if (file < 0) throw std::system_error(errno, std::generic_category(), "pidfd_open " + std::to_string(pid));
  return file;
}

}  // namespace

SharedExchange::SharedExchange(std::vector<int64_t> ranks, int64_t place, double timeout)
    : ranks_(std::move(ranks)),
      place_(place),
      timeout_(timeout),
      spins_(static_cast<int>(ranks_.size()) <= cores()),
      arena_(ranks_.size() * sizeof(Slot), static_cast<int64_t>(ranks_.size())),
      peers_(ranks_.size()) {}

void SharedExchange::attach(int64_t place, int64_t pid, int64_t file) {
  const File opened(open_or_throw("/proc/" + std::to_string(pid) + "/fd/" + std::to_string(file)));
  Peer& peer = peers_.at(static_cast<size_t>(place));
  peer.process = std::make_unique<File>(process_descriptor(pid));
  peer.memory = std::make_unique<Mapping>(opened.number(), Mapping::bytes_of(opened.number()));
}

size_t SharedExchange::exchange(const std::vector<int64_t>& sent, const std::vector<int64_t>& received, const Fill& fill) {
  if (!failure_.empty()) throw std::runtime_error("an earlier exchange failed: " + failure_);
  if (sent.size() != ranks_.size() || received.size() != ranks_.size()) {
    throw std::invalid_argument("an exchange needs as many counts as there are ranks: " + std::to_string(ranks_.size()));
  }
  ++round_;
  try {
    // Not released when anything below throws: a peer may still write into it.
    const size_t block = offer(received);
    deliver(sent, fill);
    collect(received);
    return block;
  } catch (const std::exception& error) {
    failure_ = error.what();
    throw;
  }
}

char* SharedExchange::memory_of(int64_t place) const {
  return place == place_ ? arena_.start() : peers_[place].memory->start();
}

SharedExchange::Slot& SharedExchange::slot(int64_t receiver, int64_t sender) const {
  return reinterpret_cast<Slot*>(memory_of(receiver))[sender];
}

size_t SharedExchange::offer(const std::vector<int64_t>& received) {
  const size_t block = arena_.allocate(std::accumulate(received.begin(), received.end(), size_t{0}));
  size_t offset = block;
  for (size_t sender = 0; sender < ranks_.size(); ++sender) {
    Slot& mine = slot(place_, sender);
    mine.offset = offset;
    mine.expected = received[sender];
    offset += received[sender];
    publish(mine.offered, round_);
  }
  return block;
}

void SharedExchange::deliver(const std::vector<int64_t>& sent, const Fill& fill) {
  // This rank itself first, whoever is ready next: a slow receiver keeps nobody else waiting.
  std::vector<int64_t> left(ranks_.size());
  std::iota(left.begin(), left.end(), 0);
  std::rotate(left.begin(), left.begin() + place_, left.end());
  while (!left.empty()) {
    auto next = std::find_if(left.begin(), left.end(), [&](int64_t to) { return arrived(slot(to, place_).offered); });
    if (next == left.end()) {
      next = left.begin();
      wait(slot(*next, place_).offered, *next);
    }
    const int64_t to = *next;
    left.erase(next);
    Slot& theirs = slot(to, place_);
    const int64_t expected = theirs.expected;  // once it is filled, the slot may be offered anew
    theirs.bytes = sent[to];
    if (sent[to] == expected) fill(to, memory_of(to) + theirs.offset);
    publish(theirs.filled, round_);
    check(place_, sent[to], to, expected);
  }
}

void SharedExchange::collect(const std::vector<int64_t>& received) {
  for (int64_t from = 0; from < static_cast<int64_t>(ranks_.size()); ++from) {
    Slot& mine = slot(place_, from);
    wait(mine.filled, from);
    check(from, mine.bytes, place_, received[from]);
  }
}

void SharedExchange::check(int64_t sender, int64_t bytes, int64_t receiver, int64_t expected) const {
  if (bytes == expected) return;
  std::ostringstream text;
  text << "rank " << ranks_[sender] << " sends " << bytes << " bytes to rank " << ranks_[receiver] << ", which expects "
       << expected << ": they are not in the same exchange, or disagree about its counts";
  throw std::runtime_error(text.str());
}

bool SharedExchange::spin(const std::atomic<uint32_t>& word) const {
  const auto until = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (arrived(word)) return true;
      relax();
    }
  } while (Clock::now() < until);
  return false;
}

void SharedExchange::wait(std::atomic<uint32_t>& word, int64_t place) const {
  if (arrived(word) || (spins_ && spin(word))) return;
  const auto until = Clock::now() + std::chrono::duration<double>(timeout_);
  for (uint32_t seen; (seen = word.load(std::memory_order_acquire)) != round_;) {
    sleep_while(word, seen);
    if (arrived(word)) return;
    std::ostringstream text;
    text << "rank " << ranks_[place];
    if (peers_[place].process && ended(*peers_[place].process)) {
      // It may have finished its part before it ended.
      if (arrived(word)) return;
      throw std::runtime_error(text.str() + " ended in the middle of an exchange through shared memory");
    }
    if (Clock::now() >= until) {
      text << " has not come to an exchange through shared memory for " << timeout_ << " s (see runtime.timeout)";
      throw std::runtime_error(text.str());
    }
  }
}

}  // namespace moescale
#endif
