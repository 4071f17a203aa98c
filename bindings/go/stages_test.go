package wuerstchen

import (
	"context"
	"errors"
	"image"
	"image/png"
	"math"
	"os"
	"reflect"
	"testing"
	"time"
)

// apple is the first picture of the model's contact sheet.
func apple(t *testing.T) image.Image {
	t.Helper()
	file, err := os.Open(emojiModel + "/reference-prompts.png")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	sheet, err := png.Decode(file)
	if err != nil {
		t.Fatal(err)
	}
	return sheet.(interface {
		SubImage(image.Rectangle) image.Image
	}).SubImage(image.Rect(0, 0, 128, 128))
}

func wantShape(t *testing.T, tensor *Tensor, err error, shape ...int) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(tensor.Shape, shape) {
		t.Fatalf("want the shape %v, got %v", shape, tensor)
	}
}

func TestStageAKeepsThePicture(t *testing.T) {
	model, picture := open(t), apple(t)
	tokens, err := model.StageAEncode(picture)
	wantShape(t, tokens, err, 1, 32, 32)
	for _, token := range tokens.Ints {
		if token < 0 || token >= 1024 {
			t.Fatalf("the codebook has 1,024 entries, not one at %d", token)
		}
	}
	pixels, err := model.StageADecode(tokens)
	wantShape(t, pixels, err, 1, 3, 128, 128)
	// f4 compression loses little: the mean squared error stays below 1% of the range.
	var sum float64
	bounds := picture.Bounds()
	for y := range 128 {
		for x := range 128 {
			r, g, b, _ := picture.At(bounds.Min.X+x, bounds.Min.Y+y).RGBA()
			for c, want := range []uint32{r, g, b} {
				difference := float64(pixels.Floats[(c*128+y)*128+x]) - float64(want)/0xffff
				sum += difference * difference
			}
		}
	}
	if mean := sum / (3 * 128 * 128); mean > 0.01 {
		t.Errorf("the mean squared error is %v", mean)
	}
}

func TestStagesOneByOne(t *testing.T) {
	model, ctx := open(t), context.Background()
	ids, err := model.Tokenize(StageC, "a red apple")
	if err != nil || len(ids) == 0 {
		t.Fatalf("tokens %v, %v", ids, err)
	}
	text, err := model.EncodeText(StageC, "a red apple")
	wantShape(t, text, err, 1, 32, 128)
	noise := NewTensor(make([]float32, 16*3*3), 1, 16, 3, 3)
	predicted, err := model.StageCPredict(noise, NewTensor([]float32{1}, 1), text)
	wantShape(t, predicted, err, 1, 16, 3, 3)

	latents, err := model.StageCSample(ctx, text, nil, nil, quick()...)
	wantShape(t, latents, err, 1, 16, 3, 3)
	from, err := model.StageCSample(ctx, text, nil, noise, quick()...)
	wantShape(t, from, err, 1, 16, 3, 3)
	if reflect.DeepEqual(from, latents) {
		t.Error("the initial noise makes no difference")
	}
	textB, err := model.EncodeText(StageB, "a red apple")
	wantShape(t, textB, err, 1, 32, 128)
	tokens, err := model.StageBSample(ctx, latents, textB, nil, quick()...)
	wantShape(t, tokens, err, 1, 32, 32)
	logits, err := model.StageBPredict(tokens, NewTensor([]float32{0.5}, 1), latents, textB)
	wantShape(t, logits, err, 1, 1024, 32, 32)
	pixels, err := model.StageADecode(tokens)
	wantShape(t, pixels, err, 1, 3, 128, 128)

	encoded, err := model.EncodeImage(apple(t), apple(t))
	wantShape(t, encoded, err, 2, 16, 3, 3)
	for _, value := range encoded.Floats {
		if math.IsNaN(float64(value)) {
			t.Fatal("a latent is not a number")
		}
	}
}

func TestSamplingCanBeCancelled(t *testing.T) {
	model := open(t)
	text, err := model.EncodeText(StageC, "a red apple")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err = model.StageCSample(ctx, text, nil, nil, WithStageC(10_000, 3))
	wantStatus(t, err, ErrCancelled)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v does not match context.DeadlineExceeded", err)
	}
}

func TestTensorErrors(t *testing.T) {
	model := open(t)
	for name, tensor := range map[string]*Tensor{
		"too few":    NewIntTensor([]int64{1, 2, 3}, 1, 2, 2),
		"negative":   NewIntTensor([]int64{1}, -1, -1),
		"both":       {Shape: []int{1}, Ints: []int64{1}, Floats: []float32{1}},
		"huge":       NewIntTensor(nil, math.MaxInt, math.MaxInt, 2),
		"wrong rank": NewIntTensor([]int64{1}, 1),
		"no token":   NewIntTensor([]int64{1 << 40, 0, 0, 0}, 1, 2, 2),
		"nil":        nil,
	} {
		if _, err := model.StageADecode(tensor); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			wantStatus(t, err, ErrInvalidArgument)
		}
	}
	if _, err := model.EncodeImage(); err == nil {
		t.Error("no pictures, no error")
	}
	_, err := model.EncodeImage(image.NewRGBA(image.Rectangle{}))
	wantStatus(t, err, ErrInvalidArgument, "pictures")
}

func TestTransparentBecomesWhite(t *testing.T) {
	model := open(t)
	white := image.NewRGBA(image.Rect(0, 0, 128, 128))
	for i := range white.Pix {
		white.Pix[i] = 0xff
	}
	want, err := model.StageAEncode(white)
	if err != nil {
		t.Fatal(err)
	}
	got, err := model.StageAEncode(image.NewNRGBA(image.Rect(5, 5, 133, 133)))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Error("a transparent picture is not white")
	}
}
