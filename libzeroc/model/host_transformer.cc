// The forward pass on this machine's processors.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/bf16.h"
#include "libzeroc/base/check.h"
#include "libzeroc/model/attention_plan.h"
#include "libzeroc/model/rope_tables.h"
#include "libzeroc/model/transformer.h"
#include "libzeroc/model/transformer_weights.h"

namespace zeroc {
namespace {

using kernels::kBlockTokens;
using kernels::KernelStatus;

constexpr std::int64_t kMlpRowsMax = 4096;  // enough for the matrix kernels

// Grows only; contents are not kept. Sized by the largest step so far.
template <typename T>
class Buffer {
 public:
  T* Get(std::size_t n) {
    if (data_.size() < n) data_.resize(n);
    return data_.data();
  }
  T* data() { return data_.data(); }

 private:
  std::vector<T> data_;
};

int CountTiers(const SequenceKv& kv) { return static_cast<int>(kv.format().tiers.size()); }

void Run(KernelStatus status, const char* op) {
  ZEROC_CHECK(status == KernelStatus::kOk, op, static_cast<int>(status));
}

// Weights, activations and the steps over them.
struct HostForward {
  const kernels::Ops& ops;
  ThreadPool& threads;
  ModelConfig config;
  TransformerWeights weights;
  RopeTables rope;

  // Activations of one step, [rows, ...]; "act" is the ops' own dtype.
  Buffer<float> x, qkv, q_prep, own_out, mlp;
  Buffer<std::uint8_t> act, act_wide;
  Buffer<std::int32_t> ids;
  AttentionWorkspace attention;

  HostForward(const kernels::Ops& o, ThreadPool& t) : ops(o), threads(t), attention(o, t) {}

  // Rows of consecutive positions: a sequence's new tokens, or one range of a rank's share of them.
  struct Piece {
    SequenceKv* kv;
    SequenceAttention* attention;
    SpStep* sp;
    int first_pos;
    std::span<const std::int32_t> tokens;
    int n_logits;  // of the last tokens
  };
  // A step's rows: piece i owns rows [row_begin[i], row_begin[i + 1]).
  struct Batch {
    std::vector<Piece> pieces;
    std::vector<std::int64_t> row_begin = {0};
    SpStep* sp = nullptr;  // of the only sequence, perhaps without pieces
    std::int64_t n_rows() const { return row_begin.back(); }
    bool attends_itself() const { return !pieces.empty() && pieces.front().attention != nullptr; }
  };

  struct LinearJob {
    const void* x;
    std::int64_t k;
    const LinearWeights* w;
    std::int64_t n_out;
    float* y;
    std::int64_t y_stride;
    bool accumulate;
  };

  std::int64_t q_width() const { return config.n_heads * config.head_dim; }
  std::int64_t kv_width() const { return config.n_kv_heads * config.head_dim; }
  std::int64_t qkv_width() const { return q_width() + 2 * kv_width(); }

  static Batch MakeBatch(std::span<const ForwardSequence> sequences);
  void FillRope(const Batch& batch);
  void Embed(const Batch& batch);
  template <typename Fn>
  void ForRows(std::int64_t n_rows, const Fn& run);
  void Norm(const float* rows, std::int64_t n_rows, const NormWeights& norm, void* out);
  void HeadNorm(float* rows, std::int64_t n_rows, std::int64_t n_heads, const Weight& gain);
  void Linear(std::int64_t n_rows, std::span<const LinearJob> jobs);
  void WriteKv(int layer, const Batch& batch);
  void PrepareQueries(int layer, const Batch& batch, const Batch& queries, const float* q, std::int64_t q_stride);
  void ShowProjections(int layer, const Batch& batch, ForwardObserver& observer);
  AttentionShape shape() const {
    return {static_cast<int>(config.n_heads), static_cast<int>(config.n_kv_heads), static_cast<int>(config.head_dim)};
  }
  Status AttendCached(int layer, const Batch& queries, bool all_rows, void* attended);
  void AttendItself(int layer, const Batch& batch, void* attended);
  Batch LogitRows(const Batch& batch) const;
  void KeepRows(const Batch& from, const Batch& to);
  void Activate(const float* wide, std::int64_t n_rows, void* out);
  void Mlp(const LayerWeights& w, float* rows, std::int64_t n_rows);
  Status Layer(int layer, const Batch& batch, const Batch& queries, ForwardObserver* observer);
  Status Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
              const LayerRange& layers);
};

HostForward::Batch HostForward::MakeBatch(std::span<const ForwardSequence> sequences) {
  Batch batch;
  for (const ForwardSequence& sequence : sequences) {
    const auto add = [&](int first_pos, std::span<const std::int32_t> tokens, int n_logits) {
      batch.pieces.push_back({sequence.kv, sequence.attention, sequence.sp, first_pos, tokens, n_logits});
      batch.row_begin.push_back(batch.row_begin.back() + std::ssize(tokens));
    };
    if (sequence.sp == nullptr) {
      add(sequence.kv != nullptr ? sequence.kv->n_tokens() : sequence.attention->n_tokens(), sequence.tokens,
          sequence.n_logits);
      continue;
    }
    batch.sp = sequence.sp;
    const std::vector<TokenRange> tokens = batch.sp->Tokens(batch.sp->rank());
    const std::vector<TokenRange> logits = batch.sp->LogitTokens(batch.sp->rank());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      add(tokens[i].begin,
          sequence.tokens.subspan(static_cast<std::size_t>(tokens[i].begin),
                                  static_cast<std::size_t>(tokens[i].size())),
          logits[i].size());
    }
  }
  return batch;
}

void HostForward::FillRope(const Batch& batch) {
  rope.Resize(batch.n_rows());
  threads.ParallelFor(batch.pieces.size(), [&](std::size_t i, int) {
    rope.Fill(batch.row_begin[i], batch.row_begin[i + 1], batch.pieces[i].first_pos);
  });
}

void HostForward::Embed(const Batch& batch) {
  if (batch.n_rows() == 0) return;
  std::int32_t* all = ids.Get(static_cast<std::size_t>(batch.n_rows()));
  for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
    std::copy(batch.pieces[i].tokens.begin(), batch.pieces[i].tokens.end(), all + batch.row_begin[i]);
  }
  float* out = x.Get(static_cast<std::size_t>(batch.n_rows() * config.hidden_size));
  Run(ops.embed({weights.embedding.data, all, batch.n_rows(), config.hidden_size, out}), "embed");
  if (config.has_rope()) return;
  for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
    const int first = TransformerWeights::kFirstPositionRow + batch.pieces[i].first_pos;
    std::iota(all + batch.row_begin[i], all + batch.row_begin[i + 1], first);
  }
  Run(ops.embed({weights.positions.data, all, batch.n_rows(), config.hidden_size, out, /*accumulate=*/true}), "embed");
}

// run(begin, n) for pieces of the rows, spread over the threads.
template <typename Fn>
void HostForward::ForRows(std::int64_t n_rows, const Fn& run) {
  const std::int64_t step = std::max<std::int64_t>(8, (n_rows + threads.size() - 1) / threads.size());
  threads.ParallelFor(static_cast<std::size_t>((n_rows + step - 1) / step), [&](std::size_t item, int) {
    const std::int64_t begin = static_cast<std::int64_t>(item) * step;
    run(begin, std::min(step, n_rows - begin));
  });
}

void HostForward::Norm(const float* rows, std::int64_t n_rows, const NormWeights& norm, void* out) {
  const std::int64_t hidden = config.hidden_size;
  ForRows(n_rows, [&](std::int64_t begin, std::int64_t n) {
    const float* from = rows + begin * hidden;
    void* to = static_cast<std::uint8_t*>(out) + begin * hidden * ops.act_bytes;
    if (config.norm == NormKind::kLayer) {
      Run(ops.layer_norm({from, norm.gain.data, norm.bias.data(), n, hidden, config.norm_eps, to}), "layer_norm");
    } else {
      Run(ops.rms_norm({from, norm.gain.data, n, hidden, config.norm_eps, to}), "rms_norm");
    }
  });
}

// QK-norm of n_heads heads at the front of every row of qkv. Nothing in models without it.
void HostForward::HeadNorm(float* rows, std::int64_t n_rows, std::int64_t n_heads, const Weight& gain) {
  if (!config.qk_norm) return;
  ForRows(n_rows, [&](std::int64_t begin, std::int64_t n) {
    Run(ops.head_norm(
            {rows + begin * qkv_width(), n, qkv_width(), n_heads, config.head_dim, gain.data, config.norm_eps}),
        "head_norm");
  });
}

void HostForward::Linear(std::int64_t n_rows, std::span<const LinearJob> jobs) {
  // Few rows: the weights' bytes are the cost, so cut finely for balance. Many rows: one piece per thread, in multiples
  // of 64 outputs, keeps the matrix kernel efficient.
  struct Slice {
    std::size_t job;
    std::int64_t begin, end;
  };
  std::vector<Slice> slices;
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const std::int64_t per_thread = n_rows <= 8 ? 4 : 1;
    const std::int64_t n_pieces = per_thread * threads.size();
    const std::int64_t step = std::max<std::int64_t>(64, (jobs[j].n_out / n_pieces + 63) / 64 * 64);
    for (std::int64_t begin = 0; begin < jobs[j].n_out; begin += step) {
      slices.push_back({j, begin, std::min(begin + step, jobs[j].n_out)});
    }
  }
  threads.ParallelFor(slices.size(), [&](std::size_t item, int) {
    const Slice& slice = slices[item];
    const LinearJob& job = jobs[slice.job];
    const float* bias = job.w->b.empty() ? nullptr : job.w->b.data();
    Run(ops.linear({job.x, n_rows, job.k, job.w->w.data, bias, job.n_out, slice.begin, slice.end, job.y, job.y_stride,
                    job.accumulate}),
        "linear");
  });
}

// RoPE, map, exact write and packing of every new token; a block is packed by the task that completes it, while it is
// still in the cache.
void HostForward::WriteKv(int layer, const Batch& batch) {
  struct Item {
    std::size_t piece;
    int head;
    int block;  // logical
  };
  std::vector<Item> items;
  for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
    const Piece& piece = batch.pieces[i];
    const int write_end = (piece.first_pos + static_cast<int>(piece.tokens.size()) - 1) / kBlockTokens + 1;
    int first = piece.first_pos / kBlockTokens;
    for (int tier = 0; piece.sp == nullptr && tier < CountTiers(*piece.kv); ++tier) {  // written in earlier steps
      if (piece.kv->pack_begin(tier) < piece.kv->pack_end(tier)) first = std::min(first, piece.kv->pack_begin(tier));
    }
    for (int block = first; block < write_end; ++block) {
      for (int head = 0; head < config.n_kv_heads; ++head) items.push_back({i, head, block});
    }
  }
  threads.ParallelFor(items.size(), [&](std::size_t item, int) {
    const auto [i, head, block] = items[item];
    const Piece& piece = batch.pieces[i];
    SequenceKv& kv = *piece.kv;
    const KvFormat& format = kv.format();
    const int begin = std::max(piece.first_pos, block * kBlockTokens);
    const int end = std::min(piece.first_pos + static_cast<int>(piece.tokens.size()), (block + 1) * kBlockTokens);
    if (begin < end) {
      const std::int64_t row = batch.row_begin[i] + (begin - piece.first_pos);
      const float* k = qkv.data() + row * qkv_width() + q_width();
      Run(ops.kv_write({k, k + kv_width(), qkv_width(), begin, end - begin, head, head + 1, rope.At(row),
                        format.KeyMap(layer), &format.exact,
                        kv.WriteBlocks(layer) + (block - kv.n_tokens() / kBlockTokens), format.KeyRotation(layer)}),
          "kv_write");
    }
    // From the exact block into the youngest tier, and on, each from the one before.
    for (int tier = 0; tier < CountTiers(kv); ++tier) {
      if (block < kv.pack_begin(tier) || block >= kv.pack_end(tier)) continue;
      Run(ops.kv_pack(
              {kv.PackSource(layer, tier, block), &kv.SourceLayout(layer, tier), kv.PackedBlock(layer, tier, block),
               &format.tiers[static_cast<std::size_t>(tier)].layouts[static_cast<std::size_t>(layer)], head, head + 1}),
          "kv_pack");
    }
  });
  for (const Piece& piece : batch.pieces) {
    if (piece.sp != nullptr && piece.first_pos > 0) continue;  // the first block is its owner's to copy from
    if (piece.kv->takes_sink()) piece.kv->CopySink(layer);
  }
}

// Rotates, maps and scales the queries of `queries`, a suffix of every piece's rows in `batch`.
void HostForward::PrepareQueries(int layer, const Batch& batch, const Batch& queries, const float* q,
                                 std::int64_t q_stride) {
  const auto n_heads = static_cast<std::size_t>(config.n_kv_heads);
  float* out = q_prep.Get(static_cast<std::size_t>(queries.n_rows() * q_width()));
  threads.ParallelFor(queries.pieces.size() * n_heads, [&](std::size_t item, int) {
    const std::size_t i = item / n_heads;
    const int head = static_cast<int>(item % n_heads);
    const std::int64_t row = queries.row_begin[i];
    const std::int64_t n = queries.row_begin[i + 1] - row;
    if (n == 0) return;
    const KvFormat& format = queries.pieces[i].kv->format();
    Run(ops.query_prep({q + row * q_stride, q_stride, static_cast<std::int32_t>(n),
                        static_cast<std::int32_t>(config.n_heads), static_cast<std::int32_t>(config.n_kv_heads),
                        static_cast<std::int32_t>(config.head_dim), head, head + 1, rope.At(batch.row_begin[i + 1] - n),
                        format.QueryMap(layer), 1.0f / std::sqrt(static_cast<float>(config.head_dim)),
                        out + row * q_width(), format.KeyRotation(layer)}),
        "query_prep");
  });
}

// The same RoPE as the engine's, without rotation and scale, for calibration.
void HostForward::ShowProjections(int layer, const Batch& batch, ForwardObserver& observer) {
  const auto d = static_cast<std::int32_t>(config.head_dim);
  const auto n_heads = static_cast<std::int32_t>(config.n_heads);
  const auto n_kv_heads = static_cast<std::int32_t>(config.n_kv_heads);
  const std::int64_t group = config.n_heads / config.n_kv_heads;
  for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
    const std::int64_t row = batch.row_begin[i];
    const auto n = static_cast<std::int32_t>(batch.row_begin[i + 1] - row);
    const float* q = qkv.data() + row * qkv_width();
    const kernels::RopeRows rope_rows = rope.At(row);
    std::vector<float> q_rows(static_cast<std::size_t>(n * q_width()));
    std::vector<float> k_rows(static_cast<std::size_t>(n * kv_width()));
    Run(ops.query_prep(
            {q, qkv_width(), n, n_heads, n_kv_heads, d, 0, n_kv_heads, rope_rows, nullptr, 1.0f, q_rows.data()}),
        "query_prep");
    Run(ops.query_prep({q + q_width(), qkv_width(), n, n_kv_heads, n_kv_heads, d, 0, n_kv_heads, rope_rows, nullptr,
                        1.0f, k_rows.data()}),
        "query_prep");
    observer.OnProjections(layer, batch.pieces[i].first_pos, n, {q_rows.data(), group * d, n * group * d},
                           {k_rows.data(), d, std::int64_t{n} * d}, {q + q_width() + kv_width(), qkv_width(), d});
  }
}

// attended: act [queries.n_rows(), q_width()].
Status HostForward::AttendCached(int layer, const Batch& queries, bool all_rows, void* attended) {
  std::vector<AttentionQueries> list;
  for (std::size_t i = 0; i < queries.pieces.size(); ++i) {
    const Piece& piece = queries.pieces[i];
    const std::int64_t row = queries.row_begin[i];
    const auto n = static_cast<int>(queries.row_begin[i + 1] - row);
    const int end_pos = piece.first_pos + static_cast<int>(piece.tokens.size());
    if (n == 0) continue;
    list.push_back({piece.kv, end_pos - n, n, q_prep.data() + row * q_width(),
                    static_cast<std::uint8_t*>(attended) + row * q_width() * ops.act_bytes});
  }
  if (queries.sp != nullptr) {
    return queries.sp->Attend(layer, all_rows, shape(), ops.act_bytes, list, threads, attention);
  }
  attention.Run(layer, shape(), list);
  return OkStatus();
}

void HostForward::AttendItself(int layer, const Batch& batch, void* attended) {
  const auto n_out = static_cast<std::size_t>(batch.n_rows() * q_width());
  float* out = own_out.Get(n_out);
  for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
    const std::int64_t row = batch.row_begin[i];
    const float* q = qkv.data() + row * qkv_width();
    const kernels::RopeRows rope_rows = rope.At(row);
    batch.pieces[i].attention->Attend(layer,
                                      {q, q + q_width(), q + q_width() + kv_width(), qkv_width(),
                                       static_cast<int>(batch.row_begin[i + 1] - row), rope_rows},
                                      threads, out + row * q_width());
  }
  if (ops.act_bytes == 4) {
    std::copy_n(out, n_out, static_cast<float*>(attended));
  } else {
    std::transform(out, out + n_out, static_cast<std::uint16_t*>(attended), kernels::FloatToBf16);
  }
}

HostForward::Batch HostForward::LogitRows(const Batch& batch) const {
  Batch rows{batch.pieces, {0}, batch.sp};
  for (const Piece& piece : batch.pieces) rows.row_begin.push_back(rows.row_begin.back() + piece.n_logits);
  return rows;
}

// Moves the last rows of every piece in x and act together: what the last layer still has to compute.
void HostForward::KeepRows(const Batch& from, const Batch& to) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t act_row = hidden * ops.act_bytes;
  for (std::size_t i = 0; i < to.pieces.size(); ++i) {
    const std::int64_t n = to.row_begin[i + 1] - to.row_begin[i];
    const std::int64_t source = from.row_begin[i + 1] - n;
    std::copy_n(x.data() + source * hidden, n * hidden, x.data() + to.row_begin[i] * hidden);
    std::copy_n(act.data() + source * act_row, n * act_row, act.data() + to.row_begin[i] * act_row);
  }
}

// wide: [n_rows, 2 * width] gate and up, or [n_rows, width] without a gate.
void HostForward::Activate(const float* wide, std::int64_t n_rows, void* out) {
  const std::int64_t width = config.intermediate_size;
  ForRows(n_rows, [&](std::int64_t begin, std::int64_t n) {
    void* to = static_cast<std::uint8_t*>(out) + begin * width * ops.act_bytes;
    if (config.mlp == MlpKind::kRelu) {
      Run(ops.relu({wide + begin * width, n, width, width, to}), "relu");
    } else {
      const float* gate = wide + begin * 2 * width;
      Run(ops.swiglu({gate, gate + width, n, width, 2 * width, to}), "swiglu");
    }
  });
}

// In pieces of many rows: the widest activations of a whole long prompt would be the largest buffer of all.
void HostForward::Mlp(const LayerWeights& w, float* rows, std::int64_t n_rows) {
  for (; n_rows > kMlpRowsMax; n_rows -= kMlpRowsMax, rows += kMlpRowsMax * config.hidden_size) {
    Mlp(w, rows, kMlpRowsMax);
  }
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t width = config.intermediate_size;
  const bool gated = config.mlp == MlpKind::kSwiGlu;
  const std::int64_t stride = gated ? 2 * width : width;
  Norm(rows, n_rows, w.mlp_norm, act.data());
  float* wide = mlp.Get(static_cast<std::size_t>(n_rows * stride));
  std::vector<LinearJob> jobs = {{act.data(), hidden, &w.up, width, wide + stride - width, stride, false}};
  if (gated) jobs.push_back({act.data(), hidden, &w.gate, width, wide, stride, false});
  Linear(n_rows, jobs);
  std::uint8_t* activated = act_wide.Get(static_cast<std::size_t>(n_rows * std::max(width, q_width()) * ops.act_bytes));
  Activate(wide, n_rows, activated);
  const LinearJob down[] = {{activated, width, &w.down, hidden, rows, hidden, true}};
  Linear(n_rows, down);
}

Status HostForward::Layer(int layer, const Batch& batch, const Batch& queries, ForwardObserver* observer) {
  const LayerWeights& w = weights.layers[static_cast<std::size_t>(layer)];
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t n_rows = batch.n_rows();
  const std::int64_t stride = qkv_width();
  const bool shorter = queries.n_rows() != n_rows;

  void* normed = act.Get(static_cast<std::size_t>(n_rows * hidden * ops.act_bytes));
  float* q = qkv.Get(static_cast<std::size_t>(n_rows * stride));
  if (n_rows > 0) {
    Norm(x.data(), n_rows, w.attention_norm, normed);
    float* k = q + q_width();
    std::vector<LinearJob> jobs = {{normed, hidden, &w.k, kv_width(), k, stride, false},
                                   {normed, hidden, &w.v, kv_width(), k + kv_width(), stride, false}};
    if (!shorter) jobs.push_back({normed, hidden, &w.q, q_width(), q, stride, false});
    Linear(n_rows, jobs);
    HeadNorm(k, n_rows, config.n_kv_heads, w.k_norm);
    if (!shorter) HeadNorm(q, n_rows, config.n_heads, w.q_norm);
    if (observer != nullptr && observer->WantsProjections()) ShowProjections(layer, batch, *observer);
    if (!batch.attends_itself()) WriteKv(layer, batch);
  }
  if (batch.sp != nullptr) batch.sp->OnLayerWritten(layer, shape());
  if (observer != nullptr) observer->OnLayerWritten(layer);

  // A rank without rows has others' blocks to take and to hand on.
  if (queries.n_rows() == 0)
    return batch.sp == nullptr ? OkStatus() : AttendCached(layer, queries, &queries == &batch, nullptr);
  if (shorter) {
    KeepRows(batch, queries);
    const LinearJob q_job[] = {{normed, hidden, &w.q, q_width(), q, stride, false}};
    Linear(queries.n_rows(), q_job);
    HeadNorm(q, queries.n_rows(), config.n_heads, w.q_norm);
  }
  std::uint8_t* attended = act_wide.Get(
      static_cast<std::size_t>(queries.n_rows() * std::max(config.intermediate_size, q_width()) * ops.act_bytes));
  if (batch.attends_itself()) {
    AttendItself(layer, batch, attended);
  } else {
    PrepareQueries(layer, batch, queries, q, stride);
    ZEROC_RETURN_IF_ERROR(AttendCached(layer, queries, &queries == &batch, attended));
  }
  const LinearJob o_job[] = {{attended, q_width(), &w.o, hidden, x.data(), hidden, true}};
  Linear(queries.n_rows(), o_job);
  Mlp(w, x.data(), queries.n_rows());
  return OkStatus();
}

Status HostForward::Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
                         const LayerRange& layers) {
  const Batch batch = MakeBatch(sequences);
  if (batch.sp != nullptr && batch.sp->comm().memory() != CommMemory::kHost) {
    return FailedPrecondition("a communicator between devices cannot reach the blocks of a model in host memory");
  }
  FillRope(batch);
  for (const ForwardSequence& sequence : sequences) {
    const int n_new = static_cast<int>(sequence.tokens.size());
    sequence.kv != nullptr ? sequence.kv->BeginStep(n_new) : sequence.attention->BeginStep(n_new);
  }
  const int n_layers = static_cast<int>(config.n_layers);
  const int end_layer = layers.end < 0 ? n_layers : layers.end;
  const std::int64_t n_values = batch.n_rows() * config.hidden_size;
  ZEROC_CHECK(layers.begin >= 0 && layers.begin <= end_layer && end_layer <= n_layers, layers.begin, layers.end);
  ZEROC_CHECK(batch.sp == nullptr || (layers.begin == 0 && layers.end < 0), layers.begin, layers.end);
  if (layers.begin == 0) {
    Embed(batch);
  } else {
    std::copy_n(layers.input, n_values, x.Get(static_cast<std::size_t>(n_values)));
  }
  // Rows whose logits nobody reads need only keys and values in the last layer, unless somebody looks at all queries.
  const Batch logit_rows = LogitRows(batch);
  const bool all_rows = batch.attends_itself() || (observer != nullptr && observer->WantsProjections());
  ZEROC_CHECK(batch.sp == nullptr || !all_rows);
  Status status;
  for (int layer = layers.begin; layer < end_layer && status.ok(); ++layer) {
    const bool last = layer + 1 == n_layers && layers.end < 0 && !all_rows;
    status = Layer(layer, batch, last ? logit_rows : batch, observer);
  }
  if (batch.sp != nullptr && status.ok()) status = batch.sp->Finish();
  for (const ForwardSequence& sequence : sequences) {
    sequence.kv != nullptr ? sequence.kv->EndStep() : sequence.attention->EndStep();
  }
  ZEROC_RETURN_IF_ERROR(status);
  if (layers.end >= 0) {
    std::copy_n(x.data(), n_values, layers.output);
    return OkStatus();
  }
  const std::int64_t n_logits = logit_rows.n_rows();
  if (n_logits == 0) return OkStatus();
  if (all_rows) KeepRows(batch, logit_rows);
  Norm(x.data(), n_logits, weights.final_norm, act.data());
  const LinearJob head[] = {
      {act.data(), config.hidden_size, &weights.lm_head, config.vocab_size, logits, config.vocab_size, false}};
  Linear(n_logits, head);
  return OkStatus();
}

class HostTransformer final : public Transformer {
 public:
  HostTransformer(std::shared_ptr<const Checkpoint> checkpoint, std::shared_ptr<const Plan> plan,
                  const kernels::Ops& ops, std::unique_ptr<HostForward> forward)
      : Transformer(std::move(checkpoint), std::move(plan), ops), forward_(std::move(forward)) {}

  KvMemory& kv_memory() override { return HostKvMemory(); }

 private:
  Status Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
              const LayerRange& layers) override {
    return forward_->Step(sequences, logits, observer, layers);
  }

  std::unique_ptr<HostForward> forward_;
};

}  // namespace

Result<std::unique_ptr<Transformer>> Transformer::Open(std::shared_ptr<const Checkpoint> checkpoint,
                                                       std::shared_ptr<const Plan> plan, const kernels::Ops& ops,
                                                       ThreadPool& threads) {
  ZEROC_RETURN_IF_ERROR(CheckPlan(*checkpoint, plan.get()));
  auto forward = std::make_unique<HostForward>(ops, threads);
  forward->config = checkpoint->config();
  ZEROC_ASSIGN_OR_RETURN(forward->weights, TransformerWeights::Load(*checkpoint, plan.get()));
  forward->rope.Open(forward->config);
  return std::unique_ptr<Transformer>(
      std::make_unique<HostTransformer>(std::move(checkpoint), std::move(plan), ops, std::move(forward)));
}

}  // namespace zeroc
