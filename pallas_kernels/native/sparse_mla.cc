// Attention over latent rows chosen by index, read where they lie if they are floats, else decoded: nothing is gathered.
#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

constexpr int64_t kLine = 16;      // floats of a cache line
constexpr int64_t kAhead = 8;      // rows that are fetched before they are needed: pages lie anywhere
constexpr int64_t kTogether = 4;  // heads, rows or vectors of a register tile: 16 of 32 registers hold sums

// The heads from `first` on, as a tile: past the last one it is repeated, and its results are not kept.
inline int64_t HeadOf(int64_t first, int64_t j, int64_t heads) { return std::min(first + j, heads - 1); }

// p[h * n + i] = scale * q[h] . row[i] for the tile's heads and rows. A dot's arithmetic is the same wherever it falls.
void Dots(const float* q, int64_t first, int64_t heads, const float* const* row, int64_t i, int64_t n, int64_t size,
          float scale, float* p) {
  Vector sums[kTogether][kTogether] = {};
  const float *query[kTogether], *key[kTogether];
  for (int64_t j = 0; j < kTogether; ++j) {
    query[j] = q + HeadOf(first, j, heads) * size;
    key[j] = row[std::min(i + j, n - 1)];
  }
  int64_t c = 0;
  for (; c + kVectorSize <= size; c += kVectorSize) {
    Vector keys[kTogether];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTogether; ++r) keys[r] = Load(key[r] + c);
#pragma GCC unroll 4
    for (int64_t h = 0; h < kTogether; ++h) {
      const Vector value = Load(query[h] + c);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kTogether; ++r) sums[h][r] += value * keys[r];
    }
  }
  Vector partial[kTogether];
#pragma GCC unroll 4
  for (int64_t h = 0; h < kTogether; ++h)
    partial[h] = AddNeighbours(AddNeighbours(sums[h][0], sums[h][1]), AddNeighbours(sums[h][2], sums[h][3]));
  float dots[kTogether * kTogether];
  if constexpr (kVectorSize == 16) {
    Store(dots, AddNeighbours(AddNeighbours(partial[0], partial[1]), AddNeighbours(partial[2], partial[3])));
  } else {
    Store(dots, AddNeighbours(partial[0], partial[1]));
    Store(dots + kVectorSize, AddNeighbours(partial[2], partial[3]));
  }
  for (int64_t h = 0; h < kTogether && first + h < heads; ++h)
    for (int64_t r = 0; r < kTogether && i + r < n; ++r) {
      float dot = dots[h * kTogether + r];
      for (int64_t rest = c; rest < size; ++rest) dot += query[h][rest] * key[r][rest];
      p[(first + h) * n + i + r] = scale * dot;
    }
}

// out[h, v] = sum over rows i, in order, of p[h * n + i] * row[i][v], for the tile's heads and V vectors of values.
template <int64_t V>
void AddRows(const float* p, int64_t first, int64_t heads, const float* const* row, int64_t n, int64_t v, int64_t values,
             float* out) {
  Vector sums[kTogether][V] = {};
  const float* weight[kTogether];
  for (int64_t j = 0; j < kTogether; ++j) weight[j] = p + HeadOf(first, j, heads) * n;
  for (int64_t i = 0; i < n; ++i) {
    Vector value[V];
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) value[j] = Load(row[i] + v + j * kVectorSize);
#pragma GCC unroll 4
    for (int64_t h = 0; h < kTogether; ++h) {
      const float share = weight[h][i];
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) sums[h][j] += share * value[j];
    }
  }
#pragma GCC unroll 4
  for (int64_t h = 0; h < kTogether; ++h) {
    if (first + h >= heads) break;
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) Store(out + (first + h) * values + v + j * kVectorSize, sums[h][j]);
  }
}

// The same for all values of the tile's heads.
void AddAllRows(const float* p, int64_t first, int64_t heads, const float* const* row, int64_t n, int64_t values,
                float* out) {
  int64_t v = 0;
  for (; v + 4 * kVectorSize <= values; v += 4 * kVectorSize)
    AddRows<4>(p, first, heads, row, n, v, values, out);
  for (; v + kVectorSize <= values; v += kVectorSize) AddRows<1>(p, first, heads, row, n, v, values, out);
  for (int64_t h = first; h < std::min(first + kTogether, heads); ++h)
    for (int64_t rest = v; rest < values; ++rest) {
      float sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += p[h * n + i] * row[i][rest];
      out[h * values + rest] = sum;
    }
}

ffi::Error SparseMlaImpl(ffi::ThreadPool pool, F32 q, ffi::AnyBuffer cached, S32 layer, ffi::AnyBuffer own,
                         S32 chosen, S32 pages, float scale, ffi::ResultBuffer<ffi::F32> out,
                         ffi::ResultBuffer<ffi::F32> lse) {
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], tokens = shape[1], heads = shape[2], size = shape[3];
  const int64_t topk = chosen.dimensions()[2], values = out->dimensions()[3];
  const RowFormat format{cached.element_type(), size, values};
  StepRows all;
  if (ffi::Error error = RowsOf(cached, layer, own, pages, batch, format, &all); error.failure()) return error;
  const int64_t end = all.capacity() + all.extra;
  const double work_ns = batch * tokens * heads * topk * (size + values + 32) / 16.0;
  ParallelFor(pool, batch * tokens, work_ns, [&](int64_t item) {
    const int64_t b = item / tokens;
    const int32_t* index = chosen.typed_data() + item * topk;
    const std::unique_ptr<float[]> scratch(format.Scratch(topk));
    std::vector<const float*> rows;
    rows.reserve(topk);
    for (int64_t i = 0; i < topk; ++i)
      if (index[i] >= 0 && index[i] < end)
        rows.push_back(format.Read(all.Row(b, index[i]), 1, scratch.get() + rows.size() * size));
    const int64_t n = rows.size();
    std::vector<float> p(heads * n);
    const float* queries = q.typed_data() + item * heads * size;
    for (int64_t i = 0; i < n; i += kTogether) {
      for (int64_t j = i + kAhead; j < std::min(i + kAhead + kTogether, n); ++j)
        for (int64_t c = 0; c < size; c += kLine) __builtin_prefetch(rows[j] + c, 0, 2);
      for (int64_t first = 0; first < heads; first += kTogether)
        Dots(queries, first, heads, rows.data(), i, n, size, scale, p.data());
    }
    float* result = out->typed_data() + item * heads * values;
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
    for (int64_t first = 0; first < heads; first += kTogether)
      AddAllRows(p.data(), first, heads, rows.data(), n, values, result);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sparse_mla, jaxmoe::SparseMlaImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()    // q [B, T, H, C]
                                  .Arg<jaxmoe::ffi::AnyBuffer>()  // cached rows [L, P, S, as stored]
                                  .Arg<jaxmoe::S32>()    // layer []
                                  .Arg<jaxmoe::ffi::AnyBuffer>()  // own rows [B or 1, O, as stored]
                                  .Arg<jaxmoe::S32>()    // chosen rows [B, T, topk]
                                  .Arg<jaxmoe::S32>()    // pages [B, W]
                                  .Attr<float>("scale")
                                  .Ret<jaxmoe::F32>()    // out [B, T, H, V]
                                  .Ret<jaxmoe::F32>());  // lse [B, T, H]
