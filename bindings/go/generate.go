package wuerstchen

// #include <stdint.h>
// #include <wuerstchen.h>
// typedef const wst_progress wst_go_progress;
// extern void wstGoProgress(wst_go_progress *, void *);
// static wst_status wst_go_set_progress(wst_generate_options *options, uintptr_t handle, wst_error **error) {
//     return wst_generate_options_set_progress(options, wstGoProgress, (void *)handle, error);
// }
import "C"

import (
	"context"
	"image"
	"runtime/cgo"
	"time"
	"unsafe"
)

// Stage is a stage of the paper.
type Stage int32

// The stages, in the order of training; a picture is made from C to A.
const (
	// StageA turns tokens into pixels.
	StageA Stage = C.WST_STAGE_A
	// StageB turns latents into tokens.
	StageB Stage = C.WST_STAGE_B
	// StageC turns text and noise into latents.
	StageC Stage = C.WST_STAGE_C
)

// String is the stage's letter, or "pair".
func (s Stage) String() string {
	if s == StagePair {
		return "pair"
	}
	if s < StageA || s > StageC {
		return "?"
	}
	return "ABC"[s : s+1]
}

// Progress says where a generation stands.
type Progress struct {
	// Stage is the one that runs.
	Stage Stage
	// Step of Steps of this stage are done.
	Step, Steps int
	// Elapsed is the time since the generation started.
	Elapsed time.Duration
	// Preview is a rough view of the picture; nil unless WithPreview asked for it and it is due.
	Preview image.Image
}

func goProgress(source *C.wst_progress) Progress {
	out := Progress{
		Stage:   Stage(source.stage),
		Step:    int(source.step),
		Steps:   int(source.steps),
		Elapsed: time.Duration(float64(source.seconds) * float64(time.Second)),
	}
	if source.preview != nil {
		out.Preview = goImage(source.preview)
	}
	return out
}

// Sampler is how Stage C walks from noise to latents.
type Sampler int32

// The samplers.
const (
	// DDPM adds fresh noise in every step but the last (Ho et al. 2020).
	DDPM Sampler = C.WST_DDPM
	// DDIM adds none (Song et al. 2021 with eta 0).
	DDIM Sampler = C.WST_DDIM
)

// Choice is how Stage B turns logits into tokens.
type Choice int32

// The choices.
const (
	// Multinomial samples from the distribution.
	Multinomial Choice = C.WST_MULTINOMIAL
	// Argmax takes the likeliest token.
	Argmax Choice = C.WST_ARGMAX
	// Quant takes the token nearest to the mean of the codebook under the distribution.
	Quant Choice = C.WST_QUANT
)

// GenerateOption chooses what is generated. Whatever is not chosen has the
// value that the model recommends.
type GenerateOption func(*generateOptions) error

// generateOptions is the C object, and what its callbacks need while it is used.
type generateOptions struct {
	pointer  *C.wst_generate_options
	prompts  []string
	negative *string
	cancel   *C.wst_cancel
	receiver *progressReceiver
	handle   cgo.Handle
}

// newGenerateOptions applies the options; free them after the work is done.
func newGenerateOptions(model *C.wst_model, options []GenerateOption) (*generateOptions, error) {
	out := &generateOptions{}
	if err := out.fill(model, options); err != nil {
		out.free()
		return nil, err
	}
	return out, nil
}

func (o *generateOptions) fill(model *C.wst_model, options []GenerateOption) error {
	var cError *C.wst_error
	if err := check(C.wst_generate_options_new(model, &o.pointer, &cError), &cError); err != nil {
		return err
	}
	for _, option := range options {
		if err := option(o); err != nil {
			return err
		}
	}
	if err := o.addPrompts(); err != nil {
		return err
	}
	if o.cancel = C.wst_cancel_new(); o.cancel == nil {
		return &Error{Status: ErrOutOfMemory, Message: "no memory for a cancel token"}
	}
	return check(C.wst_generate_options_set_cancel(o.pointer, o.cancel, &cError), &cError)
}

func (o *generateOptions) free() {
	C.wst_generate_options_free(o.pointer)
	C.wst_cancel_free(o.cancel)
	if o.handle != 0 {
		o.handle.Delete()
	}
}

func (o *generateOptions) requestCancel() { C.wst_cancel_request(o.cancel) }

// run calls work, which is cancelled when the context ends, and panics on with
// whatever the progress receiver panicked with.
func (o *generateOptions) run(ctx context.Context, work func() error) error {
	requested := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(requested)
		o.requestCancel()
	})
	err := work()
	if !stop() {
		<-requested // The token is not freed under the request.
	}
	if o.receiver != nil {
		if value := o.receiver.panicValue(); value != nil {
			panic(value)
		}
	}
	return withContext(ctx, err)
}

// WithPrompts adds more prompts. Pictures come back prompt by prompt.
func WithPrompts(prompts ...string) GenerateOption {
	return func(o *generateOptions) error {
		o.prompts = append(o.prompts, prompts...)
		return nil
	}
}

// WithNegativePrompt says what the pictures should not show.
func WithNegativePrompt(negative string) GenerateOption {
	return func(o *generateOptions) error {
		o.negative = &negative
		return nil
	}
}

// addPrompts hands the prompts over, each with the negative prompt.
func (o *generateOptions) addPrompts() error {
	var negative *C.char
	if o.negative != nil {
		text, err := cString("negative prompt", *o.negative)
		if err != nil {
			return err
		}
		defer freeString(text)
		negative = text
	}
	for _, prompt := range o.prompts {
		text, err := cString("prompt", prompt)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		err = check(C.wst_generate_options_add_prompt(o.pointer, text, negative, &cError), &cError)
		freeString(text)
		if err != nil {
			return err
		}
	}
	return nil
}

// WithImagesPerPrompt chooses how many pictures each prompt gets. Picture i
// uses the seed plus i.
func WithImagesPerPrompt(count int) GenerateOption {
	return func(o *generateOptions) error {
		images, err := cUint32("images per prompt", count)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_generate_options_set_images_per_prompt(o.pointer, images, &cError), &cError)
	}
}

// WithSize chooses the size of the pictures, in pixels.
func WithSize(width, height int) GenerateOption {
	return func(o *generateOptions) error {
		cWidth, err := cUint32("width", width)
		if err != nil {
			return err
		}
		cHeight, err := cUint32("height", height)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_generate_options_set_size(o.pointer, cWidth, cHeight, &cError), &cError)
	}
}

// WithSeed chooses the noise. Same model, options and seed: same picture.
func WithSeed(seed uint64) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_seed(o.pointer, C.uint64_t(seed), &cError), &cError)
	}
}

// WithStageC chooses the steps of Stage C and the weight of the text (1: no guidance).
func WithStageC(steps int, guidance float32) GenerateOption {
	return func(o *generateOptions) error {
		cSteps, err := cUint32("stage C steps", steps)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_c(o.pointer, cSteps, C.float(guidance), &cError), &cError)
	}
}

// WithStageCSampler chooses how Stage C walks from noise to latents.
func WithStageCSampler(sampler Sampler) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_c_sampler(o.pointer, C.wst_sampler(sampler), &cError), &cError)
	}
}

// WithStageCTimesteps chooses every t of Stage C, falling from at most 1 to 0;
// there is one step less than there are numbers.
func WithStageCTimesteps(timesteps ...float32) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_c_timesteps(o.pointer,
			(*C.float)(unsafe.SliceData(timesteps)), C.size_t(len(timesteps)), &cError), &cError)
	}
}

// WithStageB chooses the steps of Stage B and the weight of its conditions (1: no guidance).
func WithStageB(steps int, guidance float32) GenerateOption {
	return func(o *generateOptions) error {
		cSteps, err := cUint32("stage B steps", steps)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_b(o.pointer, cSteps, C.float(guidance), &cError), &cError)
	}
}

// WithStageBTimesteps chooses every t of Stage B in v2, falling from at most 1 to 0;
// there is one step less than there are numbers.
func WithStageBTimesteps(timesteps ...float32) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_b_timesteps(o.pointer,
			(*C.float)(unsafe.SliceData(timesteps)), C.size_t(len(timesteps)), &cError), &cError)
	}
}

// WithStageBTemperature chooses the temperature of the first and of the last step of Stage B.
func WithStageBTemperature(start, end float32) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_b_temperature(o.pointer, C.float(start), C.float(end), &cError), &cError)
	}
}

// WithStageBChoice chooses how Stage B turns logits into tokens.
func WithStageBChoice(choice Choice) GenerateOption {
	return func(o *generateOptions) error {
		var cError *C.wst_error
		return check(C.wst_generate_options_set_stage_b_choice(o.pointer, C.wst_choice(choice), &cError), &cError)
	}
}

// WithInitImage starts from a picture. The strength, 0 to 1, says how far the
// result may go from it.
func WithInitImage(picture image.Image, strength float32) GenerateOption {
	return func(o *generateOptions) error {
		copied, err := newImage("init image", picture)
		if err != nil {
			return err
		}
		defer C.wst_image_free(copied)
		var cError *C.wst_error
		return check(C.wst_generate_options_set_init_image(o.pointer, copied, C.float(strength), &cError), &cError)
	}
}

// WithInitLatents starts from latents, one sample for all pictures or one for
// each, as EncodeImage and StageCSample give them. Strength 0 only decodes
// them, without Stage C.
func WithInitLatents(latents *Tensor, strength float32) GenerateOption {
	return func(o *generateOptions) error {
		copied, err := newTensor("init latents", latents)
		if err != nil {
			return err
		}
		defer C.wst_tensor_free(copied)
		var cError *C.wst_error
		return check(C.wst_generate_options_set_init_latents(o.pointer, copied, C.float(strength), &cError), &cError)
	}
}

// WithMask keeps the init image where the mask is black and draws where it is white.
func WithMask(mask image.Image) GenerateOption {
	return func(o *generateOptions) error {
		copied, err := newImage("mask", mask)
		if err != nil {
			return err
		}
		defer C.wst_image_free(copied)
		var cError *C.wst_error
		return check(C.wst_generate_options_set_mask(o.pointer, copied, &cError), &cError)
	}
}

// WithProgress calls receive after every step, on the goroutine that called
// Generate, or, for a Job, on another one.
func WithProgress(receive func(Progress)) GenerateOption {
	return func(o *generateOptions) error {
		if receive == nil {
			return argumentError("receive", "a function", "nil")
		}
		if o.handle != 0 {
			o.handle.Delete()
		}
		o.receiver = &progressReceiver{receive: receive, cancel: o.requestCancel}
		o.handle = cgo.NewHandle(o.receiver)
		var cError *C.wst_error
		return check(C.wst_go_set_progress(o.pointer, C.uintptr_t(o.handle), &cError), &cError)
	}
}

// WithPreview puts a rough view of the picture into the Progress of every n-th step.
func WithPreview(everySteps int) GenerateOption {
	return func(o *generateOptions) error {
		steps, err := cUint32("preview", everySteps)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_generate_options_set_preview(o.pointer, steps, &cError), &cError)
	}
}

// WithSetting sets an option by its name, as configuration files do:
// WithSetting("stage_c_steps", "20").
func WithSetting(key, value string) GenerateOption {
	return func(o *generateOptions) error {
		return setByName(key, value, func(key, value *C.char) error {
			var cError *C.wst_error
			return check(C.wst_generate_options_set(o.pointer, key, value, &cError), &cError)
		})
	}
}

// promptFirst puts the prompt before those of the options.
func promptFirst(prompt string, options []GenerateOption) []GenerateOption {
	return append([]GenerateOption{WithPrompts(prompt)}, options...)
}

// Generate makes pictures of a prompt, and of those that the options add. It
// returns when they are done, and soon after the context ends.
func (m *Model) Generate(ctx context.Context, prompt string, options ...GenerateOption) ([]image.Image, error) {
	model, err := m.acquire()
	if err != nil {
		return nil, err
	}
	defer m.handle.release()
	chosen, err := newGenerateOptions(model, promptFirst(prompt, options))
	if err != nil {
		return nil, err
	}
	defer chosen.free()

	images := make([]*C.wst_image, C.wst_generate_options_image_count(chosen.pointer))
	defer func() { freeImages(images) }()
	err = chosen.run(ctx, func() error {
		var cError *C.wst_error
		return check(C.wst_generate(model, chosen.pointer,
			unsafe.SliceData(images), C.size_t(len(images)), &cError), &cError)
	})
	if err != nil {
		return nil, err
	}
	return goImages(images), nil
}
