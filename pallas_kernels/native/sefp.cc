// y = x * w from the stored bits of w (pallas_kernels/sefp/format.py): a group of 64 weights becomes bytes, then floats,
// then one sum per row of x, which the group's power of two scales. Of many matrices each row has its own, where it lies.
// A row's sums are added in one order whatever rows share the call: its result is the same, bit for bit.
#include <utility>
#include <vector>

#include "common.h"

namespace jaxmoe::sefp {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kLanes = 8;      // a group's words, and columns at a time
constexpr int64_t kFewRows = 4;    // each of which multiplies a weight while it is in a register
constexpr int64_t kRowBlock = 48;  // of more, whose share of a group stays in the L1 cache

using Quads = uint64_t __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Integers = int32_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(32)));
using SignedBytes = int8_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));

// One matrix.
struct Weights {
  const int8_t* exponent;    // [groups, columns]
  const uint8_t* base;       // [groups, columns, 32]
  const uint8_t* planes[5];  // [groups, columns, 8 bytes] each
  int64_t groups, columns;

  // The index-th of many.
  Weights At(int64_t index) const {
    const int64_t before = index * groups * columns;
    Weights w{exponent + before, base + before * 32, {}, groups, columns};
    for (int p = 0; p < 5; ++p) w.planes[p] = planes[p] == nullptr ? nullptr : planes[p] + before * 8;
    return w;
  }
};

template <typename T>
T At(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// All ones in each byte whose bit of the plane is set: byte t for element 2 t, or 2 t + 1 if odd.
template <bool kOdd>
Bytes BitsOf(const uint8_t* plane) {
  const uint64_t bits = At<uint64_t>(plane);
  const Bytes repeated = reinterpret_cast<Bytes>(Quads{bits, bits, bits, bits});
  const Bytes spread = __builtin_shufflevector(repeated, repeated, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                               20, 20, 20, 20, 21, 21, 21, 21, 22, 22, 22, 22, 23, 23, 23, 23);
  constexpr uint8_t a = kOdd ? 2 : 1, b = kOdd ? 8 : 4, c = kOdd ? 32 : 16, d = kOdd ? 128 : 64;
  const Bytes place = {a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
  return reinterpret_cast<Bytes>((spread & place) == place);
}

// Half of a group: byte t is the magnitude of element 2 t, or 2 t + 1 if odd, and minus is all ones where that is negative.
template <bool kOdd, size_t... P>
inline __attribute__((always_inline)) void Decode(const Weights& w, int64_t at, Bytes* magnitude, Bytes* minus, std::index_sequence<P...>) {
  const Bytes nibbles = At<Bytes>(w.base + at * 32);
  // A sign stands in the next byte of the word, in that of the last one in the first.
  const Bytes signs = __builtin_shufflevector(nibbles, nibbles, 1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12, 17, 18,
                                              19, 16, 21, 22, 23, 20, 25, 26, 27, 24, 29, 30, 31, 28);
  *minus = reinterpret_cast<Bytes>(kOdd ? reinterpret_cast<SignedBytes>(signs) < 0 : (signs & 8) == 8);
  *magnitude = (kOdd ? nibbles >> 4 : nibbles) & 7;
  // A set bit is -1: twice the magnitude, less that.
  ((*magnitude = *magnitude + *magnitude - BitsOf<kOdd>(w.planes[P] + at * 8)), ...);
}

// Half of a group's weights times 2^kShift. Lane l of vector k has element 8 l + 2 k (+ 1).
template <int kPlanes, bool kOdd>
inline __attribute__((always_inline)) void HalfGroup(const Weights& w, int64_t at, Floats* weights) {
  Bytes magnitude, minus;
  Decode<kOdd>(w, at, &magnitude, &minus, std::make_index_sequence<kPlanes>());
  // A byte is moved to the top of its 32 bits, where its sign is that of the whole: the cheapest way to an integer.
  if constexpr (kPlanes < 5) magnitude = (magnitude ^ minus) - minus;
  const Words codes = reinterpret_cast<Words>(magnitude), signs = reinterpret_cast<Words>(minus);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Words top = codes << (24 - 8 * k) & 0xff000000u;
    if constexpr (kPlanes < 5) {
      weights[k] = __builtin_convertvector(reinterpret_cast<Integers>(top), Floats);
    } else {  // eight bits leave none for the sign
      const Words sign = signs << (24 - 8 * k) & 0x80000000u;
      const Floats positive = __builtin_convertvector(reinterpret_cast<Integers>(top >> 1), Floats);
      weights[k] = reinterpret_cast<Floats>(reinterpret_cast<Words>(positive) ^ sign);
    }
  }
}

template <int kPlanes>
constexpr int kShift = kPlanes < 5 ? 24 : 23;

// Sums of neighbours within 128 bits, where it is cheap: {a0 + a1, a2 + a3, b0 + b1, b2 + b3, a4 + a5, ...}.
inline Floats Pairs(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The sum of each of eight vectors.
inline Floats Totals(const Floats* s) {
  const Floats low = Pairs(Pairs(s[0], s[1]), Pairs(s[2], s[3])), high = Pairs(Pairs(s[4], s[5]), Pairs(s[6], s[7]));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}

// What the sums of a group's columns count for, zero beyond `columns`; exponents, widths and shifts are within +-60.
template <int kPlanes>
inline Floats Scales(const Weights& w, int64_t at, int64_t columns) {
  Integers exponents = {};
  for (int64_t n = 0; n < columns; ++n) exponents[n] = w.exponent[at + n];
  return reinterpret_cast<Floats>((exponents + (127 - 3 - kPlanes - kShift<kPlanes>)) << 23);
}

inline void Add(Floats values, int64_t columns, float* y) {
  if (columns == kLanes) {
    values += At<Floats>(y);
    std::memcpy(y, &values, sizeof values);
  } else {
    for (int64_t n = 0; n < columns; ++n) y[n] += values[n];
  }
}

// y[R, columns] += x[R, a group] * a group's columns, up to kLanes of them; rows of x are `stride` apart.
template <int R, int kPlanes>
void FewRows(const float* x, int64_t stride, const Weights& w, int64_t at, int64_t columns, float* y) {
  Floats sums[R][kLanes] = {};
  for (int64_t n = 0; n < columns; ++n) {
    __builtin_prefetch(w.base + (at + n + w.columns) * 32, 0, 2);  // the next group, harmlessly past the end
    Floats weights[8], sum[R] = {};
    HalfGroup<kPlanes, false>(w, at + n, weights);
    HalfGroup<kPlanes, true>(w, at + n, weights + 4);
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
      for (int r = 0; r < R; ++r) sum[r] += weights[k] * At<Floats>(x + r * stride + k * kLanes);
    for (int r = 0; r < R; ++r) sums[r][n] = sum[r];
  }
  const Floats scales = Scales<kPlanes>(w, at, columns);
  for (int r = 0; r < R; ++r) Add(Totals(sums[r]) * scales, columns, y + r * w.columns);
}

// The same of any number of rows: the weights are decoded once.
template <int kPlanes>
void ManyRows(const float* x, int64_t stride, int64_t rows, const Weights& w, int64_t at, int64_t columns, float* y) {
  Floats weights[kLanes][8] = {};
  const Floats scales = Scales<kPlanes>(w, at, columns);
  for (int64_t n = 0; n < columns; ++n) {
    HalfGroup<kPlanes, false>(w, at + n, weights[n]);
    HalfGroup<kPlanes, true>(w, at + n, weights[n] + 4);
  }
  for (int64_t r = 0; r < rows; ++r, x += stride, y += w.columns) {
    Floats sums[kLanes] = {};
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const Floats own = At<Floats>(x + k * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < kLanes; ++n) sums[n] += weights[n][k] * own;
    }
    Add(Totals(sums) * scales, columns, y);
  }
}

template <int R, int kPlanes>
void Rows(const float* x, int64_t rows, const Weights& w, int64_t g, int64_t n, int64_t columns, float* y) {
  const int64_t stride = w.groups * kGroup, at = g * w.columns + n;
  if constexpr (R > kFewRows) {
    ManyRows<kPlanes>(x + g * kGroup, stride, rows, w, at, columns, y + n);
  } else if (rows == R) {
    FewRows<R, kPlanes>(x + g * kGroup, stride, w, at, columns, y + n);
  } else {
    Rows<R + 1, kPlanes>(x, rows, w, g, n, columns, y);
  }
}

// y[rows, first to end] = x[rows, groups of 64] * w
template <int kPlanes>
void Multiply(const float* x, int64_t rows, const Weights& w, int64_t first, int64_t end, float* y) {
  for (int64_t r = 0; r < rows; ++r) std::memset(y + r * w.columns + first, 0, (end - first) * sizeof(float));
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t n = first; n < end; n += kLanes)
      Rows<1, kPlanes>(x, rows, w, g, n, std::min(kLanes, end - n), y);
}

// Rows [first, first + rows) have the index-th matrix.
struct Block {
  int64_t index, first, rows;
};

// The groups' rows in blocks of at most kRowBlock, and how many rows they are; sizes beyond `total` rows are cut.
std::vector<Block> BlocksOf(S32 sizes, int64_t total, int64_t* covered) {
  std::vector<Block> blocks;
  int64_t row = 0;
  for (int64_t g = 0; g < static_cast<int64_t>(sizes.element_count()); ++g) {
    const int64_t end = row + std::clamp<int64_t>(sizes.typed_data()[g], 0, total - row);
    for (; row < end; row = std::min(row + kRowBlock, end)) blocks.push_back({g, row, std::min(kRowBlock, end - row)});
  }
  *covered = row;
  return blocks;
}

// x [rows, inner] in groups, each as HalfGroup meets its elements, zeros after the last.
std::vector<float> Ordered(const float* x, int64_t rows, int64_t inner, int64_t groups) {
  std::vector<float> ordered(rows * groups * kGroup);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = ordered.data() + r * groups * kGroup;
    for (int64_t i = 0; i < inner; ++i)
      to[i / kGroup * kGroup + (i % 2 * 4 + i / 2 % 4) * kLanes + i % kGroup / 8] = x[r * inner + i];
  }
  return ordered;
}

// y[r] = x[r] * w[offset + group of r]; zeros after the last group.
ffi::Error SefpMatmulImpl(ffi::ThreadPool pool, F32 x, ffi::Buffer<ffi::S8> exponent, ffi::Buffer<ffi::U32> base,
                          S32 sizes, S32 offset, ffi::RemainingArgs planes, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t total = x.dimensions()[0], inner = x.dimensions()[1];
  const int64_t matrices = exponent.dimensions()[0], groups = exponent.dimensions()[1], columns = exponent.dimensions()[2];
  const int64_t stored = static_cast<int64_t>(exponent.element_count());
  if (planes.size() > 5) return ffi::Error::InvalidArgument("sefp_matmul: at most five planes");
  // Whoever made w: what is too small would be read, and the copy of x written, beyond its end.
  if (groups != (inner + kGroup - 1) / kGroup)
    return ffi::Error::InvalidArgument("sefp_matmul: w must have one group for each 64 columns of x");
  if (static_cast<int64_t>(base.element_count()) != 8 * stored)
    return ffi::Error::InvalidArgument("sefp_matmul: base must have 8 words for each exponent");
  if (static_cast<int64_t>(y->element_count()) != total * columns)
    return ffi::Error::InvalidArgument("sefp_matmul: y must be [x's rows, w's columns]");
  Weights w{exponent.typed_data(), reinterpret_cast<const uint8_t*>(base.typed_data()), {}, groups, columns};
  for (size_t p = 0; p < planes.size(); ++p) {
    auto plane = planes.get<ffi::Buffer<ffi::U16>>(p);
    if (!plane) return plane.error();
    if (static_cast<int64_t>(plane->element_count()) != 4 * stored)
      return ffi::Error::InvalidArgument("sefp_matmul: a plane must have 4 halfwords for each exponent");
    w.planes[p] = reinterpret_cast<const uint8_t*>(plane->typed_data());
  }
  const int64_t start = offset.typed_data()[0];
  if (start < 0 || start + static_cast<int64_t>(sizes.element_count()) > matrices)
    return ffi::Error::InvalidArgument("sefp_matmul: group_offset + E must lie within w's matrices");
  constexpr decltype(&Multiply<0>) kMultiply[] = {Multiply<0>, Multiply<1>, Multiply<2>,
                                                  Multiply<3>, Multiply<4>, Multiply<5>};
  const auto multiply = kMultiply[planes.size()];
  int64_t covered = 0;
  const std::vector<Block> blocks = BlocksOf(sizes, total, &covered);
  const std::vector<float> ordered = Ordered(x.typed_data(), covered, inner, groups);
  float* out = y->typed_data();
  std::memset(out + covered * columns, 0, (total - covered) * columns * sizeof(float));

  // About kItems strips at least, of whole cache lines of results; at most 8 KB of nibbles side by side in each group.
  constexpr int64_t kItems = 8, kWidest = 256, kLine = 32;
  const int64_t wanted = (kItems + blocks.size() - 1) / std::max<int64_t>(blocks.size(), 1);
  const int64_t width = std::clamp<int64_t>((columns / wanted + kLine - 1) / kLine * kLine, kLine, kWidest);
  const int64_t strips = (columns + width - 1) / width;
  const double work_ns = groups * kGroup * columns * (covered + 3.0 * blocks.size()) / 32.0;
  ParallelFor(pool, blocks.size() * strips, work_ns, [&](int64_t item) {
    const Block block = blocks[item / strips];
    const int64_t first = item % strips * width;
    multiply(ordered.data() + block.first * groups * kGroup, block.rows, w.At(start + block.index), first,
             std::min(first + width, columns), out + block.first * columns);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe::sefp

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sefp_matmul, jaxmoe::sefp::SefpMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()                               // x [R, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()            // exponent [M, G, N]
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()           // base [M, G, N, 8]
                                  .Arg<jaxmoe::S32>()                               // group sizes [E]
                                  .Arg<jaxmoe::S32>()                               // group offset []
                                  .RemainingArgs()                                  // planes, uint16 [M, G, N, 4] each
                                  .Ret<jaxmoe::F32>());                             // y [R, N]
