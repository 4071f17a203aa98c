package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"context"
	"fmt"
	"image"
	"runtime"
	"sync"
	"time"
	"unsafe"
)

// Job is a generation that runs beside the program: for game loops and
// servers, which must not block. Any goroutine may use it.
type Job struct {
	handle   *handle
	polling  sync.Mutex // wst_job_poll takes one call at a time
	count    int
	ctx      context.Context
	receiver *progressReceiver
	freed    chan struct{}
}

// waitSlice is how long Wait stays in C before it looks at its context.
const waitSlice = 20 * time.Millisecond

// StartJob starts making pictures and returns at once. When the context ends
// the job is cancelled. Close the job when its pictures were taken.
func (m *Model) StartJob(ctx context.Context, prompt string, options ...GenerateOption) (*Job, error) {
	model, err := m.acquire()
	if err != nil {
		return nil, err
	}
	chosen, err := newGenerateOptions(model, promptFirst(prompt, options))
	if err != nil {
		m.handle.release()
		return nil, err
	}
	var pointer *C.wst_job
	var cError *C.wst_error
	if err := check(C.wst_job_start(model, chosen.pointer, &pointer, &cError), &cError); err != nil {
		chosen.free()
		m.handle.release()
		return nil, err
	}

	// The model is lent for as long as the job lives: its threads may still log.
	modelHandle := m.handle
	freed := make(chan struct{})
	var stop func() bool
	free := func(pointer unsafe.Pointer) {
		stop()
		C.wst_job_free((*C.wst_job)(pointer)) // cancels and waits
		chosen.free()
		modelHandle.release()
		close(freed)
	}
	// On a thread of its own, for whoever closes the job may be its progress
	// receiver, or the garbage collector, neither of which may wait for it.
	owner := newHandle("job", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) { go free(pointer) })
	stop = context.AfterFunc(ctx, func() { cancelJob(owner) })
	job := &Job{
		handle:   owner,
		count:    int(C.wst_generate_options_image_count(chosen.pointer)),
		ctx:      ctx,
		receiver: chosen.receiver,
		freed:    freed,
	}
	runtime.AddCleanup(job, (*handle).close, owner)
	return job, nil
}

// cancelJob may come at any time.
func cancelJob(owner *handle) {
	if pointer, err := owner.acquire(); err == nil {
		defer owner.release()
		C.wst_job_cancel((*C.wst_job)(pointer))
	}
}

// acquire lends the C job until j.handle.release.
func (j *Job) acquire() (*C.wst_job, error) {
	pointer, err := j.handle.acquire()
	runtime.KeepAlive(j)
	return (*C.wst_job)(pointer), err
}

// Poll tells where the job stands and whether it is done, well or not. It never blocks.
func (j *Job) Poll() (Progress, bool, error) {
	job, err := j.acquire()
	if err != nil {
		return Progress{}, false, err
	}
	defer j.handle.release()
	j.polling.Lock()
	defer j.polling.Unlock()
	var source C.wst_progress
	source.struct_size = C.uint32_t(C.sizeof_wst_progress)
	var done C.int32_t
	var cError *C.wst_error
	if err := check(C.wst_job_poll(job, &source, &done, &cError), &cError); err != nil {
		return Progress{}, false, err
	}
	return goProgress(&source), done != 0, nil
}

// Wait waits until the job is done, well or not. It returns the context's
// error if that ends first; the job then runs on.
func (j *Job) Wait(ctx context.Context) error {
	for {
		done, err := j.waitFor(waitSlice)
		if done || err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

func (j *Job) waitFor(timeout time.Duration) (bool, error) {
	job, err := j.acquire()
	if err != nil {
		return false, err
	}
	defer j.handle.release()
	var done C.int32_t
	var cError *C.wst_error
	err = check(C.wst_job_wait(job, C.double(timeout.Seconds()), &done, &cError), &cError)
	return done != 0, err
}

// Images returns the pictures of a job that is done, or why there are none.
// Before that it returns ErrBusy.
func (j *Job) Images() ([]image.Image, error) {
	job, err := j.acquire()
	if err != nil {
		return nil, err
	}
	defer j.handle.release()
	images := make([]*C.wst_image, j.count)
	defer func() { freeImages(images) }()
	var cError *C.wst_error
	err = check(C.wst_job_images(job, unsafe.SliceData(images), C.size_t(len(images)), &cError), &cError)
	if j.receiver != nil {
		if value := j.receiver.panicValue(); value != nil {
			return nil, fmt.Errorf("wuerstchen: the progress receiver panicked: %v", value)
		}
	}
	if err != nil {
		return nil, withContext(j.ctx, err)
	}
	return goImages(images), nil
}

// Cancel asks the job to stop and does not wait for it.
func (j *Job) Cancel() {
	cancelJob(j.handle)
	runtime.KeepAlive(j)
}

// Close cancels the job if it still runs, and gives it back when the calls
// that use it have returned. It waits for that, unless the progress receiver
// is just running: that may be the caller. Closing twice is allowed. The error
// is always nil: it is there for io.Closer.
func (j *Job) Close() error {
	j.Cancel()
	j.handle.close()
	runtime.KeepAlive(j)
	if j.receiver == nil || !j.receiver.running.Load() {
		<-j.freed
	}
	return nil
}
