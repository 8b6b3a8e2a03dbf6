// RMSNorm and LayerNorm of rows. XLA picks a reduction by the number of rows, so that a row's sum depends on its company.
#include "common.h"

namespace jaxmoe {
namespace {

// sum of value(d) over d in [0, size): one vector of sums in order, then its neighbours.
template <typename Value>
inline float SumOf(int64_t size, Value value) {
  float lanes[kVectorSize] = {};
  int64_t d = 0;
  for (; d + kVectorSize <= size; d += kVectorSize)
#pragma omp simd
    for (int64_t i = 0; i < kVectorSize; ++i) lanes[i] += value(d + i);
  for (int64_t i = 0; d + i < size; ++i) lanes[i] += value(d + i);
  for (int64_t half = kVectorSize / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

ffi::Error NormImpl(ffi::ThreadPool pool, F32 x, F32 weight, F32 bias, S32 layer, float eps, bool centre,
                    ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], size = x.dimensions()[1], index = layer.typed_data()[0];
  const bool biased = bias.element_count() > 0;
  if (index < 0 || index >= static_cast<int64_t>(weight.dimensions()[0]))
    return ffi::Error::InvalidArgument("norm: layer must lie within the weights");
  const float* scale = weight.typed_data() + index * size;
  const float* shift = biased ? bias.typed_data() + index * size : nullptr;
  constexpr int64_t kBlock = 16;  // rows of a work item
  ParallelFor(pool, (rows + kBlock - 1) / kBlock, rows * size / 4.0, [&](int64_t item) {
    const int64_t end = std::min(rows, (item + 1) * kBlock);
    for (int64_t r = item * kBlock; r < end; ++r) {
      const float* in = x.typed_data() + r * size;
      float* out = y->typed_data() + r * size;
      const float mean = centre ? SumOf(size, [&](int64_t d) { return in[d]; }) / size : 0.0f;
      const float square = SumOf(size, [&](int64_t d) { return (in[d] - mean) * (in[d] - mean); });
      const float inverse = 1.0f / std::sqrt(square / size + eps);
      if (biased) {
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) out[d] = (in[d] - mean) * inverse * scale[d] + shift[d];
      } else {
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) out[d] = (in[d] - mean) * inverse * scale[d];
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_norm, jaxmoe::NormImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxmoe::F32>()   // x [R, D]
                                  .Arg<jaxmoe::F32>()   // weight [L, D]
                                  .Arg<jaxmoe::F32>()   // bias [L, D], or [0, D] for none
                                  .Arg<jaxmoe::S32>()   // layer []
                                  .Attr<float>("eps")
                                  .Attr<bool>("centre")
                                  .Ret<jaxmoe::F32>()); // y [R, D]
