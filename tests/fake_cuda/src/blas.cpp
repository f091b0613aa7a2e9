// cuBLAS and cuBLASLt: a product is a launch under its function's name on the stream that its handle has.
#include "state.h"

#include <cstdlib>
#include <cstring>

// As cublasLt.h has it (cublasLtMatmulAlgo_t is eight words), which torch's wheels do not ship to include.
struct Heuristic {
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

static thread_local void* stream = nullptr;
static thread_local int pointer_mode = 0, math_mode = 0;

API int cublasCreate_v2(void** handle) { return *handle = malloc(64), 0; }
API int cublasDestroy_v2(void* handle) { return free(handle), 0; }
API int cublasSetStream_v2(void*, void* on) { return stream = on, 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = pointer_mode, 0; }
API int cublasSetPointerMode_v2(void*, int mode) { return pointer_mode = mode, 0; }
API int cublasGetMathMode(void*, int* mode) { return *mode = math_mode, 0; }
API int cublasSetMathMode(void*, int mode) { return math_mode = mode, 0; }
API int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }

#define PRODUCT(name) \
    API int name(void*, ...) { return fake::launch(stream, #name), 0; }
PRODUCT(cublasGemmEx) PRODUCT(cublasGemmStridedBatchedEx) PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemm_v2) PRODUCT(cublasSgemmStridedBatched) PRODUCT(cublasSgemv_v2) PRODUCT(cublasSdot_v2)
PRODUCT(cublasDgemm_v2) PRODUCT(cublasDgemmStridedBatched) PRODUCT(cublasDgemv_v2) PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

API size_t cublasLtGetVersion() { return 130100; }
#define DESCRIPTOR(kind)                                                       \
    API int cublasLt##kind##Create(void** made, ...) { return *made = calloc(1, 512), 0; } \
    API int cublasLt##kind##Destroy(void* made) { return free(made), 0; }      \
    API int cublasLt##kind##SetAttribute(...) { return 0; }
DESCRIPTOR(MatmulDesc) DESCRIPTOR(MatmulPreference) DESCRIPTOR(MatrixLayout)

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* found, int* num) {
    memset(found, 0, sizeof *found);
    *num = 1;
    return 0;
}
API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                       void*, void*, const void*, void*, size_t, void* on) {
    fake::launch(on, "cublasLtMatmul");
    return 0;
}
