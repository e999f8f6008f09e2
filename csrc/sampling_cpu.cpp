// The sampling of sampling.h without a GPU.

#include <algorithm>
#include <vector>

#include "sampling.h"

namespace megatron_rltd {

void sample_stratum(const Sampling& sampling, int32_t number) {
  const Stratum stratum = stratum_of(sampling, number);
  std::vector<uint64_t> drawn(sampling.length);
  for (int32_t offset = 0; offset < sampling.length; ++offset) {
    drawn[offset] = priority(sampling, stratum.layer, stratum.sample, stratum.start + offset);
  }
  if (sampling.num_kept == 0) return;
  std::vector<uint64_t> ranked = drawn;
  const auto last = ranked.begin() + sampling.num_kept - 1;
  std::nth_element(ranked.begin(), last, ranked.end());
  const uint64_t boundary = *last;
  auto on_boundary = std::count(ranked.begin(), last + 1, boundary);  // to keep, by position
  int32_t* kept = stratum.kept;
  for (int32_t offset = 0; offset < sampling.length; ++offset) {
    if (drawn[offset] < boundary || (drawn[offset] == boundary && on_boundary-- > 0)) {
      *kept++ = stratum.start + offset;
    }
  }
}

}  // namespace megatron_rltd
