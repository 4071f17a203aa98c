// Command generate draws pictures of prompts.
//
//	go run . --prompt "a red apple" --out apple.png
//
// Ctrl-C stops it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/png"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	wuerstchen "github.com/wuerstchen/wuerstchen/bindings/go"
)

type arguments struct {
	model, decoder, size, out, device string
	prompts                           []string
	steps, threads                    int
	seed                              uint64
}

func parse() (a arguments) {
	flag.StringVar(&a.model, "model", "examples/models/emoji-v1", "the model's folder")
	flag.StringVar(&a.decoder, "decoder", "", "the folder of its other half, where --model is the prior of v2")
	flag.Func("prompt", "what to draw; may be given more than once", func(text string) error {
		a.prompts = append(a.prompts, text)
		return nil
	})
	flag.StringVar(&a.size, "size", "", "WxH in pixels (default: the model's)")
	flag.IntVar(&a.steps, "steps", 0, "steps of Stage C (default: the model's)")
	flag.Uint64Var(&a.seed, "seed", 0, "the noise to start from")
	flag.StringVar(&a.out, "out", "out.png", "the file to write; several pictures get -1, -2, …")
	flag.StringVar(&a.device, "device", "auto", "auto, cpu, cuda, cuda:1")
	flag.IntVar(&a.threads, "threads", 0, "CPU threads (default: one per core)")
	flag.Parse()
	a.prompts = append(a.prompts, flag.Args()...)
	return a
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, parse()); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		if errors.Is(err, wuerstchen.ErrCancelled) {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, a arguments) error {
	if len(a.prompts) == 0 {
		return errors.New(`nothing to draw: --prompt "a red apple"`)
	}
	model, err := wuerstchen.Open(a.model, wuerstchen.WithDevice(a.device), wuerstchen.WithThreads(a.threads),
		wuerstchen.WithModelSetting("decoder_path", a.decoder))
	if err != nil {
		return err
	}
	defer model.Close()

	options := []wuerstchen.GenerateOption{wuerstchen.WithPrompts(a.prompts[1:]...), wuerstchen.WithSeed(a.seed)}
	if a.size != "" {
		var width, height int
		if _, err := fmt.Sscanf(a.size, "%dx%d", &width, &height); err != nil {
			return fmt.Errorf("--size: expected WxH, found %q", a.size)
		}
		options = append(options, wuerstchen.WithSize(width, height))
	}
	if a.steps > 0 {
		options = append(options, wuerstchen.WithSetting("stage_c_steps", fmt.Sprint(a.steps)))
	}
	if isTerminal(os.Stderr) {
		options = append(options, wuerstchen.WithProgress(drawBar))
		defer fmt.Fprint(os.Stderr, "\r\033[K")
	}

	pictures, err := model.Generate(ctx, a.prompts[0], options...)
	if err != nil {
		return err
	}
	for i, picture := range pictures {
		path := a.out
		if len(pictures) > 1 {
			extension := filepath.Ext(path)
			path = fmt.Sprintf("%s-%d%s", strings.TrimSuffix(path, extension), i+1, extension)
		}
		if err := write(path, picture); err != nil {
			return err
		}
		fmt.Println(path)
	}
	return nil
}

func write(path string, picture image.Image) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(png.Encode(file, picture), file.Close())
}

// drawBar draws one line such as "C [#####.....] 5/10  0.4 s".
func drawBar(p wuerstchen.Progress) {
	const width = 30
	done := 0
	if p.Steps > 0 {
		done = width * p.Step / p.Steps
	}
	fmt.Fprintf(os.Stderr, "\r\033[K%v [%s%s] %d/%d  %.1f s", p.Stage,
		strings.Repeat("#", done), strings.Repeat(".", width-done), p.Step, p.Steps, p.Elapsed.Seconds())
}

func isTerminal(file *os.File) bool {
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
