// Package wuerstchen generates pictures from text with the Würstchen family
// of models. It is a thin layer over the C library libwuerstchen and needs
// nothing but cgo.
//
//	model, err := wuerstchen.Open("examples/models/emoji-v1")
//	if err != nil { … }
//	defer model.Close()
//	images, err := model.Generate(ctx, "a red apple", wuerstchen.WithSeed(7))
//	if err != nil { … }
//	err = png.Encode(file, images[0])
//
// A stage of a model is trained with a [Trainer], on pictures at hand or from a
// [Loader]:
//
//	trainer, err := wuerstchen.NewTrainer(model, wuerstchen.StageC)
//	if err != nil { … }
//	loader, err := wuerstchen.OpenLoader("pictures", wuerstchen.WithSide(512))
//	if err != nil { … }
//	metrics, err := trainer.StepFrom(ctx, loader)
//	if err != nil { … }
//	err = trainer.Export("models/trained")
//
// # Threads
//
// A [Model] may be used by any number of goroutines at once. A [Job] may be
// too: its calls take turns. A [Trainer] or [Loader] serves one call at a time;
// others get [ErrBusy]. Close may come at any time, from any goroutine;
// calls that are running finish first, later ones return [ErrClosed].
//
// # Errors
//
// Every error of the library is an *[Error]. It unwraps to its [Status], so
// errors.Is(err, wuerstchen.ErrCancelled) works. A call that its context ended
// returns an error that also matches context.Canceled or
// context.DeadlineExceeded.
//
// # Building
//
// Inside the repository the package finds the header in include/ and the
// library in target/release/. For another place set CGO_CFLAGS=-I… and
// CGO_LDFLAGS="-L… -Wl,-rpath,…".
package wuerstchen

// #cgo CFLAGS: -I${SRCDIR}/../../include
// #cgo LDFLAGS: -L${SRCDIR}/../../target/release -Wl,-rpath,${SRCDIR}/../../target/release -lwuerstchen
// #include <wuerstchen.h>
import "C"

// Version tells the version of the library that is loaded, such as "0.1.0".
func Version() string {
	return C.GoString(C.wst_version())
}
