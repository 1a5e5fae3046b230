#include "services/worker/worker.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include "libzeroc/comm/ucx/ucx_transport.h"
#include "services/common/grpc_server.h"
#include "services/common/http_server.h"
#include "services/common/logging.h"
#include "services/common/registrations.h"
#include "services/common/shutdown_signal.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {
namespace {

using std::chrono::milliseconds;

const char* KindName(WorkerKind kind) { return kind == WorkerKind::kPrefill ? "prefill" : "decode"; }

void AddWorkerOptions(OptionSet* set, WorkerOptions* o) {
  set->AddString("model", &o->model, {"", "Hugging Face directory of the model."});
  set->AddString(
      "plan", &o->plan,
      {"", "Plan file; empty takes zeroc.plan in the model's directory, or none: then only bf16 is served."});
  set->AddString("backend", &o->backend,
                 {"", "What computes: cpu, or cuda for a GPU (CUDA_VISIBLE_DEVICES says which)."});
  set->AddString("grpc_listen", &o->grpc_listen, {"host:port", "Where gRPC listens; port 0 takes a free one."});
  set->AddString("http_listen", &o->http_listen, {"host:port", "Where /metrics, /healthz and /readyz are served."});
  set->AddString("router", &o->router,
                 {"host:port[,host:port..]", "Routers to register with: all addresses of every name; empty: none."});
  set->AddInt("router_resolve_ms", &o->router_resolve_ms, 100, 3'600'000,
              {"ms", "How often the names of the routers are resolved again."});
  set->AddString("name", &o->name, {"", "Unique among the workers of a router; empty: kind, host and gRPC port."});
  set->AddString("advertise", &o->advertise,
                 {"host", "Where the router reaches this worker; empty: the host that gRPC listens on."});
  set->AddInt("kv_memory_mib", &o->kv_memory_mib, 1, 256 << 10, {"MiB", "Memory for keys and values."});
  set->AddBool("prefix_cache", &o->prefix_cache, {"", "Keep beginnings of prompts in KV memory that nobody needs."});
  set->AddDouble("prefix_cache_share", &o->prefix_cache_share, 0, 1,
                 {"of the KV memory", "Most that the prefix cache may hold; it gives way to requests in any case."});
  set->AddInt("threads", &o->threads, 0, 4096, {"threads", "Compute threads; 0: one per processor of this process."});
  set->AddString("transport_tls", &o->transport_tls, {"", "UCX transports, e.g. tcp or posix,cma; auto: UCX chooses."});
  set->AddString("transport_net_devices", &o->transport_net_devices, {"", "UCX network devices, e.g. lo; auto: all."});
  set->AddInt("drain_delay_ms", &o->drain_delay_ms, 0, 600'000,
              {"ms", "After SIGTERM: how long new requests are still taken while the routers learn of it."});
  set->AddInt("drain_timeout_ms", &o->drain_timeout_ms, 0, 3'600'000,
              {"ms", "After SIGTERM: how long running requests may go on."});
  AddSecurityOptions(set, &o->security);
  set->AddString("log_level", &o->log_level, {"", "debug, info, warning or error."});
}

std::string HostName() {
  char name[256] = "";
  return gethostname(name, sizeof name - 1) == 0 ? name : "host";
}

TransportFactory UcxFactory(const WorkerOptions& options, const std::string& name) {
  UcxTransportOptions ucx;
  ucx.name = name.substr(0, kPeerNameBytesMax);
  ucx.tls = options.transport_tls;
  ucx.net_devices = options.transport_net_devices;
  return [ucx](TransportListener& listener) { return CreateUcxTransport(ucx, listener); };
}

std::vector<HttpServer::Route> Routes(Metrics& metrics, const std::function<void()>& update,
                                      std::function<Status()> ready) {
  std::vector<HttpServer::Route> routes = StandardRoutes(metrics, std::move(ready));
  for (HttpServer::Route& route : routes) {
    if (route.path != "/metrics") continue;
    route.handler = [update, inner = std::move(route.handler)](std::shared_ptr<HttpExchange> exchange) {
      update();
      inner(std::move(exchange));
    };
  }
  return routes;
}

bool WaitIdle(const WorkerService& service, milliseconds timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  while (service.in_flight() > 0) {
    if (std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::sleep_for(milliseconds(20));
  }
  return true;
}

v1::WorkerInfo Info(WorkerKind kind, const WorkerOptions& options, const WorkerModel& model,
                    const WorkerService& service, const std::string& host, int grpc_port, int http_port) {
  v1::WorkerInfo info;
  info.set_role(kind == WorkerKind::kPrefill ? v1::WORKER_ROLE_PREFILL : v1::WORKER_ROLE_DECODE);
  info.set_name(options.name);
  const std::string bracketed = host.find(':') == std::string::npos ? host : "[" + host + "]";
  info.set_grpc_address(bracketed + ":" + std::to_string(grpc_port));
  info.set_http_address(bracketed + ":" + std::to_string(http_port));
  info.set_model_fingerprint(model.fingerprint());
  info.set_plan_id(model.plan_id());
  info.set_kv_bytes_total(service.kv_bytes_total());
  info.set_max_tokens(static_cast<std::uint32_t>(model.config().max_positions));
  return info;
}

struct Addresses {
  HostPort grpc;
  std::vector<HostPort> routers;
  std::string advertised_host;
};

Result<Addresses> CheckUsage(const WorkerOptions& options) {
  if (options.model.empty()) return InvalidArgument("--model is missing (a Hugging Face directory)");
  if (options.backend != "cpu" && options.backend != "cuda") {
    return InvalidArgument("--backend " + EscapeControls(options.backend) + ": cpu or cuda");
  }
  Addresses addresses;
  ZEROC_ASSIGN_OR_RETURN(addresses.grpc, ParseHostPort(options.grpc_listen));
  ZEROC_RETURN_IF_ERROR(ParseHostPort(options.http_listen).status());
  if (!options.router.empty()) {
    ZEROC_ASSIGN_OR_RETURN(addresses.routers, ParseHostPorts(options.router));
  }
  addresses.advertised_host = options.advertise.empty() ? addresses.grpc.host : options.advertise;
  const bool any = addresses.advertised_host == "0.0.0.0" || addresses.advertised_host == "::";
  if (any && !options.router.empty()) {
    return InvalidArgument("--grpc-listen " + options.grpc_listen +
                           ": no host that the router could reach; name one with --advertise");
  }
  return addresses;
}

Status Serve(WorkerKind kind, WorkerOptions& options, const Addresses& addresses, const MakeService& make_service,
             const OpenDevice& open_cuda, ShutdownSignal& signal) {
  if (options.name.empty()) {
    options.name = std::string(KindName(kind)) + "-" + HostName() + "-" +
                   (addresses.grpc.port != 0 ? std::to_string(addresses.grpc.port) : "pid" + std::to_string(getpid()));
  }
  ZEROC_ASSIGN_OR_RETURN(const Security security, LoadSecurity(options.security));
  LogInfo("security " + security.Describe());
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<WorkerModel> model,
                         WorkerModel::Open(options.model, options.plan, static_cast<int>(options.threads),
                                           options.backend == "cuda" ? open_cuda : nullptr));
  LogInfo("model dir=" + options.model + " fingerprint=" + model->fingerprint() +
          " plan=" + (model->plan_path().empty() ? "none" : model->plan_path() + " plan_id=" + model->plan_id()) +
          " profiles=" + std::to_string(model->formats().size()));
  Metrics metrics(std::filesystem::path(options.model).lexically_normal().filename().string());
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<WorkerService> service,
                         make_service({*model, metrics, options, UcxFactory(options, options.name)}));
  const std::string isa = model->ops().isa();
  LogInfo("backend=" + std::string(model->ops().name) + " isa=" + isa +
          " threads=" + std::to_string(model->n_threads()) + " ucx=" + UcxVersion() + " " + service->Describe());
  metrics.SetRuntimeInfo({{"component", KindName(kind)},
                          {"backend", model->ops().name},
                          {"isa", isa},
                          {"plan_id", model->plan_id()},
                          {"transport_tls", options.transport_tls},
                          {"ucx", UcxVersion()}});

  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<GrpcServer> grpc_server,
                         GrpcServer::Start(options.grpc_listen, GrpcLimits(), {service->service()}, security.grpc));
  std::atomic<bool> draining = false;
  std::unique_ptr<Registrations> registrations;  // outlives the servers, which ask it from the moment it is `joined`
  std::atomic<const Registrations*> joined = nullptr;
  const auto ready = [&] {
    if (draining) return Unavailable("draining");
    if (addresses.routers.empty()) return OkStatus();
    const Registrations* now = joined;
    return now == nullptr ? Unavailable("starting") : now->Ready();
  };
  const auto update = [&] {
    service->UpdateGauges(metrics);
    if (addresses.routers.empty()) return;  // work comes from elsewhere: a follower's from its leader
    const Registrations* now = joined;
    metrics.SetRoutersRegistered(now == nullptr ? 0 : static_cast<double>(now->n_registered()));
  };
  ZEROC_ASSIGN_OR_RETURN(const std::unique_ptr<HttpServer> http_server,
                         HttpServer::Start(options.http_listen, HttpLimits(), Routes(metrics, update, ready), nullptr,
                                           nullptr, security.http));
  grpc_server->SetServing(true);
  LogInfo("listening grpc_port=" + std::to_string(grpc_server->port()) +
          " http_port=" + std::to_string(http_server->port()));
  if (!addresses.routers.empty()) {
    RegistrationsOptions registering;
    registering.routers = addresses.routers;
    registering.each.security = security.grpc;
    registering.resolve_ms = options.router_resolve_ms;
    registrations = Registrations::Start(
        registering,
        Info(kind, options, *model, *service, addresses.advertised_host, grpc_server->port(), http_server->port()),
        [&service](v1::WorkerLoad* load) { service->FillLoad(load); });
    joined = registrations.get();
  }

  const int number = signal.Wait();
  LogInfo("stopping signal=" + std::to_string(number) + " in_flight=" + std::to_string(service->in_flight()));
  draining = true;
  if (registrations != nullptr) registrations->SetDraining(true);
  grpc_server->SetServing(false);
  signal.WaitFor(milliseconds(options.drain_delay_ms));  // a second signal cuts it short
  service->StopAccepting();
  if (!WaitIdle(*service, milliseconds(options.drain_timeout_ms))) {
    LogWarning("drain timed out in_flight=" + std::to_string(service->in_flight()));
    service->CancelAll(Unavailable(std::string(KindName(kind)) + " worker " + options.name + " is stopping"));
    WaitIdle(*service, milliseconds(2000));
  }
  grpc_server->Shutdown(milliseconds(1000));
  return OkStatus();
}

}  // namespace

int WorkerMain(int argc, char** argv, WorkerKind kind, WorkerOptions* options,
               const std::function<void(OptionSet*)>& add_options, const std::function<Status()>& check_usage,
               const MakeService& make_service, const OpenDevice& open_cuda) {
  ShutdownSignal signal;
  const std::string program = std::string("zeroc-") + KindName(kind);
  OptionSet set(program, kind == WorkerKind::kPrefill
                             ? "ZeroC's prefill worker: computes prompts and sends their packed keys and values."
                             : "ZeroC's decode worker: receives packed keys and values and continues the prompts.");
  AddWorkerOptions(&set, options);
  add_options(&set);
  const Result<OptionSet::Outcome> outcome = set.Parse(argc, argv);
  const auto bad_usage = [&program](const Status& status) {
    std::fprintf(stderr, "%s: %s\n", program.c_str(), std::string(status.message()).c_str());
    return 2;
  };
  if (!outcome.ok()) return bad_usage(outcome.status());
  if (*outcome == OptionSet::Outcome::kHelpShown) return 0;
  const Result<Addresses> addresses = CheckUsage(*options);
  if (!addresses.ok()) return bad_usage(addresses.status());
  if (Status usage = check_usage(); !usage.ok()) return bad_usage(usage);
  const Result<LogLevel> level = ParseLogLevel(options->log_level);
  if (!level.ok()) return bad_usage(level.status());
  SetUpLogging(KindName(kind), *level);
  std::fprintf(stderr, "%s", set.Effective().c_str());

  const Status status = Serve(kind, *options, *addresses, make_service, open_cuda, signal);
  if (!status.ok()) LogError(status.ToString());
  if (status.ok()) LogInfo("stopped");
  return status.ok() ? 0 : 1;
}

}  // namespace zeroc
