// NCCL between threads of one process, for machines without a GPU: its rules, not its speed. An exchange begins when
// the emulated stream comes to it, and is put on the stream only at the second Poll, as NCCL may. Poll also does what a
// device does by itself: the stream goes on.
#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/cuda/host_simt/queue.h"
#include "libzeroc/comm/nccl/nccl_link.h"

namespace zeroc {
namespace {

// One exchange of one rank.
struct Run {
  std::vector<NcclLink::Transfer> transfers;
  bool begun = false;  // with Clique::mutex, as all below
  bool aborted = false;
  std::size_t n_left = 0;
};

struct Half {
  std::shared_ptr<Run> run;
  std::byte* data;
  std::size_t bytes;
};

struct Clique {
  std::mutex mutex;
  int size = 0;
  int n_joined = 0;
  using Ends = std::map<std::pair<int, int>, std::deque<Half>>;  // by (from, to)
  Ends sends, receives;

  void Begin(int rank, const std::shared_ptr<Run>& run) {
    run->begun = true;
    run->n_left = run->transfers.size();
    for (const NcclLink::Transfer& transfer : run->transfers) {
      const std::pair<int, int> pair =
          transfer.is_send ? std::pair(rank, transfer.peer) : std::pair(transfer.peer, rank);
      (transfer.is_send ? sends : receives)[pair].push_back({run, transfer.data, transfer.bytes});
      Meet(pair);
    }
  }

  void Meet(const std::pair<int, int>& pair) {
    std::deque<Half>& from = sends[pair];
    std::deque<Half>& to = receives[pair];
    while (!from.empty() && !to.empty() && from.front().bytes == to.front().bytes) {
      std::memcpy(to.front().data, from.front().data, to.front().bytes);
      --from.front().run->n_left;
      --to.front().run->n_left;
      from.pop_front();
      to.pop_front();
    }
  }

  // Peers find the places empty for ever.
  void Leave(int rank) {
    for (Ends* ends : {&sends, &receives}) {
      for (auto& [pair, halves] : *ends) {
        const bool is_ours = (ends == &sends ? pair.first : pair.second) == rank;
        if (is_ours) halves.clear();
      }
    }
  }
};

std::mutex cliques_mutex;
std::map<std::uint64_t, std::weak_ptr<Clique>> cliques;  // guarded by cliques_mutex

std::uint64_t NumberOf(const NcclId& id) {
  std::uint64_t number = 0;
  std::memcpy(&number, id.bytes.data(), sizeof(number));
  return number;
}

}  // namespace

struct NcclLink::Impl {
  int rank;
  std::shared_ptr<Clique> clique;
  std::vector<std::shared_ptr<Run>> runs;  // not yet known to be over
  std::shared_ptr<Run> waiting;            // given to Exchange, not yet on the stream
  int n_polls = 0;                         // since then
  kernels::cuda::Stream stream = nullptr;
  bool aborted = false;
  std::string error;
};

NcclLink::NcclLink(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NcclLink::~NcclLink() { Abort(); }

bool NcclLink::MakeId(NcclId* id, std::string*) {
  static std::atomic<std::uint64_t> n_made = 0;
  const std::uint64_t number = ++n_made;
  std::memcpy(id->bytes.data(), &number, sizeof(number));
  return true;
}

std::unique_ptr<NcclLink> NcclLink::Open(const NcclId& id, int rank, int size, std::string* error) {
  const std::lock_guard lock(cliques_mutex);
  std::weak_ptr<Clique>& place = cliques[NumberOf(id)];
  std::shared_ptr<Clique> clique = place.lock();
  if (clique == nullptr) place = clique = std::make_shared<Clique>();
  const std::lock_guard clique_lock(clique->mutex);
  if (clique->n_joined > 0 && clique->size != size) {
    *error = "ranks disagree in their number";
    return nullptr;
  }
  clique->size = size;
  ++clique->n_joined;
  auto impl = std::make_unique<Impl>();
  impl->rank = rank;
  impl->clique = std::move(clique);
  return std::unique_ptr<NcclLink>(new NcclLink(std::move(impl)));
}

void NcclLink::Exchange(std::span<const Transfer> transfers, kernels::cuda::Stream stream) {
  impl_->waiting = std::make_shared<Run>();
  impl_->waiting->transfers.assign(transfers.begin(), transfers.end());
  impl_->stream = stream;
  impl_->n_polls = 0;
}

NcclLink::State NcclLink::Poll() {
  {
    const std::lock_guard lock(impl_->clique->mutex);
    if (impl_->clique->n_joined < impl_->clique->size) return State::kBusy;
    std::erase_if(impl_->runs, [](const auto& run) { return run->begun && run->n_left == 0; });
  }
  if (impl_->stream != nullptr) kernels::cuda::simt::Advance(impl_->stream);
  if (impl_->waiting == nullptr) return State::kReady;
  if (++impl_->n_polls < 2) return State::kBusy;
  const std::shared_ptr<Run> run = std::exchange(impl_->waiting, nullptr);
  impl_->runs.push_back(run);
  kernels::cuda::simt::EnqueueShared(impl_->stream, [clique = impl_->clique, rank = impl_->rank, run] {
    const std::lock_guard lock(clique->mutex);
    if (run->aborted) return true;
    if (!run->begun) clique->Begin(rank, run);
    return run->n_left == 0;
  });
  return State::kReady;
}

const std::string& NcclLink::error() const { return impl_->error; }

void NcclLink::Abort() {
  if (std::exchange(impl_->aborted, true)) return;
  const std::lock_guard lock(impl_->clique->mutex);
  for (const auto& run : impl_->runs) run->aborted = true;
  impl_->waiting = nullptr;
  impl_->clique->Leave(impl_->rank);
}

}  // namespace zeroc
