"""Compares what libwuerstchen returns through its C ABI with what the authors' code returned.

The expected values are in tests/fixtures/cases (NOTES.md there says how they were made). Only numpy is needed.
The last line is "N passed, N failed".
"""

import ctypes
import json
import struct
import sys
import traceback
from pathlib import Path

import numpy as np

TOP = Path(__file__).resolve().parents[2]
FIXTURES = TOP / "tests" / "fixtures"
LIBRARY = TOP / "target" / "release" / "libwuerstchen.so"
TOLERANCE = 1e-4  # of the largest expected value, as NOTES.md suggests
F32, I64 = 0, 3  # wst_dtype
STAGE_C, DDIM = 2, 1  # wst_stage, wst_sampler
SAFETENSORS_TYPES = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def load_case(name):
    """The tensors of a case, read from its safetensors file: header length, JSON header, data."""
    data = (FIXTURES / "cases" / f"{name}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[key] = np.frombuffer(data[start:end], SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def load_notes(name):
    return json.loads((FIXTURES / "cases" / f"{name}.json").read_text())


class Library:
    """The C ABI, as far as this file needs it. Handles are c_void_p."""

    def __init__(self, path):
        self.c = ctypes.CDLL(str(path))
        for name, result in {
            "wst_error_message": ctypes.c_char_p,
            "wst_tensor_rank": ctypes.c_size_t,
            "wst_tensor_nbytes": ctypes.c_size_t,
            "wst_tensor_shape": ctypes.POINTER(ctypes.c_int64),
            "wst_tensor_data": ctypes.c_void_p,
            "wst_error_free": None,
            "wst_tensor_free": None,
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
        """A handle with a copy of the array; never freed, the process is short."""
        integer = np.issubdtype(array.dtype, np.integer)
        array = np.ascontiguousarray(array, np.int64 if integer else np.float32)
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        data = array.ctypes.data_as(ctypes.c_void_p)
        return self.make("wst_tensor_new", I64 if integer else F32, shape, ctypes.c_size_t(array.ndim), data)

    def array(self, tensor):
        shape = self.c.wst_tensor_shape(tensor)[: self.c.wst_tensor_rank(tensor)]
        kind = {F32: np.float32, I64: np.int64}[self.c.wst_tensor_dtype(tensor)]
        data = ctypes.string_at(self.c.wst_tensor_data(tensor), self.c.wst_tensor_nbytes(tensor))
        self.c.wst_tensor_free(tensor)
        return np.frombuffer(data, kind).reshape(shape)


class Model:
    """Every call takes and returns numpy arrays, in the reference's axis order."""

    def __init__(self, library, folder):
        self.library = library
        self.handle = library.make("wst_model_open", str(folder).encode(), None)

    def compute(self, name, *arguments):
        return self.library.array(self.library.make(name, self.handle, *arguments))

    def run(self, name, *arrays):
        return self.compute(name, *map(self.library.tensor, arrays))

    def tokenize(self, text):
        return self.compute("wst_tokenize", STAGE_C, text.encode())

    def encode_text(self, texts):
        pointers = (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
        return self.compute("wst_encode_text", STAGE_C, pointers, ctypes.c_size_t(len(texts)))

    def stage_c_sample(self, text, negative_text, initial_noise, steps, guidance, sampler):
        options = self.library.make("wst_generate_options_new", self.handle)
        self.library.call("wst_generate_options_set_stage_c", options, steps, ctypes.c_float(guidance))
        self.library.call("wst_generate_options_set_stage_c_sampler", options, sampler)
        tensors = map(self.library.tensor, (text, negative_text, initial_noise))
        return self.compute("wst_stage_c_sample", *tensors, options)


def close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape, f"expected the shape {want.shape}, got {got.shape}"
    if np.issubdtype(want.dtype, np.integer):
        assert (got == want).all(), f"{(got != want).sum()} of {want.size} differ"
        return
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= tolerance, f"differs by {error:.2e} of the largest value, allowed are {tolerance:.0e}"


def test_tokenizer(model):
    ids = load_case("text_encoder")["ids"]
    for prompt, want in zip(load_notes("text_encoder")["settings"]["prompts"], ids):
        close(model.tokenize(prompt), want)


def test_text_encoder(model):
    prompts = load_notes("text_encoder")["settings"]["prompts"]
    close(model.encode_text(prompts), load_case("text_encoder")["last_hidden_state"])


def test_stage_c_predict(model):
    case = load_case("stage_c_forward")
    for i in "01":
        got = model.run("wst_stage_c_predict", *(case[f"{i}.{name}"] for name in ("x", "r", "c")))
        close(got, case[f"{i}.noise"])


def test_stage_c_sample_ddim(model):
    settings, case = load_notes("stage_c_sample_ddim")["settings"], load_case("stage_c_sample_ddim")
    steps = settings["timesteps"]
    got = model.stage_c_sample(
        case["c"], np.zeros_like(case["c"]), case["init_noise"], steps, settings["cfg"], DDIM
    )
    close(got, case[f"x.{steps}"])


def test_stage_b_predict(model):
    case = load_case("stage_b_forward")
    for i in "01":
        names = ("tokens", "r", "effnet", "byt5")
        close(model.run("wst_stage_b_predict", *(case[f"{i}.{name}"] for name in names)), case[f"{i}.logits"])


def test_stage_a_decode_latents(model):
    case = load_case("stage_a")
    close(model.run("wst_stage_a_decode", case["quantised"]), case["decoded_quantised"])
    close(model.run("wst_stage_a_decode", case["latents"]), case["decoded_latents"])


def test_stage_a_decode_tokens(model):
    case = load_case("stage_a")
    close(model.run("wst_stage_a_decode", case["rand_indices"]), case["decoded_indices"])


def main():
    model = Model(Library(LIBRARY), FIXTURES / "model")
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    for test in tests:
        try:
            test(model)
            print(f"ok      {test.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {test.__name__}")
            traceback.print_exc()
    print(f"{len(tests) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
