// Modules, kernels and launches.
#include "state.h"
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>

namespace {

// An image is text: CUEMU1, the path of a library, and what it was compiled for (sm_90, or compute_90 for PTX).
struct Image {
    std::string path, target;
};

bool read(const char *image, Image *to) {
    static const char MAGIC[] = "CUEMU1\n";
    if (!image || strncmp(image, MAGIC, sizeof MAGIC - 1)) return false;
    std::string *parts[] = {&to->path, &to->target};
    const char *at = image + sizeof MAGIC - 1;
    for (std::string *part : parts) {
        for (; *at != '\n' && part->size() < 4096; at++) {
            if ((unsigned char)*at < ' ') return false;
            part->push_back(*at);
        }
        if (*at++ != '\n') return false;
    }
    return true;
}

// Machine code runs on later minor versions of its architecture, PTX on all later ones, either with a suffix on none.
bool fits(const std::string &target) {
    bool ptx = target.rfind("compute_", 0) == 0;
    int version = atoi(target.c_str() + (ptx ? 8 : 3)), device = (int)environment("CUEMU_CC", 90);
    if (isalpha((unsigned char)target.back())) return version == device;
    return version <= device && (ptx || version / 10 == device / 10);
}

char *stacks() {
    static char *const all = [] {
        size_t bytes = CUEMU_THREADS * CUEMU_STACK;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        char *stacks = (char *)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (stacks == MAP_FAILED) abort();
        for (unsigned i = 0; i < CUEMU_THREADS; i++) mprotect(stacks + i * CUEMU_STACK, 4096, PROT_NONE);
        return stacks;
    }();
    return all;
}

Function *function_of(void *handle) {
    auto found = state().functions.find(handle);
    return found == state().functions.end() ? nullptr : found->second;
}

} // namespace

API cuModuleLoadData(void **handle, const void *data) {
    ENTER();
    if (int error = forbidden_in_capture()) return error;
    Image image;
    if (!read((const char *)data, &image)) return INVALID_IMAGE;
    if (!fits(image.target)) return NO_BINARY_FOR_GPU;
    // A sanitizer looks for the names of functions when it reports, which may be after an unload.
    static const int kept = getenv("CUEMU_CXXFLAGS") ? RTLD_NODELETE : 0;
    void *library = dlopen(image.path.c_str(), RTLD_NOW | RTLD_LOCAL | kept);
    if (!library) {
        complain("%s", dlerror());
        return INVALID_IMAGE;
    }
    auto *describe = (CuemuModuleFn *)dlsym(library, "cuemu_module");
    if (!describe) {
        dlclose(library);
        return INVALID_IMAGE;
    }
    auto module = std::make_unique<Module>(Module{current(), library, describe(), {}});
    *handle = module.get();
    state().modules[*handle] = std::move(module);
    cuemu_count("module", 1);
    return SUCCESS;
}

API cuModuleLoadDataEx(void **handle, const void *data, unsigned, int *, void **) {
    return cuModuleLoadData(handle, data);
}

API cuModuleUnload(void *handle) {
    LEAVE();
    auto found = state().modules.find(handle);
    if (found == state().modules.end() || found->second->context != current()) return INVALID_HANDLE;
    run_all(current());
    for (auto &[name, function] : found->second->functions) state().functions.erase(function.get());
    dlclose(found->second->library);
    state().modules.erase(found);
    cuemu_count("module", -1);
    return SUCCESS;
}

API cuModuleGetFunction(void **handle, void *module_handle, const char *name) {
    ENTER();
    auto found = state().modules.find(module_handle);
    if (found == state().modules.end()) return INVALID_HANDLE;
    Module &module = *found->second;
    for (const CuemuKernel *kernel = module.code.kernels; kernel; kernel = kernel->next) {
        if (strcmp(kernel->name, name)) continue;
        auto &function = module.functions[name];
        if (!function) function = std::make_unique<Function>(Function{&module, kernel});
        *handle = function.get();
        state().functions[*handle] = function.get();
        return SUCCESS;
    }
    return NOT_FOUND;
}

API cuFuncSetAttribute(void *handle, int attribute, int value) {
    ENTER();
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (attribute != 8) return attribute == 9 ? SUCCESS : INVALID_VALUE;
    if (value < 0 || value > device_attribute(97)) return INVALID_VALUE;
    function->most_dynamic = value;
    return SUCCESS;
}

API cuFuncGetAttribute(int *value, int attribute, void *handle) {
    ENTER();
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = CUEMU_THREADS; break;
    case 1: *value = (int)function->module->code.static_shared; break;
    case 4: *value = 32; break;
    case 5:
    case 6: *value = (int)environment("CUEMU_CC", 90); break;
    case 8: *value = function->most_dynamic; break;
    default: *value = 0;
    }
    return SUCCESS;
}

API cuFuncGetParamInfo(void *handle, size_t index, size_t *offset, size_t *bytes) {
    ENTER();
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (index >= function->kernel->parameters) return INVALID_VALUE;
    *offset = function->kernel->offsets[index];
    if (bytes) *bytes = function->kernel->sizes[index];
    return SUCCESS;
}

API cuFuncGetModule(void **module, void *handle) {
    ENTER();
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    *module = function->module;
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *handle, int threads, size_t shared) {
    ENTER();
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (threads <= 0) return INVALID_VALUE;
    size_t each = shared + function->module->code.static_shared + 1024;
    *blocks = threads > (int)CUEMU_THREADS ? 0 : std::min({32, 2048 / threads, (int)(228 * 1024 / each)});
    return SUCCESS;
}

// --- Launches ---------------------------------------------------------------------------------------------------

struct Shape {
    unsigned grid[3], block[3], shared;
};

static int check(const Function &function, const Shape &shape) {
    unsigned long long threads = 1;
    const unsigned most_grid[] = {0x7fffffff, 65535, 65535}, most_block[] = {1024, 1024, 64};
    for (int i = 0; i < 3; i++) {
        if (!shape.grid[i] || shape.grid[i] > most_grid[i]) return INVALID_VALUE;
        if (!shape.block[i] || shape.block[i] > most_block[i]) return INVALID_VALUE;
        threads *= shape.block[i];
    }
    if (threads > CUEMU_THREADS || (int)shape.shared > function.most_dynamic) return INVALID_VALUE;
    return SUCCESS;
}

static Work launch(const CuemuKernel *kernel, void (*run)(const CuemuLaunch &), const Shape &shape, void **parameters) {
    // Parameters are copied now: the caller's may be gone when the kernel runs.
    auto values = std::make_shared<std::vector<std::vector<char>>>();
    for (unsigned i = 0; i < kernel->parameters; i++) {
        const char *from = (const char *)parameters[i];
        values->emplace_back(from, from + kernel->sizes[i]);
    }
    return [=] {
        std::vector<void *> pointers;
        for (auto &value : *values) pointers.push_back(value.data());
        Order order = launch_order();
        const unsigned *g = shape.grid, *b = shape.block;
        run({kernel, {g[0], g[1], g[2]}, {b[0], b[1], b[2]}, shape.shared, pointers.data(), order.order, order.seed,
             stacks()});
        count_launch();
        return (int)SUCCESS;
    };
}

API cuLaunchKernel(void *handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream_handle, void **parameters, void **) {
    ENTER();
    Function *function = function_of(handle);
    auto stream = stream_of(stream_handle);
    if (!function || !stream || function->module->context != stream->context) return INVALID_HANDLE;
    Shape shape{{gx, gy, gz}, {bx, by, bz}, shared};
    if (int error = check(*function, shape)) return error;
    if (function->kernel->parameters && !parameters) return INVALID_VALUE;
    return submit(stream, launch(function->kernel, function->module->code.run, shape, parameters));
}
