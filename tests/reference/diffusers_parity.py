#!/usr/bin/env python3
"""Holds the library to diffusers on random small v2 pipelines, through the C ABI, from prompt to picture.

    python3 tests/reference/diffusers_parity.py [--only NAME] [--cases N] [--seed S] [--size WxH] [--set KEY=JSON]...
                                                [--keep DIR] [--list] [--library FILE]
    python3 tests/reference/diffusers_parity.py --model DIR

Each case is a pipeline of diffusers with random weights, saved by diffusers and opened by libwuerstchen: the cases of
CASES, then `--cases N` ones with random dimensions, files and settings from `--seed`. `--set` replaces a dimension or
setting in every case, as `--set decoder.c_hidden=[8,12] --set images_per_prompt=3`; `--list` prints what there is to
set. `--keep DIR` keeps the folders. Without the library's file only diffusers' side runs. `--model DIR` instead takes a
combined folder that is there, of any size, and compares one evaluation of each of its networks for a picture of
1024 x 1024 pixels, one network in memory at a time.

Both draw the same noise: the library's generator is made again in `philox.py`, from its definition, and handed to
diffusers. So token numbers, text embeddings, single predictions, each step, whole walks and the pictures are compared,
largest difference over largest expected value. The last line is "N passed, N failed". Needs the packages of
`tests/reference/requirements.txt`.
"""

import argparse
import contextlib
import copy
import itertools
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import philox
from make_full_size import FIXTURES
from make_full_size_v2 import random_tensor

sys.path.insert(0, str(FIXTURES.parent / "python"))
from libwuerstchen import LIBRARY, STAGE_B, STAGE_C, Library, Model  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
import diffusers  # noqa: E402
import transformers  # noqa: E402
from diffusers.pipelines.deprecated import wuerstchen  # noqa: E402
from diffusers.pipelines.deprecated.wuerstchen import pipeline_wuerstchen, pipeline_wuerstchen_prior  # noqa: E402
from diffusers.schedulers import scheduling_ddpm_wuerstchen  # noqa: E402

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

TOKENIZERS = {"json": FIXTURES / "v2" / "model" / "tokenizer", "legacy": FIXTURES / "extra" / "tokenizer_legacy"}
VOCABULARY, START_ID, END_ID = 794, 792, 793  # of both
SMALL = 0.15  # the spread of biases and gammas: enough for each to matter
PUBLISHED_TIMES = pipeline_wuerstchen_prior.DEFAULT_STAGE_C_TIMESTEPS

# The largest difference, of the largest expected value. A walk amplifies: it has tens of evaluations one upon another,
# guidance multiplies their differences, and the first steps divide by the root of a small alpha.
NETWORK, WALK, PICTURE = 1e-5, 1e-4, 1 / 255

PROMPTS = [
    "a red apple", "", "  A  RED apple, on the\ttable!!", "naïve café, 42's & I'll", "日本 猫 🐈",
    "<|endoftext|> apple", "smiling cat with heart eyes, " * 20,
]  # fmt: skip

BASE = {
    "text": {"hidden_size": 20, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "text_b": {"hidden_size": 15, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3},
    "prior": {"c_in": 8, "c": 28, "c_r": 16, "depth": 2, "nhead": 4},
    "decoder": {
        "c_in": 4, "c_r": 16, "patch_size": 2, "c_cond": 14, "c_hidden": [8, 12, 16], "nhead": [-1, 3, 4],
        "blocks": [1, 1, 2], "level_config": ["CT", "CTA", "CTA"], "inject_effnet": [False, True, True],
        "kernel_size": 3,
    },
    "vqgan": {"levels": 2, "bottleneck_blocks": 2, "embed_dim": 16, "num_vq_embeddings": 64, "scale_factor": 0.3764},
    "prior_scheduler": {"scaler": 1.0, "s": 0.008},
    "scheduler": {"scaler": 1.0, "s": 0.008},
    # Of the pipelines; saved only with halves in folders of their own.
    "latent_mean": 42.0, "latent_std": 1.0, "resolution_multiple": 42.67, "latent_dim_scale": 10.67,
    "halves": False, "dtype": "float32", "shard": None, "tokenizers": ["json", "json"], "text_length": 77,
    "size": [128, 128], "prompts": [["a red apple", None]], "images_per_prompt": 1, "seed": 7,
    "steps": [6, 4], "guidance": [4.0, 0.0], "timesteps": None,
    # The picture is made with the library's own defaults for steps and guidance.
    "defaults": False,
}  # fmt: skip

# What each case has other than BASE, as dotted names.
CASES = {
    "defaults": {"timesteps": PUBLISHED_TIMES, "steps": [29, 12], "defaults": True},
    "guided": {
        "decoder.c_r": 17, "decoder.c_hidden": [6, 9, 10, 14], "decoder.nhead": [-1, 3, 2, 7],
        "decoder.blocks": [2, 1, 2, 1], "decoder.level_config": ["CT", "CTA", "CTA", "CTA"], "decoder.kernel_size": 5,
        "decoder.inject_effnet": [False, True, True, True], "prior.c_r": 9, "prior.depth": 3, "prior.c_in": 5,
        "size": [256, 128], "prompts": [["grinning face with big eyes", "sad, ugly"]], "images_per_prompt": 2,
        "guidance": [3.0, 2.0], "timesteps": [1.0, 0.85, 0.6, 0.25, 0.1, 0.0], "seed": 2**40 + 3,
    },
    "halves": {
        "halves": True, "dtype": "float16", "latent_mean": 17.0, "latent_std": 0.4, "resolution_multiple": 32.0,
        "latent_dim_scale": 4.0, "vqgan.levels": 3, "vqgan.embed_dim": 20, "vqgan.scale_factor": 0.6,
        "prior_scheduler": {"scaler": 2.0, "s": 0.02}, "scheduler": {"scaler": 0.6, "s": 0.004},
        "decoder.inject_effnet": [True, False, True], "decoder.level_config": ["CTA", "CT", "CCTA"],
        "decoder.nhead": [2, -1, 8], "size": [128, 256], "guidance": [4.0, 1.0],
    },
    "prompts": {
        "shard": "40KB", "tokenizers": ["json", "legacy"], "text.hidden_act": "quick_gelu", "text.hidden_size": 18,
        "text.num_attention_heads": 3, "prior.c": 15, "prior.nhead": 5, "decoder.c_in": 3, "decoder.patch_size": 1,
        "decoder.c_hidden": [10, 11], "decoder.nhead": [5, 1], "decoder.blocks": [1, 3],
        "decoder.level_config": ["CAT", "CTCA"], "decoder.inject_effnet": [True, True],
        "prompts": [["two cats", "blurry"], ["a red apple", None]], "images_per_prompt": 2, "guidance": [2.5, 1.5],
    },
    "one level": {
        "shard": "8KB", "dtype": "float16", "tokenizers": ["legacy", "json"], "text_length": 48,
        "decoder.c_hidden": [12], "decoder.nhead": [4], "decoder.blocks": [2], "decoder.level_config": ["CTA"],
        "decoder.inject_effnet": [True], "decoder.patch_size": 4, "decoder.kernel_size": 5, "vqgan.levels": 2,
        "vqgan.bottleneck_blocks": 1, "images_per_prompt": 3, "guidance": [1.0, 0.0], "seed": 2**64 - 2,
        "scheduler": {"scaler": 1.7, "s": 0.008},
    },
}  # fmt: skip


def set_dotted(settings, name, value):
    """Replaces `decoder.c_hidden`, or a whole section."""
    *sections, last = name.split(".")
    for section in sections:
        settings = settings[section]
    settings[last] = value


def settings_of(changes):
    settings = copy.deepcopy(BASE)
    for name, value in changes.items():
        set_dotted(settings, name, value)
    return settings


def random_changes(seed):
    """A case with dimensions and settings drawn at random, all of which diffusers can run. No width is below 8: a
    LayerNorm over 3 or 4 channels that happen to be alike magnifies rounding without limit, in diffusers as in ours."""
    draw = random.Random(seed)
    levels = draw.randint(1, 4)
    heads = [draw.randint(1, 4) for _ in range(levels)]
    configs = [draw.choice(["CT", "CTA", "CTA", "CAT", "CTCA", "C"]) for _ in range(levels)]
    prior_heads, text_heads, text_b_heads = (draw.randint(1, 4) for _ in range(3))
    changes = {
        "text.num_attention_heads": text_heads, "text.hidden_size": text_heads * draw.randint(8, 12),
        "text_b.num_attention_heads": text_b_heads, "text_b.hidden_size": text_b_heads * draw.randint(8, 12),
        "text.num_hidden_layers": draw.randint(1, 3), "text_b.num_hidden_layers": draw.randint(1, 3),
        "prior.c_in": draw.randint(2, 16), "prior.nhead": prior_heads, "prior.c": prior_heads * draw.randint(8, 14),
        "prior.c_r": draw.randint(4, 33), "prior.depth": draw.randint(1, 4),
        "decoder.c_in": draw.randint(1, 6), "decoder.c_r": draw.randint(4, 33), "decoder.c_cond": draw.randint(8, 30),
        "decoder.patch_size": draw.choice([1, 2, 4] if levels < 4 else [1, 2]),
        "decoder.c_hidden": [n * draw.randint(8, 11) for n in heads],
        "decoder.nhead": [n if "A" in config else -1 for n, config in zip(heads, configs)],
        "decoder.blocks": [draw.randint(1, 3) for _ in range(levels)], "decoder.level_config": configs,
        "decoder.inject_effnet": [draw.random() < 0.6 for _ in range(levels)],
        "decoder.kernel_size": draw.choice([1, 3, 5, 7]),
        "vqgan.bottleneck_blocks": draw.randint(1, 3), "vqgan.embed_dim": 2 * draw.randint(8, 14),
        "vqgan.scale_factor": draw.uniform(0.2, 1.2), "vqgan.num_vq_embeddings": draw.randint(2, 200),
        "prior_scheduler": {"scaler": draw.choice([1.0, 0.5, 2.0]), "s": draw.choice([0.008, 0.03])},
        "scheduler": {"scaler": draw.choice([1.0, 0.7, 1.5]), "s": draw.choice([0.008, 0.002])},
        "halves": draw.random() < 0.5, "dtype": draw.choice(["float32", "float16"]),
        "shard": draw.choice([None, "30KB"]), "tokenizers": draw.choices(["json", "legacy"], k=2),
        "size": [128 * draw.randint(1, 2), 128 * draw.randint(1, 2)], "images_per_prompt": draw.randint(1, 2),
        "prompts": draw.sample([["two cats", None], ["a red apple", "blurry"], ["", "smiling"]], draw.randint(1, 2)),
        "seed": draw.getrandbits(64), "steps": [draw.randint(2, 8), draw.randint(3, 6)],
        "guidance": [draw.choice([0.0, 1.0, 2.0, 5.0]), draw.choice([0.0, 1.0, 1.5])],
    }  # fmt: skip
    if changes["halves"]:
        changes |= {"latent_mean": draw.uniform(5, 50), "latent_std": draw.uniform(0, 2)}
    return changes


def round_frequencies_right(network):
    """torch's exp is off by one place at some frequencies of the time embedding, which depends on `c_r`, and the phase
    multiplies that by up to 10,000. There, and only there, the network gets an embedding with the right ones."""
    half, odd = network.c_r // 2, network.c_r % 2
    exponents = torch.arange(half).float().mul(-math.log(10000) / (half - 1))
    right = exponents.double().exp().float()
    if torch.equal(right, exponents.exp()):
        return

    def embed(r):
        phase = (r * 10000)[:, None] * right
        return torch.nn.functional.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, odd))

    network.gen_r_embedding = embed


class Reference:
    """The pipelines of diffusers for a case, with random weights."""

    def __init__(self, settings):
        self.settings = settings
        torch.manual_seed(settings["seed"] % 2**63)
        prior, decoder = settings["prior"], settings["decoder"]
        network = getattr(torch, settings["dtype"])
        text_width, text_b_width = settings["text"]["hidden_size"], settings["text_b"]["hidden_size"]
        self.parts = {
            "prior_text_encoder": self.tower(settings["text"]),
            "prior_prior": wuerstchen.WuerstchenPrior(**prior, c_cond=text_width),
            "text_encoder": self.tower(settings["text_b"]),
            "decoder": wuerstchen.WuerstchenDiffNeXt(
                **decoder, c_out=decoder["c_in"], effnet_embd=prior["c_in"], clip_embd=text_b_width
            ),
            "vqgan": wuerstchen.PaellaVQModel(**settings["vqgan"], latent_channels=decoder["c_in"]),
        }
        for name, part in self.parts.items():
            self.fill(name, part)
            part.eval().to(network)
        round_frequencies_right(self.parts["prior_prior"])
        round_frequencies_right(self.parts["decoder"])
        for name, kind in zip(("prior_tokenizer", "tokenizer"), settings["tokenizers"]):
            self.parts[name] = transformers.CLIPTokenizer.from_pretrained(TOKENIZERS[kind])
            self.parts[name].model_max_length = settings["text_length"]
        for name in ("prior_scheduler", "scheduler"):
            self.parts[name] = diffusers.DDPMWuerstchenScheduler(**settings[name])
        self.network = network
        self.prior = wuerstchen.WuerstchenPriorPipeline(
            **{name: self.parts[f"prior_{name}"] for name in ("tokenizer", "text_encoder", "prior", "scheduler")},
            **{name: settings[name] for name in ("latent_mean", "latent_std", "resolution_multiple")},
        )
        names = ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")
        self.decoder = wuerstchen.WuerstchenDecoderPipeline(
            **{name: self.parts[name] for name in names}, latent_dim_scale=settings["latent_dim_scale"]
        )
        for pipeline in (self.prior, self.decoder):
            pipeline.set_progress_bar_config(disable=True)

    def tower(self, dims):
        config = transformers.CLIPTextConfig(**{
            "hidden_act": "gelu", "vocab_size": VOCABULARY, "max_position_embeddings": self.settings["text_length"],
            "bos_token_id": START_ID, "eos_token_id": END_ID, "pad_token_id": END_ID,
            "projection_dim": dims["hidden_size"], **dims,
        })  # fmt: skip
        return transformers.CLIPTextModel(config)

    def fill(self, part, module):
        """Weights of order one, and none at its trivial initial value."""
        which = {"prior_prior": "c", "decoder": "b", "vqgan": "a"}.get(part, "text")
        mean = self.settings["latent_mean"]
        for name, value in module.state_dict().items():
            value.copy_(random_tensor(which, name, value, small=SMALL, latent_mean=mean))

    def save(self, folder):
        """Saves as diffusers does and gives (path, model options) for the library. Afterwards the networks compute in
        float32, with the weights as they were saved."""
        options = {"variant": "fp16"} if self.network == torch.float16 else {}
        if self.settings["shard"]:
            options["max_shard_size"] = self.settings["shard"]
        if self.settings["halves"]:
            path = (folder / "prior", {"decoder_path": folder / "decoder"})
            self.prior.save_pretrained(folder / "prior", **options)
            self.decoder.save_pretrained(folder / "decoder", **options)
            tokenizers = (folder / "prior" / "tokenizer", folder / "decoder" / "tokenizer")
        else:
            path = (folder, {})
            wuerstchen.WuerstchenCombinedPipeline(**self.parts).save_pretrained(folder, **options)
            tokenizers = (folder / "prior_tokenizer", folder / "tokenizer")
        for saved, kind in zip(tokenizers, self.settings["tokenizers"]):
            if kind == "legacy":  # today's transformers would write the newer form
                shutil.rmtree(saved)
                shutil.copytree(TOKENIZERS[kind], saved)
                config = json.loads((saved / "tokenizer_config.json").read_text())
                config["model_max_length"] = self.settings["text_length"]
                (saved / "tokenizer_config.json").write_text(json.dumps(config))
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                part.float()
        return path

    def ids(self, tokenizer, text):
        length = self.settings["text_length"]
        ids = self.parts[tokenizer](text, padding="max_length", max_length=length, truncation=True)
        return np.array(ids["input_ids"])

    def text(self, texts, which):
        """Text embeddings of stage `which`, as its pipeline makes them."""
        if which == STAGE_C:
            embeddings = self.prior.encode_prompt("cpu", 1, False, prompt=list(texts))[0]
        else:
            embeddings = self.decoder.encode_prompt(list(texts), "cpu", 1, False)[0]
        return embeddings


@contextlib.contextmanager
def philox_noise(seeds, start, step, channels):
    """Makes diffusers draw the library's noise. The decoder pipeline asks for 4 channels whatever its network has."""
    steps = itertools.count()

    def first(shape, **_):
        return torch.from_numpy(philox.noise(seeds, start, 0, (shape[0], channels, *shape[2:])))

    def further(shape, **_):
        return torch.from_numpy(philox.noise(seeds, step, next(steps), tuple(shape)))

    with contextlib.ExitStack() as stack:
        for module, draw in [
            (pipeline_wuerstchen_prior, first), (pipeline_wuerstchen, first), (scheduling_ddpm_wuerstchen, further)
        ]:  # fmt: skip
            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


class Trace:
    """The calls of a network and the latents after each step of a pipeline."""

    def __init__(self, network):
        self.calls, self.latents = [], []
        self.hook = network.register_forward_hook(self.record, with_kwargs=True)

    def record(self, _network, arguments, keywords, output):
        inputs = {"x": arguments[0], **keywords}
        self.calls.append(({name: value.numpy().copy() for name, value in inputs.items()}, output.numpy().copy()))

    def after_step(self, _pipeline, _step, _t, values):
        self.latents.append(values["latents"].clone())
        return {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


class Table:
    """Every comparison, printed as it is made."""

    def __init__(self, with_library):
        self.with_library, self.passed, self.failed = with_library, 0, 0
        self.case = None
        self.row("case", "quantity", "shape", "error", "limit", "")

    @staticmethod
    def row(case, quantity, shape, error, limit, verdict):
        print(f"{case:<12} {quantity:<34} {shape:<19} {error:>9} {limit:>9}  {verdict}", flush=True)

    def verdict(self, quantity, shape, error, limit, ok):
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        self.row(self.case, quantity, "x".join(map(str, shape)), error, limit, "ok" if ok else "FAILED")

    def check(self, quantity, want, limit, compute):
        """Compares what `compute` gives; without the library only looks at the expected value."""
        want = want.numpy() if isinstance(want, torch.Tensor) else want
        if not np.isfinite(want).all() or (want.size and want.dtype != np.int64 and np.ptp(want) == 0):
            raise AssertionError(f"{quantity}: diffusers' own value is not finite or all the same")
        if not self.with_library:
            largest = f"{np.abs(want).max():.3g}"
            return self.row(self.case, quantity, "x".join(map(str, want.shape)), largest, "", "diffusers alone")
        try:
            got = compute()
        except Exception as error:
            self.verdict(quantity, want.shape, "-", f"{limit:.0e}", False)
            return print(f"             {type(error).__name__}: {error}")
        if got.shape != want.shape:
            self.verdict(quantity, want.shape, "-", f"{limit:.0e}", False)
            return print(f"             the library gives the shape {got.shape}")
        if np.issubdtype(want.dtype, np.integer):
            wrong = int((got != want).sum())
            return self.verdict(quantity, want.shape, f"{wrong} differ", "0", wrong == 0)
        error = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
        self.verdict(quantity, want.shape, f"{error:.1e}", f"{limit:.0e}", bool(error <= limit))


class Comparison:
    """All comparisons of one case. `model` is None without the library."""

    def __init__(self, table, reference, model):
        self.table, self.reference, self.model = table, reference, model
        self.settings = reference.settings
        self.guidance_c, self.guidance_b = self.settings["guidance"]
        self.generator = torch.Generator().manual_seed(1)
        self.prompts = [tuple(pair) for pair in self.settings["prompts"]]
        self.count = len(self.prompts) * self.settings["images_per_prompt"]
        self.seeds = [(self.settings["seed"] + i) % 2**64 for i in range(self.count)]

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def everything(self):
        self.tokens_and_text()
        self.predictions_of_prior()
        self.predictions_of_decoder()
        self.decoding()
        text = self.text_of_images(STAGE_C, self.guidance_c > 1)
        embeddings = self.walk_of_prior(*text)
        text = self.text_of_images(STAGE_B, self.guidance_b > 1)
        latents = self.walk_of_decoder(embeddings, *text)
        self.pictures(latents)

    def tokens_and_text(self):
        for stage, tokenizer in ((STAGE_C, "prior_tokenizer"), (STAGE_B, "tokenizer")):
            who = "prior" if stage == STAGE_C else "decoder"
            want = np.stack([self.reference.ids(tokenizer, text) for text in PROMPTS])
            tokenize = lambda: np.stack([self.model.tokenize(text, stage) for text in PROMPTS])  # noqa: E731
            self.table.check(f"{who}: tokens", want, 0, tokenize)
            want = self.reference.text(PROMPTS, stage)
            self.table.check(f"{who}: text embeddings", want, NETWORK, lambda: self.model.encode_text(PROMPTS, stage))

    def predictions_of_prior(self):
        prior = self.reference.parts["prior_prior"]
        channels, width = prior.config.c_in, prior.config.c_cond
        for times, grid, tokens in [((1.0, 0.5), (3, 3), 77), ((0.013,), (2, 5), 6), ((0.0,), (7, 4), 1)]:
            x, t = self.random(len(times), channels, *grid), torch.tensor(times)
            text = self.random(len(times), tokens, width)
            arrays = [value.numpy() for value in (x, t, text)]
            self.table.check(
                f"prior: prediction, t {times}", prior(x, t, text), NETWORK, lambda: self.model.stage_c_predict(*arrays)
            )

    def predictions_of_decoder(self):
        decoder = self.reference.parts["decoder"]
        config = decoder.config
        multiple = config.patch_size * 2 ** (len(config.c_hidden) - 1)
        for times, sides, image, tokens in [
            ((1.0, 0.4), (2, 2), (3, 3), 77), ((0.02,), (3, 2), (7, 5), 6), ((0.0,), (1, 4), (4, 2), 1)
        ]:  # fmt: skip
            x = self.random(len(times), config.c_in, *(multiple * side for side in sides))
            image = self.random(len(times), config.effnet_embd, *image) * self.settings["latent_mean"]
            t, text = torch.tensor(times), self.random(len(times), tokens, config.clip_embd)
            arrays = [value.numpy() for value in (x, t, image, text)]
            want = decoder(x, t, image, text)
            self.table.check(
                f"decoder: prediction, t {times}", want, NETWORK, lambda: self.model.stage_b_predict(*arrays)
            )

    def decoding(self):
        vqgan = self.reference.parts["vqgan"]
        channels, codes = vqgan.config.latent_channels, vqgan.config.num_vq_embeddings
        latents = self.random(2, channels, 6, 5)
        want = vqgan.decode(latents * vqgan.config.scale_factor).sample
        self.table.check("vqgan: latents", want, NETWORK, lambda: self.model.stage_a_decode(latents.numpy()))
        tokens = torch.randint(0, codes, (2, 5, 7), generator=self.generator)
        rows = vqgan.vquantizer.embedding(tokens).permute(0, 3, 1, 2)
        want = vqgan.decode(rows).sample
        self.table.check("vqgan: tokens", want, NETWORK, lambda: self.model.stage_a_decode(tokens.numpy()))

    def text_of_images(self, stage, guided):
        """Text embeddings of every image, and of what it steers away from; None without guidance."""
        embed = lambda texts: self.reference.text(texts, stage).repeat_interleave(  # noqa: E731
            self.settings["images_per_prompt"], 0
        )
        texts, negatives = zip(*self.prompts)
        return embed(texts), embed([text or "" for text in negatives]) if guided else None

    def walk_of_prior(self, text, negative):
        settings, pipeline, prior = self.settings, self.reference.prior, self.reference.parts["prior_prior"]
        width, height = settings["size"]
        steps, times = settings["steps"][0], settings["timesteps"]
        common = {
            "prompt_embeds": text, "negative_prompt_embeds": negative, "height": height, "width": width,
            "guidance_scale": self.guidance_c,
        }  # fmt: skip
        channels = prior.config.c_in
        with philox_noise(self.seeds, philox.LATENT_START, philox.LATENT_STEP, channels), Trace(prior) as trace:
            embeddings = pipeline(
                **common, num_inference_steps=steps, timesteps=times, callback_on_step_end=trace.after_step
            ).image_embeddings
        size = embeddings.shape[2:]
        start = torch.from_numpy(philox.noise(self.seeds, philox.LATENT_START, 0, (self.count, channels, *size)))
        before = [start, *trace.latents[:-1]]

        arrays = (text.numpy(), None if negative is None else negative.numpy())
        for i, ((inputs, output), x) in enumerate(zip(trace.calls, before)):
            predict = lambda: self.model.stage_c_predict(inputs["x"], inputs["r"], inputs["c"])  # noqa: E731
            self.table.check(f"prior: step {i}, prediction", output, NETWORK, predict)
            # One step from here to the end, where no noise comes in.
            to_zero = [float(inputs["r"][0]), 0.0]
            want = pipeline(**common, latents=x, timesteps=to_zero).image_embeddings
            sample = lambda: self.model.stage_c_sample(  # noqa: E731
                *arrays, x.numpy(), stage_c=(1, self.guidance_c), stage_c_timesteps=to_zero
            )
            self.table.check(f"prior: step {i}, to the end", want, WALK, sample)
        options = {
            "seed": settings["seed"], "size": settings["size"], "stage_c": (steps, self.guidance_c),
            "stage_c_timesteps": times,
        }  # fmt: skip
        for name, noise in (("noise handed over", start.numpy()), ("noise by seed", None)):
            sample = lambda: self.model.stage_c_sample(*arrays, noise, **options)  # noqa: E731
            self.table.check(f"prior: walk, {name}", embeddings, WALK, sample)
        return embeddings

    def walk_of_decoder(self, embeddings, text, negative):
        """diffusers takes one prompt at a time here, with any number of image embeddings."""
        settings, pipeline, decoder = self.settings, self.reference.decoder, self.reference.parts["decoder"]
        steps, each = settings["steps"][1], settings["images_per_prompt"]
        latents, seeds = [], self.seeds
        for i, (prompt, avoided) in enumerate(self.prompts):
            images = slice(i * each, (i + 1) * each)
            noise = philox_noise(seeds[images], philox.DECODER_START, philox.DECODER_STEP, decoder.config.c_in)
            with noise, Trace(decoder) as trace:
                latents.append(
                    pipeline(
                        embeddings[images], prompt, num_inference_steps=steps, guidance_scale=self.guidance_b,
                        negative_prompt=avoided, output_type="latent",
                    ).images
                )  # fmt: skip
            for step, (inputs, output) in enumerate(trace.calls):
                values = [inputs[name] for name in ("x", "r", "effnet", "clip")]
                self.table.check(
                    f"decoder: prompt {i}, step {step}", output, NETWORK, lambda: self.model.stage_b_predict(*values)
                )
        latents = torch.cat(latents)
        arrays = (embeddings.numpy(), text.numpy(), None if negative is None else negative.numpy())
        options = {"seed": settings["seed"], "stage_b": (steps, self.guidance_b)}
        sample = lambda: self.model.stage_b_sample(*arrays, **options)  # noqa: E731
        self.table.check("decoder: walk", latents, WALK, sample)
        return latents

    def pictures(self, latents):
        settings, vqgan = self.settings, self.reference.parts["vqgan"]
        pixels = vqgan.decode(latents * vqgan.config.scale_factor).sample
        self.table.check("vqgan: of the walk", pixels, NETWORK, lambda: self.model.stage_a_decode(latents.numpy()))
        outside = float(((pixels < 0) | (pixels > 1)).float().mean())
        if outside > 0.8:
            raise AssertionError(f"a test of little worth: {outside:.0%} of the pixels are black or white")
        want = pixels.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
        options = {
            "prompts": self.prompts, "images_per_prompt": settings["images_per_prompt"], "seed": settings["seed"],
            "size": settings["size"],
        }  # fmt: skip
        if not settings["defaults"]:
            (steps_c, steps_b), times = settings["steps"], settings["timesteps"]
            options |= {"stage_c": (steps_c, self.guidance_c), "stage_c_timesteps": times}
            options["stage_b"] = (steps_b, self.guidance_b)
        self.picture("picture", want, lambda: self.model.generate(**options))

    def picture(self, quantity, want, generate):
        """Within one step of 8 bits, whatever the largest value is."""
        scaled = lambda: generate() / np.float32(255)  # noqa: E731
        self.table.check(quantity, want / want.max(), PICTURE / want.max() * 1.001, lambda: scaled() / want.max())


def run_case(table, name, settings, library, keep):
    table.case = name
    with contextlib.ExitStack() as stack:
        folder = keep / name.replace(" ", "-") if keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reference = Reference(settings)
        path, options = reference.save(folder)
        model = Model(library, path, **options) if library else None
        with torch.inference_mode():
            Comparison(table, reference, model).everything()
        if model:
            model.close()


def compare_folder(table, folder, library):
    """One evaluation of each network of a combined folder."""
    table.case = folder.name
    model = Model(library, folder)
    generator = torch.Generator().manual_seed(1)
    random_of = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    kinds = {"prior_prior": wuerstchen.WuerstchenPrior, "decoder": wuerstchen.WuerstchenDiffNeXt}
    kinds |= {"vqgan": wuerstchen.PaellaVQModel}

    def load(part):
        kind = kinds.get(part, transformers.CLIPTextModel)
        return kind.from_pretrained(folder / part, dtype=torch.float32).eval()

    texts = ["a red bird on a branch, oil painting", ""]
    for part, tokenizer, stage in [
        ("prior_text_encoder", "prior_tokenizer", STAGE_C),
        ("text_encoder", "tokenizer", STAGE_B),
    ]:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / tokenizer)
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        want = load(part)(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
        table.check(part, want, NETWORK, lambda: model.encode_text(texts, stage))

    prior = load("prior_prior")
    arrays = [random_of(2, prior.config.c_in, 24, 24), torch.tensor([0.9, 0.2]), random_of(2, 77, prior.config.c_cond)]
    want = prior(*arrays)
    del prior
    table.check("prior_prior", want, NETWORK, lambda: model.stage_c_predict(*(x.numpy() for x in arrays)))

    decoder = load("decoder")
    x, image = random_of(1, decoder.config.c_in, 256, 256), random_of(1, decoder.config.effnet_embd, 24, 24) * 42 - 1
    arrays = [x, torch.tensor([0.5]), image, random_of(1, 77, decoder.config.clip_embd)]
    want = decoder(*arrays)
    del decoder
    table.check("decoder", want, NETWORK, lambda: model.stage_b_predict(*(x.numpy() for x in arrays)))

    vqgan = load("vqgan")
    want = vqgan.decode(x * vqgan.config.scale_factor).sample
    table.check("vqgan", want, NETWORK, lambda: model.stage_a_decode(x.numpy()))
    model.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one case of CASES, or 'random'")
    parser.add_argument("--cases", type=int, default=3, help="how many random cases, 3 by default")
    parser.add_argument("--seed", type=int, default=1, help="of the random cases")
    parser.add_argument("--size", type=lambda text: [int(side) for side in text.split("x")], help="such as 256x128")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="replaces a dimension or setting"
    )
    parser.add_argument("--keep", type=Path, help="where to keep the folders of the pipelines")
    parser.add_argument("--list", action="store_true", help="print what can be set, and the cases")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--model", type=Path, help="a combined folder to compare instead of the cases")
    args = parser.parse_args()
    if args.list:
        print(json.dumps({"settings": BASE, "cases": CASES}, indent=1))
        return 0

    philox.check_known_answers()
    cases = {name: dict(changes) for name, changes in CASES.items() if args.only in (None, name)}
    if args.only in (None, "random"):
        cases |= {f"random {args.seed + i}": random_changes(args.seed + i) for i in range(args.cases)}
    if not cases:
        sys.exit(f"--only: there is no case {args.only}")
    library = Library(args.library) if args.library.exists() else None
    table = Table(library is not None)
    if args.model:
        cases = {}
        with torch.inference_mode():
            compare_folder(table, args.model, library)
    for name, changes in cases.items():
        try:
            settings = settings_of(changes)
            for word in args.set:
                key, value = word.split("=", 1)
                set_dotted(settings, key, json.loads(value))
            settings["size"] = args.size or settings["size"]
            run_case(table, name, settings, library, args.keep)
        except Exception:
            table.failed += 1
            print(f"FAILED: case {name}")
            traceback.print_exc(file=sys.stdout)
    print(f"{table.passed} passed, {table.failed} failed")
    return table.failed > 0


if __name__ == "__main__":
    sys.exit(main())
