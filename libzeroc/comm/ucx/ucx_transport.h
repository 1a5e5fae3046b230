// UcxTransport: the Transport over UCX 1.13 or newer: TCP, shared memory, RDMA.
//
// Delivery, decided per peer once the connection is up, from the lanes that UCX chose for it:
//   put  when the remote arena is mapped into this process (shared memory; needs AllocateArena at its owner), or the
//        end-point has a one-sided RDMA lane and the arena is registered with it;
//   am   otherwise: pieces in eager active messages, copied into the arena after the check. Never put over TCP: UCX
//        1.13 emulates it at 30 to 60 MB/s.
// The choice and the lanes are in PeerInfo::description ("am over tcp (lo)"); owners print it.
//
// Threads: one owner thread drives a worker of its own (UCS_THREAD_MODE_SERIALIZED, because it is made on the caller's
// thread) and sleeps on UCX's event descriptor when there is nothing to do.
// Failure: network end-points use UCP_ERR_HANDLING_MODE_PEER with keep-alive. UCX 1.13 offers no shared memory in that
// mode, so a peer on the same host (same boot, process and IPC namespace) gets an end-point without it and its process
// is watched by a process descriptor. Where that is not possible, UCX falls back to the network, and the description
// says so.
// Trust: frames, sizes and offsets are checked here, but UCX itself believes its peers. The data network must be
// private.
#pragma once

#include <memory>
#include <string>

#include "libzeroc/base/status.h"
#include "libzeroc/comm/transport.h"

namespace zeroc {

struct UcxTransportOptions : TransportOptions {
  std::string tls = "auto";           // UCX_TLS list ("tcp", "posix,cma"), or "auto": UCX's choice (on one host shm)
  std::string net_devices = "auto";   // UCX_NET_DEVICES list ("lo", "mlx5_0:1"), or "auto"
  int keepalive_interval_ms = 1'000;  // 100 to 60 000
};

// kInvalidArgument for bad options, kUnavailable when UCX finds no transport for them (an unknown device, no such
// library).
Result<std::unique_ptr<Transport>> CreateUcxTransport(const UcxTransportOptions& options, TransportListener& listener);

// Of the library at run time, "1.13.1"; printed at start.
std::string UcxVersion();

}  // namespace zeroc
