// Runs the kernels of csrc/*.cu on a CPU, a thread for each of a block's, so that their own code is
// tested on machines without a GPU. Blocks run one after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  emulated::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })

using std::min;
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace emulated {

struct Index {
  unsigned x;
};

inline std::unique_ptr<std::barrier<>> block;
inline uint64_t exchanged[1024];

}  // namespace emulated

inline thread_local emulated::Index threadIdx, blockIdx;

inline void __syncthreads() { emulated::block->arrive_and_wait(); }

inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  return std::atomic_ref<uint32_t>(*address).fetch_add(value);
}

// All threads of the block must call it together, which is more than CUDA asks for.
inline uint64_t __shfl_up_sync(unsigned, uint64_t value, int distance) {
  emulated::exchanged[threadIdx.x] = value;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint64_t other = lane < distance ? value : emulated::exchanged[threadIdx.x - distance];
  __syncthreads();
  return other;
}

namespace emulated {

template <typename Kernel>
void launch(int64_t blocks, int threads, const Kernel& kernel) {
  const auto next_block = [threads]() noexcept {
    block = std::make_unique<std::barrier<>>(threads);  // threads that returned left the last one
  };
  next_block();
  std::barrier between_blocks(threads, next_block);
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      threadIdx.x = static_cast<unsigned>(i);
      for (int64_t number = 0; number < blocks; ++number) {
        blockIdx.x = static_cast<unsigned>(number);
        kernel();
        block->arrive_and_drop();
        between_blocks.arrive_and_wait();
      }
    });
  }
  for (auto& thread : all) thread.join();
}

}  // namespace emulated
