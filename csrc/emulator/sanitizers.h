// Tells AddressSanitizer and ThreadSanitizer about fibers. The runtime itself is compiled without either, so that its
// own bookkeeping is not taken for accesses of the kernels; SIMT_ASAN and SIMT_TSAN say what the program is built with.
#pragma once

#include <cstddef>

#ifdef SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {

/// A stack that AddressSanitizer knows: of a fiber, or of the scheduler.
class SanitizedStack {
 public:
  void set_bounds(const void* bottom, size_t size) {
    bottom_ = bottom;
    size_ = size;
  }
  /// Before control leaves this stack for `next`.
  void leave_for([[maybe_unused]] const SanitizedStack& next) {
#ifdef SIMT_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
  }
  /// First thing after control arrived on this stack; learns the bounds of `previous` if they are unknown.
  void arrive_from([[maybe_unused]] SanitizedStack& previous) {
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &previous.bottom_, &previous.size_);
#endif
  }

 private:
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

/// A thread of control in ThreadSanitizer's eyes. Switching orders nothing; acquire and release do.
class SanitizedThread {
 public:
  void be_current() {
#ifdef SIMT_TSAN
    handle_ = __tsan_get_current_fiber();
#endif
  }
  void create() {
#ifdef SIMT_TSAN
    handle_ = __tsan_create_fiber(0);
#endif
  }
  /// Ends what create() began; nothing before the first create().
  void destroy() {
#ifdef SIMT_TSAN
    if (handle_ != nullptr) __tsan_destroy_fiber(handle_);
#endif
  }
  void switch_to() const {
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(handle_, __tsan_switch_to_fiber_no_sync);
#endif
  }

 private:
  [[maybe_unused]] void* handle_ = nullptr;
};

/// Orders what happened before release() before what happens after acquire().
class Order {
 public:
  void release() {
#ifdef SIMT_TSAN
    __tsan_release(&address_);
#endif
  }
  void acquire() {
#ifdef SIMT_TSAN
    __tsan_acquire(&address_);
#endif
  }

 private:
  [[maybe_unused]] char address_ = 0;
};

}  // namespace simt
