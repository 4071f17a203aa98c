// Counts, injected faults and settings: what a test asks of the emulation.
#include "state.h"
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Control {
    std::mutex lock;
    long calls = 0, fail_in = -1, launches = 0;
    int code = 0;
    std::string fail_name; // empty for any
    std::map<std::string, long> calls_of;
    std::map<std::string, long> live;
    Order order{(int)environment("CUEMU_ORDER", 0), (unsigned)environment("CUEMU_SEED", 0)};
};

Control &control() {
    static Control &control = *new Control;
    return control;
}
using ControlLock = std::lock_guard<std::mutex>;

} // namespace

void complain(const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fprintf(stderr, "cuemu: %s\n", text);
}

long environment(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, nullptr, 10) : otherwise;
}

int cuemu_enter(const char *name) {
    Control &c = control();
    ControlLock lock(c.lock);
    c.calls++;
    c.calls_of[name]++;
    if (c.fail_in < 0 || (!c.fail_name.empty() && c.fail_name != name) || --c.fail_in > 0) return SUCCESS;
    c.fail_in = -1;
    return c.code;
}

void cuemu_count(const char *kind, long difference) {
    Control &c = control();
    ControlLock lock(c.lock);
    c.live[kind] += difference;
}

Order launch_order() {
    Control &c = control();
    ControlLock lock(c.lock);
    return c.order;
}

void count_launch() {
    Control &c = control();
    ControlLock lock(c.lock);
    c.launches++;
}

// The n-th call from now on, of this name if there is one, fails with `code`, once; a negative n takes that back.
FAKE_API void cuemu_fail_call(const char *name, long n, int code) {
    Control &c = control();
    ControlLock lock(c.lock);
    c.fail_name = name ? name : "";
    c.fail_in = n, c.code = code;
}

// The calls so far by their names: `each` hears of one after the other.
FAKE_API void cuemu_each_call(void (*each)(const char *name, long count, void *data), void *data) {
    Control &c = control();
    std::map<std::string, long> calls_of;
    {
        ControlLock lock(c.lock);
        calls_of = c.calls_of;
    }
    for (auto &[name, count] : calls_of) each(name.c_str(), count, data);
}

FAKE_API long cuemu_calls() {
    Control &c = control();
    ControlLock lock(c.lock);
    return c.calls;
}

// How many objects of a kind are alive, or of all kinds; "bytes" counts device memory and is no object.
FAKE_API long cuemu_live(const char *kind) {
    Control &c = control();
    ControlLock lock(c.lock);
    if (kind) return c.live[kind];
    long all = 0;
    for (auto &[name, count] : c.live)
        if (name != "bytes") all += count;
    return all;
}

// Kernels that ran, in graphs too.
FAKE_API long cuemu_launches() {
    Control &c = control();
    ControlLock lock(c.lock);
    return c.launches;
}

FAKE_API void cuemu_set_order(int order, unsigned seed) {
    Control &c = control();
    ControlLock lock(c.lock);
    c.order = {order, seed};
}

// --- Names of errors --------------------------------------------------------------------------------------------

namespace {
struct Name {
    int code;
    const char *name, *text;
};
const Name NAMES[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {708, "CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "cannot set while device is active in this process"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

int name(int code, const char **to, const char *Name::*part) {
    *to = nullptr;
    for (const Name &n : NAMES)
        if (n.code == code) return *to = n.*part, SUCCESS;
    return INVALID_VALUE;
}
} // namespace

API cuGetErrorName(int code, const char **to) { return name(code, to, &Name::name); }
API cuGetErrorString(int code, const char **to) { return name(code, to, &Name::text); }
