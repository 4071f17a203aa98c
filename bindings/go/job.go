package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"context"
	"fmt"
	"image"
	"runtime"
	"time"
	"unsafe"
)

// Job is a generation that runs beside the program: for game loops and
// servers, which must not block. Any goroutine may use it.
type Job struct {
	handle   *handle
	turn     chan struct{} // holds one value: whoever takes it may use the C job
	count    int
	ctx      context.Context
	receiver *progressReceiver
}

// pollInterval is how often Wait looks. wst_job_wait would keep the job, which
// takes one call at a time, from Poll, and would hold a thread of the system.
const pollInterval = 2 * time.Millisecond

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
	var stop func() bool
	owner := newHandle("job", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
		stop()
		C.wst_job_free((*C.wst_job)(pointer)) // cancels and waits
		chosen.free()
		modelHandle.release()
	})
	stop = context.AfterFunc(ctx, func() { cancelJob(owner) })
	job := &Job{
		handle:   owner,
		turn:     make(chan struct{}, 1),
		count:    int(C.wst_generate_options_image_count(chosen.pointer)),
		ctx:      ctx,
		receiver: chosen.receiver,
	}
	job.turn <- struct{}{}
	runtime.AddCleanup(job, func(owner *handle) { go owner.close() }, owner)
	return job, nil
}

// cancelJob needs no turn: it may come at any time.
func cancelJob(owner *handle) {
	if pointer, err := owner.acquire(); err == nil {
		defer owner.release()
		C.wst_job_cancel((*C.wst_job)(pointer))
	}
}

// use lends the C job to one caller at a time.
func (j *Job) use(call func(job *C.wst_job) error) error {
	pointer, err := j.handle.acquire()
	runtime.KeepAlive(j)
	if err != nil {
		return err
	}
	defer j.handle.release()
	<-j.turn
	defer func() { j.turn <- struct{}{} }()
	return call((*C.wst_job)(pointer))
}

// Poll tells where the job stands and whether it is done, well or not. It never blocks.
func (j *Job) Poll() (Progress, bool, error) {
	var progress Progress
	var done C.int32_t
	err := j.use(func(job *C.wst_job) error {
		var source C.wst_progress
		source.struct_size = C.uint32_t(C.sizeof_wst_progress)
		var cError *C.wst_error
		if err := check(C.wst_job_poll(job, &source, &done, &cError), &cError); err != nil {
			return err
		}
		progress = goProgress(&source)
		return nil
	})
	return progress, done != 0, err
}

// Wait waits until the job is done, well or not. It returns the context's
// error if that ends first; the job then runs on.
func (j *Job) Wait(ctx context.Context) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		if _, done, err := j.Poll(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// Images returns the pictures of a job that is done, or why there are none.
// Before that it returns ErrBusy.
func (j *Job) Images() ([]image.Image, error) {
	images := make([]*C.wst_image, j.count)
	defer func() { freeImages(images) }()
	err := j.use(func(job *C.wst_job) error {
		var cError *C.wst_error
		return check(C.wst_job_images(job, unsafe.SliceData(images), C.size_t(len(images)), &cError), &cError)
	})
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

// Close cancels the job if it still runs, waits for it, and gives it back.
// Closing twice is allowed. The error is always nil: it is there for io.Closer.
func (j *Job) Close() error {
	j.handle.close()
	runtime.KeepAlive(j)
	return nil
}
