// Stores that pass the caches by.
//
// An ordinary store first reads the cache line that it is going to overwrite; where a result is larger than the cache,
// that is a third of the traffic of a copy. Streaming stores write whole lines to memory without reading them. They
// are also not ordered with other stores, hence the fence: whoever learns in the ordinary way that the result is
// there, on another thread or in another process, must find it there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace moescale::MOESCALE_ISA {

constexpr int64_t kLine = 64;  // bytes
constexpr int64_t kWorthStreaming = 2 << 20;  // bytes of a result: more than a core's own cache holds of anything else

#if defined(__x86_64__)
inline void stream_line(void* to, const void* from) {
  auto* target = static_cast<__m128i*>(to);
  const auto* source = static_cast<const __m128i*>(from);
  const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
  const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
  _mm_stream_si128(target, a);
  _mm_stream_si128(target + 1, b);
  _mm_stream_si128(target + 2, c);
  _mm_stream_si128(target + 3, d);
}
inline void fence() { _mm_sfence(); }
#else
inline void stream_line(void* to, const void* from) { std::memcpy(to, from, kLine); }
inline void fence() {}
#endif

// Whether rows of `row_bytes` that begin at `to` are whole lines, and `bytes` of them too many to keep.
inline bool streams(const void* to, int64_t row_bytes, int64_t bytes) {
  return bytes >= kWorthStreaming && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

// Copies `bytes`; as whole lines past the caches where kStream.
template <bool kStream>
inline void copy(void* to, const void* from, int64_t bytes) {
  if (!kStream) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (int64_t line = 0; line < bytes; line += kLine) {
    stream_line(static_cast<char*>(to) + line, static_cast<const char*>(from) + line);
  }
}

}  // namespace moescale::MOESCALE_ISA
