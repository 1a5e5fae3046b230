// What a worker's prefix cache tells others: the engine's loop publishes, any thread reads.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "libzeroc/kv/prefix_cache.h"
#include "services/common/metrics.h"
#include "zeroc/v1/worker.pb.h"

namespace zeroc {

class PrefixHints {
 public:
  // 4 KiB in every heartbeat: the states of dozens of long prompts.
  static constexpr std::size_t kHashesMax = 512;

  // On the engine's thread, between steps; cheap while nothing changes.
  void Publish(const PrefixCache& cache, PrefixCache::Use use, int grain_tokens) {
    if (cache.version() == version_) return;
    version_ = cache.version();
    std::vector<std::uint64_t> hashes = cache.RecentHashes(use, grain_tokens, kHashesMax);
    const std::uint64_t bytes = cache.stats().bytes;
    MutexLock lock(mu_);
    hashes_ = std::move(hashes);
    bytes_ = bytes;
  }

  void FillLoad(v1::WorkerLoad* load) const {
    MutexLock lock(mu_);
    load->mutable_prefix_hashes()->Assign(hashes_.begin(), hashes_.end());
  }
  void UpdateGauges(Metrics& metrics) const {
    MutexLock lock(mu_);
    metrics.SetPrefixCacheBytes(static_cast<double>(bytes_));
  }

 private:
  std::uint64_t version_ = 0;  // published last; engine thread
  mutable Mutex mu_;
  std::vector<std::uint64_t> hashes_ ZEROC_GUARDED_BY(mu_);
  std::uint64_t bytes_ ZEROC_GUARDED_BY(mu_) = 0;
};

}  // namespace zeroc
