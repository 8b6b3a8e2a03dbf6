// y = x * w from the stored bits of w (pallas_kernels/sefp/format.py): a group of 64 weights becomes bytes, then floats,
// then one sum per row of x, which the group's power of two scales.
#include <utility>
#include <vector>

#include "common.h"

namespace jaxmoe::sefp {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kItemColumns = 256;  // of a work item: 8 KB of nibbles side by side in each group
constexpr int64_t kLanes = 8;          // a group's words

using Quads = uint64_t __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Integers = int32_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(32)));
using SignedBytes = int8_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));

struct Weights {
  const int8_t* exponent;              // [groups, columns]
  const uint8_t* base;                 // [groups, columns, 32]
  std::vector<const uint8_t*> planes;  // [groups, columns, 8 bytes] each
  int64_t groups, columns;
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

// sum[r] += x[r, 32] * half of a group's weights, times 2^kShift. Lane l of vector k has element 8 l + 2 k (+ 1).
template <int R, int kPlanes, bool kOdd>
void HalfGroup(const float* x, int64_t x_stride, const Weights& w, int64_t at, Floats* sum) {
  Bytes magnitude, minus;
  Decode<kOdd>(w, at, &magnitude, &minus, std::make_index_sequence<kPlanes>());
  // A byte is moved to the top of its 32 bits, where its sign is that of the whole: the cheapest way to an integer.
  if constexpr (kPlanes < 5) magnitude = (magnitude ^ minus) - minus;
  const Words codes = reinterpret_cast<Words>(magnitude), signs = reinterpret_cast<Words>(minus);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Words top = codes << (24 - 8 * k) & 0xff000000u;
    Floats weights;
    if constexpr (kPlanes < 5) {
      weights = __builtin_convertvector(reinterpret_cast<Integers>(top), Floats);
    } else {  // eight bits leave none for the sign
      const Words sign = signs << (24 - 8 * k) & 0x80000000u;
      const Floats positive = __builtin_convertvector(reinterpret_cast<Integers>(top >> 1), Floats);
      weights = reinterpret_cast<Floats>(reinterpret_cast<Words>(positive) ^ sign);
    }
    for (int r = 0; r < R; ++r) sum[r] += weights * At<Floats>(x + r * x_stride + ((kOdd ? 4 : 0) + k) * kLanes);
  }
}

template <int kPlanes>
constexpr int kShift = kPlanes < 5 ? 24 : 23;

// Sums of neighbours, those of a before those of b.
inline Floats Pairs(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

// 2^exponent; the exponents of weights, widths and shifts are within +-60.
inline float PowerOfTwo(int32_t exponent) {
  const int32_t bits = (exponent + 127) << 23;
  return At<float>(&bits);
}

// y[R, columns] += x[R, a group] * a group's columns, up to kLanes of them.
template <int R, int kPlanes>
void GroupTimesColumns(const float* x, int64_t x_stride, const Weights& w, int64_t at, int64_t columns, float* y,
                       int64_t stride) {
  Floats sums[R][kLanes] = {};
  for (int64_t n = 0; n < columns; ++n) {
    __builtin_prefetch(w.base + (at + n + w.columns) * 32, 0, 2);  // the next group, harmlessly past the end
    Floats sum[R] = {};
    HalfGroup<R, kPlanes, false>(x, x_stride, w, at + n, sum);
    HalfGroup<R, kPlanes, true>(x, x_stride, w, at + n, sum);
    for (int r = 0; r < R; ++r) sums[r][n] = sum[r];
  }
  for (int r = 0; r < R; ++r) {
    const Floats* s = sums[r];
    const Floats total = Pairs(Pairs(Pairs(s[0], s[1]), Pairs(s[2], s[3])), Pairs(Pairs(s[4], s[5]), Pairs(s[6], s[7])));
    for (int64_t n = 0; n < columns; ++n)
      y[r * stride + n] += total[n] * PowerOfTwo(w.exponent[at + n] - 3 - kPlanes - kShift<kPlanes>);
  }
}

template <int R, int kPlanes>
void RowsTimesColumns(const float* x, const Weights& w, int64_t first, int64_t end, float* y) {
  for (int r = 0; r < R; ++r) std::memset(y + r * w.columns + first, 0, (end - first) * sizeof(float));
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t n = first; n < end; n += kLanes)
      GroupTimesColumns<R, kPlanes>(x + g * kGroup, w.groups * kGroup, w, g * w.columns + n, std::min(kLanes, end - n),
                                    y + n, w.columns);
}

// y[rows, first to end]
template <int kPlanes>
void Multiply(const float* x, int64_t rows, const Weights& w, int64_t first, int64_t end, float* y) {
  const int64_t inner = w.groups * kGroup;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) RowsTimesColumns<4, kPlanes>(x + r * inner, w, first, end, y + r * w.columns);
  for (; r < rows; ++r) RowsTimesColumns<1, kPlanes>(x + r * inner, w, first, end, y + r * w.columns);
}

ffi::Error SefpMatmulImpl(ffi::ThreadPool pool, F32 x, ffi::Buffer<ffi::S8> exponent, ffi::Buffer<ffi::U32> base,
                          ffi::RemainingArgs planes, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], groups = exponent.dimensions()[0], columns = exponent.dimensions()[1];
  Weights w{exponent.typed_data(), reinterpret_cast<const uint8_t*>(base.typed_data()), {}, groups, columns};
  for (size_t p = 0; p < planes.size(); ++p) {
    auto plane = planes.get<ffi::Buffer<ffi::U16>>(p);
    if (!plane) return plane.error();
    w.planes.push_back(reinterpret_cast<const uint8_t*>(plane->typed_data()));
  }
  constexpr decltype(&Multiply<0>) kMultiply[] = {Multiply<0>, Multiply<1>, Multiply<2>,
                                                  Multiply<3>, Multiply<4>, Multiply<5>};
  if (planes.size() > 5) return ffi::Error::InvalidArgument("sefp_matmul: at most five planes");
  const auto multiply = kMultiply[planes.size()];

  std::vector<float> ordered(rows * groups * kGroup);  // as HalfGroup meets them
  for (int64_t from = 0; from < static_cast<int64_t>(ordered.size()); from += kGroup)
    for (int64_t i = 0; i < kGroup; ++i)
      ordered[from + (i % 2 * 4 + i / 2 % 4) * kLanes + i / 8] = x.typed_data()[from + i];

  const int64_t items = (columns + kItemColumns - 1) / kItemColumns;
  const double work_ns = groups * kGroup * columns * (rows + 3) / 32.0;
  ParallelFor(pool, items, work_ns, [&](int64_t item) {
    const int64_t first = item * kItemColumns;
    multiply(ordered.data(), rows, w, first, std::min(first + kItemColumns, columns), y->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe::sefp

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sefp_matmul, jaxmoe::sefp::SefpMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()                               // x [B, G, 64]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()            // exponent [G, N]
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()           // base [G, N, 8]
                                  .RemainingArgs()                                  // planes, uint16 [G, N, 4] each
                                  .Ret<jaxmoe::F32>());                             // y [B, N]
