package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"fmt"
	"unsafe"
)

// Tensor is an array of numbers with a shape, for the calls that run one
// stage. Either Floats or Ints holds the numbers, in row-major order; pictures
// and latents are [N, C, H, W].
type Tensor struct {
	Shape  []int
	Floats []float32
	Ints   []int64
}

// NewTensor makes a tensor of floats.
func NewTensor(floats []float32, shape ...int) *Tensor {
	return &Tensor{Shape: shape, Floats: floats}
}

// NewIntTensor makes a tensor of whole numbers, such as tokens.
func NewIntTensor(ints []int64, shape ...int) *Tensor {
	return &Tensor{Shape: shape, Ints: ints}
}

// String is the type and the shape.
func (t *Tensor) String() string {
	if t == nil {
		return "no tensor"
	}
	if t.Ints != nil {
		return fmt.Sprintf("int64%v", t.Shape)
	}
	return fmt.Sprintf("float32%v", t.Shape)
}

// newTensor copies a tensor for C; the caller frees it. A nil tensor is a NULL.
func newTensor(name string, source *Tensor) (*C.wst_tensor, error) {
	if source == nil {
		return nil, nil
	}
	if source.Ints != nil && source.Floats != nil {
		return nil, argumentError(name, "either Floats or Ints", "both")
	}
	count := 1
	shape := make([]C.int64_t, 0, len(source.Shape)+1)
	for _, size := range source.Shape {
		if size < 0 || (size > 0 && count > (1<<40)/size) {
			return nil, argumentError(name, "a shape of sane sizes", source.Shape)
		}
		count *= size
		shape = append(shape, C.int64_t(size))
	}
	found := len(source.Floats) + len(source.Ints)
	if found != count {
		return nil, argumentError(name, fmt.Sprintf("%d numbers for shape %v", count, source.Shape), found)
	}
	dtype, data := C.wst_dtype(C.WST_F32), unsafe.Pointer(unsafe.SliceData(source.Floats))
	if source.Ints != nil {
		dtype, data = C.WST_I64, unsafe.Pointer(unsafe.SliceData(source.Ints))
	}
	var out *C.wst_tensor
	var cError *C.wst_error
	status := C.wst_tensor_new(dtype, unsafe.SliceData(shape), C.size_t(len(source.Shape)), data, &out, &cError)
	return out, check(status, &cError)
}

// goTensor copies a tensor of the library.
func goTensor(source *C.wst_tensor) (*Tensor, error) {
	rank := int(C.wst_tensor_rank(source))
	out := &Tensor{Shape: make([]int, rank)}
	count := 1
	for i, size := range unsafe.Slice(C.wst_tensor_shape(source), rank) {
		out.Shape[i] = int(size)
		count *= int(size)
	}
	data := unsafe.Pointer(C.wst_tensor_data(source))
	switch dtype := C.wst_tensor_dtype(source); dtype {
	case C.WST_F32:
		out.Floats = append([]float32{}, unsafe.Slice((*float32)(data), count)...)
	case C.WST_I64:
		out.Ints = append([]int64{}, unsafe.Slice((*int64)(data), count)...)
	default:
		return nil, &Error{Status: ErrUnsupported, Message: fmt.Sprintf("a tensor of dtype %d", int(dtype))}
	}
	return out, nil
}
