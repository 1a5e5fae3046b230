// Which transports UCX chose for an end-point. UCX 1.13 has no query for it, so its printed description is read.
#pragma once

#include <ucp/api/ucp.h>

#include <string>
#include <string_view>
#include <vector>

namespace zeroc {

struct UcxLane {
  std::string transport;           // "tcp", "posix", "rc_mlx5"
  std::string device;              // "lo", "memory", "mlx5_0:1"
  std::vector<std::string> roles;  // "am", "rma", "rma_bw#0", ...
};

std::vector<UcxLane> UcxLanes(ucp_ep_h ep);
std::vector<UcxLane> ParseUcxLanes(std::string_view description);

// Every lane stays on this host (shared memory, or the process itself); false for no lanes.
bool AllLanesLocal(const std::vector<UcxLane>& lanes);

// The context's device list has shared-memory transports that can carry active messages.
bool HasSharedMemory(ucp_context_h context);

// An RDMA network lane (not TCP, not emulated) that carries one-sided writes.
bool HasRdmaPutLane(const std::vector<UcxLane>& lanes);

// "tcp (lo)", "posix+cma", "unknown lanes" if the description could not be read. Each transport once.
std::string LaneSummary(const std::vector<UcxLane>& lanes);

}  // namespace zeroc
