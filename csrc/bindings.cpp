// The ops of megatron_rltd/tokens/ops.py for the CPU and, with MEGATRON_RLTD_CUDA, for GPUs: every check of
// their arguments, then the move. Schemas, fake implementations and autograd are defined there.
//
// On torch's stable ABI: one binary for many versions of torch and Python.

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// torch 2.13 and newer keep the text of an error, older ones print it. The header's macro is made
// for all of them and says nothing of it, not even that a GPU's memory ran out.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace megatron_rltd {
[[noreturn]] inline void throw_torch_error() {
  const bool kept = torch_exception_get_what_without_backtrace != nullptr;
  throw std::runtime_error(std::string("megatron_rltd: ") +
                           (kept ? torch_exception_get_what_without_backtrace()
                                 : "an error in torch, which has printed it"));
}
}  // namespace megatron_rltd

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) ::megatron_rltd::throw_torch_error();

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>

#ifdef MEGATRON_RLTD_CUDA
#include <dlfcn.h>
#endif

#include "rows.h"
#include "sampling.h"

namespace megatron_rltd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows, bytes of a row and the like are fewer, so that 32 bits do for sums of two.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;

#ifdef MEGATRON_RLTD_CUDA
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// torch's function for the current stream of a GPU, or null. It is looked up in the process: linked,
// it would keep this library from loading in a torch for CPUs, and a weak symbol stays null because
// Python loads torch's libraries with RTLD_LOCAL.
CurrentStream current_stream() {
  static const auto found = [] {
    constexpr char kName[] = "aoti_torch_get_current_cuda_stream";
    void* function = dlsym(RTLD_DEFAULT, kName);  // a torch linked in one piece
    void* library =
        function == nullptr ? dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    if (library != nullptr) function = dlsym(library, kName);
    return reinterpret_cast<CurrentStream>(function);
  }();
  return found;
}

// Continues "the kernels are".
constexpr char kNoStreams[] =
    "built for CUDA, but this torch has no function aoti_torch_get_current_cuda_stream: its "
    "libtorch_cuda.so is not loaded, which a torch for CPUs or for AMD GPUs lacks; install a torch "
    "2.10 or newer for CUDA";
#endif

// Runs on_gpu(stream) on the tensor's GPU, or each of n items on the CPU, at least grain a thread.
template <typename OnGpu, typename Item>
void run(const Tensor& tensor, const OnGpu& on_gpu, int64_t n, int64_t grain, const Item& item) {
#if defined(MEGATRON_RLTD_CUDA)
  if (tensor.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
    STD_TORCH_CHECK(current_stream() != nullptr, "megatron_rltd: the kernels are ", kNoStreams);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(tensor.get_device_index(), &stream));
    const int error = on_gpu(stream);
    STD_TORCH_CHECK(error == 0, "megatron_rltd: ", error_text(error));
    return;
  }
#elif defined(MEGATRON_RLTD_EMULATED)  // tests: the kernels themselves, run by CPU threads
  on_gpu(nullptr);
  return;
#endif
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) item(i);
  });
}

template <Op op>
void move_rows(const Tensor& tensor, const Move& move) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, move.row_bytes));
  run(
      tensor, [&](void* stream) { return launch_move(op, move, stream); }, num_items<op>(move),
      grain, [&](int64_t item) {
        const Copy copy = copy_of<op>(move, static_cast<int32_t>(item));
        if (copy.to != nullptr) std::memcpy(copy.to, copy.from, move.row_bytes);
      });
}

void check_hidden(const Tensor& hidden, const char* name) {
  STD_TORCH_CHECK(hidden.dim() == 3, name, " must be [s, b, h], got ", hidden.dim(), " dimensions");
  STD_TORCH_CHECK(hidden.size(0) * hidden.size(1) < kMost, name, " has s * b = ",
                  hidden.size(0) * hidden.size(1), " rows, too many");
  STD_TORCH_CHECK(hidden.size(2) * static_cast<int64_t>(hidden.element_size()) < kMost, name,
                  " has h = ", hidden.size(2), ", too long a row");
}

void check_indices(const Tensor& indices, const Tensor& hidden, const char* name) {
  STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == hidden.size(1) &&
                      indices.size(1) <= hidden.size(0),
                  name, " must be [b, k] with b = ", hidden.size(1), " and k <= ", hidden.size(0));
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, name, " must be int32");
  STD_TORCH_CHECK(indices.device() == hidden.device(), name, " must be on the device of the tokens");
  if (!indices.is_cpu()) return;  // else it would have to be waited for
  const Tensor index = torch::stable::contiguous(indices);
  const int32_t* values = index.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < index.size(0); ++i, values += index.size(1)) {
    for (int64_t j = 0; j < index.size(1); ++j) {
      STD_TORCH_CHECK(values[j] > (j ? values[j - 1] : -1) && values[j] < hidden.size(0), name,
                      " must be ascending and between 0 and s - 1 = ", hidden.size(0) - 1);
    }
  }
}

void check_tokens(const Tensor& tokens, const Tensor& hidden, const Tensor& indices) {
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(0) == indices.size(1) &&
                      tokens.size(1) == hidden.size(1) && tokens.size(2) == hidden.size(2),
                  "tokens must be [k, b, h] = [", indices.size(1), ", ", hidden.size(1), ", ",
                  hidden.size(2), "]");
  STD_TORCH_CHECK(tokens.scalar_type() == hidden.scalar_type(),
                  "tokens must have the dtype of the hidden states");
  STD_TORCH_CHECK(tokens.device() == hidden.device(),
                  "tokens must be on the device of the hidden states");
}

// Strides of one element's rows; h must be contiguous to be copied as bytes.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(2) < 2 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Rows rows_of(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  return {static_cast<char*>(tensor.data_ptr()), tensor.stride(0) * bytes,
          tensor.stride(1) * bytes};
}

Move move_of(const Tensor& hidden, const Tensor& indices) {
  Move move{};
  move.indices = indices.const_data_ptr<int32_t>();
  move.length = static_cast<int32_t>(hidden.size(0));
  move.batch = static_cast<int32_t>(hidden.size(1));
  move.kept = static_cast<int32_t>(indices.size(1));
  move.row_bytes = hidden.size(2) * static_cast<int64_t>(hidden.element_size());
  return move;
}

Tensor new_rows(const Tensor& like, int64_t rows) {
  return torch::stable::new_empty(like, {rows, like.size(1), like.size(2)});
}

Tensor gather(const Tensor& hidden_states, const Tensor& indices) {
  check_hidden(hidden_states, "hidden_states");
  check_indices(indices, hidden_states, "indices");
  const Tensor hidden = with_contiguous_rows(hidden_states);
  const Tensor index = torch::stable::contiguous(indices);
  Tensor tokens = new_rows(hidden, index.size(1));
  Move move = move_of(hidden, index);
  move.hidden = rows_of(hidden);
  move.tokens = rows_of(tokens);
  move_rows<Op::gather>(hidden, move);
  return tokens;
}

Tensor scatter(const Tensor& hidden_states, const Tensor& tokens, const Tensor& indices) {
  check_hidden(hidden_states, "hidden_states");
  check_indices(indices, hidden_states, "indices");
  check_tokens(tokens, hidden_states, indices);
  const Tensor hidden = with_contiguous_rows(hidden_states);
  const Tensor kept = with_contiguous_rows(tokens);
  const Tensor index = torch::stable::contiguous(indices);
  Tensor result = new_rows(hidden, hidden.size(0));
  Move move = move_of(hidden, index);
  move.hidden = rows_of(hidden);
  move.tokens = rows_of(kept);
  move.buffer = rows_of(result);
  move_rows<Op::scatter>(hidden, move);
  return result;
}

std::tuple<Tensor, Tensor> split(const Tensor& hidden_states, const Tensor& indices) {
  check_hidden(hidden_states, "hidden_states");
  check_indices(indices, hidden_states, "indices");
  const Tensor hidden = with_contiguous_rows(hidden_states);
  const Tensor index = torch::stable::contiguous(indices);
  Tensor tokens = new_rows(hidden, index.size(1));
  Tensor buffer = new_rows(hidden, hidden.size(0));
  Move move = move_of(hidden, index);
  move.hidden = rows_of(hidden);
  move.tokens = rows_of(tokens);
  move.buffer = rows_of(buffer);
  move_rows<Op::split>(hidden, move);
  return {tokens, buffer};
}

void check_buffer(const Tensor& buffer) {
  check_hidden(buffer, "buffer");
  STD_TORCH_CHECK(buffer.size(2) < 2 || buffer.stride(2) == 1,
                  "buffer [s, b, h] is written in place: h must be contiguous");
}

Tensor exchange_(Tensor buffer, const Tensor& tokens, const Tensor& indices,
                 const Tensor& next_indices) {
  check_buffer(buffer);
  check_indices(indices, buffer, "indices");
  check_indices(next_indices, buffer, "next_indices");
  check_tokens(tokens, buffer, indices);
  const Tensor kept = with_contiguous_rows(tokens);
  const Tensor index = torch::stable::contiguous(indices);
  const Tensor next_index = torch::stable::contiguous(next_indices);
  Tensor next = new_rows(buffer, next_index.size(1));
  Move move = move_of(buffer, index);
  move.tokens = rows_of(kept);
  move.buffer = rows_of(buffer);
  move.next = rows_of(next);
  move.next_indices = next_index.const_data_ptr<int32_t>();
  move.next_kept = static_cast<int32_t>(next_index.size(1));
  move_rows<Op::exchange>(buffer, move);
  return next;
}

void merge_(Tensor buffer, const Tensor& tokens, const Tensor& indices) {
  check_buffer(buffer);
  check_indices(indices, buffer, "indices");
  check_tokens(tokens, buffer, indices);
  const Tensor kept = with_contiguous_rows(tokens);
  const Tensor index = torch::stable::contiguous(indices);
  Move move = move_of(buffer, index);
  move.tokens = rows_of(kept);
  move.buffer = rows_of(buffer);
  move_rows<Op::merge>(buffer, move);
}

Tensor sample(int64_t seed, const Tensor& layer_numbers, const Tensor& samples, int64_t seq_length,
              int64_t kept_tokens, int64_t strata) {
  for (const Tensor& numbers : {layer_numbers, samples}) {
    STD_TORCH_CHECK(numbers.dim() == 1 && numbers.scalar_type() == ScalarType::Long,
                    "layer_numbers [l] and samples [b] must be int64");
    STD_TORCH_CHECK(numbers.device() == samples.device(),
                    "layer_numbers and samples must be on the same device");
  }
  STD_TORCH_CHECK(strata > 0 && seq_length % strata == 0 && kept_tokens % strata == 0,
                  "s = ", seq_length, " and k = ", kept_tokens, " must be multiples of the strata, ",
                  strata);
  STD_TORCH_CHECK(0 <= kept_tokens && kept_tokens <= seq_length && seq_length < kMost,
                  "k = ", kept_tokens, " must be between 0 and s = ", seq_length);
  const Tensor layers = torch::stable::contiguous(layer_numbers);
  const Tensor drawn_for = torch::stable::contiguous(samples);
  const int64_t strata_in_all = layers.size(0) * drawn_for.size(0) * strata;
  STD_TORCH_CHECK(strata_in_all < kMost, "l * b * strata = ",
                  strata_in_all, " is too many");
  Tensor kept = torch::stable::new_empty(samples, {layers.size(0), samples.size(0), kept_tokens},
                                         ScalarType::Int);
  Sampling sampling{};
  sampling.key_low = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  sampling.key_high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  sampling.layers = layers.const_data_ptr<int64_t>();
  sampling.samples = drawn_for.const_data_ptr<int64_t>();
  sampling.kept = kept.mutable_data_ptr<int32_t>();
  sampling.num_layers = static_cast<int32_t>(layers.size(0));
  sampling.batch = static_cast<int32_t>(drawn_for.size(0));
  sampling.strata = static_cast<int32_t>(strata);
  sampling.length = static_cast<int32_t>(seq_length / strata);
  sampling.num_kept = static_cast<int32_t>(kept_tokens / strata);
  run(
      samples, [&](void* stream) { return launch_sampling(sampling, stream); }, strata_in_all, 1,
      [&](int64_t number) { sample_stratum(sampling, static_cast<int32_t>(number)); });
  return kept;
}

Tensor select_mask(const Tensor& mask, const Tensor& rows, const Tensor& columns) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.element_size() == 1,
                  "mask must be [b, a, s or 1, s] with elements of one byte");
  for (const Tensor& index : {rows, columns}) {
    STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == mask.size(0) &&
                        index.scalar_type() == ScalarType::Int && index.device() == mask.device(),
                    "rows and columns must be [b, k] int32 on the mask's device, b = ",
                    mask.size(0));
  }
  STD_TORCH_CHECK(mask.stride(3) == 1 || mask.size(3) < 2,
                  "mask [b, a, s or 1, s]: columns must be contiguous");
  const Tensor row_index = torch::stable::contiguous(rows);
  const Tensor column_index = torch::stable::contiguous(columns);
  const bool one_row = mask.size(2) == 1;
  const int64_t num_rows = one_row ? 1 : row_index.size(1);
  const int64_t out_rows = mask.size(0) * mask.size(1) * num_rows;
  STD_TORCH_CHECK(out_rows < kMost && column_index.size(1) < kMost, "mask: b * a * k = ", out_rows,
                  " rows to select are too many");
  Tensor out = torch::stable::new_empty(
      mask, {mask.size(0), mask.size(1), num_rows, column_index.size(1)});
  MaskSelection selection{};
  selection.mask = static_cast<const uint8_t*>(mask.data_ptr());
  selection.sample_stride = mask.stride(0);
  selection.head_stride = mask.stride(1);
  selection.row_stride = one_row ? 0 : mask.stride(2);
  selection.rows = row_index.const_data_ptr<int32_t>();
  selection.columns = column_index.const_data_ptr<int32_t>();
  selection.out = static_cast<uint8_t*>(out.data_ptr());
  selection.batch = static_cast<int32_t>(mask.size(0));
  selection.heads = static_cast<int32_t>(mask.size(1));
  selection.num_rows = static_cast<int32_t>(num_rows);
  selection.num_columns = static_cast<int32_t>(column_index.size(1));
  run(
      mask, [&](void* stream) { return launch_select_mask(selection, stream); }, out_rows, 16,
      [&](int64_t row) {
        const auto out_row = static_cast<int32_t>(row);
        const int32_t number = out_row / selection.num_rows;
        const int32_t i = out_row - number * selection.num_rows;
        const MaskPart part = mask_part(selection, number);
        const uint8_t* from = mask_row(selection, part, i);
        uint8_t* to = part.out + static_cast<int64_t>(i) * selection.num_columns;
        for (int32_t j = 0; j < selection.num_columns; ++j) to[j] = from[part.columns[j]];
      });
  return out;
}

void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("gather", TORCH_BOX(&gather));
  library.impl("scatter", TORCH_BOX(&scatter));
  library.impl("split", TORCH_BOX(&split));
  library.impl("exchange_", TORCH_BOX(&exchange_));
  library.impl("merge_", TORCH_BOX(&merge_));
  library.impl("sample", TORCH_BOX(&sample));
  library.impl("select_mask", TORCH_BOX(&select_mask));
}

}  // namespace
}  // namespace megatron_rltd

STABLE_TORCH_LIBRARY_IMPL(megatron_rltd, CPU, library) { megatron_rltd::implement(library); }

#ifdef MEGATRON_RLTD_CUDA
// Only if they can run: else tensors on a GPU go through the reference.
STABLE_TORCH_LIBRARY_IMPL(megatron_rltd, CUDA, library) {
  if (megatron_rltd::current_stream() != nullptr) megatron_rltd::implement(library);
}

// For megatron_rltd/tokens/kernels.py: why there are none for GPUs, or null. Not there in a build for CPUs.
extern "C" __attribute__((visibility("default"))) const char* megatron_rltd_without_cuda() {
  return megatron_rltd::current_stream() == nullptr ? megatron_rltd::kNoStreams : nullptr;
}
#endif
