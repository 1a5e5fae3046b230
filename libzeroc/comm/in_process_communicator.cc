#include "libzeroc/comm/in_process_communicator.h"

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "libzeroc/base/check.h"
#include "libzeroc/base/mutex.h"

namespace zeroc {
namespace {

struct Operation {
  int peer;
  std::uint64_t tag;
  Communicator::Parts parts;    // of a send
  Communicator::Places places;  // of a receive
  bool done = false;
};

// What the ranks share. A message is copied outside of the mutex; Abort waits for such copies.
class Group {
 public:
  using Key = std::tuple<int, int, std::uint64_t>;  // from, to, tag

  CommOp Post(bool is_send, int from, int to, std::uint64_t tag, Operation operation) {
    mu_.lock();
    const CommOp id{++n_ops_};
    Operation& mine = ops_[id] = std::move(operation);
    const auto [place, is_first] = unmatched_.try_emplace({from, to, tag}, id, is_send);
    if (is_first || !why_.ok()) {
      mu_.unlock();
      return id;
    }
    const auto [other_id, other_is_send] = place->second;
    ZEROC_CHECK(other_is_send != is_send, from, to, tag);  // a tag is used once
    unmatched_.erase(place);
    Operation& other = ops_.at(other_id);
    Copy(is_send ? mine : other, is_send ? other : mine, from, to);
    mu_.unlock();
    return id;
  }

  Status Wait(CommOp id, int rank, Communicator::TimePoint deadline) {
    MutexLock lock(mu_);
    const auto found = ops_.find(id);
    ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(id));
    Operation& op = found->second;
    while (!op.done && why_.ok()) {
      if (!changed_.WaitUntil(mu_, deadline) && !op.done && why_.ok()) {
        why_ = DeadlineExceeded("rank " + std::to_string(rank) + " waited in vain for rank " + std::to_string(op.peer));
        changed_.NotifyAll();
      }
    }
    Settle();
    const bool done = op.done;
    ops_.erase(found);
    return done ? OkStatus() : why_;
  }

  bool Test(CommOp id) {
    MutexLock lock(mu_);
    const auto found = ops_.find(id);
    ZEROC_CHECK(found != ops_.end(), static_cast<std::uint64_t>(id));
    return found->second.done || !why_.ok();
  }

  Status Check() {
    MutexLock lock(mu_);
    return why_;
  }

  void Abort(const Status& why) {
    MutexLock lock(mu_);
    if (why_.ok()) why_ = why;
    changed_.NotifyAll();
    Settle();
  }

 private:
  // The map's nodes stay where they are while the mutex is free: nobody waits for an operation that is being copied
  // without Settle.
  void Copy(Operation& send, Operation& receive, int from, int to) ZEROC_REQUIRES(mu_) {
    const std::size_t n_sent = CountBytes(send.parts), n_wanted = CountBytes(receive.places);
    if (n_sent != n_wanted) {
      why_ = Internal("rank " + std::to_string(from) + " sent " + std::to_string(n_sent) + " bytes, rank " +
                      std::to_string(to) + " waits for " + std::to_string(n_wanted));
    } else {
      ++n_copying_;
      mu_.unlock();
      std::size_t offset = 0;
      for (const auto& part : send.parts) {
        Scatter(part, offset, receive.places);
        offset += part.size();
      }
      mu_.lock();
      --n_copying_;
      send.done = receive.done = true;
    }
    changed_.NotifyAll();
  }

  // After an abort, until no copy is under way.
  void Settle() ZEROC_REQUIRES(mu_) {
    while (!why_.ok() && n_copying_ > 0) changed_.Wait(mu_);
  }

  Mutex mu_;
  CondVar changed_;
  std::map<CommOp, Operation> ops_ ZEROC_GUARDED_BY(mu_);
  std::map<Key, std::pair<CommOp, bool>> unmatched_ ZEROC_GUARDED_BY(mu_);  // and whether it sends
  std::uint64_t n_ops_ ZEROC_GUARDED_BY(mu_) = 0;
  int n_copying_ ZEROC_GUARDED_BY(mu_) = 0;
  Status why_ ZEROC_GUARDED_BY(mu_);
};

class InProcessCommunicator final : public Communicator {
 public:
  InProcessCommunicator(int rank, int size, std::shared_ptr<Group> group)
      : Communicator(rank, size), group_(std::move(group)) {}
  ~InProcessCommunicator() override { group_->Abort(Cancelled("rank " + std::to_string(rank()) + " has left")); }

  CommOp Recv(int from, std::uint64_t tag, Places places) override {
    ZEROC_CHECK(from >= 0 && from < size() && from != rank(), from);
    return group_->Post(false, from, rank(), tag, {from, tag, {}, std::move(places)});
  }
  Status Wait(CommOp op, TimePoint deadline) override { return group_->Wait(op, rank(), deadline); }
  bool Test(CommOp op) override { return group_->Test(op); }
  void Abort(const Status& why) override { group_->Abort(why); }
  Status Check() override { return group_->Check(); }

 protected:
  CommOp PostSend(int to, std::uint64_t tag, Parts parts) override {
    ZEROC_CHECK(to >= 0 && to < size() && to != rank(), to);
    return group_->Post(true, rank(), to, tag, {to, tag, std::move(parts), {}});
  }

 private:
  const std::shared_ptr<Group> group_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeInProcessCommunicators(int size) {
  const auto group = std::make_shared<Group>();
  std::vector<std::unique_ptr<Communicator>> all;
  for (int rank = 0; rank < size; ++rank) {
    all.push_back(std::make_unique<InProcessCommunicator>(rank, size, group));
  }
  return all;
}

}  // namespace zeroc
