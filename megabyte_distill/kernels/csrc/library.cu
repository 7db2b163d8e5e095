// What a built library says about itself.
#include "kernel.h"

#if !defined(MBK_TARGETS)
#error "build with build.py, which defines MBK_TARGETS"
#endif

MBK_API const char* mbk_last_error() { return mbk::last_error; }
// What it runs on: "sm_80 sm_90a", or "cpu".
MBK_API const char* mbk_targets() { return MBK_TARGETS; }
#if !defined(__CUDACC__)
// Order of lanes, warps and blocks from now on: 0 forward, 1 reversed, otherwise the seed of a shuffle.
MBK_API int mbk_set_order(int64_t order, void*) {
  ::cuda_on_cpu::order = order;
  return 0;
}
#endif
