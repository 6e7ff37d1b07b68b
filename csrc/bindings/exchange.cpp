// torch.ops.moescale_exchange: the exchange through shared memory. Exchanges are known to Python by numbers.
#if defined(__linux__)
#include "../include/cpu/exchange.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tensors.h"

namespace moescale {

namespace {

class Exchanges {
 public:
  int64_t add(std::shared_ptr<SharedExchange> one) {
    const std::lock_guard lock(mutex_);
    open_[++last_] = std::move(one);
    return last_;
  }
  std::shared_ptr<SharedExchange> at(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(number);
    STD_TORCH_CHECK(found != open_.end(), "the exchange is closed");
    return found->second;
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    open_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<SharedExchange>> open_;
  int64_t last_ = 0;
};

Exchanges exchanges;

int64_t open_exchange(std::vector<int64_t> ranks, int64_t place, double timeout) {
  return exchanges.add(std::make_shared<SharedExchange>(std::move(ranks), place, timeout));
}

int64_t file(int64_t number) { return exchanges.at(number)->file(); }

void attach(int64_t number, int64_t place, int64_t pid, int64_t file) { exchanges.at(number)->attach(place, pid, file); }

void close_file(int64_t number) { exchanges.at(number)->close_file(); }

// Rows that were received keep their memory.
void close_exchange(int64_t number) { exchanges.remove(number); }

int64_t total(const std::vector<int64_t>& counts) {
  int64_t sum = 0;
  for (const int64_t count : counts) sum += count;
  return sum;
}

std::vector<int64_t> times(std::vector<int64_t> counts, int64_t factor) {
  for (int64_t& count : counts) count *= factor;
  return counts;
}

// The memory of `block` as rows like those of `like`; given back when the last tensor over it goes.
Tensor block_as_rows(const std::shared_ptr<SharedExchange>& exchange, size_t block, int64_t rows, const Tensor& like) {
  std::vector<int64_t> sizes{rows}, strides(like.dim(), 1);
  for (int64_t dim = 1; dim < like.dim(); ++dim) sizes.push_back(like.size(dim));
  for (int64_t dim = like.dim() - 1; dim > 0; --dim) strides[dim - 1] = strides[dim] * sizes[dim];
  return torch::stable::from_blob(exchange->at(block), sizes, strides, like.device(), like.scalar_type(),
                                  [exchange, block](void*) { exchange->release(block); });
}

// Where each peer's rows begin.
std::vector<int64_t> starts(const std::vector<int64_t>& sent) {
  std::vector<int64_t> first(sent.size(), 0);
  for (size_t p = 1; p < sent.size(); ++p) first[p] = first[p - 1] + sent[p - 1];
  return first;
}

SharedExchange::Fill copy_of(const Tensor& rows, int64_t row_bytes, const std::vector<int64_t>& sent) {
  const char* source = static_cast<const char*>(rows.data_ptr());
  return [=, first = starts(sent)](int64_t p, char* target) {
    for_each_range(sent[p], row_bytes, [&](int64_t begin, int64_t end) {
      std::memcpy(target + begin * row_bytes, source + (first[p] + begin) * row_bytes, (end - begin) * row_bytes);
    });
  };
}

SharedExchange::Fill gather_of(const Tensor& rows, const Tensor& visit_R, int64_t active, const std::vector<int64_t>& sent) {
  const int64_t* visits = elements<int64_t>(visit_R, "visit_R");
  const int64_t width = rows.size(1);
  return with_row_type(rows, "rows", [&](auto type) -> SharedExchange::Fill {
    using T = decltype(type);
    return [=, source = elements<T>(rows, "rows"), first = starts(sent)](int64_t p, char* target) {
      for_each_range(sent[p], width, [&](int64_t begin, int64_t end) {
        row_kernels<T>().gather(source, visits + first[p], active, width, reinterpret_cast<T*>(target), begin, end);
      });
    };
  });
}

// Sends `sent[p]` consecutive rows to peer p. With `visit_R`, row r is row visit_R[r] / active of `rows`, or zeros at -1.
Tensor send(const Tensor& rows, const MaybeTensor& visit_R, int64_t active, std::vector<int64_t> sent,
            std::vector<int64_t> received, int64_t number) {
  const auto exchange = exchanges.at(number);
  STD_TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  STD_TORCH_CHECK(total(sent) == (visit_R.has_value() ? visit_R->size(0) : rows.size(0)),
                  "the counts sent do not add up to the rows");
  int64_t row_bytes = static_cast<int64_t>(rows.element_size());
  for (int64_t dim = 1; dim < rows.dim(); ++dim) row_bytes *= rows.size(dim);
  const auto fill = visit_R.has_value() ? gather_of(rows, *visit_R, active, sent) : copy_of(rows, row_bytes, sent);
  const size_t block = exchange->exchange(times(sent, row_bytes), times(received, row_bytes), fill);
  return block_as_rows(exchange, block, total(received), rows);
}

}  // namespace
}  // namespace moescale

STABLE_TORCH_LIBRARY(moescale_exchange, library) {
  library.def("open(int[] ranks, int place, float timeout) -> int");
  library.def("file(int exchange) -> int");
  library.def("attach(int exchange, int place, int pid, int file) -> ()");
  library.def("close_file(int exchange) -> ()");
  library.def("close(int exchange) -> ()");
  library.def("send(Tensor rows, Tensor? visit_R, int active, int[] sent, int[] received, int exchange) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(moescale_exchange, CompositeExplicitAutograd, library) {
  library.impl("open", TORCH_BOX(&moescale::open_exchange));
  library.impl("file", TORCH_BOX(&moescale::file));
  library.impl("attach", TORCH_BOX(&moescale::attach));
  library.impl("close_file", TORCH_BOX(&moescale::close_file));
  library.impl("close", TORCH_BOX(&moescale::close_exchange));
}

STABLE_TORCH_LIBRARY_IMPL(moescale_exchange, CPU, library) { library.impl("send", TORCH_BOX(&moescale::send)); }
#endif
