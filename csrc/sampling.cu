// The kernel of sampling.h: a block for each stratum of each sample in each layer.
//
// The num_kept-th smallest priority is found by radix select, eight bits at a time from the top, in
// a histogram of the priorities that agree with the bits found so far. The positions up to it are
// then written in their order, with a prefix sum in the place of a sort.

#include "sampling.h"

namespace megatron_rltd {
namespace {

constexpr int kThreads = 256;  // and bins
constexpr int kItems = 8;      // positions of a thread in a tile
constexpr int kTile = kThreads * kItems;
constexpr int kWarps = kThreads / 32;

// The sum of the values of the threads before this one; in total that of all.
__device__ uint64_t sum_before(uint64_t value, uint64_t* of_warps, uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += of_warps[i];
    total += of_warps[i];
  }
  __syncthreads();
  return before + sum - value;
}

// If a stratum is one tile, a thread draws its priorities once and keeps them in registers.
template <bool one_tile>
__global__ void __launch_bounds__(kThreads) sampling_kernel(const Sampling sampling) {
  __shared__ uint32_t bins[kThreads];
  __shared__ uint64_t of_warps[kWarps];
  __shared__ uint32_t found_bin, found_before, found_count;
  const Stratum stratum = stratum_of(sampling, static_cast<int32_t>(blockIdx.x));
  const int32_t own = threadIdx.x * kItems;  // first position of this thread in a tile

  uint64_t drawn[kItems];
  auto draw = [&](int32_t tile) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int32_t offset = tile + own + i;
      if (offset < sampling.length) {
        drawn[i] = priority(sampling, stratum.layer, stratum.sample, stratum.start + offset);
      }
    }
  };
  if (one_tile) draw(0);

  uint64_t bits = 0, mask = 0;  // of the boundary, as far as they are found
  uint32_t wanted = sampling.num_kept;  // of the priorities that agree with it
  bool all_agreeing = false;
  for (int shift = 55; !all_agreeing && mask != (uint64_t{1} << 63) - 1; shift -= 8) {
    // The last digit has seven bits.
    const int width = shift < 0 ? 7 : 8, low = shift < 0 ? 0 : shift;
    bins[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t tile = 0; tile < sampling.length; tile += kTile) {
      if (!one_tile) draw(tile);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (tile + own + i < sampling.length && (drawn[i] & mask) == bits) {
          atomicAdd(&bins[drawn[i] >> low & ((1u << width) - 1)], 1u);
        }
      }
    }
    __syncthreads();
    const uint32_t count = bins[threadIdx.x];
    uint64_t total;
    const auto before = static_cast<uint32_t>(sum_before(count, of_warps, total));
    if (before < wanted && wanted <= before + count) {
      found_bin = threadIdx.x;
      found_before = before;
      found_count = count;
    }
    __syncthreads();
    bits |= static_cast<uint64_t>(found_bin) << low;
    mask |= ((uint64_t{1} << width) - 1) << low;
    wanted -= found_before;
    all_agreeing = found_count == wanted;
    __syncthreads();
  }

  // Priorities below the boundary are kept, and of those on it the first `wanted` by position.
  uint32_t below_before = 0, on_before = 0;  // in the tiles before
  for (int32_t tile = 0; tile < sampling.length; tile += kTile) {
    if (!one_tile) draw(tile);
    uint32_t below = 0, on = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (tile + own + i < sampling.length) {
        below += (drawn[i] & mask) < bits;
        on += (drawn[i] & mask) == bits;
      }
    }
    uint64_t total;
    const uint64_t sums = sum_before(static_cast<uint64_t>(below) << 32 | on, of_warps, total);
    uint32_t below_here = below_before + static_cast<uint32_t>(sums >> 32);
    uint32_t on_here = on_before + static_cast<uint32_t>(sums);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int32_t offset = tile + own + i;
      if (offset < sampling.length) {
        const uint64_t own_bits = drawn[i] & mask;
        if (own_bits < bits || (own_bits == bits && on_here < wanted)) {
          stratum.kept[below_here + min(on_here, wanted)] = stratum.start + offset;
        }
        below_here += own_bits < bits;
        on_here += own_bits == bits;
      }
    }
    below_before += static_cast<uint32_t>(total >> 32);
    on_before += static_cast<uint32_t>(total);
  }
}

}  // namespace

int launch_sampling(const Sampling& sampling, void* stream) {
  const int64_t blocks =
      static_cast<int64_t>(sampling.num_layers) * sampling.batch * sampling.strata;
  if (blocks == 0 || sampling.num_kept == 0) return cudaSuccess;
  auto* kernel = sampling.length <= kTile ? sampling_kernel<true> : sampling_kernel<false>;
  LAUNCH(kernel, blocks, kThreads, static_cast<cudaStream_t>(stream), sampling);
  return cudaGetLastError();
}

}  // namespace megatron_rltd
