// A gRPC call that is answered once, by a flow. Internal to the router's gRPC services.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <utility>

#include "libzeroc/base/mutex.h"
#include "services/common/grpc_status.h"
#include "services/router/client_link.h"
#include "services/router/response_sink.h"

namespace zeroc {

// Shared by the flow, whose sink it is, and the reactor, which end independently. Subclasses fill `response_` from what
// the flow says; OnFinal and OnError end the call.
template <typename Response>
class UnaryCall : public ResponseSink {
 public:
  ClientLink client;

  // Answers into `out`, holds `pass` as long as it lives, and is deleted by OnDone.
  class Reactor : public grpc::ServerUnaryReactor {
   public:
    Reactor(std::shared_ptr<UnaryCall> call, Response* out, std::shared_ptr<const void> pass)
        : call_(std::move(call)), out_(out), pass_(std::move(pass)) {}
    void OnCancel() override { call_->client.ClientGone(); }
    void OnDone() override {
      call_->Detach();
      delete this;
    }

   private:
    friend class UnaryCall;
    const std::shared_ptr<UnaryCall> call_;
    Response* const out_;
    const std::shared_ptr<const void> pass_;
  };

  // Once the flow is bound: OnDone could otherwise race with that.
  void Attach(Reactor* reactor) {
    MutexLock lock(mu_);
    reactor_ = reactor;
    FinishIfEnded();
  }
  void OnError(const Status& status, ErrorOrigin) override {
    MutexLock lock(mu_);
    End(status);
  }

 protected:
  void End(const Status& status) ZEROC_REQUIRES(mu_) {
    end_ = status;
    FinishIfEnded();
  }
  Mutex mu_;
  Response response_ ZEROC_GUARDED_BY(mu_);

 private:
  void Detach() {
    MutexLock lock(mu_);
    reactor_ = nullptr;
  }
  // Finish runs no reaction inline, so the lock may be held.
  void FinishIfEnded() ZEROC_REQUIRES(mu_) {
    if (reactor_ == nullptr || !end_.has_value()) return;
    if (end_->ok()) *reactor_->out_ = std::move(response_);
    std::exchange(reactor_, nullptr)->Finish(ToGrpc(*end_));
  }

  Reactor* reactor_ ZEROC_GUARDED_BY(mu_) = nullptr;
  std::optional<Status> end_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
