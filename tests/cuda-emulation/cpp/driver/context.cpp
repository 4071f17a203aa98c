// Devices and contexts.
#include "state.h"
#include <cstdio>
#include <cstring>

namespace {
thread_local std::vector<Context *> stack;

int capability() { return (int)environment("CUEMU_CC", 90); }

int most_shared() {
    switch (capability()) {
    case 75: return 64 * 1024;
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121: return 99 * 1024;
    default: return 227 * 1024;
    }
}

Context *device(int ordinal) {
    auto &devices = state().devices;
    return ordinal >= 0 && (size_t)ordinal < devices.size() ? devices[ordinal].get() : nullptr;
}

bool known(Context *context) {
    for (auto &each : state().devices)
        if (each.get() == context) return true;
    return false;
}

int check(Context *context) {
    if (!known(context)) return INVALID_CONTEXT;
    return context->users ? SUCCESS : CONTEXT_IS_DESTROYED;
}
} // namespace

State &state() {
    static State &state = *new State;
    return state;
}

Context *current() { return stack.empty() ? nullptr : stack.back(); }

bool cuemu_has_context() { return current() && current()->users; }

int leave(Needs needs) {
    if (needs >= STARTED && !state().started) return NOT_INITIALIZED;
    if (needs < CONTEXT) return SUCCESS;
    if (!current()) return INVALID_CONTEXT;
    return check(current());
}

int enter(const char *name, Needs needs) {
    if (int injected = cuemu_enter(name)) return injected;
    if (int missing = leave(needs)) return missing;
    return needs == CONTEXT ? current()->fault : SUCCESS;
}

API cuInit(unsigned flags) {
    ENTER(NOTHING);
    if (flags) return INVALID_VALUE;
    long count = environment("CUEMU_DEVICES", 1);
    if (count <= 0) return NO_DEVICE;
    State &s = state();
    for (long i = 0; !s.started && i < count; i++) {
        s.devices.push_back(std::make_unique<Context>());
        s.devices.back()->device = (int)i;
    }
    s.started = true;
    return SUCCESS;
}

API cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

API cuDeviceGetCount(int *count) {
    ENTER(STARTED);
    *count = (int)state().devices.size();
    return SUCCESS;
}

API cuDeviceGet(int *to, int ordinal) {
    ENTER(STARTED);
    if (!device(ordinal)) return INVALID_DEVICE;
    *to = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char *name, int length, int ordinal) {
    ENTER(STARTED);
    if (!device(ordinal)) return INVALID_DEVICE;
    snprintf(name, length, "Emulated GPU");
    return SUCCESS;
}

API cuDeviceGetUuid_v2(char *uuid, int ordinal) {
    ENTER(STARTED);
    if (!device(ordinal)) return INVALID_DEVICE;
    memcpy(uuid, "emulated device", 15);
    uuid[15] = (char)ordinal;
    return SUCCESS;
}

API cuDeviceGetUuid(char *uuid, int ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }

int device_attribute(int attribute) {
    const std::map<int, int> values = {
        {1, CUEMU_THREADS},      // threads of a block
        {2, 1024},               // and their extents
        {3, 1024},
        {4, 64},
        {5, 0x7fffffff},         // extents of a grid
        {6, 65535},
        {7, 65535},
        {8, 48 * 1024},          // shared memory of a block
        {9, 64 * 1024},          // constant memory
        {10, 32},                // warp
        {12, 65536},             // registers of a block
        {13, 1000000},           // kHz
        {16, 4},                 // multiprocessors
        {31, 1},                 // kernels run side by side
        {36, 1000000},           // kHz of memory
        {37, 1024},              // its bus, in bits
        {38, 4 << 20},           // second-level cache
        {39, 2048},              // threads of a multiprocessor
        {40, 2},                 // copy engines
        {41, 1},                 // unified addressing
        {75, capability() / 10}, // compute capability
        {76, capability() % 10},
        {78, 1},                 // priorities of streams
        {81, 228 * 1024},        // shared memory of a multiprocessor
        {82, 65536},             // its registers
        {97, most_shared()},     // shared memory of a block, when asked for
        {106, 32},               // blocks of a multiprocessor
        {111, 1024},             // shared memory that the system takes from a block
        {115, 1},                // memory pools
    };
    auto found = values.find(attribute);
    return found == values.end() ? 0 : found->second;
}

API cuDeviceGetAttribute(int *value, int attribute, int ordinal) {
    ENTER(STARTED);
    if (!device(ordinal)) return INVALID_DEVICE;
    *value = device_attribute(attribute);
    return SUCCESS;
}

// --- Contexts ---------------------------------------------------------------------------------------------------

API cuDevicePrimaryCtxRetain(Context **context, int ordinal) {
    ENTER(STARTED);
    Context *found = device(ordinal);
    if (!found) return INVALID_DEVICE;
    if (!found->users++) {
        found->fault = 0;
        found->default_stream = std::make_shared<Stream>();
        found->default_stream->context = found;
        found->default_stream->blocking = false;
    }
    cuemu_count("context", 1);
    *context = found;
    return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int ordinal) {
    LEAVE(STARTED);
    Context *found = device(ordinal);
    if (!found) return INVALID_DEVICE;
    if (!found->users) return INVALID_CONTEXT;
    if (found->users == 1) run_all(found);
    found->users--;
    cuemu_count("context", -1);
    return SUCCESS;
}

API cuCtxGetCurrent(Context **context) {
    ENTER(STARTED);
    *context = current();
    return SUCCESS;
}

API cuCtxSetCurrent(Context *context) {
    ENTER(STARTED);
    if (context) {
        if (int error = check(context)) return error;
        if (stack.empty()) stack.push_back(context);
        stack.back() = context;
    } else if (!stack.empty()) {
        stack.pop_back();
    }
    return SUCCESS;
}

API cuCtxPushCurrent_v2(Context *context) {
    ENTER(STARTED);
    if (int error = check(context)) return error;
    stack.push_back(context);
    return SUCCESS;
}

API cuCtxPopCurrent_v2(Context **context) {
    LEAVE(STARTED);
    if (stack.empty()) return INVALID_CONTEXT;
    if (context) *context = stack.back();
    stack.pop_back();
    return SUCCESS;
}

API cuCtxGetDevice(int *ordinal) {
    ENTER();
    *ordinal = current()->device;
    return SUCCESS;
}

API cuCtxSynchronize() {
    ENTER();
    if (int error = forbidden_in_capture()) return error;
    run_all(current());
    return current()->fault;
}
