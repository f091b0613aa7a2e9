// Memory, streams, counters: what runtime, driver and cuBLAS share.
#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fake {

std::recursive_mutex mutex;
Counters counters{};
Stream* active = nullptr;
std::set<Stream*> streams;
std::map<char*, size_t> device_memory, pinned_memory;
std::vector<long> graph_nodes;

static Stream legacy;
static cudaStreamCaptureMode active_mode;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local cudaError_t last = cudaSuccess;
static std::string complaints;
static Watcher watcher = nullptr;
static std::set<const char*> flags;  // fp32 words in device memory
static std::map<std::string, long> launches_by_name, outside_by_name;
static const size_t SMALL = 1 << 20;  // bytes: larger copies between device buffers would only fill the host's memory

static const Chip CHIPS[] = {
    // cc, name, GiB, SMs, threads and blocks an SM, L2 MiB, shared memory: opt-in of a block, of an SM
    {80, "NVIDIA A100-SXM4-80GB", 80, 108, 2048, 32, 40, 166912, 167936},
    {86, "NVIDIA GeForce RTX 3090", 24, 82, 1536, 16, 6, 101376, 102400},
    {89, "NVIDIA GeForce RTX 4090", 24, 128, 1536, 24, 72, 101376, 102400},
    {90, "NVIDIA H100 80GB HBM3", 80, 132, 2048, 32, 50, 232448, 233472},
    {120, "NVIDIA GeForce RTX 5090", 32, 170, 1536, 24, 96, 101376, 102400},
};

const Chip& chip() {
    static const Chip* found = [] {
        const char* said = getenv("FAKE_CUDA_CHIP");
        int cc = said ? atoi(said) : 89;
        for (const Chip& one : CHIPS)
            if (one.cc == cc) return &one;
        fprintf(stderr, "FAKE_CUDA_CHIP=%s: known are 80, 86, 89, 90, 120\n", said);
        exit(2);
    }();
    return *found;
}

size_t capacity() {
    const char* said = getenv("FAKE_CUDA_GIB");
    return (size_t)((said ? atof(said) : chip().gib) * (1 << 30));
}

Stream* stream_of(void* handle) {
    bool is_legacy = handle == nullptr || handle == (void*)1 || handle == (void*)2;
    return is_legacy ? &legacy : (Stream*)handle;
}

bool lies_in(const std::map<char*, size_t>& memory, const void* pointer) {
    auto next = memory.upper_bound((char*)pointer);
    if (next == memory.begin()) return false;
    --next;
    return (char*)pointer < next->first + next->second;
}

cudaError_t fail(cudaError_t error) {
    if (error) last = error;
    return error;
}

cudaError_t last_error(bool clear) {
    cudaError_t error = last;
    if (clear) last = cudaSuccess;
    return error;
}

cudaError_t complain(cudaError_t error, const std::string& what, Stream* spoils) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    fprintf(stderr, "fake CUDA: %s\n", what.c_str());
    complaints += what + "\n";
    if (spoils) spoils->root()->spoilt = true;
    return fail(error);
}

cudaError_t forbid(const char* what) {
    std::lock_guard<std::recursive_mutex> guard(mutex);
    bool strict = thread_mode == cudaStreamCaptureModeGlobal && active_mode == cudaStreamCaptureModeGlobal;
    if (!active || !strict) return cudaSuccess;
    return complain(cudaErrorStreamCaptureUnsupported, std::string(what) + " during a capture", active);
}

static void tell(const char* kind, const char* name) {
    if (Watcher told = watcher) told(kind, name);  // without the lock: it takes Python's
}

void launch(void* handle, const std::string& name) {
    Stream* stream = stream_of(handle);
    {
        std::lock_guard<std::recursive_mutex> guard(mutex);
        counters.launches++;
        launches_by_name[name]++;
        if (stream->capturing) {
            counters.captured++;
            stream->root()->recorded.nodes++;
            return;
        }
        if (active) {
            counters.outside++;
            outside_by_name[name]++;
        }
    }
    tell("launch", name.c_str());
}

static void perform(const Copy& one) {
    bool host = one.from && !lies_in(device_memory, one.to);
    if (!host && one.size > SMALL) return;
    if (one.from)
        memmove(one.to, one.from, one.size);
    else
        memset(one.to, one.value, one.size);
    if (!host || !lies_in(device_memory, one.from)) return;
    if (one.size == 1) *one.to = 1;
    for (auto flag = flags.lower_bound(one.from); flag != flags.end() && *flag + 4 <= one.from + one.size; ++flag)
        *(float*)(one.to + (*flag - one.from)) = 1;
}

cudaError_t copy(void* to, const void* from, size_t size, void* handle, bool waits) {
    Stream* stream = stream_of(handle);
    Copy one{(char*)to, (const char*)from, size, 0};
    const char* name;
    {
        std::lock_guard<std::recursive_mutex> guard(mutex);
        bool to_device = lies_in(device_memory, to), from_device = lies_in(device_memory, from);
        bool steady = (to_device || lies_in(pinned_memory, to)) && (from_device || lies_in(pinned_memory, from));
        if (stream->capturing && !steady)  // rule 3
            return complain(cudaErrorStreamCaptureUnsupported,
                            "a pageable copy of " + std::to_string(size) + " bytes during a capture", stream);
        if (stream->capturing) stream->root()->recorded.copies.push_back(one);
        name = !to_device ? "copy to host" : from_device ? "copy on device" : "copy to device";
        if (!stream->capturing) {
            (!to_device ? counters.to_host : from_device ? counters.on_device : counters.to_device)++;
            perform(one);
        }
    }
    launch(handle, name);
    if (waits) synchronised(name);
    return cudaSuccess;
}

void set(void* to, int value, size_t size, void* handle) {
    Stream* stream = stream_of(handle);
    Copy one{(char*)to, nullptr, size, value};
    {
        std::lock_guard<std::recursive_mutex> guard(mutex);
        if (stream->capturing)
            stream->root()->recorded.copies.push_back(one);
        else
            perform(one);
    }
    launch(handle, "memset");
}

void synchronised(const char* what, bool event) {
    {
        std::lock_guard<std::recursive_mutex> guard(mutex);
        (event ? counters.waits : counters.syncs)++;
    }
    tell(event ? "wait" : "sync", what);
}

cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode) {
    cudaStreamCaptureMode before = thread_mode;
    thread_mode = mode;
    return before;
}

cudaStreamCaptureMode& capture_mode() { return active_mode; }

void replay(const Graph& graph) {
    for (const Copy& one : graph.copies) perform(one);
}

int attribute(int which) {
    switch (which) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrClockRate: return 2520000;
        case cudaDevAttrMemoryClockRate: return 10501000;
        case cudaDevAttrGlobalMemoryBusWidth: return 384;
        case cudaDevAttrMultiProcessorCount: return chip().sms;
        case cudaDevAttrL2CacheSize: return chip().l2_mib << 20;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return chip().threads_sm;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return chip().blocks_sm;
        case cudaDevAttrComputeCapabilityMajor: return chip().cc / 10;
        case cudaDevAttrComputeCapabilityMinor: return chip().cc % 10;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return chip().shared_sm;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return chip().shared_optin;
        case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: return 1;
        default: return 0;
    }
}

}  // namespace fake

// What tests ask: device.py.
API void fake_counters(long* out) { memcpy(out, &fake::counters, sizeof fake::counters); }
API void fake_reset_peak() { fake::counters.peak = fake::counters.live; }
API void fake_watch(fake::Watcher watcher) { fake::watcher = watcher; }
API const char* fake_complaints() { return fake::complaints.c_str(); }
API void fake_forget_complaints() { fake::complaints.clear(); }
API void fake_flag(const char* word) {
    std::lock_guard<std::recursive_mutex> guard(fake::mutex);
    fake::flags.insert(word);
}
API int fake_graphs(long* nodes, int size) {
    std::lock_guard<std::recursive_mutex> guard(fake::mutex);
    int num = (int)fake::graph_nodes.size();
    for (int i = 0; i < num && i < size; i++) nodes[i] = fake::graph_nodes[i];
    return num;
}
API int fake_lacks(const char* name) {
    return fake::complain(cudaErrorNotSupported, std::string(name) + " is not part of the stand-in");
}
API void fake_launch(void* stream, const char* name) { fake::launch(stream, name); }
API const char* fake_names(int outside) {
    static std::string said;
    std::lock_guard<std::recursive_mutex> guard(fake::mutex);
    said.clear();
    for (auto& [name, count] : outside ? fake::outside_by_name : fake::launches_by_name)
        said += std::to_string(count) + "\t" + name + "\n";
    return said.c_str();
}
