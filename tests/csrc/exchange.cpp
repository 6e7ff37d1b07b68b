// All ranks of an exchange in one process: `exchange FOLDER ranks=N row_bytes=N seed=0`. The array `sizes` holds, for
// each rank, how many sends, receives, rows leaving and rows arriving it has; `sends`, `receives` and `leaving` are
// those of all ranks, one behind the other. Mailboxes stand in for NCCL: between two ranks the i-th message sent is the
// i-th received, a group ends when all its messages were, and sizes must agree.
#include "exchange.h"

#include <deque>
#include <map>
#include <utility>

#include "arguments.h"

namespace moescale::cuda {
namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

using Mail = std::map<std::pair<int64_t, int64_t>, std::deque<std::vector<char>>>;

/// Posts what a rank sends; what it is to receive is noted, and delivered when everybody has posted.
class Mailboxes {
 public:
  Mailboxes(Mail& mail, int64_t rank) : mail_(mail), rank_(rank) {}

  void begin() { open_ = true; }
  void send(const char* data, int64_t bytes, int64_t peer) {
    if (!open_ || bytes <= 0 || peer == rank_) fail("a send outside a group, without bytes, or to oneself");
    mail_[{rank_, peer}].emplace_back(data, data + bytes);
  }
  void receive(char* data, int64_t bytes, int64_t peer) {
    if (!open_ || bytes <= 0 || peer == rank_) fail("a receive outside a group, without bytes, or from oneself");
    expected_.push_back({peer, data, bytes});
  }
  void end() { open_ = false; }
  void copy(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }

  void deliver() {
    for (const Expected& one : expected_) {
      auto& box = mail_[{one.peer, rank_}];
      if (box.empty()) fail("a receive without its send");
      if (static_cast<int64_t>(box.front().size()) != one.bytes) fail("a send and its receive differ in size");
      std::memcpy(one.data, box.front().data(), one.bytes);
      box.pop_front();
    }
  }

 private:
  struct Expected {
    int64_t peer;
    char* data;
    int64_t bytes;
  };
  Mail& mail_;
  int64_t rank_;
  bool open_ = false;
  std::vector<Expected> expected_;
};

/// A rank's side of the exchange, cut out of the arrays of all ranks.
struct Side {
  Segments sends, receives;
  const char* leaving;
  char* arriving;
};

std::vector<Side> sides(Arguments& a, int64_t ranks, int64_t row_bytes) {
  const int64_t* sizes = a.input<int64_t>("sizes");
  const Segment* sends = a.input<Segment>("sends");
  const Segment* receives = a.input<Segment>("receives");
  const char* leaving = a.input<char>("leaving");
  int64_t made = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) made += sizes[4 * rank + 3];
  char* arriving = a.output<char>("arriving", made * row_bytes);
  std::vector<Side> all;
  for (int64_t rank = 0; rank < ranks; ++rank, sizes += 4) {
    all.push_back({{sends, sizes[0], sizes[2]}, {receives, sizes[1], sizes[3]}, leaving, arriving});
    sends += sizes[0];
    receives += sizes[1];
    leaving += sizes[2] * row_bytes;
    arriving += sizes[3] * row_bytes;
  }
  return all;
}

void run(Arguments& a) {
  const int64_t ranks = a.integer("ranks");
  const int64_t row_bytes = a.integer("row_bytes");
  const std::vector<Side> all = sides(a, ranks, row_bytes);
  Mail mail;
  std::vector<Mailboxes> transports;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const Side& side = all[rank];
    for (const char* fault : {fault_in(side.sends, ranks), fault_in(side.receives, ranks),
                              fault_in_own(side.sends, side.receives, rank)}) {
      if (fault != nullptr) fail(fault);
    }
    exchange(side.sends, side.receives, side.leaving, side.arriving, row_bytes, rank,
             transports.emplace_back(mail, rank));
  }
  for (Mailboxes& transport : transports) transport.deliver();
  for (const auto& [pair, box] : mail) {
    if (!box.empty()) fail("a send without its receive");
  }
}

}  // namespace
}  // namespace moescale::cuda

int main(int count, char** values) {
  Arguments arguments(count, values);
  moescale::cuda::run(arguments);
  return 0;
}
