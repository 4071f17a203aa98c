package wuerstchen

// #include <stdint.h>
// #include <wuerstchen.h>
// typedef const wst_progress wst_go_progress;
// typedef const char wst_go_text;
import "C"

import (
	"runtime/cgo"
	"sync"
	"sync/atomic"
	"unsafe"
)

// progressReceiver is what a progress callback finds behind its user data.
type progressReceiver struct {
	receive func(Progress)
	cancel  func()
	running atomic.Bool

	mutex    sync.Mutex
	panicked any
}

func (r *progressReceiver) panicValue() any {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.panicked
}

// wstGoProgress runs on the thread that generates. A panic must not cross C: it
// is kept, the work is cancelled, and whoever collects the result hears of it.
//
//export wstGoProgress
func wstGoProgress(progress *C.wst_go_progress, userData unsafe.Pointer) {
	receiver, ok := handleOf(userData).Value().(*progressReceiver)
	if !ok || receiver.panicValue() != nil {
		return
	}
	receiver.running.Store(true)
	defer func() {
		receiver.running.Store(false)
		if value := recover(); value != nil {
			receiver.mutex.Lock()
			receiver.panicked = value
			receiver.mutex.Unlock()
			receiver.cancel()
		}
	}()
	receiver.receive(goProgress((*C.wst_progress)(progress)))
}

// wstGoLog may run on any thread of the library.
//
//export wstGoLog
func wstGoLog(level C.int32_t, message *C.wst_go_text, userData unsafe.Pointer) {
	receive, ok := handleOf(userData).Value().(func(LogLevel, string))
	if !ok {
		return
	}
	defer func() { _ = recover() }() // A log line is not worth the process.
	receive(LogLevel(level), C.GoString((*C.char)(message)))
}

// sumReceiver is what a sum over ranks finds behind its user data.
type sumReceiver struct {
	reducer Reducer

	mutex    sync.Mutex
	failed   error
	panicked any
}

// take returns what the reducer failed or panicked with, once.
func (r *sumReceiver) take() (error, any) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	failed, panicked := r.failed, r.panicked
	r.failed, r.panicked = nil, nil
	return failed, panicked
}

func (r *sumReceiver) keep(failed error, panicked any) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.failed, r.panicked = failed, panicked
}

// wstGoSum runs on the thread that steps. An error or a panic ends the step,
// which returns it.
//
//export wstGoSum
func wstGoSum(values unsafe.Pointer, count C.size_t, isDouble C.int32_t, userData unsafe.Pointer) (failed C.int32_t) {
	receiver, ok := handleOf(userData).Value().(*sumReceiver)
	if !ok {
		return 1
	}
	defer func() {
		if value := recover(); value != nil {
			receiver.keep(nil, value)
			failed = 1
		}
	}()
	var err error
	if isDouble != 0 {
		err = receiver.reducer.SumFloat64(unsafe.Slice((*float64)(values), int(count)))
	} else {
		err = receiver.reducer.SumFloat32(unsafe.Slice((*float32)(values), int(count)))
	}
	if err != nil {
		receiver.keep(err, nil)
		return 1
	}
	return 0
}

// handleOf reads the cgo.Handle that user data is: its value, not its address.
func handleOf(userData unsafe.Pointer) cgo.Handle {
	return cgo.Handle(uintptr(userData))
}
