package wuerstchen

import (
	"context"
	"math"
	"path/filepath"
	"reflect"
	"testing"
)

const v2Models = "../../tests/fixtures/v2"

// small makes a picture of v2's smallest size.
func small(more ...GenerateOption) []GenerateOption {
	return quick(append([]GenerateOption{WithSize(128, 128)}, more...)...)
}

func openV2(t *testing.T, folder string, options ...ModelOption) *Model {
	t.Helper()
	model, err := Open(filepath.Join(v2Models, folder), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { model.Close() })
	return model
}

func TestTwoFoldersAreOneModel(t *testing.T) {
	ctx := context.Background()
	whole := openV2(t, "model")
	want, err := whole.Generate(ctx, "a red apple", small(WithImagesPerPrompt(2))...)
	if err != nil {
		t.Fatal(err)
	}
	if len(want) != 2 || reflect.DeepEqual(want[0], want[1]) {
		t.Fatal("two seeds make two pictures")
	}
	for folder, setting := range map[string]ModelOption{
		"prior":   WithModelSetting("decoder_path", filepath.Join(v2Models, "decoder")),
		"decoder": WithModelSetting("prior_path", filepath.Join(v2Models, "prior")),
	} {
		model := openV2(t, folder, setting)
		info, err := model.Info()
		if err != nil || info.Generation != 2 || info.DefaultWidth != 1024 || info.LatentChannels != 8 {
			t.Errorf("%s: %+v, %v", folder, info, err)
		}
		got, err := model.Generate(ctx, "a red apple", small(WithImagesPerPrompt(2))...)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: another picture than that of the whole model", folder)
		}
	}

	_, err = Open(filepath.Join(v2Models, "prior"), WithModelSetting("decoder_path", "no/such/folder"))
	wantStatus(t, err, ErrIO, "no/such/folder")
	_, err = Open(filepath.Join(v2Models, "prior"), WithModelSetting("decoder_path", filepath.Join(v2Models, "prior")))
	wantStatus(t, err, ErrInvalidArgument, "decoder_path", "WuerstchenPriorPipeline")
	_, err = openV2(t, "prior").Generate(ctx, "a red apple", small()...)
	wantStatus(t, err, ErrUnsupported, "decoder_path")
	_, err = whole.Generate(ctx, "a red apple", WithSize(192, 128))
	wantStatus(t, err, ErrInvalidArgument, "width", "128")
	_, err = whole.Generate(ctx, "a red apple", WithStageBChoice(Argmax))
	wantStatus(t, err, ErrUnsupported, "tokens")
}

func TestInitLatents(t *testing.T) {
	ctx := context.Background()
	whole, decoder := openV2(t, "model"), openV2(t, "decoder")
	want, err := whole.Generate(ctx, "a red apple", small()...)
	if err != nil {
		t.Fatal(err)
	}
	text, err := whole.EncodeText(StageC, "a red apple")
	wantShape(t, text, err, 1, 77, 20)
	latents, err := whole.StageCSample(ctx, text, nil, nil, small()...)
	wantShape(t, latents, err, 1, 8, 3, 3)
	// The latents of the same run: the same picture, which then needs the decoder only.
	for name, model := range map[string]*Model{"whole": whole, "decoder": decoder} {
		got, err := model.Generate(ctx, "a red apple", small(WithInitLatents(latents, 0))...)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: another picture from the same latents", name)
		}
	}
	got, err := whole.Generate(ctx, "a red apple", small(WithInitLatents(latents, 0.6))...)
	if err != nil {
		t.Fatal(err)
	}
	if reflect.DeepEqual(got, want) {
		t.Error("a part of the walk changes nothing")
	}
	_, err = decoder.Generate(ctx, "a red apple", small(WithInitLatents(latents, 0.6))...)
	wantStatus(t, err, ErrUnsupported, "prior_path")

	broken := NewTensor(append([]float32{float32(math.NaN())}, latents.Floats[1:]...), latents.Shape...)
	for name, option := range map[string]GenerateOption{
		"finite":     WithInitLatents(broken, 0),
		"8 channels": WithInitLatents(NewTensor(make([]float32, 63), 1, 7, 3, 3), 0),
		"samples":    WithInitLatents(NewTensor(make([]float32, 96), 1, 8, 4, 3), 0),
		"F32":        WithInitLatents(NewIntTensor(make([]int64, 72), 1, 8, 3, 3), 0),
		"numbers":    WithInitLatents(NewTensor(latents.Floats, 1, 8, 3, 4), 0),
		"latents":    WithInitLatents(nil, 0),
		"strength":   WithInitLatents(latents, 1.5),
	} {
		_, err := whole.Generate(ctx, "a red apple", small(option)...)
		wantStatus(t, err, ErrInvalidArgument, name)
	}
}
