// The logistic function, element by element. XLA's differs in the last bit between a loop's vectors and its remainder.
#include "common.h"

namespace jaxmoe {
namespace {

ffi::Error SigmoidImpl(F32 x, ffi::ResultBuffer<ffi::F32> y) {
  const float* in = x.typed_data();
  float* out = y->typed_data();
  const int64_t size = x.element_count();
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float small = ExpNegative(-std::fabs(in[i]));  // of the two exponentials the one that cannot overflow
    out[i] = (in[i] < 0 ? small : 1.0f) / (1.0f + small);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_sigmoid, jaxmoe::SigmoidImpl,
                              xla::ffi::Ffi::Bind()
                                  .Arg<jaxmoe::F32>()   // x, of any shape
                                  .Ret<jaxmoe::F32>()); // y, of x's
