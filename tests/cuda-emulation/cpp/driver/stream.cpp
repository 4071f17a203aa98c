// Streams, events, and when work runs.
#include "state.h"
#include <chrono>

namespace {

void run_one(Stream &stream) {
    Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    if (!stream.context->fault)
        if (int error = work()) stream.context->fault = error;
    stream.finished++;
}

std::shared_ptr<Event> event_of(void *handle) {
    auto found = state().events.find(handle);
    return found == state().events.end() ? nullptr : found->second;
}

// The default stream waits for the blocking ones and they for it.
void order_with_default(const std::shared_ptr<Stream> &stream) {
    auto wait = [&](const std::shared_ptr<Stream> &other) {
        if (other == stream || other->finished == other->queued) return;
        unsigned long long mark = other->queued;
        stream->queue.push_back([other, mark] { return run_until(other, mark), SUCCESS; });
        stream->queued++;
    };
    if (stream->blocking) wait(stream->context->default_stream);
    if (stream != stream->context->default_stream) return;
    for (auto &[handle, other] : state().streams)
        if (other->blocking && other->context == stream->context) wait(other);
}

double now() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

} // namespace

std::shared_ptr<Stream> stream_of(void *handle) {
    if (!handle || handle == (void *)1) return current()->default_stream;
    auto found = state().streams.find(handle);
    if (found == state().streams.end() || found->second->context != current()) {
        complain("a stream that does not exist, or of another context");
        return nullptr;
    }
    return found->second;
}

void run_until(const std::shared_ptr<Stream> &stream, unsigned long long mark) {
    while (stream->finished < mark && !stream->queue.empty()) run_one(*stream);
}

void run_all(Context *context) {
    std::vector<std::shared_ptr<Stream>> streams{context->default_stream};
    for (auto &[handle, stream] : state().streams)
        if (stream->context == context) streams.push_back(stream);
    for (auto &stream : streams)
        if (stream) run_until(stream, stream->queued);
}

int submit(const std::shared_ptr<Stream> &stream, Work work) {
    if (auto &capture = stream->capture) {
        if (capture->broken) return CAPTURE_INVALIDATED;
        capture->graph->work.push_back(std::move(work));
        capture->used[stream.get()] = capture->graph->work.size();
        return SUCCESS;
    }
    order_with_default(stream);
    stream->queue.push_back(std::move(work));
    stream->queued++;
    static const bool eager = environment("CUEMU_EAGER", 0);
    if (eager) run_until(stream, stream->queued);
    return SUCCESS;
}

int break_capture(Stream &stream) {
    if (!stream.capture) return SUCCESS;
    stream.capture->broken = true;
    return CAPTURE_UNSUPPORTED;
}

int forbidden_in_capture() {
    int error = SUCCESS;
    for (auto &capture : state().captures) {
        bool concerned = capture->mode == 0 || (capture->mode == 1 && capture->thread == std::this_thread::get_id());
        if (!concerned) continue;
        capture->broken = true;
        error = CAPTURE_UNSUPPORTED;
    }
    return error;
}

// --- Streams ----------------------------------------------------------------------------------------------------

API cuStreamCreate(void **handle, unsigned flags) {
    ENTER();
    if (flags > 1) return INVALID_VALUE;
    auto stream = std::make_shared<Stream>();
    stream->context = current();
    stream->blocking = !(flags & 1);
    *handle = stream.get();
    state().streams[*handle] = stream;
    cuemu_count("stream", 1);
    return SUCCESS;
}

API cuStreamCreateWithPriority(void **handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

API cuStreamDestroy_v2(void *handle) {
    LEAVE();
    auto stream = handle ? stream_of(handle) : nullptr;
    if (!stream || stream == current()->default_stream) return INVALID_HANDLE;
    break_capture(*stream);
    run_until(stream, stream->queued);
    state().streams.erase(handle);
    cuemu_count("stream", -1);
    return SUCCESS;
}

API cuStreamSynchronize(void *handle) {
    std::shared_ptr<Stream> stream;
    unsigned long long mark;
    {
        ENTER();
        stream = stream_of(handle);
        if (!stream) return INVALID_HANDLE;
        if (int error = break_capture(*stream)) return error;
        order_with_default(stream);
        mark = stream->queued;
    }
    // The lock is given up between two pieces of work, for threads that use other streams.
    for (;;) {
        Lock lock(state().lock);
        if (stream->finished >= mark) return stream->context->fault;
        run_one(*stream);
    }
}

// Runs one piece of work for each time that it is asked: "not ready" is seen as often as on a device.
API cuStreamQuery(void *handle) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (int error = break_capture(*stream)) return error;
    if (int error = forbidden_in_capture()) return error;
    if (stream->queue.empty()) return SUCCESS;
    run_one(*stream);
    return stream->context->fault ? stream->context->fault : NOT_READY;
}

API cuStreamGetCtx(void *handle, Context **context) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *context = stream->context;
    return SUCCESS;
}

API cuStreamWaitEvent(void *handle, void *event_handle, unsigned) {
    ENTER();
    auto stream = stream_of(handle);
    auto event = event_of(event_handle);
    if (!stream || !event) return INVALID_HANDLE;
    if (event->captured) {
        auto capture = event->capture.lock();
        if (!capture) return CAPTURE_ISOLATION;
        if (stream->capture && stream->capture != capture) return CAPTURE_ISOLATION;
        stream->capture = capture;
        for (auto &[other, used] : capture->used)
            if (other == event->stream.get()) capture->joined[other] = event->captured_mark;
        return SUCCESS;
    }
    if (stream->capture) {
        if (!event->stream) return SUCCESS;
        stream->capture->broken = true;
        return CAPTURE_ISOLATION;
    }
    if (!event->stream) return SUCCESS;
    auto other = event->stream;
    unsigned long long mark = event->mark;
    return submit(stream, [other, mark] { return run_until(other, mark), SUCCESS; });
}

// --- Events -----------------------------------------------------------------------------------------------------

API cuEventCreate(void **handle, unsigned flags) {
    ENTER();
    auto event = std::make_shared<Event>();
    event->context = current();
    event->timed = !(flags & 2);
    *handle = event.get();
    state().events[*handle] = event;
    cuemu_count("event", 1);
    return SUCCESS;
}

API cuEventDestroy_v2(void *handle) {
    LEAVE();
    if (!state().events.erase(handle)) return INVALID_HANDLE;
    cuemu_count("event", -1);
    return SUCCESS;
}

API cuEventRecord(void *handle, void *stream_handle) {
    ENTER();
    auto event = event_of(handle);
    auto stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (event->context != stream->context) return INVALID_HANDLE;
    event->stream = stream;
    event->captured = stream->capture != nullptr;
    event->capture = stream->capture;
    if (stream->capture) {
        event->captured_mark = stream->capture->graph->work.size();
        return stream->capture->broken ? CAPTURE_INVALIDATED : SUCCESS;
    }
    auto time = event->milliseconds = std::make_shared<double>(0);
    int error = submit(stream, [time] { return *time = now(), SUCCESS; });
    event->mark = stream->queued;
    return error;
}

API cuEventSynchronize(void *handle) {
    std::shared_ptr<Event> event;
    {
        ENTER();
        event = event_of(handle);
        if (!event) return INVALID_HANDLE;
        if (event->captured) return CAPTURE_UNSUPPORTED;
        if (!event->stream) return SUCCESS;
    }
    for (;;) {
        Lock lock(state().lock);
        if (event->stream->finished >= event->mark) return event->context->fault;
        run_one(*event->stream);
    }
}

API cuEventQuery(void *handle) {
    ENTER();
    auto event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    if (event->captured) return CAPTURE_UNSUPPORTED;
    if (int error = forbidden_in_capture()) return error;
    if (!event->stream || event->stream->finished >= event->mark) return SUCCESS;
    run_one(*event->stream);
    return event->context->fault ? event->context->fault : NOT_READY;
}

API cuEventElapsedTime(float *milliseconds, void *from, void *to) {
    ENTER();
    auto a = event_of(from), b = event_of(to);
    if (!a || !b || !a->timed || !b->timed || !a->stream || !b->stream || a->captured || b->captured)
        return INVALID_HANDLE;
    if (a->stream->finished < a->mark || b->stream->finished < b->mark) return NOT_READY;
    *milliseconds = (float)(*b->milliseconds - *a->milliseconds);
    return SUCCESS;
}

API cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) {
    return cuEventElapsedTime(milliseconds, from, to);
}

// --- Work of the other libraries --------------------------------------------------------------------------------

int cuemu_enqueue(void *handle, int (*run)(void *), void (*drop)(void *), void *data) {
    Lock lock(state().lock);
    std::shared_ptr<void> kept(data, drop);
    if (int error = leave()) return error;
    if (int fault = current()->fault) return fault;
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    return submit(stream, [run, kept] { return run(kept.get()); });
}
