// One translation unit: most of the compiler's time goes into the headers.
#include "grouped_matmul.cc"
#include "index_topk.cc"
#include "norm.cc"
#include "sefp.cc"
#include "sigmoid.cc"
#include "sparse_mla.cc"
