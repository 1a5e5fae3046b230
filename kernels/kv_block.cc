#include "kernels/kv_block.h"

namespace zeroc::kernels {
namespace {

bool IsValidScale(const KvRun& run) {
  return run.scale == KvScaleKind::kAffine || (run.scale == KvScaleKind::kShared && IsQuantised(run.bits));
}

int MetaBytes(const KvRun& run, int n_tokens) {
  if (!IsQuantised(run.bits)) return 0;
  return run.scale == KvScaleKind::kShared ? n_tokens / 2 : 2 * n_tokens;
}

// Appends one side at *offset: the codes of every run, then the meta of every quantised run.
bool FillSide(int head_dim, int n_tokens, const KvRun* runs, int n_runs, KvSideLayout* side, std::int32_t* offset) {
  if (runs == nullptr || n_runs < 1 || n_runs > kMaxRuns) return false;
  int coord = 0;
  side->n_runs = n_runs;
  for (int r = 0; r < n_runs; ++r) {
    const KvRun& run = runs[r];
    if (!IsValidBits(run.bits) || !IsValidScale(run)) return false;
    if (run.width < kTileDepth || run.width % kTileDepth != 0) return false;
    if (run.width > head_dim - coord) return false;
    side->runs[r] = run;
    side->first_coord[r] = coord;
    side->codes_offset[r] = *offset;
    coord += run.width;
    *offset += (n_tokens / kTileLanes) * (run.width / kTileDepth) * TileBytes(run.bits);
  }
  if (coord != head_dim) return false;
  for (int r = 0; r < n_runs; ++r) {
    side->meta_offset[r] = IsQuantised(runs[r].bits) ? *offset : -1;
    *offset += MetaBytes(runs[r], n_tokens);
  }
  return true;
}

// Appends the base codes of one side. True if there are any.
bool FillBases(KvSideLayout* side, std::int32_t* offset) {
  const std::int32_t begin = *offset;
  for (int r = 0; r < side->n_runs; ++r) {
    side->base_offset[r] = side->runs[r].scale == KvScaleKind::kShared ? (*offset)++ : -1;
  }
  return *offset != begin;
}

}  // namespace

bool MakeKvBlockLayout(int n_kv_heads, int head_dim, int n_tokens, const KvRun* k_runs, int n_k_runs,
                       const KvRun* v_runs, int n_v_runs, bool rotate_v, KvBlockLayout* layout) {
  // A head of f32 takes at most 2 * 64 * 256 * 4 bytes = 128 KiB, so 4096 heads stay far below 2^31.
  if (n_kv_heads < 1 || n_kv_heads > 4096 || head_dim < kTileDepth || head_dim > kMaxHeadDim) return false;
  if (head_dim % kTileDepth != 0 || (n_tokens != kBlockTokens && n_tokens != kSinkTokens)) return false;
  KvBlockLayout out;
  out.n_kv_heads = n_kv_heads;
  out.head_dim = head_dim;
  out.n_tokens = n_tokens;
  out.rotate_v = rotate_v;
  std::int32_t offset = 0;
  if (!FillSide(head_dim, n_tokens, k_runs, n_k_runs, &out.k, &offset)) return false;
  if (!FillSide(head_dim, n_tokens, v_runs, n_v_runs, &out.v, &offset)) return false;
  const bool k_shares = FillBases(&out.k, &offset);
  const bool v_shares = FillBases(&out.v, &offset);
  // Cache lines where nothing is lost by it; the bytes of a compressed block count.
  const int granule = k_shares || v_shares ? 16 : 64;
  out.head_bytes = offset;
  out.block_bytes = (n_kv_heads * offset + granule - 1) / granule * granule;
  *layout = out;
  return true;
}

}  // namespace zeroc::kernels
