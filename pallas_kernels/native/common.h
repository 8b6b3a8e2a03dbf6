// What the CPU kernels share: work splitting over XLA's own threads, and a vectorisable exponential.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

#if defined(__AVX512F__)
constexpr int64_t kVectorSize = 16;
#else
constexpr int64_t kVectorSize = 8;
#endif
using Vector = float __attribute__((vector_size(kVectorSize * sizeof(float))));

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void Store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Sums of neighbours: {a0 + a1, a2 + a3, ..., b0 + b1, ...}.
inline Vector AddNeighbours(Vector a, Vector b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// Runs work(i) for i in [0, count), about work_ns in all, on the calling thread and on helpers from the pool.
//
// The caller may itself be a pool thread, so it never waits for a helper that has not begun: it takes items
// until none are left, then waits for those that helpers hold. A helper that begins later finds nothing and touches
// only `shared`.
template <typename Work>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, double work_ns, Work work) {
  constexpr double kWorthAThread = 20000;  // waking one costs about half of that
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  helpers = std::min<int64_t>(helpers, static_cast<int64_t>(work_ns / kWorthAThread));
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto drain = [shared, count, &work]() noexcept {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      work(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule(decltype(drain)(drain));
  drain();
  for (int64_t spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

// exp(x) for x <= 0 to two units in the last place: 2^n * p(r). Below -87 it is 0. (expf does not vectorise.)
inline float ExpNegative(float x) {
  float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Not std::fmax, a call that keeps the loop around it from being vectorised.
  int32_t bits = (static_cast<int32_t>(n > -126.0f ? n : -126.0f) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? 0.0f : p * scale;
}

// A float8_e4m3fn number. Not by way of a subnormal float: XLA's threads may flush those.
inline float FromFloat8(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  const bool subnormal = magnitude < 8;
  const uint32_t bits = (magnitude << 20) + ((subnormal ? 121u : 120u) << 23);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  x -= subnormal ? 0x1p-6f : 0.0f;
  x = magnitude == 0x7f ? std::numeric_limits<float>::quiet_NaN() : x;
  return code & 0x80 ? -x : x;
}

inline float FromBfloat16(const char* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// How rows are stored (pallas_kernels/cache_rows.py): `size` numbers; as bytes, the first `values` of them in 8 bits.
struct RowFormat {
  static constexpr int64_t kTile = 128;
  ffi::DataType type;
  int64_t size, values;

  bool known() const { return type == ffi::F32 || type == ffi::BF16 || type == ffi::U8; }

  int64_t elements() const {
    return type == ffi::U8 ? values + (values + kTile - 1) / kTile * sizeof(float) + 2 * (size - values) : size;
  }

  int64_t bytes() const { return elements() * (type == ffi::F32 ? 4 : type == ffi::BF16 ? 2 : 1); }

  // The numbers of `count` rows behind each other: where they lie, if those are floats, or decoded into `scratch`.
  const float* Read(const char* stored, int64_t count, float* scratch) const {
    if (type == ffi::F32) return reinterpret_cast<const float*>(stored);
    if (type == ffi::BF16)
      for (int64_t i = 0; i < count * size; ++i) scratch[i] = FromBfloat16(stored + 2 * i);
    else
      for (int64_t row = 0; row < count; ++row) Decode(stored + row * bytes(), scratch + row * size);
    return scratch;
  }

  float* Scratch(int64_t count) const { return type == ffi::F32 ? nullptr : new float[count * size]; }

 private:
  void Decode(const char* stored, float* row) const {
    const char* scales = stored + values;
    for (int64_t first = 0; first < values; first += kTile, scales += sizeof(float)) {
      float scale;
      std::memcpy(&scale, scales, sizeof scale);
      const int64_t end = std::min(first + kTile, values);
      for (int64_t i = first; i < end; ++i) row[i] = FromFloat8(stored[i]) * scale;
    }
    for (int64_t i = 0; i < size - values; ++i) row[values + i] = FromBfloat16(scales + 2 * i);
  }
};

// What a step's queries may see: rows of one layer of a paged cache [L, P, S, elements], then the step's own
// [Bo, O, elements], all stored alike.
struct StepRows {
  const char *cached, *own;
  const int32_t* pages;  // [B, W]: sequence b's row r is row r % S of page pages[b, r / S]; -1 where it has none
  int64_t page_size, width, bytes, extra;
  bool own_shared;  // Bo is 1: all sequences see the same own rows

  // Rows that a sequence can have in the cache; the step's own are numbered from here on.
  int64_t capacity() const { return width * page_size; }

  // A sequence's cached rows from `row` to the end of the page, and how many these are.
  const char* Page(int64_t sequence, int64_t row, int64_t* number) const {
    *number = page_size - row % page_size;
    const int64_t page = std::max(pages[sequence * width + row / page_size], 0);
    return cached + (page * page_size + row % page_size) * bytes;
  }

  const char* Own(int64_t sequence) const { return own + (own_shared ? 0 : sequence * extra * bytes); }

  const char* Row(int64_t sequence, int64_t row) const {
    int64_t number;
    return row < capacity() ? Page(sequence, row, &number) : Own(sequence) + (row - capacity()) * bytes;
  }
};

// An error if the rows are not stored in the format, or the layer or a page is not in the cache.
inline ffi::Error RowsOf(const ffi::AnyBuffer& cached, const S32& layer, const ffi::AnyBuffer& own, const S32& pages,
                         int64_t batch, const RowFormat& format, StepRows* rows) {
  const auto shape = cached.dimensions();
  if (!format.known() || own.element_type() != format.type || static_cast<int64_t>(shape[3]) != format.elements() ||
      static_cast<int64_t>(own.dimensions()[2]) != format.elements())
    return ffi::Error::InvalidArgument("cached and own rows must be stored alike, in a format for the queries' size");
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= static_cast<int64_t>(shape[0]))
    return ffi::Error::InvalidArgument("layer must lie within the cache");
  const int64_t width = pages.dimensions()[1], number = shape[1];
  for (int64_t i = 0; i < batch * width; ++i)
    if (pages.typed_data()[i] >= number) return ffi::Error::InvalidArgument("pages must lie within the cache");
  *rows = {static_cast<const char*>(cached.untyped_data()) +
               index * static_cast<int64_t>(shape[1] * shape[2]) * format.bytes(),
           static_cast<const char*>(own.untyped_data()),
           pages.typed_data(),
           static_cast<int64_t>(shape[2]),
           width,
           format.bytes(),
           static_cast<int64_t>(own.dimensions()[1]),
           own.dimensions()[0] == 1 && batch > 1};
  return ffi::Error::Success();
}

}  // namespace jaxmoe
