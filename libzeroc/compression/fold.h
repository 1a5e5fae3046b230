// The maps of a layer, solved and folded into the weights.
//
// v' = M^T v and o = sum over heads of (W_O,h N_g) v', with M N^T = I: exact at full width, no work at run time, for
// every kind of position embedding. M and N are the balanced basis of H_g = sum over the group's heads of
// W_O,h^T W_O,h and C_v. Products are float32 and rounded to bf16 once. Any thread; no shared state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "libzeroc/base/status.h"
#include "libzeroc/compression/basis.h"
#include "libzeroc/compression/moments.h"
#include "libzeroc/compression/profile.h"

namespace zeroc {

struct TensorView;

// The maps of one layer, row-major [n_kv_heads, head_dim, head_dim] each, coordinates sorted by falling spectrum.
struct LayerMaps {
  std::vector<float> a;     // queries:        q' = A^T q
  std::vector<float> b;     // keys:           k' = B^T k,   A B^T = I
  std::vector<float> m;     // values:         v' = M^T v
  std::vector<float> n;     // output weights: W_O' = W_O N, M N^T = I
  std::vector<float> s_qk;  // [n_kv_heads, head_dim] spectrum of the scores
  std::vector<float> s_vo;  // [n_kv_heads, head_dim] spectrum of the outputs
};

// H_g of one KV head. w_o: [hidden, n_heads * head_dim] in bf16, f16 or f32, row-major as in Hugging Face checkpoints.
// kInvalidArgument on another shape or dtype.
Result<SecondMoment> OutputGram(const TensorView& w_o, const ModelGeometry& geometry, int kv_head);

// Both bases of every KV head of one layer. Errors as SolveBalancedBasis, with layer and head named.
Result<LayerMaps> SolveLayer(const MomentAccumulator& moments, int layer, const TensorView& w_o,
                             const BasisOptions& options = {});

// Heads of a projection in the coordinates of their maps.
struct FoldedHeads {
  std::vector<std::uint16_t> w;  // bf16 [n_heads * head_dim, hidden]
  std::vector<float> bias;       // [n_heads * head_dim], empty without a bias
};

// W' = map_g^T W and b' = map_g^T b for every head of a projection w [n_heads * head_dim, hidden], bf16, f16 or f32;
// bias [n_heads * head_dim] or null. n_heads is geometry.n_heads or geometry.n_kv_heads; g is the KV head that a head
// reads or writes; maps is one side of LayerMaps. Models without RoPE fold their query and key maps so. `name` stands
// in errors, which are those of FoldValueOutput.
Result<FoldedHeads> FoldHeads(const char* name, const TensorView& w, const TensorView* bias, int n_heads,
                              const ModelGeometry& geometry, std::span<const float> maps);

struct FoldedValueOutput {
  std::vector<std::uint16_t> w_v;  // bf16 [n_kv_heads * head_dim, hidden]
  std::vector<std::uint16_t> w_o;  // bf16 [hidden, n_heads * head_dim]
  std::vector<float> v_bias;       // [n_kv_heads * head_dim], empty without a bias
};

// w_v: [n_kv_heads * head_dim, hidden]; w_o: [hidden, n_heads * head_dim]; v_bias: [n_kv_heads * head_dim] or null;
// bf16, f16 or f32. m and n as in LayerMaps. kInvalidArgument on another shape or dtype, kOutOfRange when a folded
// weight does not fit bf16 (a broken checkpoint).
Result<FoldedValueOutput> FoldValueOutput(const TensorView& w_v, const TensorView& w_o, const TensorView* v_bias,
                                          const ModelGeometry& geometry, std::span<const float> m,
                                          std::span<const float> n);

}  // namespace zeroc
