// Grouped matmul in register tiles on the weights where they lie. Products are added kSum at a time, and these sums one after
// another, for every row alike: a row's result is the same, bit for bit, whatever company it has.
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

// Twice so many registers hold sums: 24 of 32, or 12 of 16.
constexpr int64_t kTileRows = kVectorSize == 16 ? 12 : 6;
constexpr int64_t kPanel = 2 * kVectorSize;    // columns of a tile; of one with few rows twice as many
constexpr int64_t kSum = 32;                   // products that are added one after another: a longer chain rounds more
constexpr int64_t kDepth = 128;                // products in a pass: a panel's weights and a tile's x stay in the L1 cache
constexpr int64_t kRowBlock = 24 * kTileRows;  // rows of a work item: x of a pass stays in the L2 cache

// A matrix in someone else's memory, element (i, j) at data[i * row + j * column].
struct View {
  const float* data;
  int64_t row, column;

  View At(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
};

// y[R, columns] (+)= x[R, depth] * w[depth, V vectors], kSum products at a time, whose sums are added in their order. They stay in
// registers only if nothing takes their address. A block's first tile also fetches the weights of the next kSum rows, harmlessly
// past the end, and copies those it reads, so that further tiles find them side by side. With four vectors a tile has all rows of
// its block and reads them where they lie; with two it reads x as `Pack` leaves it.
template <int64_t R, int64_t V, bool kFirst>
void Tile(View x, int64_t depth, const float* w, int64_t w_stride, bool add, int64_t columns, float* y, int64_t stride,
          float* copy) {
  constexpr int64_t kWidth = V * kVectorSize;
  alignas(64) float total[R * kWidth];
  const bool whole = columns == kWidth;
  if (add) {
    for (int64_t r = 0; r < R; ++r) std::memcpy(total + r * kWidth, y + r * stride, columns * sizeof(float));
  } else {
    for (int64_t r = 0; r < R; ++r) __builtin_prefetch(y + r * stride, 1);
  }
  for (int64_t begin = 0; begin < depth; begin += kSum) {
    const int64_t end = std::min(begin + kSum, depth);
    Vector sums[R][V] = {};
    for (int64_t k = begin; k < end; ++k) {
      Vector line[V];
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) {
        line[v] = Load(w + k * w_stride + v * kVectorSize);
        if (kFirst) {
          __builtin_prefetch(w + (k + kSum) * w_stride + v * kVectorSize, 0, 2);
          if (V == 2) Store(copy + (k * V + v) * kVectorSize, line[v]);
        }
      }
#pragma GCC unroll 12
      for (int64_t r = 0; r < R; ++r) {
        const float value = V == 2 ? x.data[k * R + r] : x.data[r * x.row + k * x.column];
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) sums[r][v] += value * line[v];
      }
    }
    const bool first = begin == 0 && !add, last = end == depth && whole;
#pragma GCC unroll 12
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) {
        float* so_far = total + r * kWidth + v * kVectorSize;
        float* to = last ? y + r * stride + v * kVectorSize : so_far;
        Store(to, first ? sums[r][v] : Load(so_far) + sums[r][v]);
      }
    }
  }
  if (whole) return;
  for (int64_t r = 0; r < R; ++r) std::memcpy(y + r * stride, total + r * kWidth, columns * sizeof(float));
}

template <int64_t R, int64_t V, bool kFirst>
void TileOf(int64_t rows, View x, int64_t depth, const float* w, int64_t w_stride, bool add, int64_t columns, float* y,
            int64_t stride, float* copy) {
  if constexpr (R > 0) {
    if (rows == R)
      return Tile<R, V, kFirst>(x, depth, w, w_stride, add, columns, y, stride, copy);
    TileOf<R - 1, V, kFirst>(rows, x, depth, w, w_stride, add, columns, y, stride, copy);
  }
}

// Rows r and r + kVectorSize / 2 of a square of vectors, interleaved: its lower or its upper half.
inline Vector Interleaved(Vector a, Vector b, bool upper) {
#if defined(__AVX512F__)
  return upper ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
               : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return upper ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
               : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#endif
}

// to[k * width + n] = from[n * stride + k] for a square of kVectorSize. Each step takes the highest bit of a number's row to the
// lowest of its column, so that after all of them rows are columns.
inline void Transpose(const float* from, int64_t stride, int64_t width, float* to) {
  constexpr int64_t kSteps = kVectorSize == 16 ? 4 : 3;
  Vector square[kSteps + 1][kVectorSize];
#pragma GCC unroll 16
  for (int64_t n = 0; n < kVectorSize; ++n) square[0][n] = Load(from + n * stride);
#pragma GCC unroll 4
  for (int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 8
    for (int64_t i = 0; i < kVectorSize / 2; ++i) {
      const Vector a = square[step][i], b = square[step][i + kVectorSize / 2];
      square[step + 1][2 * i] = Interleaved(a, b, false);
      square[step + 1][2 * i + 1] = Interleaved(a, b, true);
    }
#pragma GCC unroll 16
  for (int64_t k = 0; k < kVectorSize; ++k) Store(to + k * width, square[kSteps][k]);
}

// The first `columns` columns of w's first `depth` rows as a dense [depth, width], zeros after the last column.
void Copy(View w, int64_t depth, int64_t columns, int64_t width, float* to) {
  if (w.column == 1) {
    for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * width, w.data + k * w.row, columns * sizeof(float));
  } else {  // transposed: a column's numbers lie side by side; those of the next panel are called into the cache
    const int64_t squares = columns / kVectorSize * kVectorSize, whole = depth / kVectorSize * kVectorSize;
    for (int64_t n = 0; n < squares; n += kVectorSize)
      for (int64_t k = 0; k < whole; k += kVectorSize) {
        for (int64_t i = 0; i < kVectorSize; ++i) __builtin_prefetch(w.data + (width + n + i) * w.column + k, 0, 2);
        Transpose(w.data + n * w.column + k, w.column, width, to + k * width + n);
      }
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t k = n < squares ? whole : 0; k < depth; ++k) to[k * width + n] = w.data[n * w.column + k];
  }
  if (columns == width) return;
  for (int64_t k = 0; k < depth; ++k) std::memset(to + k * width + columns, 0, (width - columns) * sizeof(float));
}

// Rows in parts of about equal height, at most `height`; part t from row Row(t) on.
struct Tiles {
  int64_t rows, count;

  Tiles(int64_t rows, int64_t height) : rows(rows), count((rows + height - 1) / height) {}
  int64_t Row(int64_t t) const { return t * rows / count; }
  int64_t Height(int64_t t) const { return Row(t + 1) - Row(t); }
};

// x's first `depth` columns tile after tile, each [depth, height]: where they lie, rows may be a power of two apart and then
// push each other out of the cache.
void Pack(View x, Tiles tiles, int64_t depth, float* to) {
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t height = tiles.Height(t);
    const View from = x.At(tiles.Row(t), 0);
    if (x.column == 1) {
      for (int64_t r = 0; r < height; ++r)
        for (int64_t k = 0; k < depth; ++k) to[k * height + r] = from.data[r * from.row + k];
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < height; ++r) to[k * height + r] = from.data[r * from.row + k * from.column];
    }
    to += height * depth;
  }
}

// y[rows, columns <= V vectors] (+)= x[rows, depth <= kDepth] * w[depth, columns]; with two vectors x is packed.
template <int64_t V>
void RowsTimesPanel(View x, Tiles tiles, int64_t depth, View w, bool add, int64_t columns, float* y, int64_t stride) {
  constexpr int64_t kWidth = V * kVectorSize, kHeight = 2 * kTileRows / V;
  alignas(64) float copy[kDepth * kWidth];
  const bool dense = w.column != 1 || columns < kWidth;
  if (dense) Copy(w, depth, columns, kWidth, copy);
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t r = tiles.Row(t), height = tiles.Height(t);
    const View part = V == 2 ? View{x.data + r * depth, 0, 0} : x.At(r, 0);
    if (t == 0 && !dense)
      TileOf<kHeight, V, true>(height, part, depth, w.data, w.row, add, columns, y + r * stride, stride, copy);
    else
      TileOf<kHeight, V, false>(height, part, depth, copy, kWidth, add, columns, y + r * stride, stride, copy);
  }
}

// y[rows, columns] = x[rows, inner] * w[inner, columns]: the weights are read once, in the order of their rows.
template <int64_t V>
void RowsTimesColumns(View x, int64_t rows, int64_t inner, View w, int64_t columns, float* y, int64_t stride) {
  constexpr int64_t kWidth = V * kVectorSize;
  constexpr int64_t kPass = V == 2 ? kDepth : kSum;  // few rows take the weights in their order, a chain's rows at a time
  static thread_local std::vector<float> packed;     // too much for the stack
  const Tiles tiles(rows, 2 * kTileRows / V);
  if (V == 2) packed.resize(kRowBlock * kDepth);
  for (int64_t k = 0; k < inner; k += kPass) {
    const int64_t depth = std::min(kPass, inner - k);
    View part = x.At(0, k);
    if (V == 2) {
      Pack(part, tiles, depth, packed.data());
      part.data = packed.data();
    }
    for (int64_t n = 0; n < columns; n += kWidth)
      RowsTimesPanel<V>(part, tiles, depth, w.At(k, n), k > 0, std::min(kWidth, columns - n), y + n, stride);
  }
}

void Multiply(View x, int64_t rows, int64_t inner, View w, int64_t columns, float* y, int64_t stride) {
  if (rows <= kTileRows / 2) return RowsTimesColumns<4>(x, rows, inner, w, columns, y, stride);
  const Tiles blocks(rows, kRowBlock);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t r = blocks.Row(b);
    RowsTimesColumns<2>(x.At(r, 0), blocks.Height(b), inner, w, columns, y + r * stride, stride);
  }
}

// Rows [first, first + rows) belong to one group.
struct Block {
  int64_t group, first, rows;
};

// The groups' rows in blocks of about equal size, at most kRowBlock, and how many rows they are; sizes beyond `total` rows
// are cut.
std::vector<Block> BlocksOf(S32 sizes, int64_t total, int64_t* covered) {
  std::vector<Block> blocks;
  int64_t row = 0;
  for (int64_t g = 0; g < static_cast<int64_t>(sizes.element_count()); ++g) {
    const int64_t rows = std::clamp<int64_t>(sizes.typed_data()[g], 0, total - row);
    const Tiles parts(rows, kRowBlock);
    for (int64_t p = 0; p < parts.count; ++p) blocks.push_back({g, row + parts.Row(p), parts.Height(p)});
    row += rows;
  }
  *covered = row;
  return blocks;
}

// Columns of a work item, so that there are about kItems at least.
int64_t WidthOf(int64_t columns, int64_t rows, int64_t blocks) {
  constexpr int64_t kItems = 8;
  const int64_t step = rows <= blocks * kTileRows / 2 ? 2 * kPanel : kPanel;
  const int64_t strips = (kItems + blocks - 1) / std::max<int64_t>(blocks, 1);
  return std::max(columns / std::max<int64_t>(strips, 1) / step, int64_t{1}) * step;
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
  const int64_t width = WidthOf(columns, covered, blocks.size()), strips = (columns + width - 1) / width;
  const float* weights = w.typed_data() + base * inner * columns;
  float* out = y->typed_data();
  std::memset(out + covered * columns, 0, (total - covered) * columns * sizeof(float));
  if (inner == 0) std::memset(out, 0, covered * columns * sizeof(float));
  // Reading weights at 16 bytes/ns, or arithmetic at 32 operations/ns.
  const double work_ns = inner * columns * std::max(blocks.size() / 4.0, covered / 16.0);
  ParallelFor(pool, blocks.size() * strips, work_ns, [&](int64_t item) {
    const Block block = blocks[item / strips];
    const int64_t start = item % strips * width, number = std::min(width, columns - start);
    const float* matrix = weights + block.group * inner * columns;
    const View view = transpose ? View{matrix, 1, inner} : View{matrix, columns, 1};
    Multiply({x.typed_data() + block.first * inner, inner, 1}, block.rows, inner, view.At(0, start), number,
             out + block.first * columns + start, columns);
  });
  return ffi::Error::Success();
}

// dw[g] = x[rows of g]^T * dy[rows of g].
ffi::Error GroupedOuterImpl(ffi::ThreadPool pool, F32 x, F32 dy, S32 sizes, ffi::ResultBuffer<ffi::F32> dw) {
  const int64_t total = x.dimensions()[0], height = x.dimensions()[1], columns = dy.dimensions()[1];
  const int64_t groups = sizes.element_count();
  const int64_t width = WidthOf(columns, height, groups), strips = (columns + width - 1) / width;
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
    const int64_t start = item % strips * width, number = std::min(width, columns - start);
    float* result = dw->typed_data() + block.group * height * columns + start;
    if (block.rows == 0) {
      for (int64_t r = 0; r < height; ++r) std::memset(result + r * columns, 0, number * sizeof(float));
      return;
    }
    Multiply({x.typed_data() + block.first * height, 1, height}, height, block.rows,
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
