"""Checks tools/convert.py: checkpoints made from the reference data must come back as the folder they are from.

    python tests/reference/test_convert.py        (or pytest; needs torch and safetensors)
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import convert  # noqa: E402

MODEL = ROOT / "tests/fixtures/model"
EMOJI = ROOT / "examples/models/emoji-v1"
# What leaves no trace in shapes and is not asked for.
FREE = {"dropout", "latent_size", "stochastic_depth_prob", "_doc"}


def weights(part, prefix=""):
    return {prefix + key: value for key, value in load_file(part / "model.safetensors").items()}


def checkpoints(folder, model=MODEL, prefix="module."):
    """The authors' files, made from a model folder."""
    other = {key: value + 1 for key, value in weights(model / "stage_c").items()}
    torch.save({"state_dict": weights(model / "stage_a", prefix)}, folder / "a.pt")
    torch.save({"state_dict": weights(model / "stage_b", prefix), "iter": 3, "wandb_run_id": "x",
                "effnet_state_dict": weights(model / "image_encoder", prefix)}, folder / "b.pt")
    torch.save({"state_dict": other, "ema_state_dict": weights(model / "stage_c", prefix)}, folder / "c.pt")
    return ["--stage-a", str(folder / "a.pt"), "--stage-b", str(folder / "b.pt"), "--stage-c", str(folder / "c.pt"),
            "--text-encoder", str(model / "text_encoder"), "--tokenizer", str(model / "tokenizer")]


def check_folder(output, model, dtype=torch.float32):
    for part in ("stage_a", "stage_b", "stage_c", "image_encoder", "text_encoder"):
        got, want = weights(output / part), weights(model / part)
        assert got.keys() == want.keys(), part
        for key, value in want.items():
            expected = value.to(dtype) if value.is_floating_point() else value
            assert got[key].dtype == expected.dtype and torch.equal(got[key], expected), f"{part}: {key}"
        config, wanted = (json.loads((f / part / "config.json").read_text()) for f in (output, model))
        for name in set(wanted) - FREE:
            assert config[name] == wanted[name], f"{part}: {name}: {config[name]} is not {wanted[name]}"
    assert (output / "tokenizer/tokenizer.json").read_bytes() == (model / "tokenizer/tokenizer.json").read_bytes()
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "WuerstchenV1Pipeline" and index["defaults"]["stage_c_steps"] == 60


def run(*argv):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = convert.main([str(argument) for argument in argv])
    return status, errors.getvalue()


TINY = ["--stage-b-nhead=-1,4", "--stage-c-nhead=4", "--encoder-strides=1,2,2,2", "--encoder-output-add=1",
        "--encoder-output-div=42"]


def test_the_reference_model_comes_back():
    for dtype in ("f32", "f16", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            status, errors = run(*checkpoints(folder), "--output", folder / "out", "--dtype", dtype, *TINY)
            assert (status, errors) == (0, "")
            check_folder(folder / "out", MODEL, convert.DTYPES[dtype])


def test_the_bundled_model_comes_back():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        heads = ["--stage-b-nhead=-1,4", "--stage-c-nhead=6", "--encoder-strides=1,2,2,2,2"]
        status, errors = run(*checkpoints(folder, EMOJI, ""), "--output", folder / "out", "--dtype", "f16", *heads)
        assert (status, errors) == (0, "")
        check_folder(folder / "out", EMOJI, torch.float16)


def test_published_shapes_give_the_papers_arguments():
    """The configurations of the real models, from the stored names and shapes of their tensors."""
    def shapes(path):
        tensors = json.loads((ROOT / "tests/fixtures" / path).read_text())["tensors"]
        return convert.Shapes({name: torch.empty(shape, device="meta") for name, shape, _ in tensors}, path)

    args = convert.parse_arguments("--stage-a a --stage-b b --stage-c c --text-encoder t --output o".split())
    a = convert.stage_a_config(shapes("shapes_full/v1_stage_a.json"), args)
    assert (a["levels"], a["bottleneck_blocks"], a["c_hidden"], a["codebook_size"]) == (2, 12, 384, 8192)
    b = convert.stage_b_config(shapes("shapes_full/v1_stage_b.json"), args)
    assert b["c_hidden"] == [640, 1280, 1280] and b["nhead"] == [-1, 16, 16] and b["blocks"] == [4, 12, 4]
    assert b["level_config"] == ["CT", "CTA", "CTA"] and (b["byt5_embd"], b["c_r"], b["patch_size"]) == (1024, 64, 2)
    c = convert.stage_c_config(shapes("shapes_full/v1_stage_c.json"), args)
    assert (c["c"], c["depth"], c["nhead"], c["c_cond"], c["c_r"], c["c_in"]) == (1536, 32, 24, 1024, 64, 16)
    for name in ("efficientnet_v2_s", "efficientnet_v2_l"):
        wanted = json.loads((ROOT / f"tests/fixtures/shapes/{name}.json").read_text())["config"]
        got = convert.encoder_config(shapes(f"shapes/{name}.json"), args)
        for key in set(wanted) - FREE - {"output_add", "output_div"}:
            assert got[key] == wanted[key], f"{name}: {key}"
        assert (got["output_add"], got["output_div"]) == (0.0, 1.0)


def test_errors_say_what_is_wrong():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        good = checkpoints(folder)

        def fails(text, argv, name):
            status, errors = run(*argv, "--output", folder / name)
            assert status == 1 and text in errors, errors

        fails("--stage-b-nhead", good, "1")
        fails("divisor of 24", [*good, *TINY, "--stage-c-nhead=5"], "2")
        (folder / "bad.pt").write_bytes(b"nothing")
        fails("bad.pt", [*good, *TINY, "--stage-a", folder / "bad.pt"], "3")
        torch.save({"x": 1}, folder / "odd.pt")
        fails("expected ema_state_dict or state_dict, found x", [*good, *TINY, "--stage-c", folder / "odd.pt"], "4")
        torch.save({"state_dict": weights(MODEL / "stage_b")}, folder / "b2.pt")
        fails("effnet_state_dict", [*good, *TINY, "--stage-b", folder / "b2.pt"], "5")
        state = weights(MODEL / "stage_c")
        state["projection.bias"][0] = float("nan")
        torch.save({"state_dict": state}, folder / "nan.pt")
        fails("projection.bias: expected finite", [*good, *TINY, "--stage-c", folder / "nan.pt"], "6")
        fails("expected a folder with config.json", [*good, *TINY, "--text-encoder", folder / "none"], "7")
        fails("new or empty", [*good, *TINY], "1")
        status, _ = run(*good, *TINY, "--output", folder / "raw", "--no-ema")
        raw = weights(folder / "raw/stage_c")["projection.bias"]
        assert status == 0 and torch.equal(raw, weights(MODEL / "stage_c")["projection.bias"] + 1)


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"{name}: ok")
