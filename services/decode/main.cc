// zeroc-decode: receives prompts' keys and values and generates.
#include "libzeroc/model/cuda/cuda_transformer.h"
#include "services/decode/decode_rpc.h"
#include "services/worker/worker.h"

int main(int argc, char** argv) {
  using namespace zeroc;  // NOLINT: main is not in the namespace
  WorkerOptions options;
  std::int64_t batch_max = 64;
  std::int64_t lease_expiry_ms = 30'000;
  std::int64_t swap_memory_mib = 1024;
  std::int64_t local_prefill_chunk_tokens = 256;
  return WorkerMain(
      argc, argv, WorkerKind::kDecode, &options,
      [&](OptionSet* set) {
        set->AddInt("batch_max", &batch_max, 1, 4096, {"requests", "Sequences of one decode step; more take turns."});
        set->AddInt("lease_expiry_ms", &lease_expiry_ms, 100, 600'000,
                    {"ms", "A lease without a sign of life from its prefill worker ends after this long."});
        set->AddInt("swap_memory_mib", &swap_memory_mib, 0, 1 << 20,
                    {"MiB", "Memory for the KV of preempted requests; beyond it they fail and the router retries."});
        set->AddInt("local_prefill_chunk_tokens", &local_prefill_chunk_tokens, 64, 1 << 16,
                    {"tokens", "Prompt tokens computed here between two decode steps, at most; a multiple of 64."});
      },
      [&] {
        return local_prefill_chunk_tokens % 64 == 0
                   ? OkStatus()
                   : InvalidArgument("--local-prefill-chunk-tokens is not a multiple of 64");
      },
      [&](const WorkerParts& parts) -> Result<std::unique_ptr<WorkerService>> {
        DecodeCore::Options core_options;
        core_options.prefix_cache_share = parts.options.prefix_cache ? parts.options.prefix_cache_share : 0;
        core_options.kv_bytes = static_cast<std::uint64_t>(parts.options.kv_memory_mib) << 20;
        core_options.batch_max = static_cast<int>(batch_max);
        core_options.lease_expiry_ms = lease_expiry_ms;
        core_options.swap_bytes = static_cast<std::uint64_t>(swap_memory_mib) << 20;
        core_options.local_prefill_chunk_tokens = static_cast<int>(local_prefill_chunk_tokens);
        ZEROC_ASSIGN_OR_RETURN(std::unique_ptr<DecodeCore> core,
                               DecodeCore::Create(core_options, parts.model, parts.metrics, parts.transport));
        return MakeDecodeService(std::move(core));
      },
      OpenCudaTransformer);
}
