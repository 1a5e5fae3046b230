// One HTTP request for completions: runs its choices, a few at a time, and writes their answer as one body or as
// server-sent events.
//
// Thread-safe. Ends by the last choice, by the first error of any choice, or when the client has gone; the other
// choices are cancelled then.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/common/http_server.h"
#include "services/router/completions_api.h"
#include "services/router/router.h"

namespace zeroc {

HttpResponse ErrorResponse(const Status& status, ErrorOrigin origin = ErrorOrigin::kRequest);

class HttpAnswer : public std::enable_shared_from_this<HttpAnswer> {
 public:
  // `id` is the request's, `headers` go with every answer.
  HttpAnswer(Router& router, std::shared_ptr<HttpExchange> exchange, std::string id, const CompletionRequest& request,
             std::vector<ChoicePlan> plans, std::size_t parallel_max,
             std::vector<std::pair<std::string, std::string>> headers);

  // On a server thread.
  void Start();

 private:
  class ChoiceSink;

  void StartMore();
  void CancelAll(const Status& why);

  // From the flows, with their locks held: these never call a flow.
  void OnStarted(std::size_t choice, const v1::Started& started);
  void OnDelta(std::size_t choice, const v1::Delta& delta);
  void OnFinal(std::size_t choice, const v1::Final& final);
  void OnError(const Status& status, ErrorOrigin origin);

  // No choice is to come.
  void SetEnded() ZEROC_REQUIRES(mu_) {
    ended_ = true;
    hold_.reset();
  }
  void BeginStream() ZEROC_REQUIRES(mu_);
  void Begin(std::size_t choice) ZEROC_REQUIRES(mu_);
  void EndChoice(std::size_t choice, const v1::Final& final) ZEROC_REQUIRES(mu_);

  Router& router_;
  const std::shared_ptr<HttpExchange> exchange_;
  const std::string id_;
  const bool stream_;
  const std::size_t parallel_max_;
  const std::vector<std::pair<std::string, std::string>> headers_;

  Mutex mu_;
  std::vector<ChoicePlan> plans_ ZEROC_GUARDED_BY(mu_);
  CompletionFormatter formatter_ ZEROC_GUARDED_BY(mu_);
  std::vector<std::weak_ptr<RequestFlow>> flows_ ZEROC_GUARDED_BY(mu_);
  std::shared_ptr<const void> hold_ ZEROC_GUARDED_BY(mu_);  // until the end
  std::vector<bool> begun_ ZEROC_GUARDED_BY(mu_);           // per choice: its first event is out
  bool streaming_ ZEROC_GUARDED_BY(mu_) = false;            // the status line has gone out
  bool admitted_ ZEROC_GUARDED_BY(mu_) = false;             // by the router, with the first choice
  bool ended_ ZEROC_GUARDED_BY(mu_) = false;
  std::size_t next_ ZEROC_GUARDED_BY(mu_) = 0;  // choice to start
  std::size_t n_running_ ZEROC_GUARDED_BY(mu_) = 0;
  std::size_t n_ended_ ZEROC_GUARDED_BY(mu_) = 0;
};

}  // namespace zeroc
