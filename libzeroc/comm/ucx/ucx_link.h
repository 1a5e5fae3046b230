// One end-point of a UcxWire and what is under way on it. Private to comm/ucx.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "libzeroc/comm/ucx/ucx_wire.h"

namespace zeroc {

struct UcxWire::Link {
  UcxWire* wire = nullptr;
  PeerId peer = PeerId::kNone;
  ucp_ep_h ep = nullptr;
  ucp_rkey_h rkey = nullptr;
  std::uint64_t remote_base = 0;
  bool failed = false;
  bool local = false;  // shared memory: UCX reports no failures, we watch the process
  int process_fd = -1;
  std::unordered_set<Request*> requests;

  ~Link();
  bool puts = false;  // one-sided writes read the caller's memory
  // closing
  void* drain_request = nullptr;
  void* close_request = nullptr;
  bool drain_started = false;
  bool close_started = false;
  double close_deadline = 0;
  Done closed;  // empty: the core has been told
};

struct UcxWire::Request {
  Link* link = nullptr;
  Done done;                // empty: already answered, the link was abandoned
  FrameHeaderBytes header;  // UCX 1.13 reads it until the request is over
  // Always our own copy: a peer that stopped cannot be cancelled in time (AdvanceClosing), but the caller's bytes must
  // be free when Close says so. Costs one pass over the piece; measured in bench/transport_bench.cc.
  std::vector<std::byte> payload;
};

inline UcxWire::Link::~Link() {
  if (process_fd >= 0) ::close(process_fd);
  for (Request* request : requests) delete request;  // of an abandoned link, after its worker is gone
}

}  // namespace zeroc
