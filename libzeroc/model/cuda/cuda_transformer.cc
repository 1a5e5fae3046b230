#include "libzeroc/model/cuda/cuda_transformer.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/graph.h"
#include "kernels/cuda/linear.h"
#include "libzeroc/base/check.h"
#include "libzeroc/model/cuda/device_step.h"
#include "libzeroc/model/cuda/device_weights.h"
#include "libzeroc/model/rope_tables.h"

namespace zeroc {

namespace cuda = kernels::cuda;
using kernels::Bf16;

namespace {

constexpr std::int64_t kMlpRowsMax = 4096;  // the widest activations are not kept for more rows at once
constexpr int kRopePositionsMin = 1024;     // of the first table

// Name and ISA of the device over the host's functions of the same dtype.
const kernels::Ops& DeviceOps() {
  static const kernels::Ops ops = [] {
    kernels::Ops table = kernels::CpuOps();
    table.name = cuda::RuntimeName();
    table.isa = [] {
      static const std::string text = [] {
        char buffer[256];
        cuda::DescribeDevice(buffer, sizeof(buffer));
        return std::string(buffer);
      }();
      return text.c_str();
    };
    return table;
  }();
  return ops;
}

class OwnedStream {
 public:
  explicit OwnedStream(cuda::Stream stream) : stream_(stream) {}
  ~OwnedStream() { cuda::DestroyStream(stream_); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  cuda::Stream get() const { return stream_; }

 private:
  cuda::Stream stream_;
};

// Activations of one step, on the device. f32 but for act and wide.
struct Activations {
  DeviceBuffer x, kept_x;                     // [rows, hidden]; of the rows with logits alone
  DeviceBuffer act, kept_act;                 // bf16, likewise
  DeviceBuffer qkv;                           // [rows, qkv_width]
  DeviceBuffer queries;                       // [rows, q_width], by sequence [n_kv_heads, n_tokens, group, head_dim]
  DeviceBuffer wide;                          // bf16 [rows, q_width] or [MLP rows, intermediate]
  DeviceBuffer mlp;                           // [MLP rows, 2 * intermediate]
  DeviceBuffer logits;                        // [logit rows, vocab]
  DeviceBuffer part_out, part_max, part_sum;  // of decode attention
};

class CudaTransformer final : public Transformer {
 public:
  static Result<std::unique_ptr<Transformer>> Open(std::shared_ptr<const Checkpoint> checkpoint,
                                                   std::shared_ptr<const Plan> plan);
  KvMemory& kv_memory() override { return memory_; }

 private:
  CudaTransformer(std::shared_ptr<const Checkpoint> checkpoint, std::shared_ptr<const Plan> plan,
                  std::unique_ptr<OwnedStream> stream, std::unique_ptr<cuda::Linear> linear)
      : Transformer(std::move(checkpoint), std::move(plan), DeviceOps()),
        config_(config()),
        owned_stream_(std::move(stream)),
        stream_(owned_stream_->get()),
        linear_(std::move(linear)),
        memory_(stream_) {}

  std::int64_t q_width() const { return config_.n_heads * config_.head_dim; }
  std::int64_t kv_width() const { return config_.n_kv_heads * config_.head_dim; }
  std::int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  std::int64_t mlp_stride() const { return config_.intermediate_size * (config_.mlp == MlpKind::kSwiGlu ? 2 : 1); }

  Status Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
              const LayerRange& layers) override;
  Status CheckSupported(std::span<const ForwardSequence> sequences, const ForwardObserver* observer) const;
  Result<std::vector<StepSequence>> Begin(std::span<const ForwardSequence> sequences);
  Status Reserve(const StepRows& rows, const StepRows& logit_rows, bool has_logits);
  Status ReserveRope(std::span<const StepSequence> sequences);
  Status Run(std::span<const StepSequence> sequences, SpStep* sp, float* logits, ForwardObserver* observer,
             const LayerRange& layers);
  Status RunDecode(float* logits);
  Status EnqueueDecode();
  std::vector<const void*> Places() const;
  Status Embed();
  Status Layer(int layer, bool shortened, SpStep* sp, ForwardObserver* observer);
  Status KeysAndValues(const DeviceLayer& w, int layer);
  Status Logits(const float* x, Bf16* act);
  void CopyLogits(float* logits);
  Status Norm(const float* x, std::int64_t n_rows, const DeviceNorm& norm, Bf16* out);
  Status HeadNorm(float* rows, std::int64_t n_rows, std::int64_t n_heads, const Bf16* gain);
  Status Linear(const Bf16* x, std::int64_t n_rows, std::int64_t k, const DeviceLinear& w, std::int64_t n_out, float* y,
                std::int64_t y_stride, bool accumulate);
  Status WriteKv(int layer);
  Status PrepareQueries(int layer, bool shortened);
  Status Attend(int layer);
  Status Mlp(const DeviceLayer& w, float* x, Bf16* act, std::int64_t n_rows);
  void KeepLogitRows();
  kernels::RopeRows Rope() const { return {rope_cos_.As<float>(), rope_sin_.As<float>()}; }  // of every position

  const ModelConfig& config_;
  std::unique_ptr<OwnedStream> owned_stream_;
  cuda::Stream stream_;
  std::unique_ptr<cuda::Linear> linear_;
  DeviceKvMemory memory_;
  DeviceWeights weights_;
  DeviceFormats formats_;
  DeviceBuffer rope_cos_, rope_sin_;  // [rope_positions_, head_dim / 2]
  std::int64_t rope_positions_ = 0;
  DeviceStep step_;
  Activations at_;
  // The launches of a decode step, once two steps had the same.
  DeviceStep::Launches recorded_;
  std::vector<const void*> recorded_places_;
  std::unique_ptr<cuda::Graph> graph_;
};

Result<std::unique_ptr<Transformer>> CudaTransformer::Open(std::shared_ptr<const Checkpoint> checkpoint,
                                                           std::shared_ptr<const Plan> plan) {
  ZEROC_RETURN_IF_ERROR(CheckPlan(*checkpoint, plan.get()));
  const std::string backend = "backend " + std::string(cuda::RuntimeName()) + ": ";
  if (const char* why = cuda::WhyUnavailable()) return FailedPrecondition(backend + why);
  auto stream = std::make_unique<OwnedStream>(cuda::CreateStream());
  if (stream->get() == nullptr) return FailedPrecondition(backend + "the device gives no stream");
  const char* error = nullptr;
  std::unique_ptr<cuda::Linear> linear = cuda::Linear::Open(stream->get(), &error);
  if (linear == nullptr) return FailedPrecondition(backend + error);
  // The host's copies of folded weights go when they are on the device.
  ZEROC_ASSIGN_OR_RETURN(const TransformerWeights weights, TransformerWeights::Load(*checkpoint, plan.get()));
  std::unique_ptr<CudaTransformer> model(
      new CudaTransformer(std::move(checkpoint), std::move(plan), std::move(stream), std::move(linear)));
  ZEROC_ASSIGN_OR_RETURN(model->weights_, DeviceWeights::Upload(weights, model->config_, model->stream_));
  return std::unique_ptr<Transformer>(std::move(model));
}

Status CudaTransformer::CheckSupported(std::span<const ForwardSequence> sequences,
                                       const ForwardObserver* observer) const {
  const std::string name = ops().name;
  for (const ForwardSequence& sequence : sequences) {
    if (sequence.attention != nullptr) {
      return Unimplemented("backend " + name + ": methods that attend for themselves run on the CPU only");
    }
    if (sequence.sp == nullptr) continue;
    const SpScheme scheme = sequence.sp->scheme();
    if (scheme != SpScheme::kAllGather && scheme != SpScheme::kRing) {
      return Unimplemented("backend " + name + ": scheme " + std::string(SpSchemeName(scheme)) +
                           " runs on the CPU only; allgather and ring run here");
    }
    if (sequence.sp->comm().memory() == CommMemory::kHost && !cuda::HostReachesDevice()) {
      return FailedPrecondition("backend " + name +
                                ": a communicator over host memory cannot reach blocks on a device; NCCL's can");
    }
  }
  if (observer != nullptr && observer->WantsProjections()) {
    return Unimplemented("backend " + name + ": queries and keys are shown (calibration) on the CPU only");
  }
  return OkStatus();
}

// The sequences with their formats' numbers, which are taken to the device when they are first seen.
Result<std::vector<StepSequence>> CudaTransformer::Begin(std::span<const ForwardSequence> sequences) {
  std::vector<StepSequence> out;
  for (const ForwardSequence& sequence : sequences) {
    ZEROC_ASSIGN_OR_RETURN(const DeviceFormat* format, formats_.Of(sequence.kv->shared_format(), stream_));
    if (sequence.sp == nullptr) {
      out.push_back({sequence.kv, format, sequence.tokens, sequence.kv->n_tokens(), sequence.n_logits});
      continue;
    }
    const std::vector<TokenRange> tokens = sequence.sp->Tokens(sequence.sp->rank());
    const std::vector<TokenRange> logits = sequence.sp->LogitTokens(sequence.sp->rank());
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const auto begin = static_cast<std::size_t>(tokens[i].begin), n = static_cast<std::size_t>(tokens[i].size());
      out.push_back({sequence.kv, format, sequence.tokens.subspan(begin, n), tokens[i].begin, logits[i].size(), true});
    }
  }
  ZEROC_RETURN_IF_ERROR(ReserveRope(out));
  return out;
}

// All positions' cos and sin, computed once: 64 KiB for each 128 positions of a model with heads of 128.
Status CudaTransformer::ReserveRope(std::span<const StepSequence> sequences) {
  if (!config_.has_rope()) return OkStatus();
  std::int64_t needed = 0;
  for (const StepSequence& sequence : sequences) needed = std::max<std::int64_t>(needed, sequence.end_pos());
  if (needed <= rope_positions_) return OkStatus();
  std::int64_t n = std::max<std::int64_t>(kRopePositionsMin, rope_positions_);
  while (n < needed) n *= 2;
  RopeTables tables;
  tables.Open(config_);
  tables.Resize(n);
  tables.Fill(0, n, 0);
  rope_positions_ = 0;
  const auto n_values = static_cast<std::size_t>(n * config_.head_dim / 2);
  const kernels::RopeRows rows = tables.At(0);
  ZEROC_ASSIGN_OR_RETURN(rope_cos_, CopyToDevice(std::span(rows.cos, n_values), "RoPE tables", stream_));
  ZEROC_ASSIGN_OR_RETURN(rope_sin_, CopyToDevice(std::span(rows.sin, n_values), "RoPE tables", stream_));
  rope_positions_ = n;
  return OkStatus();
}

Status CudaTransformer::Reserve(const StepRows& rows, const StepRows& logit_rows, bool has_logits) {
  const auto bytes = [](std::int64_t n_rows, std::int64_t width, std::size_t size) {
    return static_cast<std::size_t>(n_rows * width) * size;
  };
  const std::int64_t n = rows.count(), hidden = config_.hidden_size, wide = config_.intermediate_size;
  const std::int64_t n_mlp = std::min(n, kMlpRowsMax);
  const char* what = "activations";
  ZEROC_RETURN_IF_ERROR(at_.x.Reserve(bytes(n, hidden, 4), what));
  ZEROC_RETURN_IF_ERROR(at_.act.Reserve(bytes(n, hidden, 2), what));
  ZEROC_RETURN_IF_ERROR(at_.qkv.Reserve(bytes(n, qkv_width(), 4), what));
  ZEROC_RETURN_IF_ERROR(at_.queries.Reserve(bytes(n, q_width(), 4), what));
  ZEROC_RETURN_IF_ERROR(at_.wide.Reserve(std::max(bytes(n, q_width(), 2), bytes(n_mlp, wide, 2)), what));
  ZEROC_RETURN_IF_ERROR(at_.mlp.Reserve(bytes(n_mlp, mlp_stride(), 4), what));
  if (has_logits) {
    const std::int64_t n_kept = logit_rows.count();
    ZEROC_RETURN_IF_ERROR(at_.kept_x.Reserve(bytes(n_kept, hidden, 4), what));
    ZEROC_RETURN_IF_ERROR(at_.kept_act.Reserve(bytes(n_kept, hidden, 2), what));
    ZEROC_RETURN_IF_ERROR(at_.logits.Reserve(bytes(n_kept, config_.vocab_size, 4), "logits"));
  }
  const std::int64_t part_rows = std::int64_t{step_.n_parts_max()} * cuda::kDecodeTileRows;
  ZEROC_RETURN_IF_ERROR(at_.part_out.Reserve(bytes(part_rows, config_.head_dim, 4), what));
  ZEROC_RETURN_IF_ERROR(at_.part_max.Reserve(bytes(part_rows, 1, 4), what));
  return at_.part_sum.Reserve(bytes(part_rows, 1, 4), what);
}

Status CudaTransformer::Norm(const float* x, std::int64_t n_rows, const DeviceNorm& norm, Bf16* out) {
  const std::int64_t hidden = config_.hidden_size;
  if (config_.norm == NormKind::kLayer) {
    return Launched(cuda::LayerNorm({x, norm.gain, norm.bias, n_rows, hidden, config_.norm_eps, out}, stream_),
                    "layer_norm");
  }
  return Launched(cuda::RmsNorm({x, norm.gain, n_rows, hidden, config_.norm_eps, out}, stream_), "rms_norm");
}

Status CudaTransformer::HeadNorm(float* rows, std::int64_t n_rows, std::int64_t n_heads, const Bf16* gain) {
  if (!config_.qk_norm) return OkStatus();
  return Launched(
      cuda::HeadNorm({rows, n_rows, qkv_width(), n_heads, config_.head_dim, gain, config_.norm_eps}, stream_),
      "head_norm");
}

Status CudaTransformer::Linear(const Bf16* x, std::int64_t n_rows, std::int64_t k, const DeviceLinear& w,
                               std::int64_t n_out, float* y, std::int64_t y_stride, bool accumulate) {
  return Launched(linear_->Run({x, n_rows, k, w.w, w.b, n_out, 0, n_out, y, y_stride, accumulate}), "linear");
}

Status CudaTransformer::Embed() {
  float* x = at_.x.As<float>();
  const std::int64_t n = step_.rows().count();
  ZEROC_RETURN_IF_ERROR(
      Launched(cuda::Embed({weights_.embedding, step_.launches().ids, n, config_.hidden_size, x}, stream_), "embed"));
  if (config_.has_rope()) return OkStatus();
  return Launched(
      cuda::Embed({weights_.positions, step_.launches().positions, n, config_.hidden_size, x, /*accumulate=*/true},
                  stream_),
      "embed");
}

// RoPE, map, exact write and packing of every new token, then the blocks of earlier steps that have come of age.
Status CudaTransformer::WriteKv(int layer) {
  const DeviceStep::Layer& tables = step_.layer(layer);
  const float* k = at_.qkv.As<float>() + q_width();
  for (const DeviceStep::Write& write : tables.writes) {
    const KvFormat& format = *write.format->format;
    cuda::KvWriteBatchArgs args = {k,
                                   k + kv_width(),
                                   qkv_width(),
                                   write.blocks,
                                   write.n_blocks,
                                   Rope(),
                                   write.format->k_maps[static_cast<std::size_t>(layer)],
                                   &format.exact,
                                   nullptr,
                                   format.KeyRotation(layer)};
    if (write.packs) args.packed_layout = &format.tiers[0].layouts[static_cast<std::size_t>(layer)];
    ZEROC_RETURN_IF_ERROR(Launched(cuda::KvWriteBatch(args, stream_), "kv_write"));
  }
  for (const DeviceStep::Pack& pack : tables.packs) {
    ZEROC_RETURN_IF_ERROR(Launched(cuda::KvPackBatch({pack.sources, pack.packed, pack.n_blocks, pack.source_layout,
                                                      pack.packed_layout, 0, pack.packed_layout->n_kv_heads},
                                                     stream_),
                                   "kv_pack"));
  }
  return OkStatus();
}

Status CudaTransformer::PrepareQueries(int layer, bool shortened) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  for (const DeviceStep::Prepare& prepare : step_.launches().prepares[shortened ? 1 : 0]) {
    const cuda::QueryPrepBatchArgs args = {at_.qkv.As<float>(),
                                           qkv_width(),
                                           static_cast<std::int32_t>(config_.n_heads),
                                           static_cast<std::int32_t>(config_.n_kv_heads),
                                           static_cast<std::int32_t>(config_.head_dim),
                                           prepare.tiles,
                                           prepare.n_tiles,
                                           Rope(),
                                           prepare.format->q_maps[static_cast<std::size_t>(layer)],
                                           scale,
                                           at_.queries.As<float>(),
                                           prepare.format->format->KeyRotation(layer)};
    ZEROC_RETURN_IF_ERROR(Launched(cuda::QueryPrepBatch(args, stream_), "query_prep"));
  }
  return OkStatus();
}

// Queries to `wide`, as the product behind takes them.
Status CudaTransformer::Attend(int layer) {
  const auto head_dim = static_cast<std::int32_t>(config_.head_dim);
  for (const DeviceStep::Attention& part : step_.layer(layer).attention) {
    const auto n_layouts = static_cast<std::int32_t>(part.layouts.size());
    const float* q = at_.queries.As<float>();
    Bf16* out = at_.wide.As<Bf16>();
    if (!part.decode) {
      ZEROC_RETURN_IF_ERROR(Launched(cuda::PrefillAttention({q, part.tiles, part.n_tiles, part.segments,
                                                             part.layouts.data(), n_layouts, head_dim, out, q_width()},
                                                            stream_),
                                     "prefill attention"));
      continue;
    }
    float* part_out = at_.part_out.As<float>();
    float* part_max = at_.part_max.As<float>();
    float* part_sum = at_.part_sum.As<float>();
    ZEROC_RETURN_IF_ERROR(
        Launched(cuda::DecodeAttention({q, part.tiles, part.segments, part.items, part.first_item, part.layouts.data(),
                                        n_layouts, step_.n_thread_blocks(), head_dim, part_out, part_max, part_sum},
                                       stream_),
                 "decode attention"));
    ZEROC_RETURN_IF_ERROR(Launched(
        cuda::DecodeMerge({part.tiles, part.n_tiles, head_dim, part_out, part_max, part_sum, out, q_width()}, stream_),
        "merge of attention"));
  }
  return OkStatus();
}

Status CudaTransformer::Mlp(const DeviceLayer& w, float* x, Bf16* act, std::int64_t n_rows) {
  const std::int64_t hidden = config_.hidden_size, width = config_.intermediate_size, stride = mlp_stride();
  const bool gated = config_.mlp == MlpKind::kSwiGlu;
  float* wide = at_.mlp.As<float>();
  Bf16* activated = at_.wide.As<Bf16>();
  for (std::int64_t begin = 0; begin < n_rows; begin += kMlpRowsMax) {
    const std::int64_t n = std::min(kMlpRowsMax, n_rows - begin);
    float* rows = x + begin * hidden;
    ZEROC_RETURN_IF_ERROR(Norm(rows, n, w.mlp_norm, act));
    ZEROC_RETURN_IF_ERROR(Linear(act, n, hidden, w.up, width, wide + stride - width, stride, false));
    if (gated) {
      ZEROC_RETURN_IF_ERROR(Linear(act, n, hidden, w.gate, width, wide, stride, false));
      ZEROC_RETURN_IF_ERROR(
          Launched(cuda::SwiGlu({wide, wide + width, n, width, stride, activated}, stream_), "swiglu"));
    } else {
      ZEROC_RETURN_IF_ERROR(Launched(cuda::Relu({wide, n, width, stride, activated}, stream_), "relu"));
    }
    ZEROC_RETURN_IF_ERROR(Linear(activated, n, width, w.down, hidden, rows, hidden, true));
  }
  return OkStatus();
}

// Of x and act, to what the rest of the last layer works on.
void CudaTransformer::KeepLogitRows() {
  const auto hidden = static_cast<std::size_t>(config_.hidden_size);
  const StepRows& kept = step_.logit_rows();
  for (std::size_t i = 0; i + 1 < kept.begin.size(); ++i) {
    const auto n = static_cast<std::size_t>(kept.count(i)), to = static_cast<std::size_t>(kept.begin[i]);
    const std::size_t from = static_cast<std::size_t>(step_.rows().begin[i + 1]) - n;
    if (n == 0) continue;
    cuda::CopyOnDevice(at_.kept_x.As<float>() + to * hidden, at_.x.As<float>() + from * hidden, n * hidden * 4,
                       stream_);
    cuda::CopyOnDevice(at_.kept_act.As<Bf16>() + to * hidden, at_.act.As<Bf16>() + from * hidden, n * hidden * 2,
                       stream_);
  }
}

// Of all rows, into their blocks.
Status CudaTransformer::KeysAndValues(const DeviceLayer& w, int layer) {
  const std::int64_t hidden = config_.hidden_size, stride = qkv_width(), n_rows = step_.rows().count();
  Bf16* act = at_.act.As<Bf16>();
  float* k = at_.qkv.As<float>() + q_width();
  ZEROC_RETURN_IF_ERROR(Norm(at_.x.As<float>(), n_rows, w.attention_norm, act));
  ZEROC_RETURN_IF_ERROR(Linear(act, n_rows, hidden, w.k, kv_width(), k, stride, false));
  ZEROC_RETURN_IF_ERROR(Linear(act, n_rows, hidden, w.v, kv_width(), k + kv_width(), stride, false));
  ZEROC_RETURN_IF_ERROR(HeadNorm(k, n_rows, config_.n_kv_heads, w.k_norm));
  return WriteKv(layer);
}

// shortened: queries of the rows with logits alone.
Status CudaTransformer::Layer(int layer, bool shortened, SpStep* sp, ForwardObserver* observer) {
  const DeviceLayer& w = weights_.layers[static_cast<std::size_t>(layer)];
  const std::int64_t hidden = config_.hidden_size;
  const StepRows& queries = shortened ? step_.logit_rows() : step_.rows();
  float* x = at_.x.As<float>();
  Bf16* act = at_.act.As<Bf16>();
  float* q = at_.qkv.As<float>();
  if (step_.rows().count() > 0) ZEROC_RETURN_IF_ERROR(KeysAndValues(w, layer));
  // The blocks may travel. A communicator between devices waits for the stream by itself.
  const bool waits = observer != nullptr || (sp != nullptr && sp->comm().memory() == CommMemory::kHost);
  if (waits) ZEROC_RETURN_IF_ERROR(WaitFor(stream_));
  if (sp != nullptr) {
    sp->OnLayerWritten(layer, {static_cast<int>(config_.n_heads), static_cast<int>(config_.n_kv_heads),
                               static_cast<int>(config_.head_dim)});
  }
  if (observer != nullptr) observer->OnLayerWritten(layer);
  // A rank without rows has others' blocks to take and to hand on.
  if (queries.count() == 0) return sp == nullptr ? OkStatus() : sp->Receive(layer);
  if (shortened) {
    KeepLogitRows();
    x = at_.kept_x.As<float>();
    act = at_.kept_act.As<Bf16>();
  }
  ZEROC_RETURN_IF_ERROR(Linear(act, queries.count(), hidden, w.q, q_width(), q, qkv_width(), false));
  ZEROC_RETURN_IF_ERROR(HeadNorm(q, queries.count(), config_.n_heads, w.q_norm));
  ZEROC_RETURN_IF_ERROR(PrepareQueries(layer, shortened));
  if (sp != nullptr) ZEROC_RETURN_IF_ERROR(sp->Receive(layer));
  ZEROC_RETURN_IF_ERROR(Attend(layer));
  ZEROC_RETURN_IF_ERROR(Linear(at_.wide.As<Bf16>(), queries.count(), q_width(), w.o, hidden, x, hidden, true));
  return Mlp(w, x, act, queries.count());
}

// x and act: of the rows with logits.
Status CudaTransformer::Logits(const float* x, Bf16* act) {
  const std::int64_t n = step_.logit_rows().count(), vocab = config_.vocab_size;
  if (n == 0) return OkStatus();
  ZEROC_RETURN_IF_ERROR(Norm(x, n, weights_.final_norm, act));
  return Linear(act, n, config_.hidden_size, weights_.lm_head, vocab, at_.logits.As<float>(), vocab, false);
}

void CudaTransformer::CopyLogits(float* logits) {
  const std::int64_t n_values = step_.logit_rows().count() * config_.vocab_size;
  if (n_values == 0) return;
  cuda::CopyToHost(logits, at_.logits.As<float>(), static_cast<std::size_t>(n_values) * sizeof(float), stream_);
}

Status CudaTransformer::EnqueueDecode() {
  ZEROC_RETURN_IF_ERROR(Embed());
  for (int layer = 0; layer < static_cast<int>(config_.n_layers); ++layer) {
    ZEROC_RETURN_IF_ERROR(Layer(layer, /*shortened=*/false, nullptr, nullptr));
  }
  return Logits(at_.x.As<float>(), at_.act.As<Bf16>());
}

// What launches are told beside the step: buffers that may have moved.
std::vector<const void*> CudaTransformer::Places() const {
  std::vector<const void*> places;
  for (const DeviceBuffer* buffer : {&at_.x, &at_.act, &at_.qkv, &at_.queries, &at_.wide, &at_.mlp, &at_.logits,
                                     &at_.part_out, &at_.part_max, &at_.part_sum, &rope_cos_, &rope_sin_}) {
    places.push_back(buffer->As<const void>());
  }
  return places;
}

// A step of one token of each sequence in which no block comes of age is some hundred launches that differ from the
// last step's in nothing but what the tables hold: from the third on, one call. Recording costs as much as launching,
// so a batch that changes in every step is never recorded.
Status CudaTransformer::RunDecode(float* logits) {
  std::vector<const void*> places = Places();
  const bool same = step_.launches() == recorded_ && places == recorded_places_;
  if (!same) {
    recorded_ = step_.launches();
    recorded_places_ = std::move(places);
    graph_.reset();
    ZEROC_RETURN_IF_ERROR(EnqueueDecode());
  } else {
    if (graph_ == nullptr) {
      const char* error = nullptr;
      Status enqueued;
      graph_ = cuda::Graph::Record(
          stream_,
          [&] {
            enqueued = EnqueueDecode();
            return enqueued.ok() ? kernels::KernelStatus::kOk : kernels::KernelStatus::kUnsupported;
          },
          &error);
      ZEROC_RETURN_IF_ERROR(enqueued);
      if (graph_ == nullptr) return Internal(std::string(cuda::RuntimeName()) + ": recording a decode step: " + error);
    }
    ZEROC_RETURN_IF_ERROR(Launched(graph_->Launch(), "a recorded decode step"));
  }
  CopyLogits(logits);
  return OkStatus();
}

// Between BeginStep and EndStep. What has been enqueued when it fails is waited for by the caller.
Status CudaTransformer::Run(std::span<const StepSequence> sequences, SpStep* sp, float* logits,
                            ForwardObserver* observer, const LayerRange& layers) {
  const int n_layers = static_cast<int>(config_.n_layers);
  const bool to_the_end = layers.end < 0;
  const int end_layer = to_the_end ? n_layers : layers.end;
  ZEROC_CHECK(layers.begin >= 0 && layers.begin <= end_layer && end_layer <= n_layers, layers.begin, layers.end);
  ZEROC_RETURN_IF_ERROR(step_.Make(config_, sequences, layers.begin, end_layer, to_the_end, stream_));
  ZEROC_RETURN_IF_ERROR(Reserve(step_.rows(), step_.logit_rows(), to_the_end));
  const bool is_decode = step_.IsPlainDecode() && sp == nullptr && observer == nullptr;
  if (is_decode && to_the_end && layers.begin == 0) return RunDecode(logits);
  const std::size_t x_bytes = static_cast<std::size_t>(step_.rows().count() * config_.hidden_size) * sizeof(float);
  if (layers.begin == 0) {
    if (step_.rows().count() > 0) ZEROC_RETURN_IF_ERROR(Embed());
  } else {
    cuda::CopyToDevice(at_.x.As<float>(), layers.input, x_bytes, stream_);
  }
  // Rows whose logits nobody reads need only keys and values in the last layer.
  const bool has_more_rows = step_.rows().begin != step_.logit_rows().begin;
  for (int layer = layers.begin; layer < end_layer; ++layer) {
    const bool shortened = has_more_rows && to_the_end && layer + 1 == end_layer;
    ZEROC_RETURN_IF_ERROR(Layer(layer, shortened, sp, observer));
  }
  if (sp != nullptr) ZEROC_RETURN_IF_ERROR(sp->Finish());
  if (!to_the_end) {
    cuda::CopyToHost(layers.output, at_.x.As<float>(), x_bytes, stream_);
    return OkStatus();
  }
  if (has_more_rows && layers.begin == end_layer) KeepLogitRows();
  ZEROC_RETURN_IF_ERROR(has_more_rows ? Logits(at_.kept_x.As<float>(), at_.kept_act.As<Bf16>())
                                      : Logits(at_.x.As<float>(), at_.act.As<Bf16>()));
  CopyLogits(logits);
  return OkStatus();
}

Status CudaTransformer::Step(std::span<const ForwardSequence> sequences, float* logits, ForwardObserver* observer,
                             const LayerRange& layers) {
  ZEROC_RETURN_IF_ERROR(CheckSupported(sequences, observer));
  ZEROC_ASSIGN_OR_RETURN(const std::vector<StepSequence> batch, Begin(sequences));
  SpStep* sp = sequences.front().sp;  // the only sequence's
  ZEROC_CHECK(sp == nullptr || (layers.begin == 0 && layers.end < 0), layers.begin, layers.end);
  for (const ForwardSequence& sequence : sequences) sequence.kv->BeginStep(static_cast<int>(sequence.tokens.size()));
  if (sp != nullptr) sp->comm().Follow(stream_);
  const Status status = Run(batch, sp, logits, observer, layers);
  if (sp != nullptr && !status.ok()) sp->comm().Abort(status);  // mostly it comes from there; blocks rest from now on
  const Status waited = WaitFor(stream_);                       // in any case: the next step takes the same buffers
  if (sp != nullptr) sp->comm().Follow(nullptr);
  for (const ForwardSequence& sequence : sequences) sequence.kv->EndStep();
  if (status.ok() || waited.ok()) return status.ok() ? waited : status;
  return Status(status.code(), std::string(status.message()) + ": " + std::string(waited.message()));
}

}  // namespace

Result<std::unique_ptr<Transformer>> OpenCudaTransformer(std::shared_ptr<const Checkpoint> checkpoint,
                                                         std::shared_ptr<const Plan> plan) {
  return CudaTransformer::Open(std::move(checkpoint), std::move(plan));
}

}  // namespace zeroc
