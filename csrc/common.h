// What device and host code share: everything here compiles for both, so that tests without a GPU
// exercise the arithmetic of the kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(__VA_ARGS__)
#else
#define HOST_DEVICE inline
#endif
