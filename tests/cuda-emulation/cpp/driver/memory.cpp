// Device memory and pinned host memory, and copies.
//
// Memory starts as 0xff, which is NaN in every float type, and is filled with 0xfb when it is freed. It then waits a
// while before it is used again, so that a kernel that still reads it sees that, and one that writes it is found out.
#include "state.h"
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

namespace {

constexpr size_t GUARD = 256, HELD_BYTES = 32 << 20;
constexpr unsigned char FRESH = 0xff, FREED = 0xfb, FENCE = 0xfa;

struct Block {
    size_t bytes;
    int device;
    char *start; // of the guards around it
    bool freed;  // by a call, though its stream has not come to that yet
};

struct Memory {
    std::map<Address, Block> blocks;
    std::map<Address, size_t> pinned;
    std::deque<std::pair<Address, Block>> held; // freed, and watched for writes
    size_t held_bytes = 0, limit = (size_t)environment("CUEMU_MEMORY", 4l << 30);
    std::map<int, size_t> used;
    std::map<int, unsigned long long> pool_settings;
    // A sanitizer watches the bounds itself, if nothing of ours stands around.
    bool sanitized = dlsym(RTLD_DEFAULT, "__asan_init") != nullptr;
    size_t guard() const { return sanitized ? 0 : GUARD; }
};

Memory &memory() {
    static Memory &memory = *new Memory;
    return memory;
}

// The entry that an address lies in, or null.
template <class Value> std::pair<const Address, Value> *around(std::map<Address, Value> &map, Address address) {
    auto after = map.upper_bound(address);
    return after == map.begin() ? nullptr : &*std::prev(after);
}

bool all(const char *bytes, size_t count, unsigned char value) {
    for (size_t i = 0; i < count; i++)
        if ((unsigned char)bytes[i] != value) return false;
    return true;
}

[[noreturn]] void overrun(const Block &block, const char *what) {
    complain("%s device memory of %zu bytes", what, block.bytes);
    abort();
}

void let_go(size_t down_to) {
    Memory &m = memory();
    while (m.held_bytes > down_to) {
        Block block = m.held.front().second;
        m.held.pop_front();
        m.held_bytes -= block.bytes;
        if (!all(block.start + m.guard(), block.bytes, FREED)) overrun(block, "something wrote into freed");
        free(block.start);
    }
}

// Frees memory for good: when the call says so, or when its stream comes to it.
int release(Address address) {
    Memory &m = memory();
    auto found = m.blocks.find(address);
    if (found == m.blocks.end()) return INVALID_VALUE;
    Block block = found->second;
    m.blocks.erase(found);
    m.used[block.device] -= block.bytes;
    if (!all(block.start, m.guard(), FENCE)) overrun(block, "something wrote before the start of");
    if (!all((char *)address + block.bytes, m.guard(), FENCE)) overrun(block, "something wrote past the end of");
    memset((void *)address, FREED, block.bytes);
    if (m.sanitized) return free(block.start), SUCCESS;
    m.held.push_back({address, block});
    m.held_bytes += block.bytes;
    let_go(HELD_BYTES);
    return SUCCESS;
}

int allocate(Address *to, size_t bytes) {
    Memory &m = memory();
    int device = current()->device;
    // What streams have yet to free is used again before memory runs out.
    if (m.used[device] + bytes > m.limit) run_all(current());
    if (m.used[device] + bytes > m.limit) return OUT_OF_MEMORY;
    void *start = nullptr;
    if (posix_memalign(&start, 256, bytes + 2 * m.guard())) return OUT_OF_MEMORY;
    char *block = (char *)start + m.guard();
    memset(start, FENCE, bytes + 2 * m.guard());
    memset(block, FRESH, bytes);
    *to = (Address)block;
    m.blocks[*to] = {bytes, device, (char *)start, false};
    m.used[device] += bytes;
    cuemu_count("memory", 1);
    cuemu_count("bytes", (long)bytes);
    return SUCCESS;
}

// Marks memory as freed for whoever calls from now on.
int forget(Address address) {
    auto found = memory().blocks.find(address);
    if (found == memory().blocks.end() || found->second.freed) {
        complain("free of an address that is none of a live allocation");
        return INVALID_VALUE;
    }
    found->second.freed = true;
    cuemu_count("memory", -1);
    cuemu_count("bytes", -(long)found->second.bytes);
    return SUCCESS;
}

bool pinned(Address address, size_t bytes) {
    auto *block = around(memory().pinned, address);
    return block && address + bytes <= block->first + block->second;
}

} // namespace

bool inside(Address address, size_t bytes, const char *what) {
    auto *block = around(memory().blocks, address);
    bool ok = block && !block->second.freed && address + bytes <= block->first + block->second.bytes;
    if (!ok) complain("%s of %zu bytes outside live device memory", what, bytes);
    return ok;
}

bool cuemu_inside(Address address, size_t bytes) {
    Lock lock(state().lock);
    return inside(address, bytes, "an operand");
}

int still_there(Address address, size_t bytes, const char *what) {
    auto *block = around(memory().blocks, address);
    if (block && address + bytes <= block->first + block->second.bytes) return SUCCESS;
    complain("%s of %zu bytes ran after its device memory was freed", what, bytes);
    return ILLEGAL_ADDRESS;
}

// How much memory each device has, in bytes; 4 GiB at first.
FAKE_API void cuemu_set_memory(size_t bytes) {
    Lock lock(state().lock);
    memory().limit = bytes;
}

// --- Allocation -------------------------------------------------------------------------------------------------

API cuMemAlloc_v2(Address *to, size_t bytes) {
    ENTER();
    if (!bytes) return INVALID_VALUE;
    if (int error = forbidden_in_capture()) return error;
    return allocate(to, bytes);
}

API cuMemFree_v2(Address address) {
    LEAVE();
    if (!address) return SUCCESS;
    if (int error = forbidden_in_capture()) return error;
    run_all(current());
    if (int error = forget(address)) return error;
    return release(address);
}

// Stricter than CUDA, which makes nodes of it: no allocation inside a capture.
API cuMemAllocAsync(Address *to, size_t bytes, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!bytes) return INVALID_VALUE;
    if (int error = break_capture(*stream)) return error;
    return allocate(to, bytes);
}

API cuMemFreeAsync(Address address, void *handle) {
    LEAVE();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!address) return SUCCESS;
    if (int error = break_capture(*stream)) return error;
    if (int error = forget(address)) return error;
    return submit(stream, [address] { return release(address); });
}

API cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER();
    size_t used = memory().used[current()->device];
    *total = memory().limit;
    *free_bytes = used < *total ? *total - used : 0;
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t *bytes, int device) {
    ENTER(STARTED);
    if (device < 0 || (size_t)device >= state().devices.size()) return INVALID_DEVICE;
    *bytes = memory().limit;
    return SUCCESS;
}

API cuMemHostAlloc(void **to, size_t bytes, unsigned) {
    ENTER();
    if (!bytes) return INVALID_VALUE;
    if (int error = forbidden_in_capture()) return error;
    if (posix_memalign(to, 4096, bytes)) return OUT_OF_MEMORY;
    memset(*to, FRESH, bytes);
    memory().pinned[(Address)*to] = bytes;
    cuemu_count("host", 1);
    return SUCCESS;
}

API cuMemAllocHost_v2(void **to, size_t bytes) { return cuMemHostAlloc(to, bytes, 0); }

API cuMemFreeHost(void *address) {
    LEAVE();
    if (int error = forbidden_in_capture()) return error;
    auto found = memory().pinned.find((Address)address);
    if (found == memory().pinned.end()) return INVALID_VALUE;
    run_all(current());
    memset(address, FREED, found->second);
    memory().pinned.erase(found);
    free(address);
    cuemu_count("host", -1);
    return SUCCESS;
}

API cuPointerGetAttribute(void *value, int attribute, Address address) {
    ENTER();
    auto *block = around(memory().blocks, address);
    bool device = block && !block->second.freed && address < block->first + block->second.bytes;
    if (!device && !pinned(address, 1)) return INVALID_VALUE;
    switch (attribute) {
    case 2: *(unsigned *)value = device ? 2 : 1; return SUCCESS; // the kind of memory
    case 9: *(int *)value = device ? block->second.device : 0; return SUCCESS;
    case 11: *(Address *)value = device ? block->first : address; return SUCCESS;
    case 12: *(size_t *)value = device ? block->second.bytes : 0; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

// --- Pools ------------------------------------------------------------------------------------------------------

API cuDeviceGetDefaultMemPool(void **pool, int device) {
    ENTER(STARTED);
    if (device < 0 || (size_t)device >= state().devices.size()) return INVALID_DEVICE;
    *pool = &memory().pool_settings;
    return SUCCESS;
}

API cuDeviceGetMemPool(void **pool, int device) { return cuDeviceGetDefaultMemPool(pool, device); }

API cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    ENTER(STARTED);
    if (pool != &memory().pool_settings || attribute < 1 || attribute > 8) return INVALID_VALUE;
    memory().pool_settings[attribute] = attribute <= 3 ? *(int *)value : *(unsigned long long *)value;
    return SUCCESS;
}

API cuMemPoolGetAttribute(void *pool, int attribute, void *value) {
    ENTER(STARTED);
    if (pool != &memory().pool_settings || attribute < 1 || attribute > 8) return INVALID_VALUE;
    unsigned long long setting = memory().pool_settings[attribute];
    if (attribute <= 3) *(int *)value = (int)setting;
    else *(unsigned long long *)value = setting;
    return SUCCESS;
}

API cuMemPoolTrimTo(void *pool, size_t) {
    ENTER(STARTED);
    return pool == &memory().pool_settings ? SUCCESS : INVALID_VALUE;
}

// --- Copies -----------------------------------------------------------------------------------------------------

API cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!bytes) return SUCCESS;
    if (!inside(to, bytes, "cuMemcpyHtoD")) return INVALID_VALUE;
    Address source = (Address)from;
    bool is_pinned = pinned(source, bytes);
    // Pageable memory is read before the call returns; a graph reads it at every launch.
    std::shared_ptr<std::vector<char>> copy;
    if (!is_pinned && !stream->capture)
        copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    return submit(stream, [=] {
        if (int error = still_there(to, bytes, "cuMemcpyHtoD")) return error;
        if (is_pinned && !pinned(source, bytes)) {
            complain("cuMemcpyHtoD ran after its pinned memory was freed");
            return (int)ILLEGAL_ADDRESS;
        }
        memcpy((void *)to, copy ? copy->data() : (const void *)source, bytes);
        return (int)SUCCESS;
    });
}

API cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!bytes) return SUCCESS;
    if (!inside(from, bytes, "cuMemcpyDtoH")) return INVALID_VALUE;
    bool is_pinned = pinned((Address)to, bytes);
    int error = submit(stream, [=] {
        if (int error = still_there(from, bytes, "cuMemcpyDtoH")) return error;
        if (is_pinned && !pinned((Address)to, bytes)) {
            complain("cuMemcpyDtoH ran after its pinned memory was freed");
            return (int)ILLEGAL_ADDRESS;
        }
        memcpy(to, (void *)from, bytes);
        return (int)SUCCESS;
    });
    // To pageable memory the call returns when the copy is done.
    if (error || is_pinned || stream->capture) return error;
    run_until(stream, stream->queued);
    return stream->context->fault;
}

API cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!bytes) return SUCCESS;
    if (!inside(to, bytes, "cuMemcpyDtoD") || !inside(from, bytes, "cuMemcpyDtoD")) return INVALID_VALUE;
    if (to < from + bytes && from < to + bytes) complain("cuMemcpyDtoD between ranges that overlap");
    return submit(stream, [=] {
        if (int error = still_there(to, bytes, "cuMemcpyDtoD")) return error;
        if (int error = still_there(from, bytes, "cuMemcpyDtoD")) return error;
        memmove((void *)to, (void *)from, bytes);
        return (int)SUCCESS;
    });
}

// The calls that wait do so for the default stream alone: not for streams that were made non-blocking.
API cuMemcpyHtoD_v2(Address to, const void *from, size_t bytes) {
    {
        Lock lock(state().lock);
        if (!leave())
            if (int error = forbidden_in_capture()) return error;
    }
    if (int error = cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr)) return error;
    Lock lock(state().lock);
    auto &stream = current()->default_stream;
    run_until(stream, stream->queued);
    return current()->fault;
}

API cuMemcpyDtoH_v2(void *to, Address from, size_t bytes) {
    {
        Lock lock(state().lock);
        if (!leave())
            if (int error = forbidden_in_capture()) return error;
    }
    if (int error = cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr)) return error;
    Lock lock(state().lock);
    auto &stream = current()->default_stream;
    run_until(stream, stream->queued);
    return current()->fault;
}

API cuMemsetD8Async(Address to, unsigned char value, size_t count, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!count) return SUCCESS;
    if (!inside(to, count, "cuMemsetD8")) return INVALID_VALUE;
    return submit(stream, [=] {
        if (int error = still_there(to, count, "cuMemsetD8")) return error;
        memset((void *)to, value, count);
        return (int)SUCCESS;
    });
}

API cuMemsetD32Async(Address to, unsigned value, size_t count, void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!count) return SUCCESS;
    if (to % 4 || !inside(to, count * 4, "cuMemsetD32")) return INVALID_VALUE;
    return submit(stream, [=] {
        if (int error = still_there(to, count * 4, "cuMemsetD32")) return error;
        for (size_t i = 0; i < count; i++) ((unsigned *)to)[i] = value;
        return (int)SUCCESS;
    });
}
