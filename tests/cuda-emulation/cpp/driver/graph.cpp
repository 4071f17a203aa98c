// Capture of a stream into a graph, and replay.
#include "state.h"
#include <algorithm>

namespace {
std::shared_ptr<Graph> find(std::unordered_map<void *, std::shared_ptr<Graph>> &in, void *handle) {
    auto found = in.find(handle);
    return found == in.end() ? nullptr : found->second;
}

// Whether all that joined streams did was waited for again.
bool joined(const Capture &capture) {
    for (auto &[stream, used] : capture.used) {
        if (stream == capture.origin) continue;
        auto found = capture.joined.find(stream);
        if (found == capture.joined.end() || found->second < used) return false;
    }
    return true;
}

void finish(const std::shared_ptr<Capture> &capture) {
    for (auto &[handle, stream] : state().streams)
        if (stream->capture == capture) stream->capture = nullptr;
    auto &captures = state().captures;
    captures.erase(std::remove(captures.begin(), captures.end(), capture), captures.end());
}
} // namespace

API cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream == current()->default_stream) return CAPTURE_UNSUPPORTED;
    if (stream->capture || mode < 0 || mode > 2) return INVALID_VALUE;
    auto capture = std::make_shared<Capture>();
    capture->graph = std::make_shared<Graph>();
    capture->origin = stream.get();
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    stream->capture = capture;
    state().captures.push_back(capture);
    return SUCCESS;
}

API cuStreamEndCapture(void *handle, void **graph) {
    Lock lock(state().lock);
    *graph = nullptr;
    // A fault that is injected here ends the capture too, as every failure of this call does.
    int injected = cuemu_enter(__func__);
    if (int error = leave()) return error;
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    auto capture = stream->capture;
    if (!capture) return INVALID_VALUE;
    if (capture->origin != stream.get()) return CAPTURE_UNMATCHED;
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    finish(capture);
    if (injected) return injected;
    if (capture->broken) return CAPTURE_INVALIDATED;
    if (!joined(*capture)) return CAPTURE_UNJOINED;
    *graph = capture->graph.get();
    state().graphs[*graph] = capture->graph;
    cuemu_count("graph", 1);
    return SUCCESS;
}

API cuStreamIsCapturing(void *handle, int *status) {
    ENTER();
    auto stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->broken ? 2 : 1;
    return SUCCESS;
}

API cuGraphGetNodes(void *handle, void **, size_t *count) {
    ENTER();
    auto graph = find(state().graphs, handle);
    if (!graph) return INVALID_HANDLE;
    *count = graph->work.size();
    return SUCCESS;
}

API cuGraphInstantiateWithFlags(void **executable, void *handle, unsigned long long) {
    ENTER();
    auto graph = find(state().graphs, handle);
    if (!graph) return INVALID_HANDLE;
    auto copy = std::make_shared<Graph>(*graph);
    cuemu_count("graph", 1);
    *executable = copy.get();
    state().executables[*executable] = copy;
    return SUCCESS;
}

API cuGraphUpload(void *executable, void *handle) {
    ENTER();
    return find(state().executables, executable) && stream_of(handle) ? SUCCESS : INVALID_HANDLE;
}

API cuGraphLaunch(void *executable, void *handle) {
    ENTER();
    auto graph = find(state().executables, executable);
    auto stream = stream_of(handle);
    if (!graph || !stream) return INVALID_HANDLE;
    return submit(stream, [graph] {
        for (auto &work : graph->work)
            if (int error = work()) return error;
        return (int)SUCCESS;
    });
}

API cuGraphExecDestroy(void *executable) {
    LEAVE();
    if (!state().executables.erase(executable)) return INVALID_HANDLE;
    cuemu_count("graph", -1);
    return SUCCESS;
}

API cuGraphDestroy(void *graph) {
    LEAVE();
    if (!state().graphs.erase(graph)) return INVALID_HANDLE;
    cuemu_count("graph", -1);
    return SUCCESS;
}
