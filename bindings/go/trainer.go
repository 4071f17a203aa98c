package wuerstchen

// #include <stdint.h>
// #include <wuerstchen.h>
// extern int32_t wstGoSum(void *, size_t, int32_t, void *);
// static wst_status wst_go_set_reduce(wst_trainer *trainer, uint32_t rank, uint32_t ranks, uintptr_t handle, wst_error **error) {
//     return wst_trainer_set_reduce(trainer, rank, ranks, handle ? wstGoSum : NULL, (void *)handle, error);
// }
import "C"

import (
	"context"
	"fmt"
	"image"
	"io"
	"runtime"
	"runtime/cgo"
	"sync"
	"unsafe"
)

// Trainer trains one stage of a model. The model itself is not changed: Export
// writes another. One call uses a trainer at a time; others get ErrBusy.
type Trainer struct {
	handle *handle
	cancel *C.wst_cancel
	// What sums over ranks; read by steps, which hold stepping.
	reduce *reduction
	// Held by the step that the token belongs to.
	stepping *sync.Mutex
}

// TrainMetrics is what one step showed.
type TrainMetrics struct {
	// Step is its number, counted from 1.
	Step uint64
	// Skipped: the loss or a gradient was not finite, and nothing was changed.
	Skipped bool
	// Loss is that of the whole batch, over all ranks, before the update.
	Loss float32
	// GradNorm is the norm of all gradients together, before clipping.
	GradNorm float32
	// LearningRate is that of this step.
	LearningRate float32
	// TokenAccuracy is the share of tokens (Stage B) or of texts (a pair) that were found; 0 elsewhere.
	TokenAccuracy float32
}

// TrainProgress says where training stands.
type TrainProgress struct {
	// Step counts the steps, Skipped those that changed nothing.
	Step, Skipped uint64
	// Samples were seen by all ranks together.
	Samples uint64
}

// Reducer joins the processes that train one stage together. Each call puts in
// the place of each number its sum over all ranks, the same bits in each. All
// ranks make the same calls in the same order.
type Reducer interface {
	SumFloat32(values []float32) error
	SumFloat64(values []float64) error
}

// NewTrainer begins training a stage of a model, from its weights. Close the
// trainer when it is no longer needed.
func NewTrainer(model *Model, stage Stage, options ...TrainOption) (*Trainer, error) {
	base, err := model.acquire()
	if err != nil {
		return nil, err
	}
	trainer, err := newTrainer(model.handle, base, stage, options)
	if err != nil {
		model.handle.release()
		return nil, err
	}
	return trainer, nil
}

func newTrainer(model *handle, base *C.wst_model, stage Stage, options []TrainOption) (*Trainer, error) {
	chosen, err := newTrainOptions(stage, options)
	if err != nil {
		return nil, err
	}
	defer chosen.free()
	cancel := C.wst_cancel_new()
	if cancel == nil {
		return nil, &Error{Status: ErrOutOfMemory, Message: "no memory for a cancel token"}
	}
	var pointer *C.wst_trainer
	var cError *C.wst_error
	if err = chosen.setCancel(cancel); err == nil {
		err = check(C.wst_trainer_new(base, chosen.pointer, &pointer, &cError), &cError)
	}
	if err != nil {
		C.wst_cancel_free(cancel)
		return nil, err
	}
	reduce := &reduction{}
	// The model is lent for as long as the trainer lives: it may still log.
	owner := newHandle("trainer", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
		C.wst_trainer_free((*C.wst_trainer)(pointer))
		C.wst_cancel_free(cancel)
		reduce.replace(0, nil)
		model.release()
	})
	trainer := &Trainer{handle: owner, cancel: cancel, reduce: reduce, stepping: &sync.Mutex{}}
	runtime.AddCleanup(trainer, (*handle).close, owner)
	return trainer, nil
}

// acquire lends the C trainer until t.handle.release.
func (t *Trainer) acquire() (*C.wst_trainer, error) {
	pointer, err := t.handle.acquire()
	runtime.KeepAlive(t)
	return (*C.wst_trainer)(pointer), err
}

// call runs work on the C trainer.
func (t *Trainer) call(work func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status) error {
	trainer, err := t.acquire()
	if err != nil {
		return err
	}
	defer t.handle.release()
	var cError *C.wst_error
	return check(work(trainer, &cError), &cError)
}

// step runs one step, which is cancelled when the context ends.
func (t *Trainer) step(ctx context.Context, work func(trainer *C.wst_trainer, out *C.wst_train_metrics, cError **C.wst_error) C.wst_status) (TrainMetrics, error) {
	trainer, err := t.acquire()
	if err != nil {
		return TrainMetrics{}, err
	}
	defer t.handle.release()
	if !t.stepping.TryLock() {
		return TrainMetrics{}, &Error{Status: ErrBusy, Message: "trainer is in use by another call", Place: "trainer"}
	}
	defer t.stepping.Unlock()
	requested := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(requested)
		C.wst_cancel_request(t.cancel)
	})
	var out C.wst_train_metrics
	out.struct_size = C.uint32_t(C.sizeof_wst_train_metrics)
	var cError *C.wst_error
	err = check(work(trainer, &out, &cError), &cError)
	if !stop() {
		<-requested
		C.wst_cancel_reset(t.cancel)
	}
	if err = t.reduce.outcome(err); err != nil {
		return TrainMetrics{}, withContext(ctx, err)
	}
	return TrainMetrics{
		Step:          uint64(out.step),
		Skipped:       out.skipped != 0,
		Loss:          float32(out.loss),
		GradNorm:      float32(out.grad_norm),
		LearningRate:  float32(out.learning_rate),
		TokenAccuracy: float32(out.token_accuracy),
	}, nil
}

// lists calls work with pictures of one size and their captions as C takes them.
func lists(pictures []image.Image, captions []string, work func(images **C.wst_image, texts **C.char, count C.size_t) error) error {
	if len(pictures) != len(captions) {
		return argumentError("captions", fmt.Sprintf("%d, one per picture", len(pictures)), len(captions))
	}
	images, err := newImages("pictures", pictures)
	defer freeImages(images)
	if err != nil {
		return err
	}
	return withStrings("captions", captions, func(texts []*C.char) error {
		return work(unsafe.SliceData(images), unsafe.SliceData(texts), C.size_t(len(images)))
	})
}

// Step takes one step of the optimiser over pictures of one size and their
// captions. After an error nothing has changed.
func (t *Trainer) Step(ctx context.Context, pictures []image.Image, captions []string) (TrainMetrics, error) {
	var metrics TrainMetrics
	err := lists(pictures, captions, func(images **C.wst_image, texts **C.char, count C.size_t) (err error) {
		metrics, err = t.step(ctx, func(trainer *C.wst_trainer, out *C.wst_train_metrics, cError **C.wst_error) C.wst_status {
			return C.wst_trainer_step(trainer, images, texts, count, out, cError)
		})
		return err
	})
	return metrics, err
}

// StepBatch takes one step over a loader's batch. Follow says where the loader
// stands then.
func (t *Trainer) StepBatch(ctx context.Context, batch *Batch) (TrainMetrics, error) {
	lent, err := batch.acquire()
	if err != nil {
		return TrainMetrics{}, err
	}
	defer batch.handle.release()
	return t.step(ctx, func(trainer *C.wst_trainer, out *C.wst_train_metrics, cError **C.wst_error) C.wst_status {
		count := C.wst_batch_count(lent)
		return C.wst_trainer_step(trainer, C.wst_batch_images(lent), C.wst_batch_captions(lent), count, out, cError)
	})
}

// StepSamples takes one step over prepared samples, picked by their numbers;
// without any, over all.
func (t *Trainer) StepSamples(ctx context.Context, samples *Samples, indices ...int) (TrainMetrics, error) {
	lent, err := samples.acquire()
	if err != nil {
		return TrainMetrics{}, err
	}
	defer samples.handle.release()
	numbers := make([]C.size_t, 0, len(indices))
	for _, index := range indices {
		if index < 0 {
			return TrainMetrics{}, argumentError("indices", "numbers from 0", index)
		}
		numbers = append(numbers, C.size_t(index))
	}
	return t.step(ctx, func(trainer *C.wst_trainer, out *C.wst_train_metrics, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_step_samples(trainer, lent, unsafe.SliceData(numbers), C.size_t(len(numbers)), out, cError)
	})
}

// StepFrom takes one step over the loader's next batch; checkpoints then hold
// where the loader stands. After the last batch of a single pass it returns
// io.EOF.
func (t *Trainer) StepFrom(ctx context.Context, loader *Loader) (TrainMetrics, error) {
	lent, err := loader.acquire()
	if err != nil {
		return TrainMetrics{}, err
	}
	defer loader.handle.release()
	var end C.int32_t
	metrics, err := t.step(ctx, func(trainer *C.wst_trainer, out *C.wst_train_metrics, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_step_from(trainer, lent, out, &end, cError)
	})
	if err == nil && end != 0 {
		return TrainMetrics{}, io.EOF
	}
	return metrics, err
}

// Prepare makes of pictures of one size and their captions what stays the same
// from epoch to epoch, for StepSamples.
func (t *Trainer) Prepare(pictures []image.Image, captions []string) (*Samples, error) {
	var samples *Samples
	err := lists(pictures, captions, func(images **C.wst_image, texts **C.char, count C.size_t) (err error) {
		samples, err = t.prepare(images, texts, count)
		return err
	})
	return samples, err
}

// PrepareBatch is Prepare for a loader's batch.
func (t *Trainer) PrepareBatch(batch *Batch) (*Samples, error) {
	lent, err := batch.acquire()
	if err != nil {
		return nil, err
	}
	defer batch.handle.release()
	return t.prepare(C.wst_batch_images(lent), C.wst_batch_captions(lent), C.wst_batch_count(lent))
}

func (t *Trainer) prepare(images **C.wst_image, texts **C.char, count C.size_t) (*Samples, error) {
	var out *C.wst_samples
	err := t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_prepare(trainer, images, texts, count, &out, cError)
	})
	if err != nil {
		return nil, err
	}
	return newSamples(out), nil
}

// Recaption gives a sample another caption; its picture is not looked at again.
func (t *Trainer) Recaption(samples *Samples, index int, caption string) error {
	lent, err := samples.acquire()
	if err != nil {
		return err
	}
	defer samples.handle.release()
	if index < 0 {
		return argumentError("index", "a number from 0", index)
	}
	text, err := cString("caption", caption)
	if err != nil {
		return err
	}
	defer freeString(text)
	return t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_recaption(trainer, lent, C.size_t(index), text, cError)
	})
}

// SetReduce joins the other processes that train the same stage with the same
// options, each on its own part of every batch, before the first step. 1 of
// ranks is training alone again, and needs no reducer.
func (t *Trainer) SetReduce(rank, ranks int, reducer Reducer) error {
	cRank, err := cUint32("rank", rank)
	if err != nil {
		return err
	}
	cRanks, err := cUint32("ranks", ranks)
	if err != nil {
		return err
	}
	if reducer == nil && ranks > 1 {
		return argumentError("reducer", "one, to sum over ranks", "nil")
	}
	var receiver *sumReceiver
	var user cgo.Handle
	if reducer != nil {
		receiver = &sumReceiver{reducer: reducer}
		user = cgo.NewHandle(receiver)
	}
	err = t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		status := C.wst_go_set_reduce(trainer, cRank, cRanks, C.uintptr_t(user), cError)
		if status == C.WST_OK {
			t.reduce.replace(user, receiver)
		}
		return status
	})
	if err != nil && user != 0 {
		user.Delete()
	}
	return err
}

// Follow lets checkpoints hold where the loader stands now.
func (t *Trainer) Follow(loader *Loader) error {
	lent, err := loader.acquire()
	if err != nil {
		return err
	}
	defer loader.handle.release()
	return t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_follow(trainer, lent, cError)
	})
}

// Progress says where training stands.
func (t *Trainer) Progress() (TrainProgress, error) {
	var out C.wst_train_progress
	out.struct_size = C.uint32_t(C.sizeof_wst_train_progress)
	err := t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_progress(trainer, &out, cError)
	})
	return TrainProgress{Step: uint64(out.step), Skipped: uint64(out.skipped), Samples: uint64(out.samples)}, err
}

// Save writes a checkpoint: everything that the next step depends on. The
// folder is replaced as a whole; a crash leaves the old checkpoint or the new.
func (t *Trainer) Save(folder string) error {
	return t.withFolder(folder, func(trainer *C.wst_trainer, folder *C.char, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_save(trainer, folder, cError)
	})
}

// Load takes up a checkpoint of the same stage and model: with the same options
// and batches the steps that follow are those that would have followed then.
func (t *Trainer) Load(folder string) error {
	return t.withFolder(folder, func(trainer *C.wst_trainer, folder *C.char, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_load(trainer, folder, cError)
	})
}

// Export writes the model with the averaged weights of what was trained, as a
// folder for Open.
func (t *Trainer) Export(folder string) error {
	return t.withFolder(folder, func(trainer *C.wst_trainer, folder *C.char, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_export(trainer, folder, cError)
	})
}

// SaveAdapter writes the adapter that is trained with the setting "lora_rank",
// in diffusers' format, for WithLora and MergeAdapter.
func (t *Trainer) SaveAdapter(path string) error {
	return t.withFolder(path, func(trainer *C.wst_trainer, path *C.char, cError **C.wst_error) C.wst_status {
		return C.wst_trainer_save_adapter(trainer, path, cError)
	})
}

func (t *Trainer) withFolder(folder string, work func(*C.wst_trainer, *C.char, **C.wst_error) C.wst_status) error {
	text, err := cString("folder", folder)
	if err != nil {
		return err
	}
	defer freeString(text)
	return t.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return work(trainer, text, cError)
	})
}

// Close cancels a step that runs, and gives the trainer back when the calls
// that use it have returned. Closing twice is allowed. The error is always nil:
// it is there for io.Closer.
func (t *Trainer) Close() error {
	if _, err := t.acquire(); err == nil {
		C.wst_cancel_request(t.cancel)
		t.handle.release()
	}
	t.handle.close()
	runtime.KeepAlive(t)
	return nil
}

// reduction owns what sums over ranks, for as long as C may call it.
type reduction struct {
	mutex    sync.Mutex
	user     cgo.Handle
	receiver *sumReceiver
}

func (r *reduction) replace(user cgo.Handle, receiver *sumReceiver) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.user != 0 {
		r.user.Delete()
	}
	r.user, r.receiver = user, receiver
}

// outcome adds to a step's error what the reducer said, and panics on with
// whatever it panicked with.
func (r *reduction) outcome(err error) error {
	r.mutex.Lock()
	receiver := r.receiver
	r.mutex.Unlock()
	if err == nil || receiver == nil {
		return err
	}
	failure, panicked := receiver.take()
	if panicked != nil {
		panic(panicked)
	}
	if failure != nil {
		return fmt.Errorf("%w: %w", err, failure)
	}
	return err
}
