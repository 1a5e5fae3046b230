// UcxWire: end-points, active messages and puts of one UCX worker beneath a TransportCore. Private to comm/ucx.
// Owner thread only, except where said. Progress() is the only place that enters UCX's progress; nothing calls into the
// core or closes and creates end-points from inside UCX's callbacks except to hand over received bytes.
#pragma once

#include <poll.h>
#include <ucp/api/ucp.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport_core.h"
#include "libzeroc/comm/ucx/ucx_host.h"
#include "libzeroc/comm/ucx/ucx_transport.h"
#include "libzeroc/comm/wire.h"

namespace zeroc {

class UcxWire final : public Wire {
 public:
  static Result<std::unique_ptr<UcxWire>> Open(const UcxTransportOptions& options);
  ~UcxWire() override;  // every link is closed

  void SetCore(TransportCore* core) { core_ = core; }

  // memory == nullptr: UCX allocates. Once.
  struct Arena {
    std::span<std::byte> bytes;
    RemoteArena published;
  };
  Result<Arena> MapArena(std::byte* memory, std::uint64_t bytes);

  // Moves everything that can move without waiting. True if something did.
  bool Progress();
  // Milliseconds after which Progress should be called though no event came; -1: none.
  int PollTimeoutMs() const;
  int event_fd() const { return event_fd_; }
  // Bytes wait for room in a shared-memory queue, which UCX announces by no event: progress again soon.
  bool WaitsForRoom() const;
  // Prepares to sleep on event_fd(). False: something is there already, progress again.
  bool Arm();
  // Descriptors of watched peer processes, to sleep on as well.
  void AppendWatched(std::vector<pollfd>& fds) const;

  double NowSeconds() const override;
  const PeerAddress& LocalAddress() const override { return address_; }
  Status Open(PeerId peer, const PeerAddress& address) override;
  Result<Delivery> ChooseDelivery(PeerId peer, const RemoteArena& arena) override;
  std::string Describe(PeerId peer) const override;
  void SendFrame(PeerId peer, const FrameHeader& header, std::span<const std::byte> payload, Done done) override;
  void Put(PeerId peer, std::span<const std::byte> local, std::uint64_t remote_offset, Done done) override;
  void FlushPuts(PeerId peer, Done done) override;
  void Close(PeerId peer, Done closed) override;

 private:
  struct Link;
  struct Request;
  struct Receive;

  explicit UcxWire(const UcxTransportOptions& options);
  Status OpenContext();
  Status OpenWorker();

  // Calls `post(request, param)` with a new request of `link` and finishes it at once when UCX did.
  template <typename Post>
  void PostRequest(Link& link, Done done, Post post);
  void FinishRequest(Request* request, const Status& status);
  Link* FindUsable(PeerId peer);
  Status CreateEndpoint(Link& link, const std::string& worker_address);
  void CheckPeersAlive();
  bool Drained(Link& link);
  bool Closed(Link& link);
  bool AdvanceClosing();
  bool DeliverDeferred();

  static void OnSent(void* request, ucs_status_t status, void* user_data);
  static void OnReceived(void* request, ucs_status_t status, size_t length, void* user_data);
  static void OnEndpointError(void* arg, ucp_ep_h ep, ucs_status_t status);
  static ucs_status_t OnActiveMessage(void* arg, const void* header, size_t header_length, void* data, size_t length,
                                      const ucp_am_recv_param_t* param);

  const UcxTransportOptions options_;
  TransportCore* core_ = nullptr;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  PeerAddress address_;
  ProcessIdentity process_;
  double next_alive_check_ = 0;
  ucp_mem_h arena_memory_ = nullptr;

  std::map<PeerId, std::unique_ptr<Link>> links_;
  std::vector<std::unique_ptr<Link>> closing_;  // some of them closed for the core already
  std::vector<std::vector<std::byte>> spare_payloads_;
  std::vector<std::pair<PeerId, Status>> failed_;
  std::vector<std::pair<FrameHeaderBytes, std::vector<std::byte>>> deferred_hellos_;
};

}  // namespace zeroc
