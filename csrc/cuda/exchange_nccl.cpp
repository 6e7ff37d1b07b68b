// torch.ops.moescale_nccl.exchange: rows sent and received over a communicator of NCCL, on torch's current stream.
// Built where NCCL's header is found (setup.py); parallel/exchange/nccl.py has the streams.
#include <nccl.h>

#include "../include/cuda/exchange.h"
#include "tensors.h"

namespace moescale::cuda {
namespace {

void check_nccl(ncclResult_t result, ncclComm_t communicator) {
  STD_TORCH_CHECK(result != ncclInProgress,
                  "the communicator does not block: unset TORCH_NCCL_USE_COMM_NONBLOCKING for this exchange");
  STD_TORCH_CHECK(result == ncclSuccess, "NCCL: ", ncclGetErrorString(result), ": ", ncclGetLastError(communicator));
}

class NcclTransport {
 public:
  NcclTransport(ncclComm_t communicator, cudaStream_t stream) : communicator_(communicator), stream_(stream) {}

  void begin() { check_nccl(ncclGroupStart(), communicator_); }
  void send(const char* data, int64_t bytes, int64_t peer) {
    note(ncclSend(data, bytes, ncclInt8, static_cast<int>(peer), communicator_, stream_));
  }
  void receive(char* data, int64_t bytes, int64_t peer) {
    note(ncclRecv(data, bytes, ncclInt8, static_cast<int>(peer), communicator_, stream_));
  }
  /// Ends the group whatever happened in it: a group left open would swallow all later calls of this thread.
  void end() {
    note(ncclGroupEnd());
    check_nccl(first_fault_, communicator_);
  }
  void copy(char* to, const char* from, int64_t bytes) {
    const cudaError_t result = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_);
    STD_TORCH_CHECK(result == cudaSuccess, "CUDA: ", cudaGetErrorString(result));
  }

 private:
  void note(ncclResult_t result) {
    if (first_fault_ == ncclSuccess) first_fault_ = result;
  }

  ncclComm_t communicator_;
  cudaStream_t stream_;
  ncclResult_t first_fault_ = ncclSuccess;
};

static_assert(sizeof(Segment) == 3 * sizeof(int64_t));

/// The rows of an int64 [S, 3] tensor on the CPU as segments.
Segments segments_of(const Tensor& segments_S3, const char* name, const Tensor& rows_RD) {
  STD_TORCH_CHECK(segments_S3.is_cpu() && segments_S3.is_contiguous() && segments_S3.dim() == 2 &&
                      segments_S3.size(1) == 3 && segments_S3.scalar_type() == ScalarType::Long,
                  name, " must be a contiguous int64 tensor [S, 3] on the CPU");
  return {static_cast<const Segment*>(segments_S3.const_data_ptr()), segments_S3.size(0), rows_RD.size(0)};
}

int64_t bytes_of_row(const Tensor& rows_RD) {
  int64_t bytes = static_cast<int64_t>(rows_RD.element_size());
  for (int64_t dim = 1; dim < rows_RD.dim(); ++dim) bytes *= rows_RD.size(dim);
  return bytes;
}

void exchange_rows(Tensor rows_RD, Tensor into_RD, Tensor sends_S3, Tensor receives_S3, int64_t communicator) {
  check_tensor(rows_RD, "rows", rows_RD.scalar_type(), rows_RD.dim(), rows_RD);
  check_tensor(into_RD, "into", rows_RD.scalar_type(), rows_RD.dim(), rows_RD);
  const int64_t row_bytes = bytes_of_row(rows_RD);
  STD_TORCH_CHECK(bytes_of_row(into_RD) == row_bytes, "rows and into differ in width");
  const DeviceGuard guard(rows_RD.get_device_index());

  auto* const comm = reinterpret_cast<ncclComm_t>(communicator);
  int ranks = 0, rank = 0;
  check_nccl(ncclCommCount(comm, &ranks), comm);
  check_nccl(ncclCommUserRank(comm, &rank), comm);
  const Segments sends = segments_of(sends_S3, "sends", rows_RD);
  const Segments receives = segments_of(receives_S3, "receives", into_RD);
  for (const char* fault : {fault_in(sends, ranks), fault_in(receives, ranks), fault_in_own(sends, receives, rank)}) {
    STD_TORCH_CHECK(fault == nullptr, fault);
  }
  NcclTransport transport(comm, stream_of(rows_RD));
  exchange(sends, receives, static_cast<const char*>(rows_RD.const_data_ptr()),
           static_cast<char*>(into_RD.mutable_data_ptr()), row_bytes, rank, transport);
}

}  // namespace
}  // namespace moescale::cuda

// Segments are rows of (peer, first, rows).
STABLE_TORCH_LIBRARY(moescale_nccl, library) {
  library.def("exchange(Tensor rows, Tensor(a!) into, Tensor sends, Tensor receives, int communicator) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(moescale_nccl, CUDA, library) {
  library.impl("exchange", TORCH_BOX(&moescale::cuda::exchange_rows));
}
