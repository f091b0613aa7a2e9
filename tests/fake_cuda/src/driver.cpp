// libcuda, as far as Triton, torch and the libraries beside them ask for it.
#include "state.h"

#include <cstring>

using namespace fake;

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) { return *version = CUDART_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* n) { return *n = 1, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) { return *value = attribute(which), CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char* name, int size, CUdevice) { return strncpy(name, chip().name, size), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active_) { return *flags = 0, *active_ = 1, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxPopCurrent_v2(CUcontext*) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 8 << 20, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult, const char** said) { return *said = "an error of the stand-in's driver", CUDA_SUCCESS; }
API CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle*) { return CUDA_SUCCESS; }
API CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { return CUDA_SUCCESS; }
API CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* size, CUdeviceptr pointer) {
    std::lock_guard<std::recursive_mutex> guard(fake::mutex);
    if (!lies_in(device_memory, (void*)pointer)) return CUDA_ERROR_NOT_FOUND;
    auto found = --device_memory.upper_bound((char*)pointer);
    if (start) *start = (CUdeviceptr)found->first;
    if (size) *size = found->second;
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
    std::lock_guard<std::recursive_mutex> guard(fake::mutex);
    if (!lies_in(device_memory, (void*)pointer) && !lies_in(pinned_memory, (void*)pointer)) return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = pointer;
    return CUDA_SUCCESS;
}

// Modules and kernels: a function is its name.
API CUresult cuModuleLoadData(CUmodule* module, const void*) { return *module = (CUmodule)0x20, CUDA_SUCCESS; }
API CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) { return *module = (CUmodule)0x20, CUDA_SUCCESS; }
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) { return *function = (CUfunction)strdup(name), CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
    return *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int* num, CUfunction, const CUlaunchConfig*) { return *num = 1, CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
    launch(config->hStream, std::string("triton ") + (const char*)function);
    return CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream stream, void**, void**) {
    launch(stream, std::string("triton ") + (const char*)function);
    return CUDA_SUCCESS;
}
