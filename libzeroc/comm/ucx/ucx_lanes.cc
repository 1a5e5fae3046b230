#include "libzeroc/comm/ucx/ucx_lanes.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace zeroc {

namespace {

template <typename Print>
std::string Printed(Print print) {
  char* text = nullptr;
  std::size_t size = 0;
  std::FILE* stream = open_memstream(&text, &size);
  if (stream == nullptr) return {};
  print(stream);
  std::fclose(stream);
  std::string printed(text, size);
  std::free(text);
  return printed;
}

bool IsLocal(std::string_view transport) {
  for (const std::string_view local : {"posix", "sysv", "self", "cma", "knem", "xpmem"}) {
    if (transport == local) return true;
  }
  return false;
}

}  // namespace

std::vector<UcxLane> UcxLanes(ucp_ep_h ep) {
  return ParseUcxLanes(Printed([ep](std::FILE* stream) { ucp_ep_print_info(ep, stream); }));
}

bool AllLanesLocal(const std::vector<UcxLane>& lanes) {
  return !lanes.empty() &&
         std::all_of(lanes.begin(), lanes.end(), [](const UcxLane& lane) { return IsLocal(lane.transport); });
}

bool HasSharedMemory(ucp_context_h context) {
  const std::string info = Printed([context](std::FILE* stream) { ucp_context_print_info(context, stream); });
  return info.find("posix/") != std::string::npos || info.find("sysv/") != std::string::npos;
}

// Lines such as
//   #                 lane[0]:  1:tcp/lo.0 md[1]         -> md[1]/tcp/sysdev[255] rma_bw#0 am am_bw#0 wireup
std::vector<UcxLane> ParseUcxLanes(std::string_view description) {
  std::vector<UcxLane> lanes;
  std::istringstream lines{std::string(description)};
  for (std::string line; std::getline(lines, line);) {
    const std::size_t at = line.find("lane[");
    if (at == std::string::npos) continue;
    std::istringstream words(line.substr(at));
    std::string lane_name, resource, word;
    words >> lane_name >> resource;
    const std::size_t colon = resource.find(':');
    const std::size_t slash = resource.find('/');
    if (colon == std::string::npos || slash == std::string::npos || slash < colon) continue;
    UcxLane lane;
    lane.transport = resource.substr(colon + 1, slash - colon - 1);
    lane.device = resource.substr(slash + 1);
    lane.device.erase(std::min(lane.device.size(), lane.device.rfind('.')));
    bool after_remote = false;
    while (words >> word) {
      if (after_remote) lane.roles.push_back(word);
      if (word.starts_with("md[") && word.find('/') != std::string::npos) after_remote = true;
    }
    lanes.push_back(std::move(lane));
  }
  return lanes;
}

bool HasRdmaPutLane(const std::vector<UcxLane>& lanes) {
  return std::any_of(lanes.begin(), lanes.end(), [](const UcxLane& lane) {
    const bool rdma = lane.transport.starts_with("rc_") || lane.transport.starts_with("dc_") ||
                      lane.transport == "dc" || lane.transport == "rc";
    return rdma && std::any_of(lane.roles.begin(), lane.roles.end(),
                               [](const std::string& role) { return role == "rma" || role.starts_with("rma#"); });
  });
}

std::string LaneSummary(const std::vector<UcxLane>& lanes) {
  std::string summary;
  std::vector<std::string> seen;
  for (const UcxLane& lane : lanes) {
    const std::string text = lane.device == "memory" ? lane.transport : lane.transport + " (" + lane.device + ")";
    if (std::find(seen.begin(), seen.end(), text) != seen.end()) continue;
    seen.push_back(text);
    summary += (summary.empty() ? "" : "+") + text;
  }
  return summary.empty() ? "unknown lanes" : summary;
}

}  // namespace zeroc
