package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"context"
	"image"
	"unsafe"
)

// Tokenize returns the token ids that a stage's text encoder reads.
func (m *Model) Tokenize(stage Stage, text string) ([]int64, error) {
	cText, err := cString("text", text)
	if err != nil {
		return nil, err
	}
	defer freeString(cText)
	ids, err := m.tensorCall(func(model *C.wst_model, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_tokenize(model, C.wst_stage(stage), cText, out, &cError), &cError)
	})
	if err != nil {
		return nil, err
	}
	return ids.Ints, nil
}

// EncodeText returns the embeddings of texts as a stage wants them: [N, tokens, width].
func (m *Model) EncodeText(stage Stage, texts ...string) (*Tensor, error) {
	cTexts := make([]*C.char, 0, len(texts))
	defer func() {
		for _, each := range cTexts {
			freeString(each)
		}
	}()
	for _, text := range texts {
		cText, err := cString("text", text)
		if err != nil {
			return nil, err
		}
		cTexts = append(cTexts, cText)
	}
	return m.tensorCall(func(model *C.wst_model, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_encode_text(model, C.wst_stage(stage),
			unsafe.SliceData(cTexts), C.size_t(len(cTexts)), out, &cError), &cError)
	})
}

// EncodeImage returns the latents of pictures as Stage B takes them: [N, 16, h, w].
func (m *Model) EncodeImage(pictures ...image.Image) (*Tensor, error) {
	images, err := newImages("pictures", pictures)
	defer freeImages(images)
	if err != nil {
		return nil, err
	}
	return m.tensorCall(func(model *C.wst_model, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_encode_image(model, unsafe.SliceData(images), C.size_t(len(images)), out, &cError), &cError)
	})
}

// StageAEncode returns the tokens of pictures: whole numbers [N, H/4, W/4].
func (m *Model) StageAEncode(pictures ...image.Image) (*Tensor, error) {
	images, err := newImages("pictures", pictures)
	defer freeImages(images)
	if err != nil {
		return nil, err
	}
	return m.tensorCall(func(model *C.wst_model, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_a_encode(model, unsafe.SliceData(images), C.size_t(len(images)), out, &cError), &cError)
	})
}

// StageADecode returns the pixels [N, 3, H, W], 0 to 1, of tokens [N, H/4, W/4]
// or of latents [N, 4, H/4, W/4].
func (m *Model) StageADecode(tokensOrLatents *Tensor) (*Tensor, error) {
	return m.withTensors(func(model *C.wst_model, in []*C.wst_tensor, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_a_decode(model, in[0], out, &cError), &cError)
	}, input{"tokens or latents", tokensOrLatents})
}

// StageBPredict runs Stage B once at times t [N], conditioned on latents and
// text. In v1 x is tokens and gives the logits of every token; in v2 x is Stage
// A's latents [N, 4, H, W] and gives the noise in them.
func (m *Model) StageBPredict(x, t, latents, text *Tensor) (*Tensor, error) {
	return m.withTensors(func(model *C.wst_model, in []*C.wst_tensor, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_b_predict(model, in[0], in[1], in[2], in[3], out, &cError), &cError)
	}, input{"x", x}, input{"t", t}, input{"latents", latents}, input{"text", text})
}

// StageBSample walks from noise to what StageADecode takes, as latents and text
// describe it: tokens (v1) or latents (v2). negativeText may be nil. Of the
// options those of Stage B and the seed count.
func (m *Model) StageBSample(ctx context.Context, latents, text, negativeText *Tensor, options ...GenerateOption) (*Tensor, error) {
	return m.sample(ctx, options, func(model *C.wst_model, in []*C.wst_tensor, chosen *generateOptions, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_b_sample(model, in[0], in[1], in[2], chosen.pointer, out, &cError), &cError)
	}, input{"latents", latents}, input{"text", text}, input{"negative text", negativeText})
}

// StageCPredict runs Stage C once: the noise in latents x at times t [N].
func (m *Model) StageCPredict(x, t, text *Tensor) (*Tensor, error) {
	return m.withTensors(func(model *C.wst_model, in []*C.wst_tensor, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_c_predict(model, in[0], in[1], in[2], out, &cError), &cError)
	}, input{"x", x}, input{"t", t}, input{"text", text})
}

// StageCSample walks from noise to the latents that a text describes, as Stage B takes them.
// negativeText may be nil, and so may initialNoise: then it comes from the seed.
func (m *Model) StageCSample(ctx context.Context, text, negativeText, initialNoise *Tensor, options ...GenerateOption) (*Tensor, error) {
	return m.sample(ctx, options, func(model *C.wst_model, in []*C.wst_tensor, chosen *generateOptions, out **C.wst_tensor) error {
		var cError *C.wst_error
		return check(C.wst_stage_c_sample(model, in[0], in[1], in[2], chosen.pointer, out, &cError), &cError)
	}, input{"text", text}, input{"negative text", negativeText}, input{"initial noise", initialNoise})
}

// input is a tensor and the name that errors call it.
type input struct {
	name   string
	tensor *Tensor
}

// tensorCall runs a call that makes a tensor.
func (m *Model) tensorCall(call func(model *C.wst_model, out **C.wst_tensor) error) (*Tensor, error) {
	model, err := m.acquire()
	if err != nil {
		return nil, err
	}
	defer m.handle.release()
	var out *C.wst_tensor
	defer func() { C.wst_tensor_free(out) }()
	if err := call(model, &out); err != nil {
		return nil, err
	}
	return goTensor(out)
}

// withTensors runs a call that makes a tensor of others.
func (m *Model) withTensors(
	call func(model *C.wst_model, in []*C.wst_tensor, out **C.wst_tensor) error, inputs ...input,
) (*Tensor, error) {
	tensors := make([]*C.wst_tensor, 0, len(inputs))
	defer func() {
		for _, each := range tensors {
			C.wst_tensor_free(each)
		}
	}()
	for _, each := range inputs {
		tensor, err := newTensor(each.name, each.tensor)
		if err != nil {
			return nil, err
		}
		tensors = append(tensors, tensor)
	}
	return m.tensorCall(func(model *C.wst_model, out **C.wst_tensor) error {
		return call(model, tensors, out)
	})
}

// sample runs a call that makes a tensor in many steps.
func (m *Model) sample(
	ctx context.Context, options []GenerateOption,
	call func(model *C.wst_model, in []*C.wst_tensor, chosen *generateOptions, out **C.wst_tensor) error, inputs ...input,
) (*Tensor, error) {
	return m.withTensors(func(model *C.wst_model, in []*C.wst_tensor, out **C.wst_tensor) error {
		chosen, err := newGenerateOptions(model, options)
		if err != nil {
			return err
		}
		defer chosen.free()
		return chosen.run(ctx, func() error { return call(model, in, chosen, out) })
	}, inputs...)
}
