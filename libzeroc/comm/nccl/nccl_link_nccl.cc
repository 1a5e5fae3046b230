#include <nccl.h>

#include <cstring>
#include <utility>

#include "libzeroc/comm/nccl/nccl_link.h"

namespace zeroc {

static_assert(sizeof(NcclId) == sizeof(ncclUniqueId));

struct NcclLink::Impl {
  ncclComm_t comm = nullptr;
  std::string error;

  // What is in progress is no failure. NCCL's own words stay in its thread: the last ones are the most telling.
  bool IsGood(ncclResult_t result, const char* what) {
    if (result == ncclSuccess || result == ncclInProgress) return true;
    if (error.empty()) {
      const char* more = ncclGetLastError(comm);
      error = std::string(what) + ": " + ncclGetErrorString(result);
      if (more != nullptr && *more != '\0') error += std::string(" (") + more + ")";
    }
    return false;
  }
};

NcclLink::NcclLink(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NcclLink::~NcclLink() { Abort(); }

bool NcclLink::MakeId(NcclId* id, std::string* error) {
  ncclUniqueId made;
  const ncclResult_t result = ncclGetUniqueId(&made);
  if (result != ncclSuccess) {
    *error = std::string("ncclGetUniqueId: ") + ncclGetErrorString(result);
    return false;
  }
  std::memcpy(id->bytes.data(), &made, sizeof(made));
  return true;
}

std::unique_ptr<NcclLink> NcclLink::Open(const NcclId& id, int rank, int size, std::string* error) {
  ncclUniqueId shared;
  std::memcpy(&shared, id.bytes.data(), sizeof(shared));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  auto impl = std::make_unique<Impl>();
  const bool begun = impl->IsGood(ncclCommInitRankConfig(&impl->comm, size, shared, rank, &config), "ncclCommInitRank");
  std::unique_ptr<NcclLink> link(new NcclLink(std::move(impl)));
  if (begun) return link;
  *error = link->error();
  return nullptr;
}

void NcclLink::Exchange(std::span<const Transfer> transfers, kernels::cuda::Stream stream) {
  auto* on = static_cast<cudaStream_t>(stream);
  impl_->IsGood(ncclGroupStart(), "ncclGroupStart");
  for (const Transfer& transfer : transfers) {
    if (transfer.is_send) {
      impl_->IsGood(ncclSend(transfer.data, transfer.bytes, ncclUint8, transfer.peer, impl_->comm, on), "ncclSend");
    } else {
      impl_->IsGood(ncclRecv(transfer.data, transfer.bytes, ncclUint8, transfer.peer, impl_->comm, on), "ncclRecv");
    }
  }
  impl_->IsGood(ncclGroupEnd(), "ncclGroupEnd");  // in any case: it closes what was started
}

NcclLink::State NcclLink::Poll() {
  if (!impl_->error.empty()) return State::kFailed;
  ncclResult_t result = ncclSuccess;
  if (!impl_->IsGood(ncclCommGetAsyncError(impl_->comm, &result), "ncclCommGetAsyncError")) return State::kFailed;
  if (!impl_->IsGood(result, "NCCL")) return State::kFailed;
  return result == ncclInProgress ? State::kBusy : State::kReady;
}

const std::string& NcclLink::error() const { return impl_->error; }

void NcclLink::Abort() {
  if (impl_->comm != nullptr) ncclCommAbort(std::exchange(impl_->comm, nullptr));
}

}  // namespace zeroc
