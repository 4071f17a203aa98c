package wuerstchen

import (
	"context"
	"errors"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestJobMakesWhatGenerateMakes(t *testing.T) {
	model := open(t)
	ctx := context.Background()
	var steps atomic.Int32
	job, err := model.StartJob(ctx, "a red apple", quick(WithProgress(func(Progress) { steps.Add(1) }))...)
	if err != nil {
		t.Fatal(err)
	}
	defer job.Close()
	if err := job.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if _, done, err := job.Poll(); !done || err != nil {
		t.Errorf("after Wait: done %v, %v", done, err)
	}
	got, err := job.Images()
	if err != nil {
		t.Fatal(err)
	}
	want, err := model.Generate(ctx, "a red apple", quick()...)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Error("the job drew another picture")
	}
	if steps.Load() == 0 {
		t.Error("no progress")
	}
}

func TestJobCancel(t *testing.T) {
	model := open(t)
	job, err := model.StartJob(context.Background(), "a red apple", endless()...)
	if err != nil {
		t.Fatal(err)
	}
	defer job.Close()
	if _, err := job.Images(); !errors.Is(err, ErrBusy) {
		t.Errorf("Images of a running job: %v", err)
	}
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := job.Wait(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a wait that is cut short: %v", err)
	}
	job.Cancel()
	if err := job.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	_, err = job.Images()
	wantStatus(t, err, ErrCancelled)
}

func TestJobEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	job, err := open(t).StartJob(ctx, "a red apple", endless()...)
	if err != nil {
		t.Fatal(err)
	}
	defer job.Close()
	cancel()
	if err := job.Wait(context.Background()); err != nil {
		t.Error(err)
	}
	_, err = job.Images()
	wantStatus(t, err, ErrCancelled)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not match context.Canceled", err)
	}
}

func TestJobCloseWhileRunning(t *testing.T) {
	model := open(t)
	for range 20 {
		job, err := model.StartJob(context.Background(), "a red apple", endless()...)
		if err != nil {
			t.Fatal(err)
		}
		waited := make(chan error)
		go func() { waited <- job.Wait(context.Background()) }()
		job.Close()
		job.Close()
		// Either the wait saw the end of the job or that it was closed.
		if err := <-waited; err != nil && !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
		if _, err := job.Images(); !errors.Is(err, ErrClosed) {
			t.Errorf("Images after Close: %v", err)
		}
		job.Cancel()
	}
}

func TestJobClosedByItsOwnReceiver(t *testing.T) {
	started := make(chan *Job, 1)
	closed := make(chan struct{})
	var once sync.Once
	job, err := open(t).StartJob(context.Background(), "a red apple", endless(WithProgress(func(Progress) {
		once.Do(func() {
			(<-started).Close()
			close(closed)
		})
	}))...)
	if err != nil {
		t.Fatal(err)
	}
	started <- job
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("the receiver was not called")
	}
	select {
	case <-job.freed:
	case <-time.After(10 * time.Second):
		t.Error("the job was not freed")
	}
}

func TestForgottenJobsAreFreed(t *testing.T) {
	model := open(t)
	freed := func() chan struct{} {
		job, err := model.StartJob(context.Background(), "a red apple", endless()...)
		if err != nil {
			t.Fatal(err)
		}
		return job.freed
	}()
	for range 100 {
		runtime.GC()
		select {
		case <-freed:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Error("the garbage collector did not free the job")
}

func TestJobOutlivesItsModel(t *testing.T) {
	model := open(t)
	job, err := model.StartJob(context.Background(), "a red apple", quick()...)
	if err != nil {
		t.Fatal(err)
	}
	defer job.Close()
	model.Close()
	if err := job.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	if images, err := job.Images(); err != nil || len(images) != 1 {
		t.Errorf("%d pictures, %v", len(images), err)
	}
}

func TestPanicInAJobIsAnError(t *testing.T) {
	job, err := open(t).StartJob(context.Background(), "a red apple", endless(WithProgress(func(Progress) { panic("out of paper") }))...)
	if err != nil {
		t.Fatal(err)
	}
	defer job.Close()
	if err := job.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := job.Images(); err == nil {
		t.Error("the panic got lost")
	}
}
