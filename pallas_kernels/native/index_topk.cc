// Index scores and exact top-k, a query at a time: scores live in one row of scratch, never as [queries, keys].
#include <algorithm>
#include <vector>

#include "common.h"

namespace jaxmoe {
namespace {

constexpr int64_t kLanes = 16;  // index heads computed together
constexpr int64_t kKeys = 8;    // keys that share one reading of the queries

// total[j] += sum_i weight[i] * relu(q[i] . key[j]) over kLanes heads and kKeys keys; q is transposed to [dim, kLanes].
// Inlined into its loops it is a tenth slower: registers run out.
__attribute__((noinline)) void ScoreKeys(const float* q, const float* weight, int64_t dim, const float* keys,
                                         float* total) {
  constexpr int64_t kParts = kLanes / kVectorSize;
  Vector sums[kKeys];
#pragma GCC unroll 2
  for (int64_t part = 0; part < kParts; ++part) {
    Vector dots[kKeys] = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vector heads = Load(q + d * kLanes + part * kVectorSize);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kKeys; ++j) dots[j] += keys[j * dim + d] * heads;
    }
    const Vector scale = Load(weight + part * kVectorSize);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kKeys; ++j) {
      const Vector product = scale * (dots[j] < 0 ? Vector{} : dots[j]);
      sums[j] = part == 0 ? product : sums[j] + product;
    }
  }
  const Vector first = AddNeighbours(AddNeighbours(sums[0], sums[1]), AddNeighbours(sums[2], sums[3]));
  const Vector last = AddNeighbours(AddNeighbours(sums[4], sums[5]), AddNeighbours(sums[6], sums[7]));
  Vector scores = AddNeighbours(first, last);  // one lane per key, or two
  if (kVectorSize == 2 * kKeys) scores = AddNeighbours(scores, scores);
#pragma GCC unroll 8
  for (int64_t j = 0; j < kKeys; ++j) total[j] += scores[j];
}

// Scores of keys for one query.
class Scorer {
 public:
  Scorer(const float* q, const float* weights, int64_t heads, const RowFormat& format)
      : dim_(format.size),
        blocks_((heads + kLanes - 1) / kLanes),
        format_(format),
        turned_(blocks_ * dim_ * kLanes),
        weight_(blocks_ * kLanes),
        rest_(kKeys * dim_),
        scratch_(format.Scratch(kChunk)) {
    std::copy(weights, weights + heads, weight_.begin());
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t d = 0; d < dim_; ++d) turned_[(i / kLanes * dim_ + d) * kLanes + i % kLanes] = q[i * dim_ + d];
  }

  // total[s] += score of key s, for `number` stored keys behind each other.
  void Score(const char* stored, int64_t number, float* total) {
    for (int64_t first = 0; first < number; first += kChunk) {
      const int64_t some = std::min(kChunk, number - first), whole = some / kKeys * kKeys;
      const float* keys = format_.Read(stored + first * format_.bytes(), some, scratch_.get());
      // The same code for the last few, so that equal keys have equal scores.
      if (whole < some) std::copy(keys + whole * dim_, keys + some * dim_, rest_.begin());
      for (int64_t block = 0; block < blocks_; ++block) {
        const float *heads = turned_.data() + block * dim_ * kLanes, *weight = weight_.data() + block * kLanes;
        for (int64_t s = 0; s < whole; s += kKeys)
          ScoreKeys(heads, weight, dim_, keys + s * dim_, total + first + s);
        if (whole == some) continue;
        float last[kKeys] = {};
        ScoreKeys(heads, weight, dim_, rest_.data(), last);
        for (int64_t s = whole; s < some; ++s) total[first + s] += last[s - whole];
      }
    }
  }

 private:
  static constexpr int64_t kChunk = 4 * kKeys;  // keys decoded at a time
  const int64_t dim_, blocks_;
  const RowFormat format_;
  std::vector<float> turned_, weight_;  // by block of heads: queries [dim, kLanes] and their weights, zeros past the last
  std::vector<float> rest_;
  const std::unique_ptr<float[]> scratch_;
};

constexpr uint32_t kMinusInfinity = 0x007fffffu;  // Ordered(-inf)

// Unsigned order of the result is the order of the floats; -0 equals +0, NaN is below everything.
inline uint32_t Ordered(float score) {
  if (score != score) return 0;
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The k-th largest of n values, bit by bit from the top; *above gets how many are larger. Counting vectorises, so that
// 32 passes cost less than a histogram or a partition; most searches end early, at a threshold that exactly k pass.
uint32_t KthLargest(const uint32_t* values, int64_t n, int64_t k, int64_t* above) {
  uint32_t threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t candidate = threshold | 1u << bit;
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t s = 0; s < n; ++s) count += values[s] >= candidate;
    if (count < k) continue;
    threshold = candidate;
    if (count == k) {  // whatever is at or above it
      *above = k;
      return threshold - 1;
    }
  }
  int32_t larger = 0;
#pragma omp simd reduction(+ : larger)
  for (int64_t s = 0; s < n; ++s) larger += values[s] > threshold;
  *above = larger;
  return threshold;
}

ffi::Error IndexTopkImpl(ffi::ThreadPool pool, F32 q, ffi::AnyBuffer cached, S32 layer, ffi::AnyBuffer own,
                         F32 weights, S32 visible, S32 spans, S32 pages, bool best_first,
                         ffi::ResultBuffer<ffi::S32> chosen) {
  const auto shape = q.dimensions();
  const int64_t batch = shape[0], tokens = shape[1], heads = shape[2], dim = shape[3];
  const int64_t topk = chosen->dimensions()[2];
  const RowFormat format{cached.element_type(), dim, dim};
  StepRows rows;
  if (ffi::Error error = RowsOf(cached, layer, own, pages, batch, format, &rows); error.failure()) return error;
  const int64_t capacity = rows.capacity();
  int64_t scored = 0;
  for (int64_t item = 0; item < batch * tokens; ++item) scored += visible.typed_data()[item];
  const double work_ns = (scored + batch * tokens * 16) * (heads * dim / 20.0 + 10.0);
  ParallelFor(pool, batch * tokens, work_ns, [&](int64_t item) {
    const int64_t b = item / tokens;
    const int64_t past = std::clamp<int64_t>(visible.typed_data()[item], 0, capacity);
    const int64_t first_own = std::clamp<int64_t>(spans.typed_data()[2 * item], 0, rows.extra);
    const int64_t end_own = std::clamp<int64_t>(spans.typed_data()[2 * item + 1], first_own, rows.extra);
    const int64_t n = past + end_own - first_own;
    std::vector<float> score(n, 0.0f);
    Scorer scorer(q.typed_data() + item * heads * dim, weights.typed_data() + item * heads, heads, format);
    for (int64_t s = 0, number; s < past; s += number) {
      const char* keys = rows.Page(b, s, &number);
      number = std::min(number, past - s);
      scorer.Score(keys, number, score.data() + s);
    }
    scorer.Score(rows.Own(b) + first_own * rows.bytes, end_own - first_own, score.data() + past);
    int32_t* out = chosen->typed_data() + item * topk;
    // Row numbers: cached ones as they are, the step's own after the whole cache.
    auto row = [&](int64_t s) { return static_cast<int32_t>(s < past ? s : s - past + first_own + capacity); };
    std::vector<uint32_t> value(n);
    for (int64_t s = 0; s < n; ++s) value[s] = Ordered(score[s]);
    int64_t finite = 0;  // -inf and NaN are never chosen
    for (int64_t s = 0; s < n; ++s) finite += value[s] > kMinusInfinity;
    const int64_t kept = std::min(finite, topk);
    std::vector<int32_t> picked(kept + 1);
    int64_t above = 0, number = 0;
    const uint32_t kth = kept ? KthLargest(value.data(), n, kept, &above) : 0;
    int64_t room = kept - above;
    for (int64_t s = 0; s < n; ++s) {  // without branches: which keys are chosen is not predictable
      picked[number] = s;
      const bool equal = value[s] == kth && room > 0;
      number += number < kept && (value[s] > kth || equal);
      room -= equal;
    }
    picked.resize(kept);
    if (best_first)
      std::stable_sort(picked.begin(), picked.end(),
                       [&](int32_t a, int32_t c) { return value[a] > value[c]; });
    for (int64_t i = 0; i < topk; ++i) out[i] = i < kept ? row(picked[i]) : -1;
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_index_topk, jaxmoe::IndexTopkImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()    // q [B, T, I, K]
                                  .Arg<jaxmoe::ffi::AnyBuffer>()  // cached keys [L, P, S, as stored]
                                  .Arg<jaxmoe::S32>()    // layer []
                                  .Arg<jaxmoe::ffi::AnyBuffer>()  // own keys [B or 1, O, as stored]
                                  .Arg<jaxmoe::F32>()    // head weights [B, T, I]
                                  .Arg<jaxmoe::S32>()    // visible cached keys [B, T]
                                  .Arg<jaxmoe::S32>()    // visible own keys, first and end [B, T, 2]
                                  .Arg<jaxmoe::S32>()    // pages [B, W]
                                  .Attr<bool>("best_first")
                                  .Ret<jaxmoe::S32>());  // rows [B, T, topk]
