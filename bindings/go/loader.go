package wuerstchen

// #include <stdint.h>
// #include <wuerstchen.h>
// typedef const char wst_go_text;
// extern void wstGoLog(int32_t, wst_go_text *, void *);
// static wst_status wst_go_set_skip_log(wst_loader_options *options, uintptr_t handle, wst_error **error) {
//     return wst_loader_options_set_log(options, wstGoLog, (void *)handle, error);
// }
import "C"

import (
	"image"
	"io"
	"runtime"
	"runtime/cgo"
	"unsafe"
)

// Loader gives batches of pictures with captions, decoded ahead, in an order
// that is taken up again to the bit. One call uses it at a time; others get
// ErrBusy.
type Loader struct {
	handle *handle
}

// LoaderOption chooses what a loader gives, and how.
type LoaderOption func(*loaderOptions) error

type loaderOptions struct {
	pointer *C.wst_loader_options
	log     cgo.Handle
}

// WithPaths adds paths of the same kind as the first: folders or shards.
func WithPaths(paths ...string) LoaderOption {
	return func(o *loaderOptions) error {
		for _, path := range paths {
			text, err := cString("path", path)
			if err != nil {
				return err
			}
			var cError *C.wst_error
			err = check(C.wst_loader_options_add_path(o.pointer, text, &cError), &cError)
			freeString(text)
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// WithSide chooses the side of the pictures in pixels; each is resized and cut
// to a square.
func WithSide(side int) LoaderOption {
	return func(o *loaderOptions) error {
		pixels, err := cUint32("side", side)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_loader_options_set_side(o.pointer, pixels, &cError), &cError)
	}
}

// Crop is which square of a picture is kept.
type Crop int32

// The crops.
const (
	// CropCentre keeps the middle.
	CropCentre Crop = C.WST_CROP_CENTRE
	// CropRandom keeps any, each as likely.
	CropRandom Crop = C.WST_CROP_RANDOM
)

// WithCrop chooses which square of a picture is kept.
func WithCrop(crop Crop) LoaderOption {
	return func(o *loaderOptions) error {
		var cError *C.wst_error
		return check(C.wst_loader_options_set_crop(o.pointer, C.wst_crop(crop), &cError), &cError)
	}
}

// WithFlip chooses how likely a picture is mirrored, left to right.
func WithFlip(probability float32) LoaderOption {
	return func(o *loaderOptions) error {
		var cError *C.wst_error
		return check(C.wst_loader_options_set_flip(o.pointer, C.float(probability), &cError), &cError)
	}
}

// WithBatchSize chooses how many pictures a batch has.
func WithBatchSize(pictures int) LoaderOption {
	return func(o *loaderOptions) error {
		count, err := cUint32("batch_size", pictures)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_loader_options_set_batch_size(o.pointer, count, &cError), &cError)
	}
}

// WithShuffle chooses how many records of shards are put into an order of
// chance together; 0 keeps everything in its own order. Folders are shuffled as
// a whole.
func WithShuffle(buffer int) LoaderOption {
	return func(o *loaderOptions) error {
		records, err := cUint32("shuffle", buffer)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_loader_options_set_shuffle(o.pointer, records, &cError), &cError)
	}
}

// WithDataSeed chooses what order, crops and flips follow from. It is the same
// for all ranks.
func WithDataSeed(seed uint64) LoaderOption {
	return func(o *loaderOptions) error {
		var cError *C.wst_error
		return check(C.wst_loader_options_set_seed(o.pointer, C.uint64_t(seed), &cError), &cError)
	}
}

// Passes is how often the data are gone through.
type Passes int32

// The passes.
const (
	// PassesOne ends after the last record; the last batch may be smaller.
	PassesOne Passes = C.WST_PASSES_ONE
	// PassesEndless begins again and again; batches are always full.
	PassesEndless Passes = C.WST_PASSES_ENDLESS
)

// WithPasses chooses how often the data are gone through.
func WithPasses(passes Passes) LoaderOption {
	return func(o *loaderOptions) error {
		var cError *C.wst_error
		return check(C.wst_loader_options_set_passes(o.pointer, C.wst_passes(passes), &cError), &cError)
	}
}

// WithLoaderThreads chooses how many threads read and decode.
func WithLoaderThreads(count int) LoaderOption {
	return func(o *loaderOptions) error {
		threads, err := cUint32("threads", count)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_loader_options_set_threads(o.pointer, threads, &cError), &cError)
	}
}

// WithRank takes a share of the records, for training in several processes.
func WithRank(rank, ranks int) LoaderOption {
	return func(o *loaderOptions) error {
		cRank, err := cUint32("rank", rank)
		if err != nil {
			return err
		}
		cRanks, err := cUint32("ranks", ranks)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_loader_options_set_rank(o.pointer, cRank, cRanks, &cError), &cError)
	}
}

// WithSkipLog tells receive of every record that is skipped and why.
func WithSkipLog(receive func(message string)) LoaderOption {
	return func(o *loaderOptions) error {
		if receive == nil {
			return argumentError("receive", "a function", "nil")
		}
		if o.log != 0 {
			o.log.Delete()
		}
		o.log = cgo.NewHandle(func(_ LogLevel, message string) { receive(message) })
		var cError *C.wst_error
		return check(C.wst_go_set_skip_log(o.pointer, C.uintptr_t(o.log), &cError), &cError)
	}
}

// WithLoaderSetting sets an option by its name, as configuration files do.
func WithLoaderSetting(key, value string) LoaderOption {
	return func(o *loaderOptions) error {
		return setByName(key, value, func(key, value *C.char) error {
			var cError *C.wst_error
			return check(C.wst_loader_options_set(o.pointer, key, value, &cError), &cError)
		})
	}
}

// OpenLoader opens a data set and starts decoding: a folder of pictures with
// captions, or WebDataset shards. Close the loader when it is no longer needed.
func OpenLoader(path string, options ...LoaderOption) (*Loader, error) {
	cPath, err := cString("path", path)
	if err != nil {
		return nil, err
	}
	defer freeString(cPath)
	var chosen loaderOptions
	var cError *C.wst_error
	if err := check(C.wst_loader_options_new(cPath, &chosen.pointer, &cError), &cError); err != nil {
		return nil, err
	}
	defer C.wst_loader_options_free(chosen.pointer)
	for _, option := range options {
		if err = option(&chosen); err != nil {
			break
		}
	}
	var pointer *C.wst_loader
	if err == nil {
		err = check(C.wst_loader_open(chosen.pointer, &pointer, &cError), &cError)
	}
	log := chosen.log
	if err != nil {
		if log != 0 {
			log.Delete()
		}
		return nil, err
	}
	loader := &Loader{handle: newHandle("loader", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
		C.wst_loader_free((*C.wst_loader)(pointer))
		if log != 0 {
			log.Delete()
		}
	})}
	runtime.AddCleanup(loader, (*handle).close, loader.handle)
	return loader, nil
}

// acquire lends the C loader until l.handle.release.
func (l *Loader) acquire() (*C.wst_loader, error) {
	if l == nil {
		return nil, argumentError("loader", "a loader", "nil")
	}
	pointer, err := l.handle.acquire()
	runtime.KeepAlive(l)
	return (*C.wst_loader)(pointer), err
}

// Next returns the next batch; io.EOF after the last one of a single pass.
// Close the batch when it is no longer needed.
func (l *Loader) Next() (*Batch, error) {
	loader, err := l.acquire()
	if err != nil {
		return nil, err
	}
	defer l.handle.release()
	var out *C.wst_batch
	var cError *C.wst_error
	if err := check(C.wst_loader_next(loader, &out, &cError), &cError); err != nil {
		return nil, err
	}
	if out == nil {
		return nil, io.EOF
	}
	return newBatch(out), nil
}

// Resume goes on where the data stood when the checkpoint was saved that the
// trainer loaded last; from the start if it holds no such place.
func (l *Loader) Resume(trainer *Trainer) error {
	loader, err := l.acquire()
	if err != nil {
		return err
	}
	defer l.handle.release()
	return trainer.call(func(trainer *C.wst_trainer, cError **C.wst_error) C.wst_status {
		return C.wst_loader_resume(loader, trainer, cError)
	})
}

// LoaderInfo says where a loader stands and what it left out.
type LoaderInfo struct {
	// Epochs are behind.
	Epochs uint64
	// Unreadable, Filtered and NoCaption count records that were skipped.
	Unreadable, Filtered, NoCaption uint64
	// DamagedShards counts shards that are not whole.
	DamagedShards uint64
}

// Info says where the loader stands and what it left out.
func (l *Loader) Info() (LoaderInfo, error) {
	loader, err := l.acquire()
	if err != nil {
		return LoaderInfo{}, err
	}
	defer l.handle.release()
	var info C.wst_loader_info_t
	info.struct_size = C.uint32_t(C.sizeof_wst_loader_info_t)
	var cError *C.wst_error
	if err := check(C.wst_loader_info(loader, &info, &cError), &cError); err != nil {
		return LoaderInfo{}, err
	}
	return LoaderInfo{
		Epochs:        uint64(info.epoch),
		Unreadable:    uint64(info.unreadable),
		Filtered:      uint64(info.filtered),
		NoCaption:     uint64(info.no_caption),
		DamagedShards: uint64(info.damaged_shards),
	}, nil
}

// Close gives the loader back; calls that are running finish first. Closing
// twice is allowed. The error is always nil: it is there for io.Closer.
func (l *Loader) Close() error {
	l.handle.close()
	runtime.KeepAlive(l)
	return nil
}

// Batch is pictures of one size with their captions.
type Batch struct {
	// Captions are those of the pictures.
	Captions []string
	// Keys name the pictures: a path within the folder, or "shard.tar/key".
	Keys   []string
	handle *handle
}

func newBatch(pointer *C.wst_batch) *Batch {
	count := int(C.wst_batch_count(pointer))
	batch := &Batch{
		Captions: goStrings(C.wst_batch_captions(pointer), count),
		Keys:     goStrings(C.wst_batch_keys(pointer), count),
		handle: newHandle("batch", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
			C.wst_batch_free((*C.wst_batch)(pointer))
		}),
	}
	runtime.AddCleanup(batch, (*handle).close, batch.handle)
	return batch
}

func goStrings(texts **C.char, count int) []string {
	out := make([]string, count)
	for i, text := range unsafe.Slice(texts, count) {
		out[i] = C.GoString(text)
	}
	return out
}

// acquire lends the C batch until b.handle.release.
func (b *Batch) acquire() (*C.wst_batch, error) {
	if b == nil {
		return nil, argumentError("batch", "a batch", "nil")
	}
	pointer, err := b.handle.acquire()
	runtime.KeepAlive(b)
	return (*C.wst_batch)(pointer), err
}

// Images copies the pictures.
func (b *Batch) Images() ([]image.Image, error) {
	batch, err := b.acquire()
	if err != nil {
		return nil, err
	}
	defer b.handle.release()
	return goImages(unsafe.Slice(C.wst_batch_images(batch), len(b.Captions))), nil
}

// Close gives the batch back; calls that are running finish first. Closing
// twice is allowed. The error is always nil: it is there for io.Closer.
func (b *Batch) Close() error {
	b.handle.close()
	runtime.KeepAlive(b)
	return nil
}
