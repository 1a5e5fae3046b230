#include "libzeroc/comm/ucx/ucx_wire.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "libzeroc/base/check.h"
#include "libzeroc/comm/ucx/ucx_envelope.h"
#include "libzeroc/comm/ucx/ucx_lanes.h"
#include "libzeroc/comm/ucx/ucx_link.h"

namespace zeroc {
namespace {

constexpr unsigned kAmId = 7;                // one id; our header says the rest
constexpr int kProgressMax = 64;             // UCX progress calls in a row before commands get their turn
constexpr int kSoonPollMs = 1;               // something moves without an event
constexpr double kAliveCheckSeconds = 0.02;  // while busy; when idle the descriptors wake us
constexpr int kIdlePollMs = 200;  // while peers exist: lets keep-alive run even if UCX's timer does not wake us
constexpr std::size_t kDeferredHellosMax = 1024;
constexpr std::size_t kSmallPayload = 64 << 10;  // larger copies are worth keeping, which spares page faults
constexpr std::size_t kSparePayloadsMax = 16;

Status FromUcs(ucs_status_t status, const std::string& what) {
  const std::string message = "ucx: " + what + ": " + ucs_status_string(status);
  switch (status) {
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
    case UCS_ERR_EXCEEDS_LIMIT:
      return ResourceExhausted(message);
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_INVALID_ADDR:
      return InvalidArgument(message);
    case UCS_ERR_CANCELED:
      return Cancelled(message);
    default:
      return Unavailable(message);
  }
}

}  // namespace

struct UcxWire::Receive {
  UcxWire* wire = nullptr;
  TransportCore::PieceTarget target;
};

// ---- set-up ----

UcxWire::UcxWire(const UcxTransportOptions& options) : options_(options) {}

Result<std::unique_ptr<UcxWire>> UcxWire::Open(const UcxTransportOptions& options) {
  std::unique_ptr<UcxWire> wire(new UcxWire(options));
  ZEROC_RETURN_IF_ERROR(wire->OpenContext());
  ZEROC_RETURN_IF_ERROR(wire->OpenWorker());
  return wire;
}

Status UcxWire::OpenContext() {
  ucp_config_t* raw_config = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &raw_config);
  if (status != UCS_OK) return FromUcs(status, "configuration");
  const std::unique_ptr<ucp_config_t, void (*)(ucp_config_t*)> config(raw_config, ucp_config_release);
  std::vector<std::pair<std::string, std::string>> settings = {
      {"KEEPALIVE_INTERVAL", std::to_string(options_.keepalive_interval_ms) + "ms"},
  };
  if (options_.tls == "auto" || options_.tls == "all" || options_.tls.find("tcp") != std::string::npos) {
    // No zero-copy sends on TCP: when the peer dies in the middle of one, UCX 1.13 completes it twice and aborts the
    // process (uct_iface.h: comp->count > 0). One element is too few for them. Larger segments make up for the copy.
    // UCX takes settings of one transport without its prefix here, and knows these two names for TCP alone.
    settings.emplace_back("MAX_IOV", "1");
    settings.emplace_back("TX_SEG_SIZE", "64k");
  }
  if (options_.tls != "auto") settings.emplace_back("TLS", options_.tls);
  if (options_.net_devices != "auto") settings.emplace_back("NET_DEVICES", options_.net_devices);
  for (const auto& [key, value] : settings) {
    status = ucp_config_modify(config.get(), key.c_str(), value.c_str());
    if (status != UCS_OK) return InvalidArgument("ucx: " + key + "=" + value + ": " + ucs_status_string(status));
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  params.name = options_.name.c_str();
  status = ucp_init(&params, config.get(), &context_);
  if (status != UCS_OK) {
    return Unavailable("ucx: no transport for tls=" + options_.tls + " net_devices=" + options_.net_devices + ": " +
                       ucs_status_string(status));
  }
  return OkStatus();
}

Status UcxWire::OpenWorker() {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucs_status_t status = ucp_worker_create(context_, &params, &worker_);
  if (status != UCS_OK) {
    return Unavailable("ucx: no worker for tls=" + options_.tls + " net_devices=" + options_.net_devices + ": " +
                       ucs_status_string(status));
  }
  status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) return FromUcs(status, "event descriptor");
  ucp_worker_attr_t attr{};
  attr.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS | UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
  status = ucp_worker_query(worker_, &attr);
  if (status != UCS_OK) return FromUcs(status, "worker address");
  process_ = ThisProcess(HasSharedMemory(context_));
  address_.bytes = EncodeUcxAddress({process_, {reinterpret_cast<const char*>(attr.address), attr.address_length}});
  ucp_worker_release_address(worker_, attr.address);
  if (attr.max_am_header < kFrameHeaderBytes) {
    return Unavailable("ucx: active message headers of at most " + std::to_string(attr.max_am_header) +
                       " bytes are too small");
  }
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kAmId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = &UcxWire::OnActiveMessage;
  handler.arg = this;
  status = ucp_worker_set_am_recv_handler(worker_, &handler);
  return status == UCS_OK ? OkStatus() : FromUcs(status, "active message handler");
}

UcxWire::~UcxWire() {
  ZEROC_CHECK(links_.empty(), links_.size());
  // Of links whose peer let their time pass. UCX 1.13 aborts in ucp_worker_destroy over a close that has an owner yet.
  for (const auto& link : closing_) {
    for (void* const request : {link->drain_request, link->close_request}) {
      if (request != nullptr) ucp_request_free(request);
    }
  }
  if (arena_memory_ != nullptr) ucp_mem_unmap(context_, arena_memory_);
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  if (context_ != nullptr) ucp_cleanup(context_);
}

Result<UcxWire::Arena> UcxWire::MapArena(std::byte* memory, std::uint64_t bytes) {
  ucp_mem_map_params_t params{};
  params.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_FLAGS;
  params.address = memory;
  params.length = bytes;
  params.flags = memory == nullptr ? UCP_MEM_MAP_ALLOCATE : 0;
  const std::string what = "arena of " + std::to_string(bytes) + " bytes";
  ucs_status_t status = ucp_mem_map(context_, &params, &arena_memory_);
  if (status != UCS_OK) return FromUcs(status, what);
  ucp_mem_attr_t attr{};
  attr.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  status = ucp_mem_query(arena_memory_, &attr);
  if (status != UCS_OK) return FromUcs(status, what);
  void* key = nullptr;
  std::size_t key_bytes = 0;
  status = ucp_rkey_pack(context_, arena_memory_, &key, &key_bytes);
  if (status != UCS_OK) return FromUcs(status, what + ": remote key");
  Arena arena;
  arena.bytes = {static_cast<std::byte*>(attr.address), bytes};
  arena.published.key = SealUcx({static_cast<const char*>(key), key_bytes});
  arena.published.base = reinterpret_cast<std::uintptr_t>(attr.address);
  arena.published.bytes = bytes;
  ucp_rkey_buffer_release(key);
  return arena;
}

// ---- progress ----

double UcxWire::NowSeconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool UcxWire::Progress() {
  int moved = 0;
  while (moved < kProgressMax && ucp_worker_progress(worker_) != 0) ++moved;
  bool any = moved > 0;
  CheckPeersAlive();
  any |= DeliverDeferred();
  any |= AdvanceClosing();
  return any;
}

// What UCX's callbacks left for later, because end-points may not be made or closed inside of them.
bool UcxWire::DeliverDeferred() {
  const auto failed = std::exchange(failed_, {});
  for (const auto& [peer, status] : failed) core_->OnLinkFailed(peer, status);
  const auto hellos = std::exchange(deferred_hellos_, {});
  for (const auto& [header, payload] : hellos) core_->OnFrame(header, payload);
  return !failed.empty() || !hellos.empty();
}

int UcxWire::PollTimeoutMs() const {
  if (WaitsForRoom()) return kSoonPollMs;
  for (const auto& link : closing_) {
    if (link->closed) return kSoonPollMs;
  }
  return links_.empty() && closing_.empty() ? -1 : kIdlePollMs;
}

bool UcxWire::WaitsForRoom() const {
  for (const auto& [peer, link] : links_) {
    if (link->local && !link->requests.empty()) return true;
  }
  return false;
}

bool UcxWire::Arm() { return ucp_worker_arm(worker_) == UCS_OK; }

// ---- links ----

Status UcxWire::Open(PeerId peer, const PeerAddress& address) {
  UcxAddress remote;
  ZEROC_ASSIGN_OR_RETURN(remote, DecodeUcxAddress(address.bytes));
  auto link = std::make_unique<Link>();
  link->wire = this;
  link->peer = peer;
  if (process_.shared_memory && remote.process.shared_memory && process_.host == remote.process.host) {
    const auto watched = WatchProcess(remote.process);
    if (!watched.ok() && watched.status().code() == StatusCode::kUnavailable) return watched.status();
    link->local = watched.ok();  // who cannot be watched is reached over a transport that reports failures
    if (watched.ok()) link->process_fd = *watched;
  }
  ZEROC_RETURN_IF_ERROR(CreateEndpoint(*link, remote.worker));
  if (link->local && !AllLanesLocal(UcxLanes(link->ep))) {
    // Nothing was sent on it yet. Network lanes need UCX's failure handling.
    ucp_request_param_t param{};
    const ucs_status_ptr_t closing = ucp_ep_close_nbx(link->ep, &param);
    if (UCS_PTR_IS_PTR(closing)) ucp_request_free(closing);
    link->local = false;
    ZEROC_RETURN_IF_ERROR(CreateEndpoint(*link, remote.worker));
  }
  links_[peer] = std::move(link);
  return OkStatus();
}

Status UcxWire::CreateEndpoint(Link& link, const std::string& worker_address) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.address = reinterpret_cast<const ucp_address_t*>(worker_address.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_NONE;
  if (!link.local) {
    params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &UcxWire::OnEndpointError;
    params.err_handler.arg = &link;
  }
  const ucs_status_t status = ucp_ep_create(worker_, &params, &link.ep);
  return status == UCS_OK ? OkStatus() : FromUcs(status, "end-point");
}

void UcxWire::AppendWatched(std::vector<pollfd>& fds) const {
  for (const auto& [peer, link] : links_) {
    if (link->process_fd >= 0 && !link->failed) fds.push_back({link->process_fd, POLLIN, 0});
  }
}

void UcxWire::CheckPeersAlive() {
  const double now = NowSeconds();
  if (now < next_alive_check_) return;
  next_alive_check_ = now + kAliveCheckSeconds;
  for (const auto& [peer, link] : links_) {
    pollfd fd{link->process_fd, POLLIN, 0};
    if (link->process_fd < 0 || link->failed || ::poll(&fd, 1, 0) <= 0) continue;
    link->failed = true;
    failed_.emplace_back(peer, Unavailable("ucx: its process has died"));
  }
}

Result<Delivery> UcxWire::ChooseDelivery(PeerId peer, const RemoteArena& arena) {
  Link& link = *links_.at(peer);
  std::string key;
  ZEROC_ASSIGN_OR_RETURN(key, UnsealUcx(arena.key, "arena key"));
  const ucs_status_t status = ucp_ep_rkey_unpack(link.ep, key.data(), &link.rkey);
  if (status != UCS_OK) return FromUcs(status, "arena key");
  link.remote_base = arena.base;
  void* mapped = nullptr;
  link.puts = ucp_rkey_ptr(link.rkey, arena.base, &mapped) == UCS_OK || HasRdmaPutLane(UcxLanes(link.ep));
  return link.puts ? Delivery::kPut : Delivery::kActiveMessage;
}

std::string UcxWire::Describe(PeerId peer) const { return LaneSummary(UcxLanes(links_.at(peer)->ep)); }

UcxWire::Link* UcxWire::FindUsable(PeerId peer) {
  const auto it = links_.find(peer);
  return it == links_.end() || it->second->failed ? nullptr : it->second.get();
}

// ---- requests ----

template <typename Post>
void UcxWire::PostRequest(Link& link, Done done, Post post) {
  auto* request = new Request{&link, std::move(done), {}, {}};
  link.requests.insert(request);
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &UcxWire::OnSent;
  param.user_data = request;
  const ucs_status_ptr_t result = post(*request, param);
  if (UCS_PTR_IS_ERR(result)) return FinishRequest(request, FromUcs(UCS_PTR_STATUS(result), "post"));
  if (result == nullptr) FinishRequest(request, OkStatus());
}

void UcxWire::FinishRequest(Request* request, const Status& status) {
  const std::unique_ptr<Request> owned(request);
  request->link->requests.erase(request);
  if (request->payload.size() > kSmallPayload && spare_payloads_.size() < kSparePayloadsMax) {
    spare_payloads_.push_back(std::move(request->payload));
  }
  if (request->done) request->done(status);
}

void UcxWire::OnSent(void* ucx_request, ucs_status_t status, void* user_data) {
  auto* request = static_cast<Request*>(user_data);
  request->link->wire->FinishRequest(request, status == UCS_OK ? OkStatus() : FromUcs(status, "send"));
  ucp_request_free(ucx_request);
}

void UcxWire::SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) {
  Link* link = FindUsable(peer);
  if (link == nullptr) return done(Unavailable("the end-point has failed"));
  PostRequest(*link, std::move(done), [&](Request& request, ucp_request_param_t& param) {
    request.header = EncodeFrameHeader(header);
    if (!spare_payloads_.empty() && payload.size() > kSmallPayload) {
      request.payload = std::move(spare_payloads_.back());
      spare_payloads_.pop_back();
    }
    request.payload.assign(payload.begin(), payload.end());
    // Eager: the receiver then holds a piece whole when it is asked, so the check and the copy are one step.
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = UCP_AM_SEND_FLAG_EAGER;
    return ucp_am_send_nbx(link->ep, kAmId, request.header.data(), request.header.size(), request.payload.data(),
                           request.payload.size(), &param);
  });
}

void UcxWire::Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) {
  Link* link = FindUsable(peer);
  if (link == nullptr) return done(Unavailable("the end-point has failed"));
  PostRequest(*link, std::move(done), [&](Request&, ucp_request_param_t& param) {
    return ucp_put_nbx(link->ep, local.data(), local.size(), link->remote_base + remote_offset, link->rkey, &param);
  });
}

void UcxWire::FlushPuts(PeerId peer, Done done) {
  Link* link = FindUsable(peer);
  if (link == nullptr) return done(Unavailable("the end-point has failed"));
  PostRequest(*link, std::move(done),
              [&](Request&, ucp_request_param_t& param) { return ucp_ep_flush_nbx(link->ep, &param); });
}

// ---- UCX's callbacks ----

void UcxWire::OnEndpointError(void* arg, ucp_ep_h, ucs_status_t status) {
  Link* link = static_cast<Link*>(arg);
  if (link->failed) return;
  link->failed = true;
  link->wire->failed_.emplace_back(link->peer, FromUcs(status, "end-point failed"));
}

ucs_status_t UcxWire::OnActiveMessage(void* arg, const void* header, size_t header_length, void* data, size_t length,
                                      const ucp_am_recv_param_t* param) {
  auto* wire = static_cast<UcxWire*>(arg);
  const std::span<const std::byte> head(static_cast<const std::byte*>(header), header_length);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0) {
    const std::span<const std::byte> payload(static_cast<const std::byte*>(data), length);
    const bool hello = head.size() == kFrameHeaderBytes && head[4] == static_cast<std::byte>(FrameKind::kHello);
    if (!hello) {
      wire->core_->OnFrame(head, payload);
    } else if (wire->deferred_hellos_.size() < kDeferredHellosMax &&
               length <= kPeerAddressBytesMax + 2 * kPeerNameBytesMax) {
      auto& [copied_header, copy] = wire->deferred_hellos_.emplace_back();
      std::copy(head.begin(), head.end(), copied_header.begin());
      copy.assign(payload.begin(), payload.end());
    }
    return UCS_OK;
  }
  // A rendezvous is offered: not by our own sender, but UCX may be configured to. Only a piece has room for it.
  const auto target = wire->core_->BeginPiece(head, length);
  if (!target) return UCS_OK;  // UCX tells the sender that it is over
  auto* receive = new Receive{wire, *target};
  ucp_request_param_t receive_param{};
  receive_param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  receive_param.cb.recv_am = &UcxWire::OnReceived;
  receive_param.user_data = receive;
  const ucs_status_ptr_t result = ucp_am_recv_data_nbx(wire->worker_, data, target->to, length, &receive_param);
  if (result == nullptr || UCS_PTR_IS_ERR(result)) {
    wire->core_->EndPiece(*target, result == nullptr ? OkStatus() : FromUcs(UCS_PTR_STATUS(result), "receive"));
    delete receive;
  }
  return UCS_OK;
}

void UcxWire::OnReceived(void* request, ucs_status_t status, size_t, void* user_data) {
  const std::unique_ptr<Receive> receive(static_cast<Receive*>(user_data));
  receive->wire->core_->EndPiece(receive->target, status == UCS_OK ? OkStatus() : FromUcs(status, "receive"));
  ucp_request_free(request);
}

}  // namespace zeroc
