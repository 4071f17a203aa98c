#!/usr/bin/env python3
"""Holds LoRA adapters of Stage C to peft and diffusers, in both directions, on the v2 reference prior.

    python3 tests/reference/lora_parity.py [--library FILE] [--saved FOLDER]

Adapters that peft makes and diffusers saves, in each form that diffusers reads, are opened by libwuerstchen through the
option `lora`; one that libwuerstchen has trained and saved is loaded by diffusers. Each time a prediction of Stage C is
compared, largest difference over largest expected value. The trained one comes from `cargo test --release --test lora`,
or from `--saved`. The last line is "N passed, N failed". Needs the packages of `tests/reference/requirements.txt`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import diffusers
import peft
import torch
import transformers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_parity import FIXTURES, LIBRARY, Library, Model, round_frequencies_right, wuerstchen
from diffusers.training_utils import _collate_lora_metadata

PRIOR = FIXTURES / "v2" / "prior"
TOP = FIXTURES.parents[1]
MODULES = ["to_q", "to_k", "to_v", "to_out.0"]
FILE = "pytorch_lora_weights.safetensors"
NETWORK = 1e-5  # of the largest expected value
EFFECT = 0.01  # what an adapter must change, so that nothing is not compared with nothing


def fresh_prior():
    prior = wuerstchen.WuerstchenPrior.from_pretrained(PRIOR / "prior").eval()
    round_frequencies_right(prior)
    return prior


def inputs(prior):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, prior.config.c_in, 3, 4, generator=draw)
    return x, torch.tensor([0.9, 0.3]), torch.randn(2, 5, prior.config.c_cond, generator=draw)


def prediction(prior):
    with torch.inference_mode():
        return prior(*inputs(prior)).numpy()


def adapted_by_peft(**config):
    """A prior with a random adapter."""
    torch.manual_seed(5)
    prior = fresh_prior()
    prior.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": MODULES, **config}))
    for name, value in prior.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(value, std=0.3)
    return prior


def saved_by_pipeline(prior, folder, metadata=True):
    """As today's training scripts of diffusers save."""
    layers = get_peft_model_state_dict(prior)
    more = _collate_lora_metadata({"unet": prior}) if metadata else {}
    wuerstchen.WuerstchenPriorPipeline.save_lora_weights(folder, unet_lora_layers=layers, **more)
    return prior


def reloaded(file, change=None):
    """What diffusers makes of a file whose names and tensors `change` has changed."""
    tensors = load_file(file)
    if change:
        tensors = change(tensors)
        save_file(tensors, file)
    prior = fresh_prior()
    prefix = next(iter(tensors)).split(".")[0]
    prior.load_lora_adapter(tensors, prefix=prefix if prefix in ("prior", "unet") else None)
    return prior


def first_processors(tensors):
    """The names of diffusers before peft, that of its first training script of the Würstchen prior among them."""
    names = {".0.lora": ".lora", ".lora_A": "_lora.down", ".lora_B": "_lora.up"}
    names |= {"attention.": "attention.processor.", "prior.": "unet."}
    renamed = {}
    for name, value in tensors.items():
        for new, old in names.items():
            name = name.replace(new, old)
        renamed[name] = value
    return renamed


def without_peft(tensors):
    rename = lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up")  # noqa: E731
    return {rename(name): value for name, value in tensors.items()}


def case_alpha_in_the_header(folder):
    return saved_by_pipeline(adapted_by_peft(lora_alpha=6), folder)


def case_patterns_in_the_header(folder):
    patterns = {"alpha_pattern": {"blocks.5.attention.to_q": 2}, "rank_pattern": {"blocks.2.attention.to_out.0": 7}}
    return saved_by_pipeline(adapted_by_peft(lora_alpha=5, **patterns), folder)


def case_root_of_the_rank(folder):
    return saved_by_pipeline(adapted_by_peft(lora_alpha=3, use_rslora=True), folder)


def case_some_projections(folder):
    return saved_by_pipeline(adapted_by_peft(target_modules=["to_k", "to_q", "to_v", "add_k_proj"]), folder)


def case_saved_by_the_network(folder):
    prior = adapted_by_peft(lora_alpha=6)
    prior.save_lora_adapter(folder)
    return prior


def case_without_a_header(folder):
    saved_by_pipeline(adapted_by_peft(lora_alpha=6), folder, metadata=False)
    return reloaded(folder / FILE)


def case_names_without_peft(folder):
    saved_by_pipeline(adapted_by_peft(), folder, metadata=False)
    return reloaded(folder / FILE, without_peft)


def case_names_of_the_first_processors(folder):
    saved_by_pipeline(adapted_by_peft(), folder, metadata=False)
    return reloaded(folder / FILE, first_processors)


def pipeline_with(folder):
    pipeline = wuerstchen.WuerstchenPriorPipeline(
        tokenizer=transformers.CLIPTokenizer.from_pretrained(PRIOR / "tokenizer"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(PRIOR / "text_encoder"),
        prior=fresh_prior(),
        scheduler=diffusers.DDPMWuerstchenScheduler.from_pretrained(PRIOR / "scheduler"),
    )
    pipeline.load_lora_weights(folder)
    return pipeline.prior


def train(folder):
    """Lets the library's own test leave the adapter that it trains."""
    command = ["cargo", "test", "--release", "--quiet", "--test", "lora", "--", "--exact", "training_an_adapter"]
    environment = os.environ | {"LORA_SAVED_TO": str(folder)}
    subprocess.run(command, cwd=TOP, env=environment, check=True, stdout=subprocess.DEVNULL)


def compare(name, prior, adapter, library):
    """Whether the library and diffusers agree on a prior with an adapter."""
    want, base = prediction(prior), prediction(fresh_prior())
    effect = np.abs(want - base).max() / np.abs(want).max()
    if effect < EFFECT:
        raise AssertionError(f"the adapter changes {effect:.1e} of the prediction only")
    model = Model(library, PRIOR, lora=adapter)
    got = model.stage_c_predict(*(value.numpy() for value in inputs(prior)))
    model.close()
    error = np.abs(got - want).max() / np.abs(want).max()
    ok = bool(error <= NETWORK)
    print(f"{name:<34} changes {effect:.1e}, differs by {error:.1e}  {'ok' if ok else 'FAILED'}")
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--saved", type=Path, help="a folder with an adapter that the library has saved")
    args = parser.parse_args()
    library = Library(args.library)
    passed = failed = 0

    def run(name, folder, make):
        nonlocal passed, failed
        try:
            ok = compare(name, make(folder), folder, library)
        except Exception:
            print(f"FAILED: {name}")
            traceback.print_exc(file=sys.stdout)
            ok = False
        passed, failed = passed + ok, failed + (not ok)

    with tempfile.TemporaryDirectory() as top:
        for name, make in list(globals().items()):
            if name.startswith("case_"):
                folder = Path(top) / name
                folder.mkdir()
                run(name.removeprefix("case_").replace("_", " "), folder, make)
        saved = args.saved or Path(top)
        if not args.saved:
            train(saved)
        run("saved by the library, pipeline", saved, pipeline_with)
        run("saved by the library, network", saved, lambda folder: reloaded(folder / FILE))
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
