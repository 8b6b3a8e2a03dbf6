// Grouped matmul. Few rows per group (decoding) are limited by reading the weights, which is done once and in place;
// many rows by arithmetic, done in register tiles on packed weights. Both add the same products in the same order with
// fused multiply-adds: a row's result is the same, bit for bit, whichever path and company it has.
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

// Twice so many registers hold sums: 24 of 32, or 12 of 16.
constexpr int64_t kTileRows = kVectorSize == 16 ? 12 : 6;
constexpr int64_t kColumns = 256;  // of one work item with few rows: a row of sums stays in the L1 cache
constexpr int64_t kRows = kTileRows;  // up to so many rows use the weights where they lie; more are worth packing
constexpr int64_t kAhead = 16;     // rows of weights that are fetched before they are needed; past the end it is harmless

constexpr int64_t kPanel = 2 * kVectorSize;   // columns of a register tile
constexpr int64_t kSum = 32;             // products that are added one after another
constexpr int64_t kInnerBlock = 512;     // a packed panel stays in the L2 cache; a multiple of kSum
constexpr int64_t kRowBlock = 20 * kTileRows;  // rows of a work item: packing is then a few percent of it

// A matrix in someone else's memory, element (i, j) at data[i * row + j * column].
struct View {
  const float* data;
  int64_t row, column;
};

// Columns [0, columns) of w's rows [0, inner) as a dense [inner, kPanel], zeros after the last column.
void Pack(View w, int64_t inner, int64_t columns, float* panel) {
  for (int64_t k = 0; k < inner; ++k) {
    float* to = panel + k * kPanel;
    const float* from = w.data + k * w.row;
    if (w.column == 1) {
      std::memcpy(to, from, columns * sizeof(float));
    } else {
      for (int64_t n = 0; n < columns; ++n) to[n] = from[n * w.column];
    }
    std::memset(to + columns, 0, (kPanel - columns) * sizeof(float));
  }
}

// y[R, columns] (+)= x[R, inner] * w[inner, V vectors]. The sums stay in registers only if nothing takes their address.
// Products are added kSum at a time: one long chain of additions would round several times as much.
template <int64_t R, int64_t V, bool kFetch>
void Tile(View x, int64_t inner, const float* w, int64_t w_stride, bool add, int64_t columns, float* y, int64_t stride) {
  float total[R][V * kVectorSize] = {};
  if (add)
    for (int64_t r = 0; r < R; ++r) std::memcpy(total[r], y + r * stride, columns * sizeof(float));
  for (int64_t start = 0; start < inner; start += kSum) {
    Vector sums[R][V] = {};
    const int64_t end = std::min(start + kSum, inner);
    for (int64_t k = start; k < end; ++k) {
      Vector line[V];
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) {
        line[v] = Load(w + k * w_stride + v * kVectorSize);
        if (kFetch) __builtin_prefetch(w + (k + kAhead) * w_stride + v * kVectorSize);
      }
#pragma GCC unroll 12
      for (int64_t r = 0; r < R; ++r) {
        const float value = x.data[r * x.row + k * x.column];
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) sums[r][v] += value * line[v];
      }
    }
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) {
        float* part = total[r] + v * kVectorSize;
        Store(part, Load(part) + sums[r][v]);
      }
    }
  }
  for (int64_t r = 0; r < R; ++r) std::memcpy(y + r * stride, total[r], columns * sizeof(float));
}

template <int64_t R, int64_t V, bool kFetch>
void TileOf(int64_t rows, View x, int64_t inner, const float* w, int64_t w_stride, bool add, int64_t columns, float* y,
            int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return Tile<R, V, kFetch>(x, inner, w, w_stride, add, columns, y, stride);
    TileOf<R - 1, V, kFetch>(rows, x, inner, w, w_stride, add, columns, y, stride);
  }
}

// y[rows, columns] = x[rows, inner] * w[inner, columns], the weights where they lie. Only whole vectors can be loaded there:
// the columns left over are copied first.
template <int64_t V>
void RowsTimesStrip(View x, int64_t rows, int64_t inner, const float* w, int64_t w_stride, int64_t columns, float* y,
                    int64_t stride) {
  constexpr int64_t kWidth = V * kVectorSize;
  int64_t n = 0;
  for (; n + kWidth <= columns; n += kWidth)
    TileOf<kTileRows * 2 / V, V, true>(rows, x, inner, w + n, w_stride, false, kWidth, y + n, stride);
  if (V > 1 && n + kWidth / 2 <= columns)
    return RowsTimesStrip<V / 2 + (V == 1)>(x, rows, inner, w + n, w_stride, columns - n, y + n, stride);
  if (n == columns) return;
  std::vector<float> rest(inner * kPanel);
  Pack({w + n, w_stride, 1}, inner, columns - n, rest.data());
  TileOf<kTileRows, 2, false>(rows, x, inner, rest.data(), kPanel, false, columns - n, y + n, stride);
}

// y[rows, columns <= kPanel] = x[rows, inner] * w[inner, columns].
void RowsTimesPanel(View x, int64_t rows, int64_t inner, View w, int64_t columns, float* y, int64_t stride) {
  std::vector<float> panel(std::min(inner, kInnerBlock) * kPanel);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t k = 0; k < inner; k += kInnerBlock) {
    const int64_t depth = std::min(kInnerBlock, inner - k);
    Pack({w.data + k * w.row, w.row, w.column}, depth, columns, panel.data());
    for (int64_t t = 0; t < tiles; ++t) {  // of about equal height
      const int64_t r = t * rows / tiles, height = (t + 1) * rows / tiles - r;
      TileOf<kTileRows, 2, false>(height, {x.data + r * x.row + k * x.column, x.row, x.column}, depth, panel.data(), kPanel,
                           k > 0, columns, y + r * stride, stride);
    }
  }
}

// Rows [first, first + rows) belong to one group.
struct Block {
  int64_t group, first, rows;
};

// The groups' rows in blocks of at most kRowBlock, and how many rows they are; sizes beyond `total` rows are cut.
std::vector<Block> BlocksOf(S32 sizes, int64_t total, int64_t* covered) {
  std::vector<Block> blocks;
  int64_t row = 0;
  for (int64_t g = 0; g < static_cast<int64_t>(sizes.element_count()); ++g) {
    const int64_t end = std::min<int64_t>(row + std::max(sizes.typed_data()[g], 0), total);
    for (; row < end; row = std::min(row + kRowBlock, end))
      blocks.push_back({g, row, std::min(kRowBlock, end - row)});
  }
  *covered = row;
  return blocks;
}

// y[r] = x[r] * w[offset + group of r], or its transpose.
ffi::Error GroupedMatmulImpl(ffi::ThreadPool pool, F32 x, F32 w, S32 sizes, S32 offset, bool transpose,
                             ffi::ResultBuffer<ffi::F32> y) {
  const int64_t total = x.dimensions()[0], inner = x.dimensions()[1], columns = y->dimensions()[1];
  const int64_t base = offset.typed_data()[0];
  if (base < 0 || base + static_cast<int64_t>(sizes.element_count()) > w.dimensions()[0])
    return ffi::Error::InvalidArgument("grouped_matmul: group_offset + E must lie within w's matrices");
  int64_t covered = 0;
  const std::vector<Block> blocks = BlocksOf(sizes, total, &covered);
  const bool few = !transpose && covered <= kRows * static_cast<int64_t>(blocks.size());
  const int64_t width = few ? kColumns : kPanel, strips = (columns + width - 1) / width;
  const float* weights = w.typed_data() + base * inner * columns;
  float* out = y->typed_data();
  std::memset(out + covered * columns, 0, (total - covered) * columns * sizeof(float));
  // Reading weights at 16 bytes/ns, or arithmetic at 32 operations/ns.
  const double work_ns = inner * columns * std::max(blocks.size() / 4.0, covered / 16.0);
  ParallelFor(pool, blocks.size() * strips, work_ns, [&](int64_t item) {
    const Block block = blocks[item / strips];
    const int64_t start = item % strips * width, number = std::min(width, columns - start);
    const float* rows = x.typed_data() + block.first * inner;
    const float* matrix = weights + block.group * inner * columns;
    float* result = out + block.first * columns + start;
    if (few) {
      for (int64_t r = 0; r < block.rows; r += kRows) {
        const int64_t height = std::min(kRows, block.rows - r);
        const View some = {rows + r * inner, inner, 1};
        if (height <= kTileRows / 2)
          RowsTimesStrip<4>(some, height, inner, matrix + start, columns, number, result + r * columns, columns);
        else
          RowsTimesStrip<2>(some, height, inner, matrix + start, columns, number, result + r * columns, columns);
      }
    } else {
      const View view = transpose ? View{matrix + start * inner, 1, inner} : View{matrix + start, columns, 1};
      RowsTimesPanel({rows, inner, 1}, block.rows, inner, view, number, result, columns);
    }
  });
  return ffi::Error::Success();
}

// dw[g] = x[rows of g]^T * dy[rows of g].
ffi::Error GroupedOuterImpl(ffi::ThreadPool pool, F32 x, F32 dy, S32 sizes, ffi::ResultBuffer<ffi::F32> dw) {
  const int64_t total = x.dimensions()[0], height = x.dimensions()[1], columns = dy.dimensions()[1];
  const int64_t groups = sizes.element_count(), strips = (columns + kPanel - 1) / kPanel;
  std::vector<Block> group(groups);
  int64_t row = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min<int64_t>(row + std::max(sizes.typed_data()[g], 0), total);
    group[g] = {g, row, end - row};
    row = end;
  }
  const double work_ns = height * columns * (row / 16.0 + groups);
  ParallelFor(pool, groups * strips, work_ns, [&](int64_t item) {
    const Block block = group[item / strips];
    const int64_t start = item % strips * kPanel, number = std::min(kPanel, columns - start);
    float* result = dw->typed_data() + block.group * height * columns + start;
    if (block.rows == 0) {
      for (int64_t r = 0; r < height; ++r) std::memset(result + r * columns, 0, number * sizeof(float));
      return;
    }
    RowsTimesPanel({x.typed_data() + block.first * height, 1, height}, height, block.rows,
                   {dy.typed_data() + block.first * columns + start, columns, 1}, number, result, columns);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul, jaxmoe::GroupedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()   // x [M, K]
                                  .Arg<jaxmoe::F32>()   // w [G, K, N], or [G, N, K] to be transposed
                                  .Arg<jaxmoe::S32>()   // group sizes [E]
                                  .Arg<jaxmoe::S32>()   // group offset []
                                  .Attr<bool>("transpose")
                                  .Ret<jaxmoe::F32>()); // y [M, N]

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_outer, jaxmoe::GroupedOuterImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()   // x [M, K]
                                  .Arg<jaxmoe::F32>()   // dy [M, N]
                                  .Arg<jaxmoe::S32>()   // group sizes [E]
                                  .Ret<jaxmoe::F32>()); // dw [E, K, N]
