package wuerstchen

import (
	"context"
	"errors"
	"image"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"
)

const emojiModel = "../../examples/models/emoji-v1"

// quick makes a picture in a few steps.
func quick(more ...GenerateOption) []GenerateOption {
	return append([]GenerateOption{
		WithStageC(3, 3), WithStageB(2, 2), WithSetting("seed", "7"),
	}, more...)
}

// endless runs for as long as a test waits.
func endless(more ...GenerateOption) []GenerateOption {
	return append([]GenerateOption{WithStageC(1000, 3)}, more...)
}

func open(t *testing.T, options ...ModelOption) *Model {
	t.Helper()
	model, err := Open(emojiModel, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { model.Close() })
	return model
}

func wantStatus(t *testing.T, err error, status Status, words ...string) {
	t.Helper()
	var detail *Error
	if !errors.Is(err, status) || !errors.As(err, &detail) {
		t.Fatalf("want the status %v, got %v", status, err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not name %q", err, word)
		}
	}
}

func TestVersionAndDevices(t *testing.T) {
	if strings.Count(Version(), ".") != 2 {
		t.Errorf("the version is %q", Version())
	}
	devices, err := Devices()
	if err != nil || len(devices) == 0 || devices[0].Name != "cpu" {
		t.Fatalf("the first device should be the cpu: %v, %v", devices, err)
	}
}

func TestInfo(t *testing.T) {
	info, err := open(t).Info()
	if err != nil {
		t.Fatal(err)
	}
	if info.Generation != 1 || info.DefaultWidth != 128 || info.DefaultHeight != 128 {
		t.Errorf("emoji-v1 is a 128 x 128 model of the first generation: %+v", info)
	}
	if info.LatentChannels != 16 || info.LatentHeight != 3 || info.LatentWidth != 3 {
		t.Errorf("the latents of emoji-v1 are 16 x 3 x 3: %+v", info)
	}
	if millions := float64(info.Parameters.StageB) / 1e6; math.Abs(millions-4.6) > 0.1 {
		t.Errorf("the README of emoji-v1 says 4.6 M parameters in Stage B, not %v M", millions)
	}
}

func TestGenerateMakesPicturesInOrder(t *testing.T) {
	model := open(t)
	ctx := context.Background()
	both, err := model.Generate(ctx, "a red apple", quick(WithPrompts("a blue car"), WithImagesPerPrompt(2))...)
	if err != nil {
		t.Fatal(err)
	}
	if len(both) != 4 {
		t.Fatalf("2 prompts x 2 make 4 pictures, not %d", len(both))
	}
	for i, picture := range both {
		if picture.Bounds() != image.Rect(0, 0, 128, 128) {
			t.Errorf("picture %d is %v", i, picture.Bounds())
		}
	}
	// Picture i uses the seed plus i, whatever its neighbours are.
	alone, err := model.Generate(ctx, "a blue car", quick(WithSeed(7+2))...)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(alone[0], both[2]) {
		t.Error("the first blue car differs from the one that is drawn alone")
	}
	if reflect.DeepEqual(both[0], both[1]) {
		t.Error("two seeds, the same picture")
	}
	file, err := os.Create(filepath.Join(t.TempDir(), "car.png"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := png.Encode(file, alone[0]); err != nil {
		t.Error(err)
	}
}

func TestEveryOption(t *testing.T) {
	canvas := image.NewGray(image.Rect(0, 0, 128, 128))
	var steps int
	pictures, err := open(t, WithDevice("cpu"), WithThreads(2), WithComputeDType(Float32), WithResidency(ResidencyAll)).
		Generate(context.Background(), "a red apple",
			WithNegativePrompt("a car"), WithImagesPerPrompt(1), WithSize(128, 64), WithSeed(math.MaxUint64),
			WithStageC(9, 2), WithStageCSampler(DDIM), WithStageCTimesteps(1, 0.5, 0),
			WithStageB(2, 1.5), WithStageBTemperature(1, 0.5), WithStageBChoice(Argmax),
			WithPreview(1), WithProgress(func(p Progress) {
				steps++
				if p.Stage == StageC && p.Steps != 2 {
					t.Errorf("three timesteps are two steps: %+v", p)
				}
			}))
	if err != nil {
		t.Fatal(err)
	}
	if pictures[0].Bounds() != image.Rect(0, 0, 128, 64) {
		t.Errorf("the picture is %v", pictures[0].Bounds())
	}
	if steps < 4 {
		t.Errorf("progress was called %d times in 2 + 2 steps", steps)
	}
	if _, err := open(t).Generate(context.Background(), "a red apple", quick(WithInitImage(canvas, 0.5))...); err != nil {
		t.Errorf("init image: %v", err)
	}
	if _, err := open(t).Generate(context.Background(), "a red apple", quick(WithInitImage(canvas, 1), WithMask(canvas))...); err != nil {
		t.Errorf("mask: %v", err)
	}
}

func TestErrorsNameWhatIsWrong(t *testing.T) {
	_, err := Open("no/such/folder")
	wantStatus(t, err, ErrIO, "no/such/folder")
	_, err = Open("zero\x00byte")
	wantStatus(t, err, ErrInvalidArgument, "path")
	_, err = Open(emojiModel, WithDevice("abacus"))
	wantStatus(t, err, ErrInvalidArgument, "abacus")
	_, err = Open(emojiModel, WithThreads(-1))
	wantStatus(t, err, ErrInvalidArgument, "threads", "-1")

	model := open(t)
	ctx := context.Background()
	for name, option := range map[string]GenerateOption{
		"images":    WithImagesPerPrompt(-1),
		"width":     WithSize(127, 128),
		"sampler":   WithStageCSampler(99),
		"choice":    WithStageBChoice(-1),
		"steps":     WithStageC(0, 3),
		"start":     WithStageBTemperature(float32(math.NaN()), 1),
		"timesteps": WithStageCTimesteps(0, 1),
		"mask":      WithMask(nil),
		"colour":    WithSetting("colour", "blue"),
		"receive":   WithProgress(nil),
	} {
		_, err := model.Generate(ctx, "a red apple", option)
		wantStatus(t, err, ErrInvalidArgument, name)
	}
	_, err = model.Generate(ctx, "broken \xff text")
	wantStatus(t, err, ErrInvalidArgument, "text", "UTF-8")
	_, err = model.Generate(ctx, "zero \x00 byte")
	wantStatus(t, err, ErrInvalidArgument, "prompt")
	if name := ErrOutOfMemory.Error(); name != "out of memory" {
		t.Errorf("the name of ErrOutOfMemory is %q", name)
	}
}

func TestLongPrompt(t *testing.T) {
	long := strings.Repeat("a red äpple 🍎 ", 700)[:10_000]
	if _, err := open(t).Generate(context.Background(), strings.ToValidUTF8(long, ""), quick()...); err != nil {
		t.Fatal(err)
	}
}

func TestGoroutinesShareAModel(t *testing.T) {
	model := open(t)
	want, err := model.Generate(context.Background(), "a red apple", quick()...)
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Add(1)
		go func() {
			defer group.Done()
			steps := 0
			got, err := model.Generate(context.Background(), "a red apple", quick(WithProgress(func(Progress) { steps++ }))...)
			if err != nil {
				t.Error(err)
				return
			}
			if !reflect.DeepEqual(got, want) {
				t.Error("a goroutine drew another picture")
			}
			if steps == 0 {
				t.Error("no progress")
			}
		}()
	}
	group.Wait()
}

func TestCancelWhileGenerating(t *testing.T) {
	model := open(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var cancelled time.Time
	_, err := model.Generate(ctx, "a red apple", endless(WithProgress(func(p Progress) {
		if p.Step == 2 {
			cancelled = time.Now()
			cancel()
		}
	}))...)
	wantStatus(t, err, ErrCancelled)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not match context.Canceled", err)
	}
	if late := time.Since(cancelled); late > 5*time.Second {
		t.Errorf("it took %v to stop", late)
	}
	if _, err := model.Generate(context.Background(), "a red apple", quick()...); err != nil {
		t.Errorf("the model should go on: %v", err)
	}
}

func TestDeadlineAndCancelBeforeTheStart(t *testing.T) {
	model := open(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := model.Generate(ctx, "a red apple", endless()...)
	wantStatus(t, err, ErrCancelled)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v does not match context.DeadlineExceeded", err)
	}
	// The context has ended by now.
	start := time.Now()
	_, err = model.Generate(ctx, "a red apple", endless()...)
	wantStatus(t, err, ErrCancelled)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v to notice", took)
	}
}

func TestPanicInProgressReachesTheCaller(t *testing.T) {
	model := open(t)
	defer func() {
		if value := recover(); value != "out of paper" {
			t.Errorf("recovered %v", value)
		}
		if _, err := model.Generate(context.Background(), "a red apple", quick()...); err != nil {
			t.Errorf("the model should go on: %v", err)
		}
	}()
	_, _ = model.Generate(context.Background(), "a red apple", endless(WithProgress(func(Progress) { panic("out of paper") }))...)
	t.Error("the panic got lost")
}

func TestUseAfterClose(t *testing.T) {
	model := open(t)
	for range 2 {
		if err := model.Close(); err != nil {
			t.Error(err)
		}
	}
	_, err := model.Generate(context.Background(), "a red apple")
	if !errors.Is(err, ErrClosed) {
		t.Errorf("Generate after Close: %v", err)
	}
	_, err = model.Tokenize(StageC, "a red apple")
	wantStatus(t, err, ErrInvalidArgument, "model")
	if _, err = model.Info(); !errors.Is(err, ErrClosed) {
		t.Errorf("Info after Close: %v", err)
	}
	if _, err = model.StartJob(context.Background(), "a red apple"); !errors.Is(err, ErrClosed) {
		t.Errorf("StartJob after Close: %v", err)
	}
}

func TestCloseWhileGenerating(t *testing.T) {
	model := open(t)
	started := make(chan struct{})
	var once sync.Once
	result := make(chan error, 1)
	go func() {
		_, err := model.Generate(context.Background(), "a red apple",
			quick(WithProgress(func(Progress) { once.Do(func() { close(started) }) }))...)
		result <- err
	}()
	select {
	case <-started:
	case err := <-result:
		t.Fatalf("it ended before the first step: %v", err)
	}
	model.Close()
	if err := <-result; err != nil {
		t.Errorf("a running call should finish: %v", err)
	}
}

func TestForgottenModelsAreFreed(t *testing.T) {
	freed := make(chan struct{})
	func() {
		model, err := Open(emojiModel)
		if err != nil {
			t.Fatal(err)
		}
		free := model.handle.free
		owner := model.handle
		owner.mutex.Lock()
		owner.free = func(pointer unsafe.Pointer) {
			free(pointer)
			close(freed)
		}
		owner.mutex.Unlock()
	}()
	for range 100 {
		runtime.GC()
		select {
		case <-freed:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Error("the garbage collector did not free the model")
}

func TestLog(t *testing.T) {
	var mutex sync.Mutex
	var lines []string
	model := open(t, WithLog(LogDebug, func(level LogLevel, message string) {
		mutex.Lock()
		defer mutex.Unlock()
		lines = append(lines, message)
		panic("a log receiver must not end the process")
	}))
	if _, err := model.Generate(context.Background(), "a red apple", quick()...); err != nil {
		t.Fatal(err)
	}
	mutex.Lock()
	defer mutex.Unlock()
	if len(lines) == 0 {
		t.Error("nothing was logged")
	}
}
