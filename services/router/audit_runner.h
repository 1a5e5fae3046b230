// Scores what the audit asks for, through the router like any request, but last in line, one at a time, and only while
// hardly anything else runs.
//
// Thread-safe. Owned by a shared_ptr, which its timer does not keep alive. The router, the audit, the timers and the
// metrics outlive it.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/common/metrics.h"
#include "services/common/timers.h"
#include "services/router/audit.h"
#include "services/router/router.h"

namespace zeroc {

class AuditRunner : public std::enable_shared_from_this<AuditRunner> {
 public:
  struct Config {
    std::chrono::milliseconds poll{500};
    std::size_t others_max = 1;  // requests that may run beside it
  };
  AuditRunner(const Config& config, Router& router, Audit& audit, Timers& timers, Metrics& metrics);

  void Start();
  // Cancels what runs and starts nothing more.
  void Stop();

 private:
  class Sink;
  void Poll();
  void Score(const std::string& profile) ZEROC_EXCLUDES(mu_);
  void OnScored(const Status& status, std::vector<v1::TokenLogprobs> logprobs);
  void Compare(const std::vector<v1::TokenLogprobs>& packed) ZEROC_REQUIRES(mu_);

  const Config config_;
  Router& router_;
  Audit& audit_;
  Timers& timers_;
  Metrics& metrics_;

  Mutex mu_;
  bool stopped_ ZEROC_GUARDED_BY(mu_) = false;
  bool running_ ZEROC_GUARDED_BY(mu_) = false;
  Audit::Sample sample_ ZEROC_GUARDED_BY(mu_);
  std::vector<v1::TokenLogprobs> exact_ ZEROC_GUARDED_BY(mu_);  // empty until the first score is there
  std::weak_ptr<RequestFlow> flow_ ZEROC_GUARDED_BY(mu_);
};

}  // namespace zeroc
