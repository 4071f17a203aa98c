#!/usr/bin/env python3
"""Writes a v2 model folder of the published size with random weights: for benchmarks and for tests of size.

    python3 tests/reference/make_full_size_v2.py OUT_DIR [--dtype f32|f16|bf16] [--parts text,text-b,c,b,a]
                                                    [--scale full|small]

The folder is a combined one as diffusers lays it out; diffusers' own modules give the names and shapes, which are held
to `tests/fixtures/shapes_full/v2_*.json`. The text towers' names have the prefix that the published files have. Values
are drawn so that activations stay of order one and the pictures within the range of pixels; the pictures mean nothing.
Tensors are written one by one, in under 1 GB of memory; f32 takes 12 GB of disk. The tokenizer is the test one (2,050
ids, all within the towers' vocabulary). `--scale small` writes the same structure at about a hundredth of the size.
Needs the packages of `tests/reference/requirements.txt`.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch

from make_full_size import (
    DTYPES, END_ID, START_ID, TEXT_LENGTH, TOKENIZER, check_published, write_json, write_part,
)  # fmt: skip

SEED = 20230913
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
# The parts: folder, library, class, and the list of published names and shapes.
PARTS = {
    "text": ("prior_text_encoder", "transformers", "CLIPTextModel", None),
    "text-b": ("text_encoder", "transformers", "CLIPTextModel", None),
    "c": ("prior_prior", "diffusers", "WuerstchenPrior", "shapes_full/v2_prior.json"),
    "b": ("decoder", "diffusers", "WuerstchenDiffNeXt", "shapes_full/v2_decoder.json"),
    "a": ("vqgan", "diffusers", "PaellaVQModel", "shapes_full/v2_vqgan.json"),
}
WITHOUT_WEIGHTS = {
    "prior_tokenizer": ("transformers", "CLIPTokenizer"), "tokenizer": ("transformers", "CLIPTokenizer"),
    "prior_scheduler": ("diffusers", "DDPMWuerstchenScheduler"), "scheduler": ("diffusers", "DDPMWuerstchenScheduler"),
}  # fmt: skip

# What diffusers multiplies the prior's latents by before the decoder sees them.
LATENT_MEAN = 42.0
# The networks' outputs are a and b for each latent channel. The prior divides by 1 - b: its b is this much smaller than
# a, to stay off the pole. The decoder divides by b = sigmoid(..), whose bias this is.
PRIOR_B_SCALE, DECODER_B_BIAS = 0.3, 2.0

TEXT_COMMON = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "max_position_embeddings": TEXT_LENGTH, "attention_dropout": 0.0, "bos_token_id": START_ID, "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}  # fmt: skip
CONFIGS = {
    "full": {
        "text": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
            "vocab_size": 49408, "projection_dim": 1280,
        },
        "text-b": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "vocab_size": 49408, "projection_dim": 1024,
        },
        "c": {"c_in": 16, "c": 1536, "c_cond": 1280, "c_r": 64, "depth": 32, "nhead": 24},
        "b": {},
        "a": {},
    },
    "small": {
        "text": {
            "hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 5,
            "vocab_size": 4096, "projection_dim": 160,
        },
        "text-b": {
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 4096, "projection_dim": 128,
        },
        "c": {"c_in": 16, "c": 192, "c_cond": 160, "c_r": 64, "depth": 6, "nhead": 6},
        "b": {
            "c_cond": 128, "clip_embd": 128, "c_hidden": [40, 80, 160, 160], "nhead": [-1, 4, 8, 8],
            "blocks": [2, 2, 4, 2],
        },
        "a": {"bottleneck_blocks": 2, "embed_dim": 96, "num_vq_embeddings": 1024},
    },
}  # fmt: skip


def random_tensor(part, name, meta, small=0.02, latent_mean=LATENT_MEAN):
    """Values for one tensor, of order one after every layer. `small` is the spread of what adds to or multiplies the
    signal: biases, gammas, the scales of norms and of timesteps."""
    if not meta.is_floating_point():
        return torch.zeros(meta.shape, dtype=meta.dtype)  # BatchNorm's num_batches_tracked
    value = torch.empty(meta.shape)
    last = name.rsplit(".", 1)[-1]
    fan_in = math.prod(value.shape[1:])
    if last == "running_var":
        return value.uniform_(0.5, 1.5)
    if name == "out_block.0.bias":  # pixels are within 0..1
        return value.normal_(0.5, small)
    if name.startswith(("out.1.", "clf.1.")):  # rows of a, then of b
        value.normal_(0, small if last == "bias" else 0.2 / math.sqrt(fan_in))
        b = value[len(value) // 2 :]
        if name.startswith("out.1."):
            b *= PRIOR_B_SCALE
        elif last == "bias":
            b += DECODER_B_BIAS
        return value
    if last in ("gamma", "beta", "gammas", "bias", "running_mean"):
        return value.normal_(0, small)
    if value.dim() == 1:  # the scale of an affine norm
        return value.normal_(1, small)
    if "_embedding." in name:
        return value.normal_(0, small)
    if name == "vquantizer.embedding.weight":
        return value.normal_(0, 1)
    if name.endswith(".mapper.weight"):  # the scales of the timestep blocks multiply: keep 1 + a near 1
        return value.normal_(0, small)
    if name.startswith("effnet_mappers."):
        return value.normal_(0, 1 / (latent_mean * math.sqrt(fan_in)))
    if name == "out_block.0.weight":
        return value.normal_(0, 0.6 / math.sqrt(fan_in))
    return value.normal_(0, 1 / math.sqrt(fan_in))


def network_of(part, config):
    """diffusers' or transformers' own module, with their own initial values."""
    import diffusers
    import transformers

    _, library, kind, _ = PARTS[part]
    if library == "transformers":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT_COMMON, **config))
    return getattr(diffusers.pipelines.deprecated.wuerstchen, kind)(**config)


def write_network(out_dir, part, scale, dtype):
    folder_name, library, kind, published = PARTS[part]
    with torch.device("meta"):
        network = network_of(part, CONFIGS[scale][part])
    state, folder = network.state_dict(), out_dir / folder_name
    if library == "transformers":
        prefix = "text_model."
        state = {name if name.startswith(prefix) else prefix + name: value for name, value in state.items()}
        config = {**TEXT_COMMON, **CONFIGS[scale][part]}
    else:
        config = {"_class_name": kind, **{k: v for k, v in network.config.items() if not k.startswith("_")}}
    if scale == "full" and published:
        check_published(part, state, published)
    torch.manual_seed(SEED + list(PARTS).index(part))
    file_name = TRANSFORMERS_WEIGHTS if library == "transformers" else DIFFUSERS_WEIGHTS
    write_part(folder, file_name, state, dtype, lambda name, meta: random_tensor(part, name, meta))
    write_json(folder / "config.json", config)


def write_rest(out_dir):
    """Tokenizers, schedulers and the index."""
    special = {"bos_token": "<|startoftext|>", **{f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")}}
    for name, (_, kind) in WITHOUT_WEIGHTS.items():
        folder = out_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "CLIPTokenizer":
            shutil.copy(TOKENIZER / "tokenizer.json", folder)
            config = {"tokenizer_class": kind, "model_max_length": TEXT_LENGTH, **special}
            write_json(folder / "tokenizer_config.json", config)
        else:
            write_json(folder / "scheduler_config.json", {"_class_name": kind, "s": 0.008, "scaler": 1.0})
    parts = {folder: [library, kind] for folder, library, kind, _ in PARTS.values()}
    parts |= {name: list(which) for name, which in WITHOUT_WEIGHTS.items()}
    index = {"_class_name": "WuerstchenCombinedPipeline", **dict(sorted(parts.items()))}
    write_json(out_dir / "model_index.json", index)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--scale", choices=CONFIGS, default="full")
    args = parser.parse_args()

    for part in args.parts.split(","):
        write_network(args.out_dir, part, args.scale, args.dtype)
    write_rest(args.out_dir)


if __name__ == "__main__":
    main()
