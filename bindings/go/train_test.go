package wuerstchen

import (
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// tinyModel trains in milliseconds.
const tinyModel = "../../tests/fixtures/model"

func openTiny(t *testing.T) *Model {
	t.Helper()
	model, err := Open(tinyModel)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { model.Close() })
	return model
}

// quickTraining shows something after a few steps.
func quickTraining(more ...TrainOption) []TrainOption {
	return append([]TrainOption{
		WithLearningRate(1e-3), WithWarmupSteps(0), WithEMA(0.5, 2, 1), WithTrainSeed(5),
	}, more...)
}

func newTestTrainer(t *testing.T, model *Model, stage Stage, options ...TrainOption) *Trainer {
	t.Helper()
	trainer, err := NewTrainer(model, stage, quickTraining(options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { trainer.Close() })
	return trainer
}

// examples are pictures of one size and their captions.
func examples() ([]image.Image, []string) {
	var pictures []image.Image
	for seed := range 3 {
		picture := image.NewNRGBA(image.Rect(0, 0, 64, 64))
		for y := range 64 {
			for x := range 64 {
				picture.Set(x, y, color.NRGBA{uint8(x * (seed + 1)), uint8(y * seed), uint8(40 * seed), 255})
			}
		}
		pictures = append(pictures, picture)
	}
	return pictures, []string{"a red apple", "", "a dog"}
}

func mustStep(t *testing.T, trainer *Trainer) TrainMetrics {
	t.Helper()
	pictures, captions := examples()
	metrics, err := trainer.Step(context.Background(), pictures, captions)
	if err != nil {
		t.Fatal(err)
	}
	return metrics
}

func TestTrainSteps(t *testing.T) {
	model := openTiny(t)
	for _, stage := range []Stage{StageB, StageC} {
		trainer := newTestTrainer(t, model, stage)
		for i := uint64(1); i <= 2; i++ {
			metrics := mustStep(t, trainer)
			if metrics.Step != i || metrics.Skipped || metrics.Loss <= 0 || metrics.GradNorm <= 0 || metrics.LearningRate != 1e-3 {
				t.Errorf("stage %v: %+v", stage, metrics)
			}
		}
		progress, err := trainer.Progress()
		if err != nil || progress != (TrainProgress{Step: 2, Samples: 6}) {
			t.Errorf("stage %v: %+v, %v", stage, progress, err)
		}
	}
}

func TestTrainOptions(t *testing.T) {
	model := openTiny(t)
	newTestTrainer(t, model, StageC, WithBetas(0.9, 0.95), WithWeightDecay(0), WithGradClip(1), WithGradAccumulation(2),
		WithTextDropout(0.1), WithTrainDType(BFloat16), WithTrainSetting("adam_eps", "1e-8"))
	for name, option := range map[string]TrainOption{
		"learning_rate":     WithLearningRate(-1),
		"beta2":             WithBetas(0.9, 1),
		"weight_decay":      WithWeightDecay(-1),
		"grad_clip":         WithGradClip(-1),
		"grad_accumulation": WithGradAccumulation(-1),
		"ema every":         WithEMA(0.9, 0, 0),
		"text_dropout":      WithTextDropout(2),
		"dtype":             WithTrainDType(99),
		"flavour":           WithTrainSetting("flavour", "sweet"),
	} {
		_, err := NewTrainer(model, StageC, option)
		wantStatus(t, err, ErrInvalidArgument, name)
	}
	_, err := NewTrainer(model, Stage(9))
	wantStatus(t, err, ErrInvalidArgument, "stage", "WST_STAGE_PAIR")
	if StagePair.String() != "pair" || StageB.String() != "B" {
		t.Error("the names of stages")
	}
}

func TestTrainSamples(t *testing.T) {
	model := openTiny(t)
	trainer, plain := newTestTrainer(t, model, StageC), newTestTrainer(t, model, StageC)
	pictures, captions := examples()
	samples, err := trainer.Prepare(pictures, captions)
	if err != nil {
		t.Fatal(err)
	}
	defer samples.Close()
	ctx := context.Background()
	metrics, err := trainer.StepSamples(ctx, samples)
	if err != nil || metrics != mustStep(t, plain) {
		t.Errorf("a step over prepared samples is another: %+v, %v", metrics, err)
	}
	if _, err := trainer.StepSamples(ctx, samples, 2, 0); err != nil {
		t.Error(err)
	}
	if err := trainer.Recaption(samples, 1, "a pear"); err != nil {
		t.Error(err)
	}
	if err := samples.Append(samples); err != nil || samples.Len() != 6 {
		t.Errorf("%d samples, %v", samples.Len(), err)
	}
	_, err = trainer.StepSamples(ctx, samples, 6)
	wantStatus(t, err, ErrInvalidArgument, "indices[0]")
	_, err = trainer.StepSamples(ctx, samples, -1)
	wantStatus(t, err, ErrInvalidArgument, "indices")
	_, err = trainer.StepSamples(ctx, nil)
	wantStatus(t, err, ErrInvalidArgument, "samples")
	wantStatus(t, trainer.Recaption(samples, -1, "x"), ErrInvalidArgument, "index")
	wantStatus(t, trainer.Recaption(samples, 0, "a\x00b"), ErrInvalidArgument, "caption")
	_, err = trainer.Prepare(pictures, captions[:1])
	wantStatus(t, err, ErrInvalidArgument, "captions")
	_, err = trainer.Step(ctx, nil, nil)
	wantStatus(t, err, ErrInvalidArgument, "count")
	samples.Close()
	if samples.Len() != 0 || !errors.Is(samples.Append(samples), ErrClosed) {
		t.Error("closed samples")
	}
}

func TestTrainCheckpoints(t *testing.T) {
	model := openTiny(t)
	folder := t.TempDir()
	whole, resumed := newTestTrainer(t, model, StageB), newTestTrainer(t, model, StageB)
	mustStep(t, whole)
	if err := whole.Save(filepath.Join(folder, "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if err := resumed.Load(filepath.Join(folder, "checkpoint")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if want, got := mustStep(t, whole), mustStep(t, resumed); want != got {
			t.Errorf("the resumed run steps to %+v, not %+v", got, want)
		}
	}
	wantStatus(t, newTestTrainer(t, model, StageC).Load(filepath.Join(folder, "checkpoint")), ErrFormat, "stage")
	wantStatus(t, resumed.Load(filepath.Join(folder, "nothing")), ErrIO, "nothing")
	wantStatus(t, resumed.Save("a\x00b"), ErrInvalidArgument, "folder")

	if err := whole.Export(filepath.Join(folder, "model")); err != nil {
		t.Fatal(err)
	}
	trained, err := Open(filepath.Join(folder, "model"))
	if err != nil {
		t.Fatal(err)
	}
	defer trained.Close()
	if _, err := trained.Generate(context.Background(), "a red apple", WithStageC(2, 2), WithStageB(2, 1)); err != nil {
		t.Error(err)
	}
}

func TestTrainAdapters(t *testing.T) {
	trainer := newTestTrainer(t, openTiny(t), StageC, WithTrainSetting("lora_rank", "2"), WithLearningRate(0.1))
	mustStep(t, trainer)
	mustStep(t, trainer)
	folder := t.TempDir()
	adapter, merged := filepath.Join(folder, "adapter.safetensors"), filepath.Join(folder, "merged")
	if err := errors.Join(trainer.SaveAdapter(adapter), MergeAdapter(tinyModel, adapter, 1, merged)); err != nil {
		t.Fatal(err)
	}
	draw := func(path string, options ...ModelOption) image.Image {
		model, err := Open(path, options...)
		if err != nil {
			t.Fatal(err)
		}
		defer model.Close()
		images, err := model.Generate(context.Background(), "a red apple", WithStageC(3, 2), WithStageB(2, 1))
		if err != nil {
			t.Fatal(err)
		}
		return images[0]
	}
	plain, added := draw(tinyModel), draw(tinyModel, WithLora(adapter, 1))
	if reflect.DeepEqual(plain, added) || !reflect.DeepEqual(added, draw(merged)) {
		t.Error("an adapter beside the weights and one merged into them should draw the same, new picture")
	}
	wantStatus(t, newTestTrainer(t, openTiny(t), StageC).SaveAdapter(adapter), ErrUnsupported, "lora_rank")
	wantStatus(t, MergeAdapter(tinyModel, "nothing.safetensors", 1, merged), ErrIO, "nothing")
	_, err := Open(tinyModel, WithLora(adapter, float32(math.NaN())))
	wantStatus(t, err, ErrInvalidArgument, "scale")
}

func TestCreateModel(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "new")
	if err := CreateModel(tinyModel, folder, 1); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(filepath.Join(folder, "stage_c", "model.safetensors")), CreateModel(folder, folder, 1)); err != nil {
		t.Fatal(err)
	}
	model, err := Open(folder)
	if err != nil {
		t.Fatal(err)
	}
	defer model.Close()
	mustStep(t, newTestTrainer(t, model, StageC))
	wantStatus(t, CreateModel("/nowhere", folder, 1), ErrIO, "nowhere")
	if err := TrainTokenizer([]string{"a red apple", "a green apple"}, 600, folder); err != nil {
		t.Error(err)
	}
	wantStatus(t, TrainTokenizer([]string{"x"}, 5, folder), ErrInvalidArgument, "vocabulary")
	wantStatus(t, TrainTokenizer(nil, 600, folder), ErrInvalidArgument, "count")
}

// twice pretends to be one of two ranks whose parts are alike.
type twice struct {
	floats, doubles int
	meanwhile       func() error
}

func (r *twice) SumFloat32(values []float32) error {
	r.floats += len(values)
	for i := range values {
		values[i] *= 2
	}
	if r.meanwhile == nil {
		return nil
	}
	return r.meanwhile()
}

func (r *twice) SumFloat64(values []float64) error {
	r.doubles += len(values)
	for i := range values {
		values[i] *= 2
	}
	return nil
}

func TestTrainRanks(t *testing.T) {
	trainer := newTestTrainer(t, openTiny(t), StageC)
	pictures, captions := examples()
	reducer := &twice{}
	if err := trainer.SetReduce(0, 2, reducer); err != nil {
		t.Fatal(err)
	}
	mustStep(t, trainer)
	if progress, err := trainer.Progress(); err != nil || progress.Samples != 6 || reducer.floats == 0 || reducer.doubles == 0 {
		t.Errorf("%+v, %+v, %v", progress, reducer, err)
	}
	enough := errors.New("enough")
	reducer.meanwhile = func() error { return enough }
	_, err := trainer.Step(context.Background(), pictures, captions)
	wantStatus(t, err, ErrIO, "sum over ranks")
	if !errors.Is(err, enough) {
		t.Errorf("%v does not wrap what the reducer said", err)
	}
	reducer.meanwhile = func() error { panic("enough") }
	func() {
		defer func() {
			if value := recover(); value != "enough" {
				t.Errorf("recovered %v", value)
			}
		}()
		trainer.Step(context.Background(), pictures, captions)
	}()
	// In a step's own sum the trainer is in use, and closing it cancels the step.
	reducer.meanwhile = func() error {
		_, err := trainer.Step(context.Background(), pictures, captions)
		wantStatus(t, err, ErrBusy, "trainer")
		_, err = trainer.Progress()
		wantStatus(t, err, ErrBusy, "trainer")
		return trainer.Close()
	}
	_, err = trainer.Step(context.Background(), pictures, captions)
	wantStatus(t, err, ErrCancelled)
	if _, err := trainer.Progress(); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	alone := newTestTrainer(t, openTiny(t), StageC)
	wantStatus(t, alone.SetReduce(0, 2, nil), ErrInvalidArgument, "reducer")
	wantStatus(t, alone.SetReduce(2, 2, reducer), ErrInvalidArgument, "rank")
	wantStatus(t, alone.SetReduce(-1, 2, reducer), ErrInvalidArgument, "rank")
	if err := alone.SetReduce(0, 1, nil); err != nil {
		t.Error(err)
	}
	mustStep(t, alone)
}

func TestTrainContext(t *testing.T) {
	trainer := newTestTrainer(t, openTiny(t), StageC)
	pictures, captions := examples()
	ctx, cancel := context.WithCancel(context.Background())
	// The context ends in the midst of the step.
	reducer := &twice{meanwhile: func() error {
		cancel()
		time.Sleep(50 * time.Millisecond)
		return nil
	}}
	if err := trainer.SetReduce(0, 2, reducer); err != nil {
		t.Fatal(err)
	}
	_, err := trainer.Step(ctx, pictures, captions)
	if !errors.Is(err, context.Canceled) || !errors.Is(err, ErrCancelled) {
		t.Errorf("a step that its context ended: %v", err)
	}
	reducer.meanwhile = nil
	if metrics := mustStep(t, trainer); metrics.Step != 1 {
		t.Errorf("the cancelled step counts: %+v", metrics)
	}
}

// dataSet is a folder of pictures with captions, one of them broken.
func dataSet(t *testing.T) string {
	t.Helper()
	folder := t.TempDir()
	pictures, _ := examples()
	for i, picture := range pictures {
		file, err := os.Create(filepath.Join(folder, fmt.Sprintf("%d.png", i)))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(png.Encode(file, picture), file.Close()); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("caption %d\n", i)
		if err := os.WriteFile(filepath.Join(folder, fmt.Sprintf("%d.txt", i)), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"broken.png", "broken.txt"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte("no picture"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

func openTestLoader(t *testing.T, folder string, options ...LoaderOption) *Loader {
	t.Helper()
	loader, err := OpenLoader(folder, append([]LoaderOption{WithSide(64), WithBatchSize(2), WithDataSeed(3)}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loader.Close() })
	return loader
}

func TestLoaderGivesEveryRecordOnce(t *testing.T) {
	var skipped atomic.Int32
	loader := openTestLoader(t, dataSet(t), WithPasses(PassesOne), WithShuffle(0), WithCrop(CropCentre), WithFlip(0),
		WithLoaderThreads(2), WithRank(0, 1), WithLoaderSetting("prefetch", "1"), WithSkipLog(func(message string) {
			if strings.Contains(message, "broken.png") {
				skipped.Add(1)
			}
		}))
	pictures, _ := examples()
	var captions, keys []string
	for {
		batch, err := loader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		images, err := batch.Images()
		if err != nil || len(images) != len(batch.Captions) {
			t.Fatalf("%d pictures, %v", len(images), err)
		}
		for i, picture := range images {
			if !reflect.DeepEqual(picture, pictures[len(captions)+i]) {
				t.Errorf("picture %d is another", len(captions)+i)
			}
		}
		captions, keys = append(captions, batch.Captions...), append(keys, batch.Keys...)
		batch.Close()
		if _, err := batch.Images(); !errors.Is(err, ErrClosed) {
			t.Errorf("a closed batch: %v", err)
		}
	}
	if !reflect.DeepEqual(captions, []string{"caption 0", "caption 1", "caption 2"}) {
		t.Errorf("%q", captions)
	}
	if !reflect.DeepEqual(keys, []string{"0.png", "1.png", "2.png"}) {
		t.Errorf("%q", keys)
	}
	info, err := loader.Info()
	if err != nil || info.Unreadable != 1 || info.NoCaption != 0 || skipped.Load() != 1 {
		t.Errorf("%+v, %v, %d skipped", info, err, skipped.Load())
	}
	_, err = OpenLoader("/no/such/folder")
	wantStatus(t, err, ErrIO, "/no/such/folder")
	for name, option := range map[string]LoaderOption{
		"side":       WithSide(0),
		"crop":       WithCrop(7),
		"flip":       WithFlip(2),
		"batch_size": WithBatchSize(-1),
		"shuffle":    WithShuffle(-1),
		"passes":     WithPasses(7),
		"threads":    WithLoaderThreads(0),
		"rank":       WithRank(2, 2),
		"path":       WithPaths(""),
		"receive":    WithSkipLog(nil),
		"flavour":    WithLoaderSetting("flavour", "sweet"),
	} {
		_, err := OpenLoader("x", option)
		wantStatus(t, err, ErrInvalidArgument, name)
	}
}

func TestTrainFromLoader(t *testing.T) {
	model, folder := openTiny(t), dataSet(t)
	ctx := context.Background()
	whole, byHand := newTestTrainer(t, model, StageC), newTestTrainer(t, model, StageC)
	loader, other := openTestLoader(t, folder), openTestLoader(t, folder)
	for range 2 {
		want, err := whole.StepFrom(ctx, loader)
		if err != nil {
			t.Fatal(err)
		}
		batch, err := other.Next()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := byHand.StepBatch(ctx, batch); err != nil || got != want {
			t.Errorf("by hand: %+v, %v, from the loader: %+v", got, err, want)
		}
		samples, err := byHand.PrepareBatch(batch)
		if err != nil || samples.Len() != 2 {
			t.Errorf("%d samples, %v", samples.Len(), err)
		}
		batch.Close()
	}
	checkpoint := filepath.Join(t.TempDir(), "checkpoint")
	if err := errors.Join(byHand.Follow(other), byHand.Save(checkpoint)); err != nil {
		t.Fatal(err)
	}
	resumed, again := newTestTrainer(t, model, StageC), openTestLoader(t, folder)
	if err := errors.Join(resumed.Load(checkpoint), again.Resume(resumed)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		want, err := whole.StepFrom(ctx, loader)
		got, otherErr := resumed.StepFrom(ctx, again)
		if err != nil || otherErr != nil || want != got {
			t.Errorf("resumed: %+v, %v, whole: %+v, %v", got, otherErr, want, err)
		}
	}
	once := openTestLoader(t, folder, WithPasses(PassesOne), WithBatchSize(3))
	if _, err := whole.StepFrom(ctx, once); err != nil {
		t.Error(err)
	}
	if _, err := whole.StepFrom(ctx, once); err != io.EOF {
		t.Errorf("after the last batch: %v", err)
	}
	_, err := whole.StepFrom(ctx, nil)
	wantStatus(t, err, ErrInvalidArgument, "loader")
}

func TestTrainerOutlivesItsModel(t *testing.T) {
	model, err := Open(tinyModel)
	if err != nil {
		t.Fatal(err)
	}
	trainer, err := NewTrainer(model, StageC, quickTraining()...)
	if err != nil {
		t.Fatal(err)
	}
	model.Close()
	mustStep(t, trainer)
	runtime.GC()
	trainer.Close()
	trainer.Close()
	if _, err := NewTrainer(model, StageC); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed model: %v", err)
	}
}
