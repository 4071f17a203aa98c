"""libwuerstchen's C ABI for tests: numpy arrays in and out, in the reference's axis order. Only numpy is needed."""

import contextlib
import ctypes
from pathlib import Path

import numpy as np

TOP = Path(__file__).resolve().parents[2]
LIBRARY = TOP / "target" / "release" / "libwuerstchen.so"
F32, I64 = 0, 3  # wst_dtype
STAGE_A, STAGE_B, STAGE_C = 0, 1, 2  # wst_stage
DDPM, DDIM = 0, 1  # wst_sampler


class Library:
    """The functions of the shared library. Handles are c_void_p."""

    def __init__(self, path=LIBRARY):
        self.c = ctypes.CDLL(str(path))
        for name, result in {
            "wst_error_message": ctypes.c_char_p,
            "wst_tensor_rank": ctypes.c_size_t,
            "wst_tensor_nbytes": ctypes.c_size_t,
            "wst_tensor_shape": ctypes.POINTER(ctypes.c_int64),
            "wst_tensor_data": ctypes.c_void_p,
            "wst_model_options_new": ctypes.c_void_p,
            "wst_generate_options_image_count": ctypes.c_size_t,
            "wst_image_data": ctypes.c_void_p,
        }.items():
            getattr(self.c, name).restype = result

    def call(self, name, *arguments):
        """A call that can fail; its last parameter is the error."""
        error = ctypes.c_void_p()
        if getattr(self.c, name)(*arguments, ctypes.byref(error)) != 0:
            message = self.c.wst_error_message(error).decode()
            self.c.wst_error_free(error)
            raise RuntimeError(f"{name}: {message}")

    def make(self, name, *arguments):
        """A call whose last parameter but the error is the handle that it makes."""
        handle = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(handle))
        return handle

    def tensor(self, array):
        """A handle with a copy of the array; NULL for None."""
        if array is None:
            return None
        integer = np.issubdtype(array.dtype, np.integer)
        array = np.ascontiguousarray(array, np.int64 if integer else np.float32)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        data = array.ctypes.data_as(ctypes.c_void_p)
        return self.make("wst_tensor_new", I64 if integer else F32, shape, ctypes.c_size_t(array.ndim), data)

    def array(self, tensor):
        """A copy of the tensor, which is freed."""
        shape = self.c.wst_tensor_shape(tensor)[: self.c.wst_tensor_rank(tensor)]
        kind = {F32: np.float32, I64: np.int64}[self.c.wst_tensor_dtype(tensor)]
        data = ctypes.string_at(self.c.wst_tensor_data(tensor), self.c.wst_tensor_nbytes(tensor))
        self.c.wst_tensor_free(tensor)
        return np.frombuffer(data, kind).reshape(shape)

    def pixels(self, image):
        """A copy of the image, [H, W, 3] of bytes; the image is freed."""
        shape = (self.c.wst_image_height(image), self.c.wst_image_width(image), 3)
        data = ctypes.string_at(self.c.wst_image_data(image), int(np.prod(shape)))
        self.c.wst_image_free(image)
        return np.frombuffer(data, np.uint8).reshape(shape)


class Model:
    """An open model. `options` are strings by the names that wst_model_options_set takes."""

    def __init__(self, library, folder, **options):
        self.library = library
        handle = ctypes.c_void_p(library.c.wst_model_options_new())
        try:
            for key, value in options.items():
                library.call("wst_model_options_set", handle, key.encode(), str(value).encode())
            self.handle = library.make("wst_model_open", str(folder).encode(), handle)
        finally:
            library.c.wst_model_options_free(handle)

    def close(self):
        self.library.c.wst_model_free(self.handle)
        self.handle = None

    def compute(self, name, *arguments):
        return self.library.array(self.library.make(name, self.handle, *arguments))

    def run(self, name, *arrays, options=None):
        """A call on tensors and, where given, generate options."""
        tensors = [self.library.tensor(array) for array in arrays]
        try:
            return self.compute(name, *tensors, *([options] if options else []))
        finally:
            for tensor in tensors:
                self.library.c.wst_tensor_free(tensor)

    def tokenize(self, text, stage=STAGE_C):
        return self.compute("wst_tokenize", stage, text.encode())

    def encode_text(self, texts, stage=STAGE_C):
        pointers = (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
        return self.compute("wst_encode_text", stage, pointers, ctypes.c_size_t(len(texts)))

    def stage_c_predict(self, x, t, text):
        return self.run("wst_stage_c_predict", x, t, text)

    def stage_b_predict(self, x, t, latents, text):
        return self.run("wst_stage_b_predict", x, t, latents, text)

    def stage_a_decode(self, tokens_or_latents):
        return self.run("wst_stage_a_decode", tokens_or_latents)

    def stage_c_sample(self, text, negative_text=None, initial_noise=None, **settings):
        with self.generate_options(**settings) as options:
            return self.run("wst_stage_c_sample", text, negative_text, initial_noise, options=options)

    def stage_b_sample(self, latents, text, negative_text=None, **settings):
        with self.generate_options(**settings) as options:
            return self.run("wst_stage_b_sample", latents, text, negative_text, options=options)

    def generate(self, **settings):
        """Pictures, [N, H, W, 3] of bytes."""
        with self.generate_options(**settings) as options:
            count = self.library.c.wst_generate_options_image_count(options)
            images = (ctypes.c_void_p * count)()
            self.library.call("wst_generate", self.handle, options, images, ctypes.c_size_t(count))
            return np.stack([self.library.pixels(ctypes.c_void_p(image)) for image in images])

    @contextlib.contextmanager
    def generate_options(
        self, prompts=(), images_per_prompt=None, size=None, seed=None, stage_c=None, stage_c_sampler=None,
        stage_c_timesteps=None, stage_b=None,
    ):  # fmt: skip
        """Generate options: `prompts` of (text, negative text or None), `size` (width, height), `stage_c` and `stage_b`
        (steps, guidance). What is None stays as the model has it."""
        options = self.library.make("wst_generate_options_new", self.handle)

        def set_option(name, *values):
            self.library.call(f"wst_generate_options_{name}", options, *values)

        try:
            for text, negative in prompts:
                set_option("add_prompt", text.encode(), None if negative is None else negative.encode())
            if images_per_prompt is not None:
                set_option("set_images_per_prompt", images_per_prompt)
            if size is not None:
                set_option("set_size", *size)
            if seed is not None:
                set_option("set_seed", ctypes.c_uint64(seed))
            if stage_c is not None:
                set_option("set_stage_c", stage_c[0], ctypes.c_float(stage_c[1]))
            if stage_c_sampler is not None:
                set_option("set_stage_c_sampler", stage_c_sampler)
            if stage_c_timesteps is not None:
                times = (ctypes.c_float * len(stage_c_timesteps))(*stage_c_timesteps)
                set_option("set_stage_c_timesteps", times, ctypes.c_size_t(len(times)))
            if stage_b is not None:
                set_option("set_stage_b", stage_b[0], ctypes.c_float(stage_b[1]))
            yield options
        finally:
            self.library.c.wst_generate_options_free(options)
