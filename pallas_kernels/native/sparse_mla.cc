// Attention over latent rows chosen by index, read where they lie: nothing is gathered.
#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

constexpr int64_t kTogether = 4;  // rows taken together: independent sums hide each other's latency

// p[j] = scale * q . row[j] for N rows.
template <int64_t N>
inline void Dots(const float* q, const float* const* row, int64_t size, float scale, float* p) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  const float *r0 = row[0], *r1 = row[N > 1 ? 1 : 0], *r2 = row[N > 2 ? 2 : 0], *r3 = row[N > 3 ? 3 : 0];
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < size; ++c) {
    s0 += q[c] * r0[c];
    if (N > 1) s1 += q[c] * r1[c];
    if (N > 2) s2 += q[c] * r2[c];
    if (N > 3) s3 += q[c] * r3[c];
  }
  const float sums[4] = {s0, s1, s2, s3};
  for (int64_t j = 0; j < N; ++j) p[j] = scale * sums[j];
}

// sum[v] += p[0] * row[0][v] + ... in this order.
inline void AddRows(const float* p, const float* const* row, int64_t number, int64_t values, float* sum) {
  int64_t i = 0;
  for (; i + kTogether <= number; i += kTogether) {
    const float p0 = p[i], p1 = p[i + 1], p2 = p[i + 2], p3 = p[i + 3];
    const float *r0 = row[i], *r1 = row[i + 1], *r2 = row[i + 2], *r3 = row[i + 3];
#pragma omp simd
    for (int64_t v = 0; v < values; ++v)
      sum[v] = sum[v] + p0 * r0[v] + p1 * r1[v] + p2 * r2[v] + p3 * r3[v];
  }
  for (; i < number; ++i) {
    const float pi = p[i];
    const float* r = row[i];
#pragma omp simd
    for (int64_t v = 0; v < values; ++v) sum[v] += pi * r[v];
  }
}

ffi::Error SparseMlaImpl(ffi::ThreadPool pool, F32 q, F32 cached, S32 layer, F32 own, S32 chosen,
                         S32 pages, float scale, ffi::ResultBuffer<ffi::F32> out,
                         ffi::ResultBuffer<ffi::F32> lse) {
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], tokens = shape[1], heads = shape[2], size = shape[3];
  const int64_t topk = chosen.dimensions()[2], values = out->dimensions()[3];
  StepRows all;
  if (!RowsOf(cached, layer, own, pages, batch, &all))
    return ffi::Error::InvalidArgument("sparse_mla: layer and pages must lie within the cache");
  const int64_t end = all.capacity() + all.extra;
  const double work_ns = batch * tokens * heads * topk * (size + values + 32) / 16.0;
  ParallelFor(pool, batch * tokens, work_ns, [&](int64_t item) {
    const int64_t b = item / tokens;
    const int32_t* index = chosen.typed_data() + item * topk;
    std::vector<const float*> rows;
    rows.reserve(topk);
    for (int64_t i = 0; i < topk; ++i)
      if (index[i] >= 0 && index[i] < end) rows.push_back(all.Row(b, index[i]));
    const int64_t n = rows.size();
    std::vector<float> p(heads * n);
    const float* queries = q.typed_data() + item * heads * size;
    int64_t first = 0;
    for (; first + kTogether <= n; first += kTogether)
      for (int64_t h = 0; h < heads; ++h)
        Dots<kTogether>(queries + h * size, &rows[first], size, scale, &p[h * n + first]);
    for (; first < n; ++first)
      for (int64_t h = 0; h < heads; ++h)
        Dots<1>(queries + h * size, &rows[first], size, scale, &p[h * n + first]);
    float* result = out->typed_data() + item * heads * values;
    std::memset(result, 0, heads * values * sizeof(float));
    for (int64_t h = 0; h < heads; ++h) {
      float* weight = p.data() + h * n;
      float peak = std::numeric_limits<float>::lowest(), total = 0;  // finite, so that -inf scores weigh 0
      for (int64_t i = 0; i < n; ++i) peak = std::max(peak, weight[i]);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) weight[i] = ExpNegative(weight[i] - peak);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += weight[i];
      const float inverse = total > 0 ? 1.0f / total : 0.0f;
      for (int64_t i = 0; i < n; ++i) weight[i] *= inverse;
      lse->typed_data()[item * heads + h] = total > 0 ? peak + std::log(total) : -std::numeric_limits<float>::infinity();
    }
    constexpr int64_t kBlock = 32;  // rows that stay in the L1 cache while every head adds them
    for (int64_t start = 0; start < n; start += kBlock)
      for (int64_t h = 0; h < heads; ++h)
        AddRows(&p[h * n + start], &rows[start], std::min(kBlock, n - start), values, result + h * values);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sparse_mla, jaxmoe::SparseMlaImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()    // q [B, T, H, C]
                                  .Arg<jaxmoe::F32>()    // cached rows [L, P, S, C]
                                  .Arg<jaxmoe::S32>()    // layer []
                                  .Arg<jaxmoe::F32>()    // own rows [B or 1, O, C]
                                  .Arg<jaxmoe::S32>()    // chosen rows [B, T, topk]
                                  .Arg<jaxmoe::S32>()    // pages [B, W]
                                  .Attr<float>("scale")
                                  .Ret<jaxmoe::F32>()    // out [B, T, H, V]
                                  .Ret<jaxmoe::F32>());  // lse [B, T, H]
