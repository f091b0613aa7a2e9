// What the stand-in for CUDA keeps, and the rules it enforces. One device, host memory, kernels that do nothing.
//
// Rules of stream capture (CUDA C++ Programming Guide, "Creating a Graph Using Stream Capture"):
//   1. While a stream captures in global mode, calls that may be unsafe fail (900) and spoil the capture: allocation and
//      release, synchronisation, the query of an event, a synchronous copy; a thread in relaxed mode is exempt.
//   2. A capturing stream can be neither synchronised nor queried, and its events cannot be queried (907).
//   3. A copy in a capture takes device or pinned memory only (900).
//   4. A stream joins a capture by waiting on an event of it; each must join back before the end (904). A capturing
//      stream cannot wait on an event from outside (905). The legacy stream can neither capture nor wait on one (906).
//   5. A spoilt capture gives no graph (901). What a capture launches runs at replay only.
// Rules of memory: the device holds FAKE_CUDA_GIB, an allocation beyond fails (2); memory is mapped when it is touched.
// Rules of numbers: device memory reads 0 until something is copied there. A flag (one byte, or a word that was declared
// one) copied to the host reads 1, so that code behind `isfinite` runs. Copies are real where they end on the host or are
// small; replays repeat theirs.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <cuda.h>
#include <cuda_runtime_api.h>
#undef cudaStreamGetCaptureInfo

#define API extern "C" __attribute__((visibility("default")))

namespace fake {

struct Copy {
    char* to;
    const char* from;
    size_t size;
    int value;  // of a memset, where `from` is null
};

struct Graph {
    long nodes = 0;
    std::vector<Copy> copies;
};

struct Stream {
    bool capturing = false, joined = false, spoilt = false;
    Stream* origin = nullptr;  // whose capture it joined
    unsigned long long id = 0;
    Graph recorded;
    Stream* root() { return origin ? origin : this; }
};

struct Event {
    Stream* capture = nullptr;
    Stream* stream = nullptr;  // that recorded it
};

// What `fake_counters` gives, in this order; the last three in bytes. waits: of the host, for events.
struct Counters {
    long launches, captured, outside, to_device, to_host, on_device, syncs, waits, replays, allocations, live, peak, pinned;
};

struct Chip {
    int cc;
    const char* name;
    int gib, sms, threads_sm, blocks_sm, l2_mib, shared_optin, shared_sm;
};

using Watcher = void (*)(const char* kind, const char* name);

extern std::recursive_mutex mutex;
extern Counters counters;
extern Stream* active;  // the stream that began the capture underway
extern std::set<Stream*> streams;
extern std::map<char*, size_t> device_memory, pinned_memory;
extern std::vector<long> graph_nodes;  // of every graph captured, in order

const Chip& chip();
size_t capacity();
Stream* stream_of(void* handle);
bool lies_in(const std::map<char*, size_t>& memory, const void* pointer);
cudaError_t fail(cudaError_t error);
cudaError_t complain(cudaError_t error, const std::string& what, Stream* spoils = nullptr);
cudaError_t forbid(const char* what);  // rule 1
void launch(void* stream, const std::string& name);
cudaError_t copy(void* to, const void* from, size_t size, void* stream, bool waits);
void set(void* to, int value, size_t size, void* stream);
void synchronised(const char* what, bool event = false);
int attribute(int which);
cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode);
cudaStreamCaptureMode& capture_mode();
cudaError_t last_error(bool clear);

}  // namespace fake
