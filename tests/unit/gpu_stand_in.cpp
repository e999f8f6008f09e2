// Preloaded, it has the kernels' host code take tensors on the CPU for tensors on GPU 0, so that
// the branch for GPUs runs on machines without one, as far as the first call of CUDA, in torch.
//
// With STREAM, torch's function for the current stream is left out too, and the first call of CUDA
// is the launch. With WITHOUT_LIBTORCH_CUDA, torch's library for CUDA cannot be found, as in a torch
// for CPUs.

#include <cstdint>

extern "C" {

int32_t aoti_torch_get_device_type(void*, int32_t* type) {
  *type = 1;  // CUDA
  return 0;
}

int32_t aoti_torch_get_device_index(void*, int32_t* index) {
  *index = 0;
  return 0;
}

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) { return 0; }

#ifdef STREAM
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
#endif

}  // extern "C"

#ifdef WITHOUT_LIBTORCH_CUDA
#include <dlfcn.h>

#include <cstring>

extern "C" void* dlopen(const char* name, int flags) {
  static const auto real = reinterpret_cast<decltype(&dlopen)>(dlsym(RTLD_NEXT, "dlopen"));
  const bool asks_for_it = name != nullptr && std::strcmp(name, "libtorch_cuda.so") == 0;
  return asks_for_it && flags & RTLD_NOLOAD ? nullptr : real(name, flags);
}
#endif
