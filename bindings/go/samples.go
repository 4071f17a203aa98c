package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"runtime"
	"unsafe"
)

// Samples are pictures and captions as a trainer prepared them: whatever stays
// the same from epoch to epoch. Any goroutine may use them.
type Samples struct {
	handle *handle
}

func newSamples(pointer *C.wst_samples) *Samples {
	samples := &Samples{handle: newHandle("samples", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
		C.wst_samples_free((*C.wst_samples)(pointer))
	})}
	runtime.AddCleanup(samples, (*handle).close, samples.handle)
	return samples
}

// acquire lends the C samples until s.handle.release.
func (s *Samples) acquire() (*C.wst_samples, error) {
	if s == nil {
		return nil, argumentError("samples", "samples", "nil")
	}
	pointer, err := s.handle.acquire()
	runtime.KeepAlive(s)
	return (*C.wst_samples)(pointer), err
}

// Len is how many samples there are; 0 after Close.
func (s *Samples) Len() int {
	samples, err := s.acquire()
	if err != nil {
		return 0
	}
	defer s.handle.release()
	return int(C.wst_samples_count(samples))
}

// Append adds the samples of another list at the end. The two share them.
func (s *Samples) Append(from *Samples) error {
	to, err := s.acquire()
	if err != nil {
		return err
	}
	defer s.handle.release()
	added, err := from.acquire()
	if err != nil {
		return err
	}
	defer from.handle.release()
	var cError *C.wst_error
	return check(C.wst_samples_append(to, added, &cError), &cError)
}

// Close gives the samples back; calls that are running finish first. Closing
// twice is allowed. The error is always nil: it is there for io.Closer.
func (s *Samples) Close() error {
	s.handle.close()
	runtime.KeepAlive(s)
	return nil
}
