package wuerstchen

import (
	"fmt"
	"sync"
	"unsafe"
)

// handle owns one C object. It may be closed at any time: the object is freed
// when the last call that uses it has returned.
type handle struct {
	noun string
	free func(unsafe.Pointer)

	mutex   sync.Mutex
	pointer unsafe.Pointer
	users   int
	closed  bool
}

func newHandle(noun string, pointer unsafe.Pointer, free func(unsafe.Pointer)) *handle {
	return &handle{noun: noun, free: free, pointer: pointer}
}

// acquire lends the object until release.
func (h *handle) acquire() (unsafe.Pointer, error) {
	h.mutex.Lock()
	defer h.mutex.Unlock()
	if h.closed {
		return nil, fmt.Errorf("%s: %w", h.noun, ErrClosed)
	}
	h.users++
	return h.pointer, nil
}

func (h *handle) release() {
	h.mutex.Lock()
	h.users--
	h.freeIfUnused()
}

// close lets no further call in. It does not wait for those that are running.
func (h *handle) close() {
	h.mutex.Lock()
	h.closed = true
	h.freeIfUnused()
}

// freeIfUnused unlocks the mutex before it frees: freeing may wait for a thread.
func (h *handle) freeIfUnused() {
	pointer := h.pointer
	if !h.closed || h.users > 0 || pointer == nil {
		h.mutex.Unlock()
		return
	}
	h.pointer = nil
	h.mutex.Unlock()
	h.free(pointer)
}
