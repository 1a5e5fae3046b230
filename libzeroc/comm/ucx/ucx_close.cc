// How a UcxWire lets go of its end-points.
//
// UCX 1.13 survives a forced close of a TCP end-point only when nothing is left to send on it or it has failed already:
// otherwise it keeps half of the connection, and frees it inside its own event loop when the peer goes (seen as a crash
// in uct_tcp_iface_progress). So a link drains first. If the peer does not take the bytes in time (stopped), the core
// is told that the link is closed all the same, and the end-point is closed later, when it has drained or failed.

#include <algorithm>
#include <utility>

#include "libzeroc/comm/ucx/ucx_link.h"

namespace zeroc {
namespace {

constexpr double kDeadCloseSeconds = 0.1;  // for UCX to finish with a local peer that is dead already

}  // namespace

void UcxWire::Close(PeerId peer, Done closed) {
  auto node = links_.extract(peer);
  if (node.empty()) return closed(OkStatus());
  std::unique_ptr<Link> link = std::move(node.mapped());
  link->closed = std::move(closed);
  const double patience = options_.close_timeout_ms * 0.5e-3;
  link->close_deadline =
      NowSeconds() + (link->local && link->failed ? std::min(patience, kDeadCloseSeconds) : patience);
  closing_.push_back(std::move(link));
}

// True when the end-point may be closed now.
bool UcxWire::Drained(Link& link) {
  if (!link.local && (link.failed || link.puts)) return true;
  if (!link.requests.empty()) return false;
  if (link.local) return true;  // its close drains by itself
  if (!link.drain_started) {
    link.drain_started = true;
    ucp_request_param_t param{};
    link.drain_request = ucp_ep_flush_nbx(link.ep, &param);
    if (UCS_PTR_IS_ERR(link.drain_request)) link.drain_request = nullptr;
  }
  if (link.drain_request == nullptr) return true;
  if (ucp_request_check_status(link.drain_request) == UCS_INPROGRESS) return false;
  ucp_request_free(link.drain_request);
  link.drain_request = nullptr;
  return true;
}

// True when UCX has let go of the link.
bool UcxWire::Closed(Link& link) {
  if (!link.close_started) {
    if (!Drained(link)) return false;
    link.close_started = true;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = link.local ? 0 : UCP_EP_CLOSE_FLAG_FORCE;  // force needs UCX's failure handling
    link.close_request = ucp_ep_close_nbx(link.ep, &param);
    if (UCS_PTR_IS_ERR(link.close_request)) link.close_request = nullptr;
  }
  if (link.drain_request != nullptr && ucp_request_check_status(link.drain_request) != UCS_INPROGRESS) {
    ucp_request_free(link.drain_request);
    link.drain_request = nullptr;
  }
  if (link.close_request != nullptr && ucp_request_check_status(link.close_request) != UCS_INPROGRESS) {
    ucp_request_free(link.close_request);
    link.close_request = nullptr;
  }
  return link.close_request == nullptr && link.drain_request == nullptr && link.requests.empty();
}

bool UcxWire::AdvanceClosing() {
  std::vector<std::unique_ptr<Link>> closing = std::exchange(closing_, {});
  bool any = false;
  for (std::unique_ptr<Link>& link : closing) {
    const bool over = Closed(*link);
    if (link->closed && (over || NowSeconds() >= link->close_deadline)) {
      any = true;
      for (Request* request : std::vector<Request*>(link->requests.begin(), link->requests.end())) {
        if (const Done done = std::exchange(request->done, nullptr)) done(Cancelled("ucx: not over in time"));
      }
      std::exchange(link->closed, nullptr)(OkStatus());
    }
    if (!over) {
      closing_.push_back(std::move(link));
    } else if (link->rkey != nullptr) {
      ucp_rkey_destroy(link->rkey);
    }
  }
  return any;
}

}  // namespace zeroc
