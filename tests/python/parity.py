"""Compares what libwuerstchen returns through its C ABI with what the authors' code (v1) and diffusers (v2) returned.

    python3 tests/python/parity.py

The expected values are in tests/fixtures/cases (NOTES.md there says how they were made). Only numpy is needed.
The last line is "N passed, N failed".
"""

import inspect
import json
import struct
import sys
import traceback

import numpy as np

from libwuerstchen import DDIM, STAGE_B, STAGE_C, TOP, Library, Model

FIXTURES = TOP / "tests" / "fixtures"
TOLERANCE = 1e-4  # of the largest expected value, as NOTES.md suggests
# A test names the models that it takes by its parameters.
FOLDERS = {"model": "model", "v2": "v2/model", "v2_prior": "v2/prior", "v2_decoder": "v2/decoder"}
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
        close(model.stage_c_predict(*(case[f"{i}.{name}"] for name in ("x", "r", "c"))), case[f"{i}.noise"])


def test_stage_c_sample_ddim(model):
    settings, case = load_notes("stage_c_sample_ddim")["settings"], load_case("stage_c_sample_ddim")
    steps = settings["timesteps"]
    got = model.stage_c_sample(
        case["c"], np.zeros_like(case["c"]), case["init_noise"], stage_c=(steps, settings["cfg"]), stage_c_sampler=DDIM
    )
    close(got, case[f"x.{steps}"])


def test_stage_b_predict(model):
    case = load_case("stage_b_forward")
    for i in "01":
        names = ("tokens", "r", "effnet", "byt5")
        close(model.stage_b_predict(*(case[f"{i}.{name}"] for name in names)), case[f"{i}.logits"])


def test_stage_a_decode_latents(model):
    case = load_case("stage_a")
    close(model.stage_a_decode(case["quantised"]), case["decoded_quantised"])
    close(model.stage_a_decode(case["latents"]), case["decoded_latents"])


def test_stage_a_decode_tokens(model):
    case = load_case("stage_a")
    close(model.stage_a_decode(case["rand_indices"]), case["decoded_indices"])


def test_v2_tokenizers(v2):
    prompts = load_notes("v2_tokenizer")["prompts"]
    for prompt in (prompt for prompt in prompts if "\0" not in prompt["text"]):  # a C string cannot hold it
        for stage in (STAGE_C, STAGE_B):
            close(v2.tokenize(prompt["text"], stage), np.array(prompt["ids"]))


def test_v2_text_encoders(v2, v2_prior, v2_decoder):
    prompts = load_notes("v2_text_encoder")["settings"]["prompts"]
    case = load_case("v2_text_encoder")
    for model, stage, tower in [
        (v2, STAGE_C, "prior"), (v2, STAGE_B, "decoder"), (v2_prior, STAGE_C, "prior"), (v2_decoder, STAGE_B, "decoder")
    ]:  # fmt: skip
        close(model.encode_text(prompts, stage), case[f"{tower}.last_hidden_state"])


def test_v2_stage_c_predict(v2):
    case = load_case("v2_prior_forward")
    for i in "01":
        close(v2.stage_c_predict(*(case[f"{i}.{name}"] for name in ("x", "r", "c"))), case[f"{i}.noise"])


def test_v2_stage_c_predict_in_a_batch(v2_prior):
    settings, case = load_notes("v2_prior_batch")["settings"], load_case("v2_prior_batch")
    for i, t in enumerate(settings["timesteps"][:-1]):
        x = np.concatenate([case[f"latents.{i}" if i else "latents"]] * 2)
        close(v2_prior.stage_c_predict(x, np.full(len(x), t), case["text"]), case[f"pred.{i}"])


def test_v2_stage_b_predict(v2):
    case = load_case("v2_decoder_forward")
    for i in "01":
        names = ("x", "r", "effnet", "clip")
        close(v2.stage_b_predict(*(case[f"{i}.{name}"] for name in names)), case[f"{i}.noise"])


def test_v2_stage_a_decode(v2):
    case = load_case("v2_vqgan")
    scale = load_notes("v2_vqgan")["settings"]["scale_factor"]
    close(v2.stage_a_decode(case["latents"] / np.float32(scale)), case["decoded"])
    n, _, height, width = case["quantised"].shape
    close(v2.stage_a_decode(case["indices"].reshape(n, height, width)), case["decoded_quantised"])


def test_v2_steps_of_the_pipeline(v2):
    for name in ("v2_pipeline_cfg0", "v2_pipeline_cfg2"):
        settings, case = load_notes(name)["settings"], load_case(name)
        text, steps = case["prior.text"], settings["prior_num_inference_steps"]
        times = np.linspace(1, 0, steps + 1, dtype=np.float32)
        for i, t in enumerate(times[:-1]):
            x = np.concatenate([case[f"prior.latents.{i}" if i else "prior_latents"]] * 2)
            close(v2.stage_c_predict(x, np.full(2, t), text), case[f"prior.pred.{i}"])
        # The last step has no noise.
        last = case[f"prior.latents.{steps - 1}"]
        embeddings = v2.stage_c_sample(
            text[:1], text[1:], last, stage_c=(1, settings["prior_guidance_scale"]), stage_c_timesteps=times[-2:]
        )
        close(embeddings, case["image_embeddings"])

        text, steps = case["decoder.text"], settings["num_inference_steps"]
        for i, t in enumerate(np.linspace(1, 0, steps + 1, dtype=np.float32)[:-1]):
            x = np.concatenate([case[f"decoder.latents.{i}" if i else "decoder_latents"]] * len(text))
            got = v2.stage_b_predict(x, np.full(len(x), t), case["decoder.effnet"], text)
            close(got, case[f"decoder.pred.{i}"])

        pixels = v2.stage_a_decode(case[f"decoder.latents.{steps}"]).clip(0, 1).transpose(0, 2, 3, 1) * 255
        assert np.abs(pixels - case["image_u8"]).max() <= 0.51, "a pixel differs"


def main():
    library = Library()
    tests = [test for name, test in globals().items() if name.startswith("test_")]
    models, failed = {}, 0
    for test in tests:
        try:
            names = inspect.signature(test).parameters
            for name in names:
                models[name] = models.get(name) or Model(library, FIXTURES / FOLDERS[name])
            test(*(models[name] for name in names))
            print(f"ok      {test.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {test.__name__}")
            traceback.print_exc()
    print(f"{len(tests) - failed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
