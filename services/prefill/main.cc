// zeroc-prefill: computes prompts and sends their keys and values to decode workers.
#include "services/prefill/prefill_rpc.h"
#include "services/worker/worker.h"

int main(int argc, char** argv) {
  using namespace zeroc;  // NOLINT: main is not in the namespace
  WorkerOptions options;
  std::int64_t chunk_tokens = 512;
  std::int64_t queue_max = 64;
  return WorkerMain(
      argc, argv, WorkerKind::kPrefill, &options,
      [&](OptionSet* set) {
        set->AddInt("chunk_tokens", &chunk_tokens, 64, 1 << 16,
                    {"tokens", "Prompt tokens of one step, a multiple of 64."});
        set->AddInt("queue_max", &queue_max, 1, 1 << 16, {"requests", "Prompts that may wait; more are refused."});
      },
      [&] { return chunk_tokens % 64 == 0 ? OkStatus() : InvalidArgument("--chunk-tokens is not a multiple of 64"); },
      [&](const WorkerParts& parts) -> Result<std::unique_ptr<WorkerService>> {
        PrefillCore::Options core_options;
        core_options.prefix_cache_share = parts.options.prefix_cache ? parts.options.prefix_cache_share : 0;
        core_options.kv_bytes = static_cast<std::uint64_t>(parts.options.kv_memory_mib) << 20;
        core_options.chunk_tokens = static_cast<int>(chunk_tokens);
        core_options.queue_max = static_cast<int>(queue_max);
        ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<PrefillCore> core,
                               PrefillCore::Create(core_options, parts.model, parts.metrics, parts.transport));
        return MakePrefillService(std::move(core));
      });
}
