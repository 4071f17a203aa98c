package wuerstchen

// #include <wuerstchen.h>
import "C"

// StagePair is, in training only, the text tower and the image encoder as a
// contrastive pair, before all stages.
const StagePair Stage = C.WST_STAGE_PAIR

// TrainOption chooses how a stage is trained. Whatever is not chosen has the
// paper's value for that stage.
type TrainOption func(*trainOptions) error

// trainOptions is the C object while a trainer is made.
type trainOptions struct {
	pointer *C.wst_train_options
}

// newTrainOptions applies the options; free them when the trainer is made.
func newTrainOptions(stage Stage, options []TrainOption) (*trainOptions, error) {
	out := &trainOptions{}
	var cError *C.wst_error
	if err := check(C.wst_train_options_new(C.wst_stage(stage), &out.pointer, &cError), &cError); err != nil {
		return nil, err
	}
	for _, option := range options {
		if err := option(out); err != nil {
			out.free()
			return nil, err
		}
	}
	return out, nil
}

func (o *trainOptions) free() { C.wst_train_options_free(o.pointer) }

// setCancel lets a token stop what trainers with these options do.
func (o *trainOptions) setCancel(cancel *C.wst_cancel) error {
	var cError *C.wst_error
	return check(C.wst_train_options_set_cancel(o.pointer, cancel, &cError), &cError)
}

// WithLearningRate chooses the rate after the warm-up.
func WithLearningRate(rate float32) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_learning_rate(o.pointer, C.float(rate), &cError), &cError)
	}
}

// WithBetas chooses how slowly AdamW's averages of the gradient and of its
// square follow.
func WithBetas(beta1, beta2 float32) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_betas(o.pointer, C.float(beta1), C.float(beta2), &cError), &cError)
	}
}

// WithWeightDecay chooses AdamW's decay of the weights per unit of rate.
func WithWeightDecay(decay float32) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_weight_decay(o.pointer, C.float(decay), &cError), &cError)
	}
}

// WithWarmupSteps chooses over how many steps the learning rate grows from 0.
func WithWarmupSteps(steps uint64) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_warmup_steps(o.pointer, C.uint64_t(steps), &cError), &cError)
	}
}

// WithGradClip chooses the largest norm of all gradients together; 0 never
// scales them down.
func WithGradClip(norm float32) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_grad_clip(o.pointer, C.float(norm), &cError), &cError)
	}
}

// WithGradAccumulation cuts each batch into parts that run one after the
// other: the gradient of the whole batch in the memory that a part takes.
func WithGradAccumulation(parts int) TrainOption {
	return func(o *trainOptions) error {
		count, err := cUint32("grad_accumulation", parts)
		if err != nil {
			return err
		}
		var cError *C.wst_error
		return check(C.wst_train_options_set_grad_accumulation(o.pointer, count, &cError), &cError)
	}
}

// WithEMA chooses the average of the weights, which is what Trainer.Export
// writes: a copy before step start, then decay * average + (1 - decay) *
// weights on every every-th step.
func WithEMA(decay float32, start, every uint64) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		status := C.wst_train_options_set_ema(o.pointer, C.float(decay), C.uint64_t(start), C.uint64_t(every), &cError)
		return check(status, &cError)
	}
}

// WithTextDropout chooses how likely a caption is replaced by the empty one:
// what classifier-free guidance needs.
func WithTextDropout(probability float32) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_text_dropout(o.pointer, C.float(probability), &cError), &cError)
	}
}

// WithTrainSeed chooses where the random numbers of training come from. Same
// model, options, batches and seed: the same weights.
func WithTrainSeed(seed uint64) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_seed(o.pointer, C.uint64_t(seed), &cError), &cError)
	}
}

// WithTrainDType chooses what the weights are rounded to for computing; the
// optimiser keeps Float32.
func WithTrainDType(dtype DType) TrainOption {
	return func(o *trainOptions) error {
		var cError *C.wst_error
		return check(C.wst_train_options_set_compute_dtype(o.pointer, C.wst_dtype(dtype), &cError), &cError)
	}
}

// WithTrainSetting sets an option by its name, as configuration files do.
func WithTrainSetting(key, value string) TrainOption {
	return func(o *trainOptions) error {
		return setByName(key, value, func(key, value *C.char) error {
			var cError *C.wst_error
			return check(C.wst_train_options_set(o.pointer, key, value, &cError), &cError)
		})
	}
}
