// Matrix products through oneDNN (2.6: descriptors, then primitive descriptors). Exceptions of oneDNN end here.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cpu/cpu.h"

namespace zeroc::kernels::cpu {
namespace {

using dnnl::memory;

// oneDNN starts OpenMP threads of its own unless the calling thread's setting says one; put back afterwards.
class OneOpenMpThread {
 public:
  OneOpenMpThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneOpenMpThread() { omp_set_num_threads(before_); }
  OneOpenMpThread(const OneOpenMpThread&) = delete;
  OneOpenMpThread& operator=(const OneOpenMpThread&) = delete;

 private:
  int before_;
};

struct Shape {
  std::int64_t rows, k, outs, y_stride;
  bool has_bias, accumulate;
  bool operator==(const Shape&) const = default;
};

struct ShapeHash {
  std::size_t operator()(const Shape& s) const {
    std::uint64_t hash = 0;
    for (std::int64_t part : {s.rows, s.k, s.outs, s.y_stride, std::int64_t{s.has_bias}, std::int64_t{s.accumulate}}) {
      hash = (hash ^ static_cast<std::uint64_t>(part)) * 0x9e3779b97f4a7c15ull;
    }
    return hash;
  }
};

// A primitive and the memory objects whose pointers each call sets.
struct Product {
  bool fast = false;
  dnnl::matmul primitive;
  memory x, w, bias, y;
};

dnnl::engine& Engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

Product MakeProduct(const Shape& s) {
  using type = memory::data_type;
  const memory::desc x({s.rows, s.k}, type::bf16, memory::dims{s.k, 1});
  const memory::desc w({s.k, s.outs}, type::bf16, memory::dims{1, s.k});
  const memory::desc y({s.rows, s.outs}, type::f32, memory::dims{s.y_stride, 1});
  const memory::desc bias({1, s.outs}, type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attr;
  if (s.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
  const auto desc = s.has_bias ? dnnl::matmul::desc(x, w, bias, y) : dnnl::matmul::desc(x, w, y);
  Product product;
  const dnnl::matmul::primitive_desc found(desc, attr, Engine(), true);
  // Without bf16 kernels for this processor oneDNN falls back to a scalar loop named ref.
  if (!found || std::strncmp(found.impl_info_str(), "ref", 3) == 0) return product;
  product.primitive = dnnl::matmul(found);
  product.x = memory(x, Engine(), nullptr);
  product.w = memory(w, Engine(), nullptr);
  product.y = memory(y, Engine(), nullptr);
  product.bias = memory(bias, Engine(), nullptr);
  product.fast = true;
  return product;
}

// One thread's primitives. A model has a handful of weight shapes and a few row counts per shape (full chunks and the
// last, shorter one); when odd lengths fill the table it starts anew.
Product& ProductFor(const Shape& shape) {
  constexpr std::size_t kProductsMax = 64;
  thread_local std::unordered_map<Shape, Product, ShapeHash> products;
  const auto found = products.find(shape);
  if (found != products.end()) return found->second;
  if (products.size() >= kProductsMax) products.clear();
  return products.emplace(shape, MakeProduct(shape)).first->second;
}

void Run(const LinearArgs& args, Product* product) {
  thread_local dnnl::stream stream(Engine());
  product->x.set_data_handle(const_cast<void*>(args.x));
  product->w.set_data_handle(const_cast<Bf16*>(args.w + args.out_begin * args.k));
  product->y.set_data_handle(args.y + args.out_begin);
  if (args.bias == nullptr) {
    product->primitive.execute(
        stream, {{DNNL_ARG_SRC, product->x}, {DNNL_ARG_WEIGHTS, product->w}, {DNNL_ARG_DST, product->y}});
  } else {
    product->bias.set_data_handle(const_cast<float*>(args.bias + args.out_begin));
    product->primitive.execute(stream, {{DNNL_ARG_SRC, product->x},
                                        {DNNL_ARG_WEIGHTS, product->w},
                                        {DNNL_ARG_BIAS, product->bias},
                                        {DNNL_ARG_DST, product->y}});
  }
  stream.wait();
}

}  // namespace

bool LinearOneDnn(const LinearArgs& args) {
  try {
    const OneOpenMpThread one_thread;
    Product& product = ProductFor(
        {args.n_rows, args.k, args.out_end - args.out_begin, args.y_stride, args.bias != nullptr, args.accumulate});
    if (!product.fast) return false;
    Run(args, &product);
    return true;
  } catch (const dnnl::error&) {
    return false;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

bool LinearSgemm(const LinearArgs& args) {
  constexpr std::int64_t kPanelOuts = 64;   // a panel of w in float32 stays in the L2 cache for k up to 4096
  constexpr std::int64_t kPanelRows = 256;  // rows of x converted at a time
  try {
    const OneOpenMpThread one_thread;
    const std::int64_t k = args.k;
    std::vector<float> w(static_cast<std::size_t>(kPanelOuts * k));
    std::vector<float> x(static_cast<std::size_t>(std::min(kPanelRows, args.n_rows) * k));
    const auto* x_act = static_cast<const Bf16*>(args.x);
    for (std::int64_t r = 0; r < args.n_rows; r += kPanelRows) {
      const std::int64_t rows = std::min(kPanelRows, args.n_rows - r);
      for (std::int64_t i = 0; i < rows * k; ++i) x[static_cast<std::size_t>(i)] = Bf16ToFloat(x_act[r * k + i]);
      for (std::int64_t o = args.out_begin; o < args.out_end; o += kPanelOuts) {
        const std::int64_t outs = std::min(kPanelOuts, args.out_end - o);
        for (std::int64_t i = 0; i < outs * k; ++i) w[static_cast<std::size_t>(i)] = Bf16ToFloat(args.w[o * k + i]);
        float* y = args.y + r * args.y_stride + o;
        const float beta = args.accumulate ? 1.0f : 0.0f;
        if (dnnl_sgemm('N', 'T', rows, outs, k, 1.0f, x.data(), k, w.data(), k, beta, y, args.y_stride) !=
            dnnl_success) {
          return false;
        }
        for (std::int64_t i = 0; args.bias != nullptr && i < rows; ++i) {
          for (std::int64_t j = 0; j < outs; ++j) y[i * args.y_stride + j] += args.bias[o + j];
        }
      }
    }
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace zeroc::kernels::cpu
