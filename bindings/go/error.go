package wuerstchen

// #include <stdlib.h>
// #include <wuerstchen.h>
import "C"

import (
	"context"
	"fmt"
	"strings"
	"unsafe"
)

// Status is the kind of an error. The Err constants are its values, and each
// is an error itself: errors.Is(err, wuerstchen.ErrCancelled).
type Status int32

// The statuses of the library.
const (
	// ErrInvalidArgument: an argument is out of range, of the wrong shape, or missing.
	ErrInvalidArgument Status = C.WST_INVALID_ARGUMENT
	// ErrIO: a file could not be opened, read, mapped or written.
	ErrIO Status = C.WST_IO
	// ErrFormat: a file was read but does not hold what it should.
	ErrFormat Status = C.WST_FORMAT
	// ErrUnsupported: a valid request that this build, device or model cannot serve.
	ErrUnsupported Status = C.WST_UNSUPPORTED
	// ErrOutOfMemory: memory ran out; the model stays usable.
	ErrOutOfMemory Status = C.WST_OUT_OF_MEMORY
	// ErrDevice: the compute device failed.
	ErrDevice Status = C.WST_DEVICE
	// ErrCancelled: the work was cancelled.
	ErrCancelled Status = C.WST_CANCELLED
	// ErrBusy: the work is still running, or another call uses the handle.
	ErrBusy Status = C.WST_BUSY
	// ErrInternal: a defect of the library; the handle can only be closed.
	ErrInternal Status = C.WST_INTERNAL
)

// Error is the name of the status, such as "cancelled".
func (s Status) Error() string {
	name := C.GoString(C.wst_status_name(C.wst_status(s)))
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "WST_"), "_", " "))
}

// Error is an error of the library. It unwraps to its Status.
type Error struct {
	Status  Status
	Message string
	// Place is the parameter, file, tensor or stage that the error is about; "" if there is none.
	Place string
}

// Error is the message of the library.
func (e *Error) Error() string { return "wuerstchen: " + e.Message }

// Unwrap returns the Status, for errors.Is.
func (e *Error) Unwrap() error { return e.Status }

// ErrClosed is returned by every call on something that was closed. It is an
// ErrInvalidArgument too.
var ErrClosed error = &Error{Status: ErrInvalidArgument, Message: "used after Close"}

// check turns what a call returned into an error, and frees the C error. It
// takes the address because Go does not say whether check(f(&e), e) reads e
// before or after the call of f.
func check(status C.wst_status, cError **C.wst_error) error {
	if status == C.WST_OK {
		return nil
	}
	if *cError == nil {
		return &Error{Status: Status(status), Message: Status(status).Error()}
	}
	defer C.wst_error_free(*cError)
	return &Error{
		Status:  Status(status),
		Message: C.GoString(C.wst_error_message(*cError)),
		Place:   C.GoString(C.wst_error_place(*cError)),
	}
}

// argumentError reports an argument that cannot be handed to C at all.
func argumentError(name, expected string, found any) error {
	return &Error{
		Status:  ErrInvalidArgument,
		Message: fmt.Sprintf("%s: expected %s, found %v", name, expected, found),
		Place:   name,
	}
}

// withContext adds the context's error to a cancellation that the context caused.
func withContext(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	if e, ok := err.(*Error); !ok || e.Status != ErrCancelled {
		return err
	}
	return fmt.Errorf("%w: %w", ctx.Err(), err)
}

// cString copies a string for C; the caller frees it. A zero byte would cut
// the text short without notice, so it is an error.
func cString(name, text string) (*C.char, error) {
	if at := strings.IndexByte(text, 0); at >= 0 {
		return nil, argumentError(name, "text without a zero byte", fmt.Sprintf("one at byte %d", at))
	}
	return C.CString(text), nil
}

func freeString(text *C.char) { C.free(unsafe.Pointer(text)) }

// cUint32 converts a count for C, which knows no negative ones.
func cUint32(name string, value int) (C.uint32_t, error) {
	if value < 0 || int64(value) > 1<<32-1 {
		return 0, argumentError(name, "a number between 0 and 4294967295", value)
	}
	return C.uint32_t(value), nil
}
