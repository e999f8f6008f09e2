// Which tokens a layer keeps. The definition is megatron_rltd/tokens/sampling.py, which this equals bit for
// bit.
//
// Shapes: l layers, b samples, s sequence length, k kept tokens, S strata.
#pragma once

#include "common.h"

namespace megatron_rltd {

struct Sampling {
  uint32_t key_low, key_high;  // of the seed
  const int64_t* layers;       // [l], layer numbers
  const int64_t* samples;      // [b], global indices
  int32_t* kept;               // [l, b, k], the result
  int32_t num_layers, batch, strata;
  int32_t length;       // of a stratum, s / S
  int32_t num_kept;     // in a stratum, k / S
};

struct Words {
  uint32_t x[4];
};

HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// Philox4x32-10 (Salmon et al., SC'11).
HOST_DEVICE Words philox(Words counter, uint32_t key_low, uint32_t key_high) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  Words c = counter;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    c = {{multiply_high(kMultiplier1, c.x[2]) ^ c.x[1] ^ key_low, kMultiplier1 * c.x[2],
          multiply_high(kMultiplier0, c.x[0]) ^ c.x[3] ^ key_high, kMultiplier0 * c.x[0]}};
    key_low += kWeyl0;
    key_high += kWeyl1;
  }
  return c;
}

// The priority, 63 bits, of a position in the sequence.
HOST_DEVICE uint64_t priority(const Sampling& sampling, int64_t layer, int64_t sample,
                              int32_t position) {
  const auto index = static_cast<uint64_t>(sample);
  const Words words = philox({{static_cast<uint32_t>(position) / 2, static_cast<uint32_t>(layer),
                               static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)}},
                             sampling.key_low, sampling.key_high);
  const uint32_t high = position % 2 ? words.x[2] : words.x[0];
  const uint32_t low = position % 2 ? words.x[3] : words.x[1];
  return static_cast<uint64_t>(high) << 31 | low >> 1;
}

// One stratum of one sample in one layer.
struct Stratum {
  int64_t layer, sample;
  int32_t start;  // its first position
  int32_t* kept;  // where its kept positions go
};

HOST_DEVICE Stratum stratum_of(const Sampling& sampling, int32_t number) {
  const int32_t row = number / sampling.strata;  // of [l * b, k]
  const int32_t slice = number - row * sampling.strata;
  return {sampling.layers[row / sampling.batch], sampling.samples[row % sampling.batch],
          slice * sampling.length, sampling.kept + static_cast<int64_t>(number) * sampling.num_kept};
}

// On the CPU: the kept positions of one stratum.
void sample_stratum(const Sampling& sampling, int32_t number);

// On the GPU, on a stream; returns a cudaError_t.
int launch_sampling(const Sampling& sampling, void* stream);

}  // namespace megatron_rltd
