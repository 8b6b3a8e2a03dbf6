// Attention over latent rows chosen by index, read where they lie: nothing is gathered.
#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

inline float Dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

ffi::Error SparseMlaImpl(ffi::ThreadPool pool, F32 q, F32 cached, S32 layer, F32 own, S32 chosen,
                         float scale, ffi::ResultBuffer<ffi::F32> out,
                         ffi::ResultBuffer<ffi::F32> lse) {
  const auto shape = q.dimensions(), stored = cached.dimensions();
  const int64_t batch = shape[0], tokens = shape[1], heads = shape[2], size = shape[3];
  const int64_t capacity = stored[2], extra = own.dimensions()[1], topk = chosen.dimensions()[2];
  const int64_t values = out->dimensions()[3];
  const float* kv = cached.typed_data() + int64_t{layer.typed_data()[0]} * batch * capacity * size;
  const double flops = 2.0 * batch * tokens * heads * topk * (size + values + 16);
  ParallelFor(pool, batch * tokens, flops, [&](int64_t item) {
    const int64_t b = item / tokens;
    const int32_t* index = chosen.typed_data() + item * topk;
    std::vector<const float*> rows;
    rows.reserve(topk);
    for (int64_t i = 0; i < topk; ++i) {
      if (index[i] < 0 || index[i] >= capacity + extra) continue;
      rows.push_back(index[i] < capacity ? kv + (b * capacity + index[i]) * size
                                         : own.typed_data() + (b * extra + index[i] - capacity) * size);
    }
    const int64_t n = rows.size();
    std::vector<float> p(heads * n);
    const float* queries = q.typed_data() + item * heads * size;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t h = 0; h < heads; ++h) p[h * n + i] = scale * Dot(queries + h * size, rows[i], size);
    float* result = out->typed_data() + item * heads * values;
    std::memset(result, 0, heads * values * sizeof(float));
    for (int64_t h = 0; h < heads; ++h) {
      float* weight = p.data() + h * n;
      float peak = -std::numeric_limits<float>::infinity(), total = 0;
      for (int64_t i = 0; i < n; ++i) peak = std::max(peak, weight[i]);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) weight[i] = ExpNegative(weight[i] - peak);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += weight[i];
      const float inverse = n ? 1.0f / total : 0.0f;
      for (int64_t i = 0; i < n; ++i) weight[i] *= inverse;
      lse->typed_data()[item * heads + h] = n ? peak + std::log(total) : peak;
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const float weight = p[h * n + i];
        float* sum = result + h * values;
#pragma omp simd
        for (int64_t v = 0; v < values; ++v) sum[v] += weight * rows[i][v];
      }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sparse_mla, jaxmoe::SparseMlaImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()    // q [B, T, H, C]
                                  .Arg<jaxmoe::F32>()    // cached rows [L, B, S, C]
                                  .Arg<jaxmoe::S32>()    // layer []
                                  .Arg<jaxmoe::F32>()    // own rows [B, O, C]
                                  .Arg<jaxmoe::S32>()    // chosen rows [B, T, topk]
                                  .Attr<float>("scale")
                                  .Ret<jaxmoe::F32>()    // out [B, T, H, V]
                                  .Ret<jaxmoe::F32>());  // lse [B, T, H]
