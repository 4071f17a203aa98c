// The objects of the fake driver, all behind one lock.
//
// Work is queued on its stream and runs only when somebody waits for it or asks after it, on that thread: what is
// used before it was waited for is then wrong every time.
#pragma once
#include "../fake.h"
#include "../module.h"
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#define API FAKE_API int

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    PRIMARY_CONTEXT_ACTIVE = 708,
    CONTEXT_IS_DESTROYED = 709,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_WRONG_THREAD = 908,
};

using Address = unsigned long long;
using Work = std::function<int()>;
struct Context;

struct Graph {
    std::vector<Work> work;
};

struct Stream;

// A capture under way: work goes to the graph instead of the stream.
struct Capture {
    std::shared_ptr<Graph> graph;
    Stream *origin;
    int mode; // 0 global, 1 of one thread, 2 relaxed
    std::thread::id thread;
    bool broken = false;
    // Streams that joined by waiting for an event: how much of the graph is theirs, and what of it was waited for.
    std::map<Stream *, size_t> used, joined;
};

struct Stream {
    Context *context;
    bool blocking; // waits for the default stream, and that for it
    std::deque<Work> queue;
    unsigned long long queued = 0, finished = 0;
    std::shared_ptr<Capture> capture;
};

struct Event {
    Context *context;
    bool timed;
    std::shared_ptr<Stream> stream; // null before it was recorded
    unsigned long long mark = 0;
    std::shared_ptr<double> milliseconds;
    std::weak_ptr<Capture> capture;
    bool captured = false;
    size_t captured_mark = 0;
};

struct Context {
    int device;
    int users = 0;
    int fault = 0; // sticky: what work that ran later than its call failed with
    std::shared_ptr<Stream> default_stream;
};

struct Module;

struct Function {
    Module *module;
    const CuemuKernel *kernel;
    int most_dynamic = 48 * 1024;
};

struct Module {
    Context *context;
    void *library;
    CuemuModule code;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

struct State {
    std::recursive_mutex lock;
    bool started = false;
    std::vector<std::unique_ptr<Context>> devices;
    std::unordered_map<void *, std::shared_ptr<Stream>> streams;
    std::unordered_map<void *, std::shared_ptr<Event>> events;
    std::unordered_map<void *, std::unique_ptr<Module>> modules;
    std::unordered_map<void *, Function *> functions;
    std::unordered_map<void *, std::shared_ptr<Graph>> graphs, executables;
    std::vector<std::shared_ptr<Capture>> captures;
};

// Never destroyed: a program may free its handles while it exits.
State &state();
using Lock = std::lock_guard<std::recursive_mutex>;

enum Needs { NOTHING, STARTED, CONTEXT };
// The first line of an entry point: an injected fault, what is missing, or a fault of the current context.
int enter(const char *name, Needs needs = CONTEXT);
// The same for calls that free something: no fault is injected there.
int leave(Needs needs = CONTEXT);
#define ENTER(...)                                                                                                     \
    Lock lock(state().lock);                                                                                           \
    if (int error = enter(__func__ __VA_OPT__(,) __VA_ARGS__)) return error
#define LEAVE(...)                                                                                                     \
    Lock lock(state().lock);                                                                                           \
    if (int error = leave(__VA_ARGS__)) return error

Context *current();
int device_attribute(int attribute);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
long environment(const char *name, long otherwise);

// --- Streams ----------------------------------------------------------------------------------------------------

// The stream of a handle, or null for one that is unknown or of another context than the current one.
std::shared_ptr<Stream> stream_of(void *handle);
// Puts work on a stream, or into the graph that it captures.
int submit(const std::shared_ptr<Stream> &stream, Work work);
// Runs a stream's work up to a mark.
void run_until(const std::shared_ptr<Stream> &stream, unsigned long long mark);
void run_all(Context *context);
// For an entry point that a capture under way forbids; marks the capture as broken.
int forbidden_in_capture();
int break_capture(Stream &stream);

// --- Memory -----------------------------------------------------------------------------------------------------

bool inside(Address address, size_t bytes, const char *what);
// The same when work runs, which may be after a free.
int still_there(Address address, size_t bytes, const char *what);

// --- Faults and counts ------------------------------------------------------------------------------------------

struct Order {
    int order;
    unsigned seed;
};
Order launch_order();
void count_launch();
