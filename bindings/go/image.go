package wuerstchen

// #include <wuerstchen.h>
import "C"

import (
	"image"
	"image/color"
	"image/draw"
	"unsafe"
)

// newImage copies a picture for C; the caller frees it. What is transparent
// becomes white.
func newImage(name string, picture image.Image) (*C.wst_image, error) {
	if picture == nil {
		return nil, argumentError(name, "a picture", "nil")
	}
	bounds := picture.Bounds()
	width, height := bounds.Dx(), bounds.Dy()
	if width <= 0 || height <= 0 {
		return nil, argumentError(name, "a picture with pixels", bounds)
	}
	flat := image.NewRGBA(image.Rect(0, 0, width, height))
	draw.Draw(flat, flat.Rect, image.NewUniform(color.White), image.Point{}, draw.Src)
	draw.Draw(flat, flat.Rect, picture, bounds.Min, draw.Over)
	rgb := make([]byte, 0, 3*width*height)
	for i := 0; i < len(flat.Pix); i += 4 {
		rgb = append(rgb, flat.Pix[i], flat.Pix[i+1], flat.Pix[i+2])
	}
	var out *C.wst_image
	var cError *C.wst_error
	status := C.wst_image_new(C.uint32_t(width), C.uint32_t(height),
		(*C.uint8_t)(unsafe.Pointer(&rgb[0])), C.size_t(3*width), &out, &cError)
	return out, check(status, &cError)
}

// newImages copies pictures for C; the caller frees them with freeImages, also
// after an error.
func newImages(name string, pictures []image.Image) ([]*C.wst_image, error) {
	out := make([]*C.wst_image, 0, len(pictures))
	for _, picture := range pictures {
		copied, err := newImage(name, picture)
		if err != nil {
			return out, err
		}
		out = append(out, copied)
	}
	return out, nil
}

// freeImages frees what is there: a failed call leaves NULLs.
func freeImages(images []*C.wst_image) {
	for _, each := range images {
		C.wst_image_free(each)
	}
}

// goImage copies a picture of the library.
func goImage(source *C.wst_image) *image.NRGBA {
	width, height := int(C.wst_image_width(source)), int(C.wst_image_height(source))
	rgb := unsafe.Slice((*byte)(unsafe.Pointer(C.wst_image_data(source))), 3*width*height)
	out := image.NewNRGBA(image.Rect(0, 0, width, height))
	for i, j := 0, 0; i < len(rgb); i, j = i+3, j+4 {
		out.Pix[j], out.Pix[j+1], out.Pix[j+2], out.Pix[j+3] = rgb[i], rgb[i+1], rgb[i+2], 0xff
	}
	return out
}

// goImages copies pictures of the library.
func goImages(sources []*C.wst_image) []image.Image {
	out := make([]image.Image, len(sources))
	for i, source := range sources {
		out[i] = goImage(source)
	}
	return out
}
