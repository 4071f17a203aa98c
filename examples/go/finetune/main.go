// Command finetune trains Stage C of a model on a folder of pictures with captions (NAME.png beside NAME.txt), and
// writes the model. Interrupted (also by Ctrl-C), the same command goes on from the last checkpoint, OUT.checkpoint.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"

	wuerstchen "github.com/wuerstchen/wuerstchen/bindings/go"
)

const (
	saveEvery = 100
	batchSize = 4
)

func main() {
	steps := flag.Uint64("steps", 1000, "optimiser steps")
	flag.Parse()
	if flag.NArg() != 3 {
		log.Fatal("usage: finetune [-steps N] MODEL PICTURES OUT")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, flag.Arg(0), flag.Arg(1), flag.Arg(2), *steps); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, folder, pictures, out string, steps uint64) error {
	model, err := wuerstchen.Open(folder)
	if err != nil {
		return err
	}
	defer model.Close()
	info, err := model.Info()
	if err != nil {
		return err
	}
	trainer, err := wuerstchen.NewTrainer(model, wuerstchen.StageC, wuerstchen.WithLearningRate(1e-4),
		wuerstchen.WithWarmupSteps(steps/10), wuerstchen.WithEMA(0.99, 0, 1))
	if err != nil {
		return err
	}
	defer trainer.Close()
	loader, err := wuerstchen.OpenLoader(pictures, wuerstchen.WithSide(info.DefaultWidth),
		wuerstchen.WithBatchSize(batchSize))
	if err != nil {
		return err
	}
	defer loader.Close()

	checkpoint := out + ".checkpoint"
	if _, err := os.Stat(checkpoint); err == nil {
		if err := trainer.Load(checkpoint); err != nil {
			return err
		}
		if err := loader.Resume(trainer); err != nil {
			return err
		}
	}
	for {
		progress, err := trainer.Progress()
		if err != nil {
			return err
		}
		if progress.Step >= steps {
			break
		}
		metrics, err := trainer.StepFrom(ctx, loader)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if metrics.Step%saveEvery == 0 || metrics.Step == steps {
			if err := trainer.Save(checkpoint); err != nil {
				return err
			}
			fmt.Printf("step %d: loss %.4f\n", metrics.Step, metrics.Loss)
		}
	}
	return trainer.Export(out)
}
