// zeroc-prefill: computes prompts and sends their keys and values to decode workers.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/model/cuda/cuda_transformer.h"
#include "services/common/registrations.h"
#include "services/prefill/prefill_rpc.h"
#include "services/worker/worker.h"

namespace zeroc {
namespace {

Result<std::vector<std::string>> ParseFollowers(const std::string& text) {
  std::vector<std::string> followers;
  if (text.empty()) return followers;
  ZEROC_ASSIGN_OR_RETURN(const std::vector<HostPort> parsed, ParseHostPorts(text));
  if (parsed.size() >= Communicator::kRanksMax) {
    return InvalidArgument("--sp-followers names " + std::to_string(parsed.size()) + ", a group has at most " +
                           std::to_string(Communicator::kRanksMax - 1));
  }
  for (const auto& [host, port] : parsed) {
    const std::string bracketed = host.find(':') == std::string::npos ? host : "[" + host + "]";
    const std::string follower = bracketed + ":" + std::to_string(port);
    if (std::find(followers.begin(), followers.end(), follower) != followers.end()) {
      return InvalidArgument("--sp-followers names " + follower + " twice");
    }
    followers.push_back(follower);
  }
  return followers;
}

}  // namespace
}  // namespace zeroc

int main(int argc, char** argv) {
  using namespace zeroc;  // NOLINT: main is not in the namespace
  WorkerOptions options;
  std::int64_t chunk_tokens = 512;
  std::int64_t queue_max = 64;
  std::string sp_followers;
  std::string sp_scheme = "auto";
  std::int64_t sp_patience_ms = 10'000;
  PrefillGroupOptions group;
  return WorkerMain(
      argc, argv, WorkerKind::kPrefill, &options,
      [&](OptionSet* set) {
        set->AddInt("chunk_tokens", &chunk_tokens, 64, 1 << 16,
                    {"tokens", "Prompt tokens of one step, a multiple of 64."});
        set->AddInt("queue_max", &queue_max, 1, 1 << 16, {"requests", "Prompts that may wait; more are refused."});
        set->AddString("sp_followers", &sp_followers,
                       {"host:port,..", "gRPC addresses of the workers that compute long prompts with this one."});
        set->AddString("sp_scheme", &sp_scheme,
                       {"", "What they exchange: auto, allgather, ring, ulysses or ulysses8 (not exact)."});
        set->AddInt("sp_patience_ms", &sp_patience_ms, 100, 3'600'000,
                    {"ms", "Longest wait for one of them, for an answer or a layer; then the group ends."});
      },
      [&]() -> Status {
        if (chunk_tokens % 64 != 0) return InvalidArgument("--chunk-tokens is not a multiple of 64");
        ZEROC_ASSIGN_OR_RETURN(group.scheme, SpSchemeFromName(sp_scheme));
        ZEROC_ASSIGN_OR_RETURN(group.followers, ParseFollowers(sp_followers));
        if (options.backend == "cuda" && !group.followers.empty()) {
          return InvalidArgument("--sp-followers: groups compute on the CPU only as yet, --backend is cuda");
        }
        group.patience = std::chrono::milliseconds(sp_patience_ms);
        return OkStatus();
      },
      [&](const WorkerParts& parts) -> Result<std::unique_ptr<WorkerService>> {
        PrefillCore::Options core_options;
        core_options.prefix_cache_share = parts.options.prefix_cache ? parts.options.prefix_cache_share : 0;
        core_options.kv_bytes = static_cast<std::uint64_t>(parts.options.kv_memory_mib) << 20;
        core_options.chunk_tokens = static_cast<int>(chunk_tokens);
        core_options.queue_max = static_cast<int>(queue_max);
        core_options.name = parts.options.name;
        core_options.group = group;
        ZEROC_ASSIGN_OR_RETURN(const Security security, LoadSecurity(parts.options.security));
        core_options.group.security = security.grpc;
        ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<PrefillCore> core,
                               PrefillCore::Create(core_options, parts.model, parts.metrics, parts.transport));
        return MakePrefillService(std::move(core));
      },
      OpenCudaTransformer);
}
