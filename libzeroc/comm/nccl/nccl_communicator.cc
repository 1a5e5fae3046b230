#include "libzeroc/comm/nccl/nccl_communicator.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <thread>
#include <utility>

#include "kernels/cuda/runtime.h"
#include "libzeroc/base/check.h"
#include "libzeroc/base/mutex.h"
#include "libzeroc/comm/nccl/nccl_link.h"

namespace zeroc {
namespace {

namespace cuda = kernels::cuda;

constexpr std::uint64_t kIdTag = Communicator::kReservedTags | std::uint64_t{1} << 62;
constexpr std::uint64_t kFirstTag = kIdTag + 1;
constexpr std::size_t kAlignment = 256;  // of messages in the staging buffer: NCCL's widest loads are of 16 bytes
// When NCCL reports that a peer is gone, the reason is mostly still on its way.
constexpr std::chrono::milliseconds kReasonPatience(300);

// What the receiver must agree with. Ranks are machines of one byte order, as NCCL demands.
struct Header {
  std::uint64_t bytes = 0;
  std::uint64_t number = 0;  // among the messages from this sender to this receiver, from 1; 0: nothing to send
};
using HeaderBytes = std::array<std::byte, sizeof(Header)>;

// Bytes of the device, given back at the end. Contents are lost when it grows; what it was may still be in use.
class Staging {
 public:
  ~Staging() {
    for (std::byte* memory : all_) cuda::Free(memory);
  }
  // Null when there is no memory left.
  std::byte* Reserve(std::size_t bytes) {
    if (bytes <= bytes_) return bytes == 0 ? nullptr : all_.back();
    const std::size_t wanted = std::max(bytes, 2 * bytes_);
    auto* memory = static_cast<std::byte*>(cuda::Allocate(wanted));
    if (memory == nullptr) return nullptr;
    all_.push_back(memory);
    bytes_ = wanted;
    return memory;
  }

 private:
  std::vector<std::byte*> all_;
  std::size_t bytes_ = 0;
};

struct EventPair {
  cuda::Event ready = cuda::CreateEvent(), done = cuda::CreateEvent();
  EventPair() = default;
  ~EventPair() {
    cuda::DestroyEvent(ready);
    cuda::DestroyEvent(done);
  }
  EventPair(const EventPair&) = delete;
  EventPair& operator=(const EventPair&) = delete;
  bool is_good() const { return ready != nullptr && done != nullptr; }
};

// Short waits first: the other side is mostly there.
class Backoff {
 public:
  void Pause() {
    if (++n_ < 64) return std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

 private:
  int n_ = 0;
};

template <typename Span>
void DropEmpty(std::vector<Span>* pieces) {
  std::erase_if(*pieces, [](const Span& piece) { return piece.empty(); });
}

bool AreSame(const Communicator::Parts& a, const Communicator::Parts& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& x, const auto& y) { return x.data() == y.data() && x.size() == y.size(); });
}

class NcclCommunicator final : public Communicator {
 public:
  explicit NcclCommunicator(std::unique_ptr<Communicator> bootstrap)
      : Communicator(bootstrap->rank(), bootstrap->size()), bootstrap_(std::move(bootstrap)) {}
  ~NcclCommunicator() override {
    Abort(Cancelled("rank " + std::to_string(rank()) + " has left"));
    cuda::DestroyStream(stream_);
  }

  Status Open(TimePoint deadline);

  CommMemory memory() const override { return CommMemory::kDevice; }
  CommOp Recv(int from, std::uint64_t tag, Places places) override;
  Status Wait(CommOp op, TimePoint deadline) override;
  bool Test(CommOp op) override;
  void Abort(const Status& why) override;
  Status Check() override { return bootstrap_->Check(); }
  void Follow(void* stream) override {
    MutexLock lock(mu_);
    followed_ = stream;
  }
  std::vector<CommOp> AllToAll(std::uint64_t tag, std::vector<Parts> parts, std::vector<Places> places) override;

 protected:
  CommOp PostSend(int to, std::uint64_t tag, Parts parts) override;

 private:
  struct Group;
  struct Operation {
    bool is_send;
    int peer;
    std::uint64_t tag;
    std::uint64_t bytes;
    Parts parts;
    Places places;
    HeaderBytes header{};
    bool is_flushed = false;   // is in its place among the pair's messages
    std::uint64_t number = 0;  // that place; a receive's is compared
    bool has_header = false;   // is under way, and to be waited for
    CommOp header_op{};
    std::shared_ptr<Group> group;  // null: nothing goes by NCCL, or never did
  };
  // Messages that run together.
  struct Group {
    std::vector<Operation*> ops;
    EventPair events;
    bool follows = false, exchanged = false, launched = false, done = false;
    // From the staging buffer to where they belong, once received.
    std::vector<std::pair<std::span<std::byte>, const std::byte*>> spreads;
  };

  CommOp Post(Operation op);
  void Flush() ZEROC_REQUIRES(mu_);
  bool Number(Operation& op) ZEROC_REQUIRES(mu_);
  Status Advance() ZEROC_REQUIRES(mu_);
  Status Exchange(Group& group) ZEROC_REQUIRES(mu_);
  Result<bool> IsMoved(const Operation& op) ZEROC_REQUIRES(mu_);
  Status CompareHeader(const Operation& op) const;
  Status WaitFor(Operation& op, TimePoint deadline);
  Status EndWith(const Status& why);
  Status AwaitReason(const Status& status);
  Status Late(int peer) const {
    return DeadlineExceeded("rank " + std::to_string(rank()) + " waited in vain for rank " + std::to_string(peer) +
                            ": NCCL has not moved its bytes");
  }
  Status OpenLink(TimePoint deadline);
  Status SendFirstBytes(TimePoint deadline);

  const std::unique_ptr<Communicator> bootstrap_;
  cuda::Stream stream_ = nullptr;

  Mutex mu_;
  std::unique_ptr<NcclLink> link_ ZEROC_GUARDED_BY(mu_);  // null with one rank
  bool is_down_ ZEROC_GUARDED_BY(mu_) = false;
  cuda::Stream followed_ ZEROC_GUARDED_BY(mu_) = nullptr;
  Staging staging_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t n_ops_ ZEROC_GUARDED_BY(mu_) = 0;
  std::map<CommOp, Operation> ops_ ZEROC_GUARDED_BY(mu_);           // only the rank's thread adds and removes
  std::vector<Operation*> collected_ ZEROC_GUARDED_BY(mu_);         // of no group yet
  std::deque<std::shared_ptr<Group>> queue_ ZEROC_GUARDED_BY(mu_);  // not on the stream yet
  std::vector<std::uint64_t> n_sent_ ZEROC_GUARDED_BY(mu_), n_received_ ZEROC_GUARDED_BY(mu_);  // [rank]
};

// --- the beginning ---

Status NcclCommunicator::Open(TimePoint deadline) {
  if (const char* why = cuda::WhyUnavailable()) return EndWith(FailedPrecondition(std::string("NCCL: ") + why));
  stream_ = cuda::CreateStream();
  if (stream_ == nullptr) return EndWith(FailedPrecondition("NCCL: the device gives no stream"));
  {
    MutexLock lock(mu_);
    n_sent_.resize(static_cast<std::size_t>(size()));
    n_received_.resize(static_cast<std::size_t>(size()));
  }
  if (size() == 1) return OkStatus();
  ZEROC_RETURN_IF_ERROR(OpenLink(deadline));
  return SendFirstBytes(deadline);
}

Status NcclCommunicator::OpenLink(TimePoint deadline) {
  NcclId id;
  std::string error;
  std::vector<CommOp> ops;
  if (rank() == 0) {
    if (!NcclLink::MakeId(&id, &error)) return EndWith(Unavailable("NCCL: " + error));
    for (int peer = 1; peer < size(); ++peer) ops.push_back(bootstrap_->Send(peer, kIdTag, {id.bytes}));
  } else {
    ops.push_back(bootstrap_->Recv(0, kIdTag, {id.bytes}));
  }
  ZEROC_RETURN_IF_ERROR(bootstrap_->WaitAll(ops, deadline));
  {
    MutexLock lock(mu_);
    link_ = NcclLink::Open(id, rank(), size(), &error);
    if (link_ == nullptr) is_down_ = true;
  }
  if (!error.empty()) return EndWith(Unavailable("NCCL: " + error));
  Backoff backoff;
  for (;; backoff.Pause()) {
    ZEROC_RETURN_IF_ERROR(Check());
    NcclLink::State state = NcclLink::State::kBusy;
    {
      MutexLock lock(mu_);
      if (!is_down_) state = link_->Poll();
      if (state == NcclLink::State::kFailed) error = link_->error();
    }
    if (state == NcclLink::State::kReady) return OkStatus();
    if (state == NcclLink::State::kFailed) return EndWith(Unavailable("NCCL: " + error));
    if (std::chrono::steady_clock::now() > deadline) {
      return EndWith(DeadlineExceeded("rank " + std::to_string(rank()) + ": NCCL has not joined all " +
                                      std::to_string(size()) + " ranks"));
    }
  }
}

// Between all ranks, so that what NCCL does at the first message to a peer is done, and known to work.
Status NcclCommunicator::SendFirstBytes(TimePoint deadline) {
  const auto n = static_cast<std::size_t>(size());
  auto* memory = static_cast<std::byte*>(cuda::Allocate(2 * n * kAlignment));
  if (memory == nullptr) return EndWith(ResourceExhausted("NCCL: no device memory"));
  std::vector<CommOp> ops;
  for (std::size_t i = 0; i < n; ++i) {
    const int peer = static_cast<int>(i);
    if (peer == rank()) continue;
    ops.push_back(PostSend(peer, kFirstTag, {{memory + 2 * i * kAlignment, 1}}));  // is not counted
    ops.push_back(Recv(peer, kFirstTag, {{memory + (2 * i + 1) * kAlignment, 1}}));
  }
  const Status status = WaitAll(ops, deadline);
  if (!status.ok()) Abort(status);  // until then the memory is in use
  cuda::Free(memory);
  return status;
}

// --- posting ---

CommOp NcclCommunicator::Post(Operation op) {
  ZEROC_CHECK(op.peer >= 0 && op.peer < size() && op.peer != rank(), op.peer);
  MutexLock lock(mu_);
  const CommOp id{++n_ops_};
  Operation& posted = ops_[id] = std::move(op);
  if (!posted.is_send) {
    posted.has_header = true;
    posted.header_op = bootstrap_->Recv(posted.peer, posted.tag, {posted.header});
  }
  collected_.push_back(&posted);
  return id;
}

CommOp NcclCommunicator::PostSend(int to, std::uint64_t tag, Parts parts) {
  const std::uint64_t bytes = CountBytes(parts);
  DropEmpty(&parts);
  return Post({true, to, tag, bytes, std::move(parts), {}});
}

CommOp NcclCommunicator::Recv(int from, std::uint64_t tag, Places places) {
  const std::uint64_t bytes = CountBytes(places);
  DropEmpty(&places);
  return Post({false, from, tag, bytes, {}, std::move(places)});
}

std::vector<CommOp> NcclCommunicator::AllToAll(std::uint64_t tag, std::vector<Parts> parts,
                                               std::vector<Places> places) {
  {
    MutexLock lock(mu_);
    Flush();
  }
  std::vector<CommOp> ops = Communicator::AllToAll(tag, std::move(parts), std::move(places));
  MutexLock lock(mu_);
  Flush();
  (void)Advance();  // a failure is found again by who waits
  return ops;
}

// What has been collected becomes a group. Both sides of a pair order its messages by their tags.
void NcclCommunicator::Flush() {
  if (collected_.empty()) return;
  std::vector<Operation*> ops = std::exchange(collected_, {});
  if (is_down_ || !Check().ok()) return;  // who waits for them is told
  std::stable_sort(ops.begin(), ops.end(), [](const Operation* a, const Operation* b) { return a->tag < b->tag; });
  auto group = std::make_shared<Group>();
  for (Operation* op : ops) {
    if (!Number(*op)) continue;
    op->group = group;
    group->ops.push_back(op);
  }
  if (group->ops.empty()) return;
  group->follows = followed_ != nullptr && group->events.is_good();
  if (group->follows) cuda::RecordEvent(group->events.ready, followed_);
  queue_.push_back(std::move(group));
}

// Gives the message its place among those of its pair, and tells the receiver. False for one without bytes.
bool NcclCommunicator::Number(Operation& op) {
  const auto peer = static_cast<std::size_t>(op.peer);
  op.is_flushed = true;
  op.number = op.bytes == 0 ? 0 : ++(op.is_send ? n_sent_ : n_received_)[peer];
  if (op.is_send) {
    const Header header{op.bytes, op.number};
    std::memcpy(op.header.data(), &header, sizeof(header));
    op.has_header = true;
    op.header_op = bootstrap_->Send(op.peer, op.tag, {op.header});
  }
  return op.bytes > 0;
}

// --- on the stream ---

// Puts on the stream what can be put there, group by group.
Status NcclCommunicator::Advance() {
  while (!queue_.empty() && !is_down_) {
    Group& group = *queue_.front();
    if (!group.exchanged) ZEROC_RETURN_IF_ERROR(Exchange(group));
    const NcclLink::State state = link_->Poll();
    if (state == NcclLink::State::kBusy) return OkStatus();
    if (state == NcclLink::State::kFailed) return Unavailable("NCCL: " + link_->error());
    for (const auto& [place, from] : group.spreads) cuda::CopyOnDevice(place.data(), from, place.size(), stream_);
    cuda::RecordEvent(group.events.done, stream_);
    group.launched = true;
    queue_.pop_front();
  }
  return OkStatus();
}

// Gathers what lies in pieces and starts the messages. The staging buffer is the previous group's too: the stream is
// through with that one by then.
Status NcclCommunicator::Exchange(Group& group) {
  group.exchanged = true;
  if (!group.events.is_good()) return ResourceExhausted("NCCL: the device gives no events");
  if (group.follows) cuda::StreamWait(stream_, group.events.ready);
  const auto padded = [](std::uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
  std::size_t n_staged = 0;
  for (const Operation* op : group.ops) {
    if (op->parts.size() > 1 || op->places.size() > 1) n_staged += padded(op->bytes);
  }
  std::byte* staging = staging_.Reserve(n_staged);
  if (n_staged > 0 && staging == nullptr) {
    return ResourceExhausted("NCCL: no " + std::to_string(n_staged) + " bytes of device memory for messages in pieces");
  }
  std::vector<NcclLink::Transfer> transfers;
  const Operation* gathered = nullptr;  // the latest: a gather sends the same bytes to all
  std::byte* gathered_at = nullptr;
  for (const Operation* op : group.ops) {
    if (op->parts.size() == 1) {
      transfers.push_back({true, op->peer, const_cast<std::byte*>(op->parts[0].data()), op->bytes});
    } else if (op->places.size() == 1) {
      transfers.push_back({false, op->peer, op->places[0].data(), op->bytes});
    } else if (op->is_send && gathered != nullptr && AreSame(gathered->parts, op->parts)) {
      transfers.push_back({true, op->peer, gathered_at, op->bytes});
    } else {
      transfers.push_back({op->is_send, op->peer, staging, op->bytes});
      std::byte* at = staging;
      if (op->is_send) gathered = op, gathered_at = staging;
      for (const auto& part : op->parts) {
        cuda::CopyOnDevice(at, part.data(), part.size(), stream_);
        at += part.size();
      }
      for (const auto& place : op->places) {
        group.spreads.push_back({place, at});
        at += place.size();
      }
      staging += padded(op->bytes);
    }
  }
  link_->Exchange(transfers, stream_);
  return OkStatus();
}

// --- waiting ---

Status NcclCommunicator::CompareHeader(const Operation& op) const {
  Header header;
  std::memcpy(&header, op.header.data(), sizeof(header));
  const std::string pair = "rank " + std::to_string(op.peer) + " sent ";
  if (header.bytes != op.bytes) {
    return Internal(pair + std::to_string(header.bytes) + " bytes, rank " + std::to_string(rank()) + " waits for " +
                    std::to_string(op.bytes));
  }
  if (header.number != op.number) {
    return Internal(pair + "a message as number " + std::to_string(header.number) + ", rank " + std::to_string(rank()) +
                    " waits for it as number " + std::to_string(op.number) + ": the ranks' groups of messages differ");
  }
  return OkStatus();
}

// The group ends, with this or an earlier reason.
Status NcclCommunicator::EndWith(const Status& why) {
  Abort(why);
  const Status first = Check();
  return first.ok() ? why : first;
}

// Whether the device is through with the message; for what was under way when the group ended, never.
Result<bool> NcclCommunicator::IsMoved(const Operation& op) {
  ZEROC_RETURN_IF_ERROR(Advance());
  const bool is_up = !is_down_ && link_ != nullptr;
  const bool failed = is_up && link_->Poll() == NcclLink::State::kFailed;
  if (!op.is_flushed) return false;
  if (op.bytes == 0) return true;
  if (op.group == nullptr) return false;
  Group& group = *op.group;
  if (is_up && group.launched && !group.done) {
    const cuda::EventState state = cuda::QueryEvent(group.events.done);
    if (state == cuda::EventState::kFailed) {
      const char* error = cuda::Synchronize(stream_);
      return Internal(std::string("NCCL: ") + (error == nullptr ? "the device failed" : error));
    }
    group.done = state == cuda::EventState::kPassed;
  }
  // Trouble shows here alone: a dead peer's messages stay ahead for ever. One who has left after the last is none.
  if (failed && !group.done) return Unavailable("NCCL: " + link_->error());
  return group.done;
}

bool NcclCommunicator::Test(CommOp id) {
  MutexLock lock(mu_);
  Flush();
  const auto found = ops_.find(id);
  ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(id));
  const Operation& op = found->second;
  const Result<bool> moved = IsMoved(op);
  if (!moved.ok() || !Check().ok()) return true;
  return *moved && (!op.has_header || bootstrap_->Test(op.header_op));
}

Status NcclCommunicator::WaitFor(Operation& op, TimePoint deadline) {
  Backoff backoff;
  for (;; backoff.Pause()) {
    Result<bool> moved = false;
    {
      MutexLock lock(mu_);
      moved = IsMoved(op);
    }
    if (!moved.ok()) return EndWith(AwaitReason(moved.status()));
    // As early as it is there: bytes of another size never arrive.
    if (op.has_header && bootstrap_->Test(op.header_op)) {
      op.has_header = false;
      Status status = bootstrap_->Wait(op.header_op, deadline);
      if (status.ok() && !op.is_send) status = CompareHeader(op);
      if (!status.ok()) return EndWith(status);
    }
    if (*moved && !op.has_header) return OkStatus();
    const Status ended = Check();
    if (!ended.ok()) return EndWith(ended);
    if (std::chrono::steady_clock::now() <= deadline) continue;
    if (!op.has_header) return EndWith(Late(op.peer));
    op.has_header = false;
    const Status late = bootstrap_->Wait(op.header_op, deadline);  // which knows its peers by name
    return EndWith(late.ok() ? Late(op.peer) : late);
  }
}

// What NCCL says of a peer that is gone is not why: that is mostly still on its way.
Status NcclCommunicator::AwaitReason(const Status& status) {
  const TimePoint until = std::chrono::steady_clock::now() + kReasonPatience;
  while (status.code() == StatusCode::kUnavailable && Check().ok() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return status;
}

Status NcclCommunicator::Wait(CommOp id, TimePoint deadline) {
  Operation* op = nullptr;
  {
    MutexLock lock(mu_);
    const auto found = ops_.find(id);
    ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(id));
    op = &found->second;  // stays where it is; nobody else removes it
    Flush();
  }
  Status status = WaitFor(*op, deadline);
  if (op->has_header) {
    const Status header = bootstrap_->Wait(op->header_op, deadline);
    if (status.ok()) status = header;
  }
  MutexLock lock(mu_);
  std::erase(collected_, op);
  if (op->group != nullptr) std::erase(op->group->ops, op);
  ops_.erase(id);
  return status;
}

// The bootstrap first: who waits for us hears the reason before NCCL tells that we are gone.
void NcclCommunicator::Abort(const Status& why) {
  bootstrap_->Abort(why);
  MutexLock lock(mu_);
  if (!is_down_) {
    queue_.clear();
    for (const auto& [id, op] : ops_) (void)IsMoved(op);  // what is over stays over
    is_down_ = true;
    if (link_ != nullptr) link_->Abort();
  }
  if (stream_ != nullptr) (void)cuda::Synchronize(stream_);  // soon: NCCL's kernels have ended
}

}  // namespace

Result<std::unique_ptr<Communicator>> MakeNcclCommunicator(std::unique_ptr<Communicator> bootstrap,
                                                           Communicator::TimePoint deadline) {
  auto communicator = std::make_unique<NcclCommunicator>(std::move(bootstrap));
  ZEROC_RETURN_IF_ERROR(communicator->Open(deadline));
  return std::unique_ptr<Communicator>(std::move(communicator));
}

}  // namespace zeroc
