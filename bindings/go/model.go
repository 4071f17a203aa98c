package wuerstchen

// #include <stdint.h>
// #include <wuerstchen.h>
// typedef const char wst_go_text;
// extern void wstGoLog(int32_t, wst_go_text *, void *);
// static wst_status wst_go_set_log(wst_model_options *options, int32_t level, uintptr_t handle, wst_error **error) {
//     return wst_model_options_set_log(options, level, wstGoLog, (void *)handle, error);
// }
import "C"

import (
	"runtime"
	"runtime/cgo"
	"unsafe"
)

// Model is a model folder, opened on one device. Its weights are mapped, not
// read: opening takes milliseconds. It may be used by any number of goroutines
// at once.
type Model struct {
	handle *handle
}

// ModelOption chooses how a model is opened.
type ModelOption func(*modelOptions) error

type modelOptions struct {
	pointer *C.wst_model_options
	log     cgo.Handle
}

// WithDevice chooses where the model runs: "auto" (the default), "cpu", "cuda", "cuda:1".
func WithDevice(name string) ModelOption {
	return func(o *modelOptions) error {
		text, err := cString("device", name)
		if err != nil {
			return err
		}
		defer freeString(text)
		var cError *C.wst_error
		return check(C.wst_model_options_set_device(o.pointer, text, &cError), &cError)
	}
}

// WithThreads chooses how many CPU threads work; 0, the default, takes one per core.
func WithThreads(count int) ModelOption {
	return func(o *modelOptions) error {
		threads, err := cUint32("threads", count)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_model_options_set_threads(o.pointer, threads, &cError), &cError)
	}
}

// DType is a type of numbers.
type DType int32

// The types of numbers that a model can compute in.
const (
	Float32 DType = C.WST_F32
	Float16 DType = C.WST_F16
	// BFloat16: on the CPU, of the factors of products.
	BFloat16 DType = C.WST_BF16
	// Int8, of the CPU alone: products in the blocks of Stages B and C have factors of eight bits.
	Int8 DType = C.WST_I8
)

// WithComputeDType chooses the numbers that the networks compute in.
func WithComputeDType(dtype DType) ModelOption {
	return func(o *modelOptions) error {
		var cError *C.wst_error
		return check(C.wst_model_options_set_compute_dtype(o.pointer, C.wst_dtype(dtype), &cError), &cError)
	}
}

// WithCUDAStream runs all work on a CUDA stream of the host's, a CUstream or cudaStream_t, one call at a time. The
// stream must outlive the model.
func WithCUDAStream(stream unsafe.Pointer) ModelOption {
	return func(o *modelOptions) error {
		var cError *C.wst_error
		return check(C.wst_model_options_set_cuda_stream(o.pointer, stream, &cError), &cError)
	}
}

// Residency says which weights are kept ready.
type Residency int32

// The residencies.
const (
	// ResidencyAuto is whatever the device does best.
	ResidencyAuto Residency = C.WST_RESIDENCY_AUTO
	// ResidencyAll keeps all stages.
	ResidencyAll Residency = C.WST_RESIDENCY_ALL
	// ResidencyStage keeps the stage that runs.
	ResidencyStage Residency = C.WST_RESIDENCY_STAGE
)

// WithResidency chooses which weights are kept ready.
func WithResidency(residency Residency) ModelOption {
	return func(o *modelOptions) error {
		var cError *C.wst_error
		return check(C.wst_model_options_set_residency(o.pointer, C.wst_residency(residency), &cError), &cError)
	}
}

// LogLevel says how much a log receiver hears.
type LogLevel int32

// The log levels.
const (
	LogOff     LogLevel = C.WST_LOG_OFF
	LogWarning LogLevel = C.WST_LOG_WARNING
	LogInfo    LogLevel = C.WST_LOG_INFO
	LogDebug   LogLevel = C.WST_LOG_DEBUG
)

// WithLog sends the library's messages up to a level to receive, which may be
// called from any thread. Without it the library is silent.
func WithLog(level LogLevel, receive func(level LogLevel, message string)) ModelOption {
	return func(o *modelOptions) error {
		if receive == nil {
			return argumentError("receive", "a function", "nil")
		}
		if o.log != 0 {
			o.log.Delete()
		}
		o.log = cgo.NewHandle(receive)
		var cError *C.wst_error
		return check(C.wst_go_set_log(o.pointer, C.int32_t(level), C.uintptr_t(o.log), &cError), &cError)
	}
}

// WithLora adds a LoRA adapter of Stage C, as diffusers or Trainer.SaveAdapter
// writes it, times a scale. Several add up.
func WithLora(path string, scale float32) ModelOption {
	return func(o *modelOptions) error {
		text, err := cString("path", path)
		if err != nil {
			return err
		}
		defer freeString(text)
		var cError *C.wst_error
		return check(C.wst_model_options_add_lora(o.pointer, text, C.float(scale), &cError), &cError)
	}
}

// WithModelSetting sets an option by its name, as configuration files do.
func WithModelSetting(key, value string) ModelOption {
	return func(o *modelOptions) error {
		return setByName(key, value, func(key, value *C.char) error {
			var cError *C.wst_error
			return check(C.wst_model_options_set(o.pointer, key, value, &cError), &cError)
		})
	}
}

func setByName(key, value string, set func(key, value *C.char) error) error {
	cKey, err := cString("key", key)
	if err != nil {
		return err
	}
	defer freeString(cKey)
	cValue, err := cString(key, value)
	if err != nil {
		return err
	}
	defer freeString(cValue)
	return set(cKey, cValue)
}

// Open opens a model folder. Close the model when it is no longer needed; one
// that is forgotten is closed by the garbage collector.
func Open(path string, options ...ModelOption) (*Model, error) {
	cPath, err := cString("path", path)
	if err != nil {
		return nil, err
	}
	defer freeString(cPath)

	chosen := modelOptions{pointer: C.wst_model_options_new()}
	if chosen.pointer == nil {
		return nil, &Error{Status: ErrOutOfMemory, Message: "no memory for the model's options"}
	}
	defer C.wst_model_options_free(chosen.pointer)
	for _, option := range options {
		if err = option(&chosen); err != nil {
			break
		}
	}
	var pointer *C.wst_model
	if err == nil {
		var cError *C.wst_error
		err = check(C.wst_model_open(cPath, chosen.pointer, &pointer, &cError), &cError)
	}
	log := chosen.log
	if err != nil {
		if log != 0 {
			log.Delete()
		}
		return nil, err
	}
	model := &Model{handle: newHandle("model", unsafe.Pointer(pointer), func(pointer unsafe.Pointer) {
		C.wst_model_free((*C.wst_model)(pointer))
		if log != 0 {
			log.Delete()
		}
	})}
	runtime.AddCleanup(model, (*handle).close, model.handle)
	return model, nil
}

// Close gives the model back; calls that are running finish first. Closing
// twice is allowed. The error is always nil: it is there for io.Closer.
func (m *Model) Close() error {
	m.handle.close()
	runtime.KeepAlive(m)
	return nil
}

// acquire lends the C model until m.handle.release.
func (m *Model) acquire() (*C.wst_model, error) {
	pointer, err := m.handle.acquire()
	runtime.KeepAlive(m)
	return (*C.wst_model)(pointer), err
}

// ModelInfo says what a model is.
type ModelInfo struct {
	// Generation is 1, 2 or 3 (Stable Cascade).
	Generation int
	// Parameters counts the weights of each network.
	Parameters struct {
		StageA, StageB, StageC, TextEncoder, ImageEncoder uint64
	}
	// DefaultWidth and DefaultHeight are the size of a picture, in pixels.
	DefaultWidth, DefaultHeight int
	// LatentChannels, LatentHeight and LatentWidth are what Stage C draws for that size.
	LatentChannels, LatentHeight, LatentWidth int
	// BytesMapped, BytesHost and BytesDevice say where the weights are.
	BytesMapped, BytesHost, BytesDevice uint64
}

// Info says what the model is.
func (m *Model) Info() (ModelInfo, error) {
	model, err := m.acquire()
	if err != nil {
		return ModelInfo{}, err
	}
	defer m.handle.release()
	var info C.wst_model_info_t
	info.struct_size = C.uint32_t(C.sizeof_wst_model_info_t)
	var cError *C.wst_error
	if err := check(C.wst_model_info(model, &info, &cError), &cError); err != nil {
		return ModelInfo{}, err
	}
	out := ModelInfo{
		Generation:     int(info.generation),
		DefaultWidth:   int(info.default_width),
		DefaultHeight:  int(info.default_height),
		LatentChannels: int(info.latent_channels),
		LatentHeight:   int(info.latent_height),
		LatentWidth:    int(info.latent_width),
		BytesMapped:    uint64(info.bytes_mapped),
		BytesHost:      uint64(info.bytes_host),
		BytesDevice:    uint64(info.bytes_device),
	}
	out.Parameters.StageA = uint64(info.stage_a_parameters)
	out.Parameters.StageB = uint64(info.stage_b_parameters)
	out.Parameters.StageC = uint64(info.stage_c_parameters)
	out.Parameters.TextEncoder = uint64(info.text_encoder_parameters)
	out.Parameters.ImageEncoder = uint64(info.image_encoder_parameters)
	return out, nil
}
