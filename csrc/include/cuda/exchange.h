// The arithmetic of an exchange: which bytes go to whom, and where those of others come to lie. No torch, no CUDA, no
// NCCL: a transport moves the bytes, NCCL's in csrc/cuda/exchange_nccl.cpp, mailboxes in tests/csrc/exchange.cpp.
#pragma once

#include <cstdint>

namespace moescale::cuda {

/// `rows` consecutive rows of a buffer from row `first`, which go to or come from `peer`; see parallel/exchange/plan.py.
struct Segment {
  int64_t peer;
  int64_t first;
  int64_t rows;
};

/// Segments of a buffer of `rows` rows.
struct Segments {
  const Segment* begin;
  int64_t count;
  int64_t rows;
};

/// The next segment, from number `next` on, that is the rank's own and holds rows; `segments.count` where there is none.
inline int64_t next_own(const Segments& segments, int64_t next, int64_t rank) {
  while (next < segments.count && (segments.begin[next].peer != rank || segments.begin[next].rows == 0)) ++next;
  return next;
}

/// What is wrong with one side of an exchange between `ranks` ranks, or null.
inline const char* fault_in(const Segments& segments, int64_t ranks) {
  int64_t rows = 0;
  for (int64_t i = 0; i < segments.count; ++i) {
    const Segment& segment = segments.begin[i];
    if (segment.peer < 0 || segment.peer >= ranks) return "a segment's peer is not in the group";
    if (segment.rows < 0 || segment.first < 0 || segment.rows > segments.rows - segment.first) {
      return "a segment lies outside the rows";
    }
    rows += segment.rows;
  }
  return rows == segments.rows ? nullptr : "the segments do not add up to the rows";
}

/// What is wrong with the rows that `rank` sends to itself, or null: both sides must name them alike.
inline const char* fault_in_own(const Segments& sends, const Segments& receives, int64_t rank) {
  int64_t from = next_own(sends, 0, rank);
  int64_t to = next_own(receives, 0, rank);
  while (from < sends.count && to < receives.count) {
    if (sends.begin[from].rows != receives.begin[to].rows) return "a rank's own rows differ in number";
    from = next_own(sends, from + 1, rank);
    to = next_own(receives, to + 1, rank);
  }
  return from == sends.count && to == receives.count ? nullptr : "a rank's own rows differ in number";
}

/// Sends and receives all segments in one group, and copies the rank's own rows. Segments without rows are left out on
/// both sides, so between two ranks the i-th send meets the i-th receive.
template <typename Transport>
void exchange(const Segments& sends, const Segments& receives, const char* leaving, char* arriving, int64_t row_bytes,
              int64_t rank, Transport& transport) {
  transport.begin();
  for (int64_t i = 0; i < sends.count; ++i) {
    const Segment& segment = sends.begin[i];
    if (segment.rows == 0 || segment.peer == rank) continue;
    transport.send(leaving + segment.first * row_bytes, segment.rows * row_bytes, segment.peer);
  }
  for (int64_t i = 0; i < receives.count; ++i) {
    const Segment& segment = receives.begin[i];
    if (segment.rows == 0 || segment.peer == rank) continue;
    transport.receive(arriving + segment.first * row_bytes, segment.rows * row_bytes, segment.peer);
  }
  transport.end();

  int64_t to = next_own(receives, 0, rank);
  for (int64_t from = next_own(sends, 0, rank); from < sends.count; from = next_own(sends, from + 1, rank)) {
    transport.copy(arriving + receives.begin[to].first * row_bytes, leaving + sends.begin[from].first * row_bytes,
                   sends.begin[from].rows * row_bytes);
    to = next_own(receives, to + 1, rank);
  }
}

}  // namespace moescale::cuda
