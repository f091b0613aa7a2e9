// libcudart, as far as torch, Triton, xFormers, bitsandbytes and DeepSpeed ask for it.
#include "state.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

using namespace fake;
#define LOCK std::lock_guard<std::recursive_mutex> guard(fake::mutex)

namespace fake { void replay(const Graph& graph); }
API int fake_lacks(const char* name);

static std::map<const void*, std::string> kernel_names;

static std::string name_of(const void* kernel) {
    LOCK;
    auto found = kernel_names.find(kernel);
    return found == kernel_names.end() ? "unnamed" : found->second;
}

// ---- device
static thread_local int current_device = 0;  // all of a process's devices share one memory and its cap
static int num_devices() {
    const char* said = getenv("FAKE_CUDA_DEVICES");
    return said ? atoi(said) : 1;
}
API cudaError_t cudaGetDeviceCount(int* n) { return *n = num_devices(), cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= num_devices()) return fail(cudaErrorInvalidDevice);
    return current_device = device, cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { return *value = attribute(which), cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) { return strncpy(id, "0000:01:00.0", size), cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaGetLastError() { return last_error(true); }
API cudaError_t cudaPeekAtLastError() { return last_error(false); }

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", chip().name);
    p->major = chip().cc / 10, p->minor = chip().cc % 10;
    p->totalGlobalMem = capacity();
    p->multiProcessorCount = chip().sms, p->warpSize = 32, p->l2CacheSize = chip().l2_mib << 20;
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = chip().threads_sm;
    p->maxBlocksPerMultiProcessor = chip().blocks_sm;
    p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = chip().shared_optin;
    p->sharedMemPerMultiprocessor = chip().shared_sm;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
    p->asyncEngineCount = 2, p->textureAlignment = 512, p->memPitch = 2147483647;
    return cudaSuccess;
}

API const char* cudaGetErrorString(cudaError_t error) {
    switch ((int)error) {
        case 0: return "no error";
        case 2: return "out of memory";
        case 801: return "operation not supported";
        case 900: return "operation not permitted when stream is capturing";
        case 901: return "operation failed due to a previous error during capture";
        case 904: return "capturing stream has unjoined work";
        case 905: return "dependency created on uncaptured work in another stream";
        case 906: return "operation would make the legacy stream depend on a capturing blocking stream";
        case 907: return "operation not permitted on an event last recorded in a capturing stream";
        default: return "an error that the stand-in gives no text";
    }
}
API const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }

// ---- memory
API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    LOCK;
    *total = capacity();
    *free_bytes = *total - counters.live;
    return cudaSuccess;
}
API cudaError_t cudaMalloc(void** pointer, size_t size) {
    *pointer = nullptr;
    if (auto error = forbid("cudaMalloc")) return error;
    LOCK;
    size_t asked = size ? size : 1;
    if (counters.live + asked > capacity()) return fail(cudaErrorMemoryAllocation);
    void* found = mmap(nullptr, asked, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    device_memory[(char*)found] = asked;
    counters.allocations++;
    counters.live += asked;
    if (counters.live > counters.peak) counters.peak = counters.live;
    *pointer = found;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* pointer) {
    if (!pointer) return cudaSuccess;
    if (auto error = forbid("cudaFree")) return error;
    LOCK;
    auto found = device_memory.find((char*)pointer);
    if (found == device_memory.end()) return fail(cudaErrorInvalidValue);
    munmap(pointer, found->second);
    counters.live -= found->second;
    device_memory.erase(found);
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    if (auto error = forbid("cudaHostAlloc")) return error;
    LOCK;
    size_t whole = (size + 4095) / 4096 * 4096;
    *pointer = aligned_alloc(4096, whole);
    memset(*pointer, 0, size);
    pinned_memory[(char*)*pointer] = whole;
    counters.pinned += whole;
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* pointer) {
    if (auto error = forbid("cudaFreeHost")) return error;
    LOCK;
    auto found = pinned_memory.find((char*)pointer);
    if (found == pinned_memory.end()) return fail(cudaErrorInvalidValue);
    counters.pinned -= found->second;
    pinned_memory.erase(found);
    free(pointer);
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
    LOCK;
    pinned_memory[(char*)pointer] = size;
    return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* pointer) {
    LOCK;
    pinned_memory.erase((char*)pointer);
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
    LOCK;
    memset(found, 0, sizeof *found);
    found->devicePointer = found->hostPointer = (void*)pointer;
    found->type = lies_in(device_memory, pointer)   ? cudaMemoryTypeDevice
                  : lies_in(pinned_memory, pointer) ? cudaMemoryTypeHost
                                                    : cudaMemoryTypeUnregistered;
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    return copy(to, from, size, stream, false);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    if (auto error = forbid("cudaMemcpy")) return error;
    return copy(to, from, size, nullptr, true);
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                  size_t height, cudaMemcpyKind, cudaStream_t stream) {
    if (stream_of(stream)->capturing) return launch(stream, "copy of rows"), cudaSuccess;
    for (size_t i = 0; i < height; i++) memmove((char*)to + i * to_pitch, (char*)from + i * from_pitch, width);
    launch(stream, "copy of rows");
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
    set(to, value, size, stream);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void* to, int value, size_t size) {
    if (auto error = forbid("cudaMemset")) return error;
    set(to, value, size, nullptr);
    return cudaSuccess;
}

// ---- streams and events
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    LOCK;
    *stream = (cudaStream_t) * streams.insert(new Stream).first;
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamGetFlags(cudaStream_t, unsigned* flags) { return *flags = cudaStreamNonBlocking, cudaSuccess; }
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (stream_of(stream)->capturing)  // rule 2
        return complain(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery of a capturing stream", stream_of(stream));
    return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    synchronised("cudaStreamSynchronize");
    if (stream_of(stream)->capturing)  // rule 2
        return complain(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize of a capturing stream", stream_of(stream));
    return forbid("cudaStreamSynchronize");
}
API cudaError_t cudaDeviceSynchronize() {
    synchronised("cudaDeviceSynchronize");
    return forbid("cudaDeviceSynchronize");
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = (cudaEvent_t) new Event, cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete (Event*)event, cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    LOCK;
    Stream* stream = stream_of(handle);
    *(Event*)event = {stream->capturing ? stream->root() : nullptr, stream};
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {  // rule 4
    LOCK;
    Stream *stream = stream_of(handle), *capture = ((Event*)event)->capture;
    if (capture && !capture->capturing) capture = nullptr;
    if (capture && stream == stream_of(nullptr))
        return complain(cudaErrorStreamCaptureImplicit, "the legacy stream waits on an event of a capture", capture);
    if (stream->capturing && !capture)
        return complain(cudaErrorStreamCaptureIsolation, "a capturing stream waits on an event from outside", stream);
    if (capture && stream != capture && !stream->capturing) {
        stream->capturing = true, stream->joined = false;
        stream->origin = capture, stream->id = capture->id;
    }
    if (capture && ((Event*)event)->stream != stream) ((Event*)event)->stream->joined = true;
    return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    Stream* capture = ((Event*)event)->capture;
    if (capture && capture->capturing) return complain(cudaErrorCapturedEvent, "cudaEventQuery of a captured event", capture);
    return forbid("cudaEventQuery");
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
    synchronised("cudaEventSynchronize", true);
    return forbid("cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

// ---- capture and graphs
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { return *mode = exchange_mode(*mode), cudaSuccess; }
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    LOCK;
    static unsigned long long next_id = 1;
    Stream* stream = stream_of(handle);
    if (stream == stream_of(nullptr)) return complain(cudaErrorStreamCaptureImplicit, "the legacy stream begins a capture");
    *stream = Stream();
    stream->capturing = true, stream->id = next_id++;
    active = stream, capture_mode() = mode;
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {  // rules 4 and 5
    LOCK;
    Stream* stream = stream_of(handle);
    bool apart = false;
    for (Stream* other : streams)
        if (other->origin == stream) {
            apart |= !other->joined;
            other->capturing = false, other->origin = nullptr;
        }
    stream->capturing = false, active = nullptr, *graph = nullptr;
    if (getenv("FAKE_CUDA_REFUSES_CAPTURES")) stream->spoilt = true;  // to see what a command does then
    if (stream->spoilt) return fail(cudaErrorStreamCaptureInvalidated);
    if (apart) return complain(cudaErrorStreamCaptureUnjoined, "a stream of the capture did not join");
    *graph = (cudaGraph_t) new Graph(stream->recorded);
    graph_nodes.push_back(stream->recorded.nodes);
    return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = stream_of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* num) {
    Stream* stream = stream_of(handle);
    *status = stream->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = stream->id;
    if (graph) *graph = (cudaGraph_t)stream;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (num) *num = 0;
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    return *exec = (cudaGraphExec_t) new Graph(*(Graph*)graph), cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) { return cudaGraphInstantiateWithFlags(exec, graph, flags); }
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* num) { return *num = ((Graph*)graph)->nodes, cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
    LOCK;
    if (stream_of(handle)->capturing) return complain(cudaErrorNotSupported, "a graph is launched into a capture", stream_of(handle));
    counters.replays++;
    replay(*(Graph*)exec);
    return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph*)graph, cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete (Graph*)exec, cudaSuccess; }

// ---- kernels
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->maxDynamicSharedSizeBytes = chip().shared_optin;
    found->binaryVersion = found->ptxVersion = chip().cc == 89 ? 86 : chip().cc;  // torch ships no sm_89 of its own
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* num, const void*, int, size_t, unsigned) { return *num = 2, cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num, const void*, int, size_t) { return *num = 2, cudaSuccess; }
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    launch(stream, name_of(kernel));
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
    launch(config->stream, name_of(kernel));
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    launch(stream, name_of((const void*)kernel));
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
static thread_local struct { dim3 grid, block; size_t shared; void* stream; } configuration;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *(void**)stream = configuration.stream;
    return cudaSuccess;
}
API void** __cudaRegisterFatBinary(void*) {
    static void* handle[4];
    return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    LOCK;
    kernel_names[host] = name;
}
API cudaError_t cudaGetSymbolAddress(void** pointer, const void*) { return *pointer = nullptr, cudaSuccess; }

// A driver function that is not here complains under its own name, when it is called.
static const char* absent_names[64];
template <int N>
static int absent() { return fake_lacks(absent_names[N]); }
template <int... N>
static void* absent_function(int n, std::integer_sequence<int, N...>) {
    static int (*const functions[])() = {absent<N>...};
    return (void*)functions[n];
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
    static int num_absent = 0;
    void* found = dlsym(RTLD_DEFAULT, name);
    if (!found) found = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
    if (!found) {
        LOCK;
        absent_names[num_absent] = strdup(name);
        found = absent_function(num_absent, std::make_integer_sequence<int, 64>());
        num_absent = (num_absent + 1) % 64;
    }
    *function = found;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
