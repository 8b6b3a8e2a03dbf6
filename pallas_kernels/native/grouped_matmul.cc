// Grouped matmul for few rows per group (decoding): limited by reading the weights once, which XLA:CPU copies first.
#include "common.h"

namespace jaxmoe {
namespace {

constexpr int64_t kColumns = 256;  // of one work item: a row of sums stays in the L1 cache
constexpr int64_t kRows = 8;       // rows that share one reading of the weights

// sums[r, n] += x[r, k] * w[k, n] for rows r, all k, columns n. A row's arithmetic does not depend on the other rows.
void RowsTimesTile(const float* x, int64_t rows, int64_t inner, const float* w, int64_t stride,
                   int64_t columns, float* y) {
  float sums[kRows][kColumns];
  for (int64_t r = 0; r < rows; ++r) std::memset(sums[r], 0, columns * sizeof(float));
  int64_t k = 0;
  for (; k + 4 <= inner; k += 4) {
    const float* w0 = w + k * stride;
    const float *w1 = w0 + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    for (int64_t r = 0; r < rows; ++r) {
      const float* xr = x + r * inner + k;
      const float x0 = xr[0], x1 = xr[1], x2 = xr[2], x3 = xr[3];
      float* sum = sums[r];
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n)
        sum[n] = sum[n] + x0 * w0[n] + x1 * w1[n] + x2 * w2[n] + x3 * w3[n];
    }
  }
  for (; k < inner; ++k)
    for (int64_t r = 0; r < rows; ++r) {
      const float xk = x[r * inner + k];
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) sums[r][n] += xk * w[k * stride + n];
    }
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(y + r * stride, sums[r], columns * sizeof(float));
}

ffi::Error GroupedMatmulImpl(ffi::ThreadPool pool, F32 x, F32 w, S32 sizes, S32 offset,
                             ffi::ResultBuffer<ffi::F32> y) {
  const int64_t total = x.dimensions()[0], inner = x.dimensions()[1];
  const int64_t stride = w.dimensions()[2], groups = sizes.element_count();
  const int64_t tiles = (stride + kColumns - 1) / kColumns;
  const int32_t* size = sizes.typed_data();
  std::unique_ptr<int64_t[]> first(new int64_t[groups + 1]);
  std::unique_ptr<int64_t[]> used(new int64_t[groups]);
  int64_t row = 0, count = 0;
  for (int64_t g = 0; g < groups; ++g) {
    first[g] = row;
    row = std::min<int64_t>(row + std::max(size[g], 0), total);
    if (row > first[g]) used[count++] = g;
  }
  first[groups] = row;
  const int64_t base = offset.typed_data()[0];
  if (base < 0 || base + groups > w.dimensions()[0])
    return ffi::Error::InvalidArgument("grouped_matmul: group_offset + E must lie within w's matrices");
  const float* weights = w.typed_data() + base * inner * stride;
  float* out = y->typed_data();
  std::memset(out + row * stride, 0, (total - row) * stride * sizeof(float));
  // Reading weights at 16 bytes/ns, or arithmetic at 32 operations/ns.
  const double work_ns = inner * stride * std::max(count / 4.0, row / 16.0);
  ParallelFor(pool, count * tiles, work_ns, [&](int64_t item) {
    const int64_t g = used[item / tiles], start = item % tiles * kColumns;
    const int64_t columns = std::min(kColumns, stride - start);
    for (int64_t r = first[g]; r < first[g + 1]; r += kRows)
      RowsTimesTile(x.typed_data() + r * inner, std::min(kRows, first[g + 1] - r), inner,
                    weights + g * inner * stride + start, stride, columns, out + r * stride + start);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul, jaxmoe::GroupedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()   // x [M, K]
                                  .Arg<jaxmoe::F32>()   // w [G, K, N]
                                  .Arg<jaxmoe::S32>()   // group sizes [E]
                                  .Arg<jaxmoe::S32>()   // group offset []
                                  .Ret<jaxmoe::F32>()); // y [M, N]
