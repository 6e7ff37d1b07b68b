#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "sanitizers.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned char kPoison = 0xcb;  // as a float -2.7e7, as an int -8.8e8: neither passes for a result
constexpr int kFault = 70;               // exit status after an error in a kernel

enum class State { kReady, kAtBarrier, kInCollective, kLeft };

struct Fiber {
  int index = 0;
  State state = State::kReady;
  Where where;
  // In a collective:
  Collective collective{};
  unsigned mask = 0;
  uint64_t value = 0;
  uint64_t values[kWarp] = {};
  // Its thread of control:
  ucontext_t start{};
  bool started = false;
  void* resume_at[5] = {};
  SanitizedStack stack;
  SanitizedThread thread;
  SanitizedThread thread_of_last_block;
};

/// Two orders in turn: threads may arrive at the next barrier before all have left this one.
struct BarrierOrder {
  Order order[2];
  int generation = 0;
  Order& current() { return order[generation % 2]; }
};

struct Emulator {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  Fiber* running = nullptr;
  void* resume_at[5] = {};  // of the scheduler
  SanitizedStack stack;
  SanitizedThread thread;

  uint64_t seed = 0;
  uint64_t random_state = 0;

  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  int threads = 0;
  unsigned char* shared = nullptr;
  std::vector<int> schedule;
  Order begin, end;
  BarrierOrder block_order;
  std::vector<BarrierOrder> warp_order = std::vector<BarrierOrder>(kMostThreads / kWarp);
};

Emulator emulator;

/// SplitMix64 (Steele, Lea and Flood 2014).
uint64_t draw() {
  uint64_t z = emulator.random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

template <typename T>
void shuffle_order(std::vector<T>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
}

const char* name_of(State state) {
  switch (state) {
    case State::kReady: return "running";
    case State::kAtBarrier: return "at __syncthreads";
    case State::kInCollective: return "in a warp function";
    case State::kLeft: return "left";
  }
  return "";
}

/// Reports an error in a kernel, with where its threads are, and ends the program.
[[noreturn]] void fail(const char* what, Where where) {
  std::fprintf(stderr, "simt: %s\n  kernel %s, block %u, thread %u, %s:%u\n", what, emulator.kernel, blockIdx.x,
               threadIdx.x, where.file_name(), static_cast<unsigned>(where.line()));
  for (int first = 0, last = 0; first < emulator.threads; first = last) {
    const Fiber& fiber = emulator.fibers[first];
    const auto alike = [&](const Fiber& other) {
      return other.state == fiber.state && other.where.line() == fiber.where.line();
    };
    for (last = first; last < emulator.threads && alike(emulator.fibers[last]);) ++last;
    std::fprintf(stderr, "  threads %d to %d: %s, line %u\n", first, last - 1, name_of(fiber.state),
                 static_cast<unsigned>(fiber.where.line()));
  }
  std::fflush(stderr);
  std::_Exit(kFault);
}

// ---- Fibers ----
// __builtin_setjmp and __builtin_longjmp switch stacks in a few instructions; swapcontext would make a system call.

/// On its own, and opaque: a function that both sets and jumps would lose the code behind its setjmp.
[[gnu::noipa]] void jump_to(void** point) { __builtin_longjmp(point, 1); }

/// Gives way to the scheduler until it resumes this fiber. Not inlined: the registers it saves are its caller's.
[[gnu::noinline]] void give_way(Fiber& fiber) {
  fiber.stack.leave_for(emulator.stack);
  emulator.thread.switch_to();
  if (__builtin_setjmp(fiber.resume_at) == 0) jump_to(emulator.resume_at);
  emulator.running->stack.arrive_from(emulator.stack);
}

/// Runs a fiber until it gives way.
[[gnu::noinline]] void resume(Fiber& fiber) {
  emulator.running = &fiber;
  threadIdx.x = fiber.index;
  emulator.stack.leave_for(fiber.stack);
  fiber.thread.switch_to();
  if (__builtin_setjmp(emulator.resume_at) == 0) {
    if (fiber.started) jump_to(fiber.resume_at);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  emulator.stack.arrive_from(emulator.running->stack);
}

/// A fiber's life: a thread of one block after another.
void live() {
  Fiber& self = *emulator.running;
  self.stack.arrive_from(emulator.stack);
  for (;;) {
    emulator.begin.acquire();
    (*emulator.body)();
    emulator.end.release();
    self.state = State::kLeft;
    give_way(self);
  }
}

void make_fiber(Fiber& fiber, int index) {
  void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a fiber", Where::current());
  fiber.index = index;
  fiber.stack.set_bounds(stack, kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, live, 0);
}

// ---- Waiting for each other ----

/// Lets the block pass its barrier once all threads wait there.
bool release_barrier() {
  int waiting = 0;
  const Fiber* first = nullptr;
  const Fiber* left = nullptr;
  for (int i = 0; i < emulator.threads; ++i) {
    const Fiber& fiber = emulator.fibers[i];
    if (fiber.state == State::kLeft) left = &fiber;
    if (fiber.state != State::kAtBarrier) continue;
    ++waiting;
    if (first == nullptr) first = &fiber;
    if (fiber.where.line() != first->where.line()) {
      fail("threads of a block wait at different __syncthreads", fiber.where);
    }
  }
  if (first == nullptr) return false;
  if (left != nullptr) fail("__syncthreads after threads of the block have left", first->where);
  if (waiting < emulator.threads) return false;
  for (int i = 0; i < emulator.threads; ++i) emulator.fibers[i].state = State::kReady;
  ++emulator.block_order.generation;
  return true;
}

/// Whether every lane that `fiber` waits for has come; an error if one never can.
bool complete(const Fiber& fiber) {
  const int first = fiber.index / kWarp * kWarp;
  for (int i = 0; i < kWarp; ++i) {
    if (!(fiber.mask >> i & 1)) continue;
    if (first + i >= emulator.threads) fail("the mask names a lane that the block does not have", fiber.where);
    const Fiber& other = emulator.fibers[first + i];
    if (other.state == State::kLeft) fail("the mask names a lane that has left", fiber.where);
    if (other.state != State::kInCollective) return false;
    if (other.mask != fiber.mask) fail("lanes that wait for each other have different masks", fiber.where);
    if (other.collective != fiber.collective || other.where.line() != fiber.where.line()) {
      fail("lanes that wait for each other are in different warp functions", fiber.where);
    }
  }
  return true;
}

void release_lanes(const Fiber& leader) {
  Fiber* const warp = &emulator.fibers[leader.index / kWarp * kWarp];
  const unsigned mask = leader.mask;
  uint64_t values[kWarp] = {};
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) values[i] = warp[i].value;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    // One by one: ThreadSanitizer would see a call of memcpy as this thread's access.
    for (int j = 0; j < kWarp; ++j) warp[i].values[j] = values[j];
    warp[i].state = State::kReady;
  }
  ++emulator.warp_order[leader.index / kWarp].generation;
}

bool release_warps() {
  bool released = false;
  for (int i = 0; i < emulator.threads; ++i) {
    const Fiber& fiber = emulator.fibers[i];
    if (fiber.state != State::kInCollective || !complete(fiber)) continue;
    release_lanes(fiber);
    released = true;
  }
  return released;
}

// ---- Scheduling ----

/// Runs ready threads in an order of the seed's; with a seed, one in four is held back for a turn.
bool run_ready() {
  bool any = false;
  if (emulator.seed != 0) shuffle_order(emulator.schedule);
  for (const int i : emulator.schedule) {
    Fiber& fiber = emulator.fibers[i];
    if (fiber.state != State::kReady) continue;
    any = true;
    if (emulator.seed == 0 || draw() % 4 != 0) resume(fiber);
  }
  return any;
}

bool all_left() {
  const auto first = emulator.fibers.begin();
  return std::all_of(first, first + emulator.threads, [](const Fiber& fiber) { return fiber.state == State::kLeft; });
}

/// Threads of different blocks are different threads to ThreadSanitizer too. It numbers threads and gives the number of
/// one that is gone to the next, so the last block's go only when this block's have theirs.
void renew_threads() {
  for (int i = 0; i < emulator.threads; ++i) {
    Fiber& fiber = emulator.fibers[i];
    fiber.thread_of_last_block = fiber.thread;
    fiber.thread.create();
  }
  for (int i = 0; i < emulator.threads; ++i) emulator.fibers[i].thread_of_last_block.destroy();
}

void run_block(unsigned block) {
  blockIdx = {block, 0, 0};
  emulator.begin.release();
  renew_threads();
  for (int i = 0; i < emulator.threads; ++i) {
    emulator.fibers[i].state = State::kReady;
    emulator.fibers[i].where = Where();
  }
  while (!all_left()) {
    const bool ran = run_ready();
    const bool released = release_warps();
    if (!release_barrier() && !ran && !released) {
      fail("threads wait for others that never come", emulator.fibers[0].where);
    }
  }
}

}  // namespace

void set_seed(uint64_t seed) { emulator.seed = seed; }

void launch(const char* kernel, int64_t grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  emulator.kernel = kernel;
  if (grid < 1 || grid > std::numeric_limits<int>::max() || threads < 1 || threads > kMostThreads) {
    fail("a launch needs 1 to 2^31 - 1 blocks of 1 to 1024 threads", Where::current());
  }
  emulator.random_state = emulator.seed;
  emulator.body = &body;
  emulator.thread.be_current();
  gridDim = {static_cast<unsigned>(grid), 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (int i = emulator.threads; i < threads; ++i) {
    if (!emulator.fibers[i].started) make_fiber(emulator.fibers[i], i);
  }
  emulator.threads = threads;
  emulator.schedule.resize(threads);
  std::iota(emulator.schedule.begin(), emulator.schedule.end(), 0);

  std::vector<unsigned> blocks(grid);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (emulator.seed != 0) shuffle_order(blocks);
  // Memory of its own for each block: ThreadSanitizer would take two blocks' use of one address for a race.
  std::vector<std::unique_ptr<unsigned char[]>> shared_of_block;
  for (const unsigned block : blocks) {
    shared_of_block.emplace_back(new unsigned char[shared_bytes]);
    emulator.shared = shared_of_block.back().get();
    std::fill_n(emulator.shared, shared_bytes, kPoison);
    run_block(block);
  }
  emulator.end.acquire();
}

unsigned char* shared_memory() { return emulator.shared; }

int lane() { return emulator.running->index % kWarp; }

void barrier(Where where) {
  Fiber& self = *emulator.running;
  Order& order = emulator.block_order.current();
  order.release();
  self.state = State::kAtBarrier;
  self.where = where;
  give_way(self);
  order.acquire();
}

const uint64_t* exchange(Collective collective, unsigned mask, uint64_t value, Where where) {
  Fiber& self = *emulator.running;
  if (!(mask >> lane() & 1)) fail("the mask of a warp function lacks its caller", where);
  // Only __syncwarp orders memory; the other warp functions exchange registers.
  Order& order = emulator.warp_order[self.index / kWarp].current();
  const bool orders = collective == Collective::kSyncwarp;
  if (orders) order.release();
  self.state = State::kInCollective;
  self.where = where;
  self.collective = collective;
  self.mask = mask;
  self.value = value;
  give_way(self);
  if (orders) order.acquire();
  return self.values;
}

uint64_t read_lane(const uint64_t* values, unsigned mask, int source, Where where) {
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask", where);
  return values[source];
}

}  // namespace simt
