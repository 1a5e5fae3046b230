// zeroc-router: puts the parts together, waits for SIGTERM, drains.
#include <grpcpp/impl/service_type.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <random>

#include "services/common/access.h"
#include "services/common/grpc_server.h"
#include "services/common/http_server.h"
#include "services/common/logging.h"
#include "services/common/shutdown_signal.h"
#include "services/common/timer_thread.h"
#include "services/router/audit_runner.h"
#include "services/router/grpc_worker_connection.h"
#include "services/router/http_front.h"
#include "services/router/inference_service.h"
#include "services/router/kserve_service.h"
#include "services/router/registry_service.h"
#include "services/router/router.h"
#include "services/router/router_options.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// What clients get at least, to read the ends of their answers when the time to drain is over.
constexpr milliseconds kLastAnswers(2000);

FlowConfig MakeFlowConfig(const RouterOptions& options, const ServedModel& model) {
  FlowConfig config;
  config.limits.vocab_size = model.vocab_size;
  config.limits.max_positions = model.max_positions;
  config.limits.eos_ids = model.eos_ids;
  config.limits.default_max_tokens = static_cast<std::uint32_t>(options.default_max_tokens);
  config.limits.prompt_tokens_max = static_cast<std::uint32_t>(options.max_prompt_tokens);
  config.limits.output_tokens_max = static_cast<std::uint32_t>(options.max_output_tokens);
  config.default_max_ppl_increase = options.default_max_ppl_increase;
  config.reserve_timeout = milliseconds(options.reserve_timeout_ms);
  config.request_timeout = milliseconds(options.request_timeout_ms);
  config.retries_max = static_cast<int>(options.retries_max);
  config.queue_timeout = milliseconds(options.queue_timeout_ms);
  config.adaptive = options.adaptive_profiles;
  config.local_prefill_tokens = static_cast<std::uint32_t>(options.local_prefill_tokens);
  config.local_prefill_queue = milliseconds(options.local_prefill_queue_ms);
  config.sp_min_tokens = static_cast<std::uint32_t>(options.sp_min_tokens);
  return config;
}

HttpLimits MakeHttpLimits(const RouterOptions& options) {
  HttpLimits limits;
  limits.body_bytes_max = options.http_body_bytes_max;
  limits.header_bytes_max = options.http_header_bytes_max;
  limits.connections_max = options.http_connections_max;
  limits.request_timeout_ms = options.http_request_timeout_ms;
  limits.write_timeout_ms = options.http_write_timeout_ms;
  limits.queued_bytes_max = options.queued_bytes_max;
  limits.threads = options.http_threads;
  return limits;
}

GrpcLimits MakeGrpcLimits(const RouterOptions& options) {
  GrpcLimits limits;
  limits.message_bytes_max = options.grpc_message_bytes_max;
  limits.metadata_bytes_max = options.grpc_metadata_bytes_max;
  limits.streams_max = options.grpc_streams_max;
  return limits;
}

// Members go down in reverse: fronts first, then requests, then what requests use.
Status Serve(const RouterOptions& options, ShutdownSignal& signal) {
  Security security;
  ZEROC_ASSIGN_OR_RETURN(security, LoadSecurity(options.security));
  LogInfo("security " + security.Describe() + " api_keys=" + (options.access.keys_file.empty() ? "no" : "yes"));
  ServedModel model;
  ZEROC_ASSIGN_OR_RETURN(model, LoadServedModel(options.model, options.plan, options.served_model_name));
  LogInfo("model name=" + model.name + " fingerprint=" + model.fingerprint + " plan=" + model.plan_id +
          " profiles=" + std::to_string(model.ladder.size()));

  const GrpcLimits grpc_limits = MakeGrpcLimits(options);
  Metrics metrics(model.name);
  metrics.SetRuntimeInfo({{"component", "router"}, {"plan_id", model.plan_id}});
  for (const char* stage : {"reserve", "prefill", "decode"}) metrics.CountRetry(stage, 0);
  TimerThread timers;
  WorkerPool pool(model.fingerprint, model.plan_id, milliseconds(options.heartbeat_expiry_ms));
  Estimates estimates;
  AdmissionQueue::Config queue_config;
  queue_config.waiting_max = static_cast<std::size_t>(options.queue_max);
  const auto queue = std::make_shared<AdmissionQueue>(queue_config, timers, metrics);
  Audit::Config audit_config;
  audit_config.share = options.audit_share;
  audit_config.window_tokens = static_cast<std::uint64_t>(options.audit_window_tokens);
  Audit audit(audit_config, model.ladder, model.ppl_base, std::random_device{}());
  const FlowContext context{model, pool, metrics, timers, estimates, *queue, audit, MakeFlowConfig(options, model)};
  Router router(context, static_cast<std::size_t>(options.max_in_flight));
  const auto auditor = std::make_shared<AuditRunner>(AuditRunner::Config(), router, audit, timers, metrics);
  if (options.audit_share > 0) auditor->Start();
  RegistryConfig registry_config;
  registry_config.heartbeat = milliseconds(options.heartbeat_ms);
  registry_config.expiry = milliseconds(options.heartbeat_expiry_ms);
  const auto registry = MakeRegistryService(
      registry_config, pool,
      [&](const std::string& address) { return DialWorker(address, GrpcLimits(), security.grpc); }, metrics, timers);
  std::unique_ptr<AccessControl> access;
  ZEROC_ASSIGN_OR_RETURN(access, AccessControl::Open(options.access));
  const auto queued_bytes_max = static_cast<std::size_t>(options.queued_bytes_max);
  const auto inference = MakeInferenceService(router, queued_bytes_max, access.get());
  const auto kserve = MakeKserveService(router, queued_bytes_max, access.get());

  std::unique_ptr<GrpcServer> grpc_server;
  ZEROC_ASSIGN_OR_RETURN(grpc_server,
                         GrpcServer::Start(options.grpc_listen, grpc_limits,
                                           {inference.get(), kserve.get(), registry->service()}, security.grpc));
  std::atomic<bool> leaving = false;
  const auto ready = [&] { return leaving ? Unavailable("not ready: the router is stopping") : router.Ready(); };
  ApiOptions api;
  api.default_max_tokens = static_cast<std::uint32_t>(options.default_max_tokens);
  std::vector<HttpServer::Route> routes = ApiRoutes(router, api);
  for (HttpServer::Route& route : StandardRoutes(metrics, ready)) {
    routes.push_back(std::move(route));
  }
  std::unique_ptr<HttpServer> http_server;
  ZEROC_ASSIGN_OR_RETURN(http_server, HttpServer::Start(options.http_listen, MakeHttpLimits(options), std::move(routes),
                                                        FormatHttpError, ApiScreener(*access), security.http));
  grpc_server->SetServing(true);
  LogInfo("listening grpc_port=" + std::to_string(grpc_server->port()) +
          " http_port=" + std::to_string(http_server->port()));

  const int number = signal.Wait();
  LogInfo("stopping signal=" + std::to_string(number) + " in_flight=" + std::to_string(router.in_flight()));
  leaving = true;
  grpc_server->SetServing(false);
  signal.WaitFor(milliseconds(options.drain_delay_ms));  // a second signal cuts it short
  router.StopAccepting();
  auditor->Stop();
  http_server->StopAccepting();
  const auto drained_by = steady_clock::now() + milliseconds(options.drain_timeout_ms);
  if (!router.WaitIdle(milliseconds(options.drain_timeout_ms))) {
    LogWarning("drain timed out in_flight=" + std::to_string(router.in_flight()));
    router.CancelAll(Unavailable("the router is stopping"));
  }
  // Requests end with their last token; their clients may still be reading.
  if (!http_server->WaitClosed(std::max(drained_by, steady_clock::now() + kLastAnswers))) {
    LogWarning("drain timed out http_connections=" + std::to_string(http_server->connections()));
  }
  registry->CloseAll();
  grpc_server->Shutdown(milliseconds(1000));  // the last messages of the streams that have just ended
  return OkStatus();
}

int Main(int argc, char** argv) {
  ShutdownSignal signal;
  RouterOptions options;
  OptionSet set = RouterOptionSet(&options);
  const Result<OptionSet::Outcome> outcome = set.Parse(argc, argv);
  const auto bad_usage = [](const Status& status) {
    std::fprintf(stderr, "zeroc-router: %s\n", std::string(status.message()).c_str());
    return 2;
  };
  if (!outcome.ok()) return bad_usage(outcome.status());
  if (*outcome == OptionSet::Outcome::kHelpShown) return 0;
  if (options.model.empty()) return bad_usage(InvalidArgument("--model is missing (a Hugging Face directory)"));
  const Result<LogLevel> level = ParseLogLevel(options.log_level);
  if (!level.ok()) return bad_usage(level.status());
  SetUpLogging("router", *level);
  std::fprintf(stderr, "%s", set.Effective().c_str());

  const Status status = Serve(options, signal);
  if (!status.ok()) LogError(status.ToString());
  if (status.ok()) LogInfo("stopped");
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace zeroc

int main(int argc, char** argv) { return zeroc::Main(argc, argv); }
