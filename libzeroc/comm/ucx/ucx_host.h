// Which process on which host: decides whether a peer can be reached over shared memory, and watches it live.
//
// UCX 1.13 has no failure handling on shared memory: end-points with UCP_ERR_HANDLING_MODE_PEER never choose it. For
// peers on the same host we take the mode without it and watch the peer's process ourselves, through a process
// descriptor that becomes readable the moment the process dies. Pure functions of the system's state. Any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "libzeroc/base/status.h"

namespace zeroc {

struct ProcessIdentity {
  // Hash of boot id, process and IPC namespace: equal means that a pid means the same and shared memory is shared.
  std::uint64_t host = 0;
  std::uint64_t start = 0;  // the kernel's start time of the process, so that a reused pid is not mistaken for it
  std::uint32_t pid = 0;
  bool shared_memory = false;  // its UCX has shared-memory transports
};

ProcessIdentity ThisProcess(bool shared_memory);

// A descriptor that polls readable when the process has died; the caller closes it. kUnavailable: it is dead already.
// kUnimplemented: the kernel or a sandbox has no process descriptors.
Result<int> WatchProcess(const ProcessIdentity& process);

// What a transport publishes: identity and UCX's worker address, sealed.
struct UcxAddress {
  ProcessIdentity process;
  std::string worker;
};
std::string EncodeUcxAddress(const UcxAddress& address);
Result<UcxAddress> DecodeUcxAddress(std::string_view sealed);  // kInvalidArgument

}  // namespace zeroc
