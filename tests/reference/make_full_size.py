#!/usr/bin/env python3
"""Writes a v1 model folder of the paper's size with random weights: for benchmarks and for tests of size.

    python3 tests/reference/make_full_size.py OUT_DIR [--dtype f32|f16|bf16] [--parts text,image,a,b,c]
                                                [--scale full|small]

The networks and their names come from `torch_v1.py` at the paper's configuration; names and shapes are held to
`tests/fixtures/shapes_full/`, which lists the published ones. Values are drawn so that activations stay of order one
through the whole pipeline; the pictures mean nothing. Tensors are written one by one, in under 1 GB of memory; f32
takes 8.9 GB of disk. The tokenizer is the test one (2,050 ids, all within the tower's vocabulary).
`--scale small` writes the same structure at about a hundredth of the size.
"""

import argparse
import functools
import json
import math
import shutil
import sys
from pathlib import Path

import torch

import torch_v1

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TOKENIZER = FIXTURES / "extra" / "tokenizer_full"
START_ID, END_ID = 2048, 2049  # of that tokenizer
SEED = 20230601
TEXT_LENGTH = 77

DTYPES = {"f32": (torch.float32, "F32"), "f16": (torch.float16, "F16"), "bf16": (torch.bfloat16, "BF16")}

# The published lists of names and shapes that a part must equal at full size.
PUBLISHED = {
    "a": "shapes_full/v1_stage_a.json",
    "b": "shapes_full/v1_stage_b.json",
    "c": "shapes_full/v1_stage_c.json",
    "image": "shapes/efficientnet_v2_l.json",
}


def image_blocks(rows):
    """EfficientNetV2 stages from rows of (type, expand_ratio, stride, in, out, layers)."""
    names = ("type", "expand_ratio", "stride", "in_channels", "out_channels", "layers")
    return [{**dict(zip(names, row)), "kernel": 3} for row in rows]


IMAGE_COMMON = {
    "_class_name": "EfficientNetEncoder", "c_latent": 16, "norm_eps": 0.001, "norm_momentum": 0.1,
    "stochastic_depth_prob": 0.2, "output_add": 0.0, "output_div": 1.0, "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}  # fmt: skip
TEXT_COMMON = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "max_position_embeddings": TEXT_LENGTH, "attention_dropout": 0.0, "bos_token_id": START_ID, "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}  # fmt: skip
STAGE_A_COMMON = {"_class_name": "VQModel", "levels": 2, "c_latent": 4, "scale_factor": 0.3764}
STAGE_B_COMMON = {
    "_class_name": "Paella", "c_r": 64, "patch_size": 2, "level_config": ["CT", "CTA", "CTA"], "effnet_embd": 16,
    "kernel_size": 3, "dropout": 0.0, "self_attn": True,
}  # fmt: skip
STAGE_C_COMMON = {"_class_name": "Prior", "c_in": 16, "c_r": 64, "dropout": 0.0}

CONFIGS = {
    "full": {
        "index": {"image_size": 512, "image_encoder_size": 384},
        "text": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "vocab_size": 49408, "projection_dim": 1024,
        },
        "image": {
            "stem_channels": 32, "last_channel": 1280,
            "blocks": image_blocks([
                ("FusedMBConv", 1, 1, 32, 32, 4), ("FusedMBConv", 4, 2, 32, 64, 7), ("FusedMBConv", 4, 2, 64, 96, 7),
                ("MBConv", 4, 2, 96, 192, 10), ("MBConv", 6, 1, 192, 224, 19), ("MBConv", 6, 2, 224, 384, 25),
                ("MBConv", 6, 1, 384, 640, 7),
            ]),
        },
        "a": {"bottleneck_blocks": 12, "c_hidden": 384, "codebook_size": 8192},
        "b": {
            "c_in": 256, "c_out": 256, "num_labels": 8192, "c_cond": 1024, "c_hidden": [640, 1280, 1280],
            "nhead": [-1, 16, 16], "blocks": [4, 12, 4], "byt5_embd": 1024,
        },
        "c": {"c": 1536, "c_cond": 1024, "depth": 32, "nhead": 24, "latent_size": [12, 12]},
    },
    "small": {
        "index": {"image_size": 128, "image_encoder_size": 96},
        "text": {
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 4096, "projection_dim": 128,
        },
        "image": {
            "stem_channels": 16, "last_channel": 160,
            "blocks": image_blocks([
                ("FusedMBConv", 1, 1, 16, 16, 1), ("FusedMBConv", 4, 2, 16, 24, 2), ("FusedMBConv", 4, 2, 24, 32, 2),
                ("MBConv", 4, 2, 32, 48, 2), ("MBConv", 6, 1, 48, 64, 2), ("MBConv", 6, 2, 64, 96, 2),
            ]),
        },
        "a": {"bottleneck_blocks": 2, "c_hidden": 96, "codebook_size": 1024},
        "b": {
            "c_in": 32, "c_out": 32, "num_labels": 1024, "c_cond": 128, "c_hidden": [80, 160, 160],
            "nhead": [-1, 4, 4], "blocks": [2, 4, 2], "byt5_embd": 128,
        },
        "c": {"c": 192, "c_cond": 128, "depth": 6, "nhead": 6, "latent_size": [3, 3]},
    },
}  # fmt: skip
COMMON = {"text": TEXT_COMMON, "image": IMAGE_COMMON, "a": STAGE_A_COMMON, "b": STAGE_B_COMMON, "c": STAGE_C_COMMON}


def state_of(part, config):
    """Names and shapes of a part's network, in its own order, without memory for the values."""
    with torch.device("meta"):
        return torch_v1.PARTS[part][1](**config).state_dict()


def check_published(part, state, file):
    """Exits unless names, order-free, and shapes equal the published list in `file`."""
    facts = json.loads((FIXTURES / file).read_text())
    want = {name: tuple(shape) for name, shape, _dtype in facts["tensors"]}
    got = {name: tuple(value.shape) for name, value in state.items()}
    if got != want:
        differ = sorted({*got.items()} ^ {*want.items()})
        sys.exit(f"part {part}: not the names and shapes of {file}: {differ[:6]}")


def random_tensor(part, name, meta):
    """Values for one tensor, of order one after every layer."""
    if not meta.is_floating_point():
        return torch.zeros(meta.shape, dtype=meta.dtype)  # BatchNorm's num_batches_tracked
    value = torch.empty(meta.shape)
    last = name.rsplit(".", 1)[-1]
    if last == "running_var":
        return value.uniform_(0.5, 1.5)
    if last in ("gamma", "beta", "gammas", "bias", "in_proj_bias", "running_mean"):
        return value.normal_(0, 0.02)
    if value.dim() == 1:  # the scale of an affine norm
        return value.normal_(1, 0.02)
    if "embedding" in name and part == "text":
        return value.normal_(0, 0.02)
    if name in ("in_mapper.0.weight", "vquantizer.codebook.weight"):
        return value.normal_(0, 1)
    if name.endswith(".mapper.weight"):  # the scales of the timestep blocks multiply: keep 1 + a near 1
        return value.normal_(0, 0.02)
    if part == "c" and name == "out.1.weight":  # Stage C divides by |1 - b|: keep b near 0
        return value.normal_(0, 0.005)
    fan_in = math.prod(value.shape[1:])
    return value.normal_(0, 1 / math.sqrt(fan_in))


def write_safetensors(path, state, dtype, draw):
    """A safetensors file, tensor by tensor: `draw(name, meta)` gives the values of each. Returns their bytes."""
    torch_dtype, dtype_name = DTYPES[dtype]
    sizes = {name: v.numel() * (torch_dtype.itemsize if v.is_floating_point() else 8) for name, v in state.items()}
    # Eight-byte integers first, then ascending names: every tensor is aligned to its element.
    order = sorted(state, key=lambda name: (state[name].is_floating_point(), name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        stored = dtype_name if state[name].is_floating_point() else "I64"
        header[name] = {
            "dtype": stored, "shape": list(state[name].shape), "data_offsets": [offset, offset + sizes[name]],
        }  # fmt: skip
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            value = draw(name, state[name])
            value = value.to(torch_dtype) if value.is_floating_point() else value
            file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return offset


def write_part(folder, file_name, state, dtype, draw):
    """The weights of a part, put in place when they are whole; says what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{file_name}.partial"
    size = write_safetensors(partial, state, dtype, draw)
    partial.rename(folder / file_name)
    parameters = sum(v.numel() for v in state.values() if v.is_floating_point())
    print(f"{folder.name:<18} {len(state):>5} tensors {parameters / 1e6:>8.1f} M values {size / 1e9:>6.2f} GB")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--parts", default="text,image,a,b,c")
    parser.add_argument("--scale", choices=CONFIGS, default="full")
    args = parser.parse_args()
    configs = CONFIGS[args.scale]

    for part in args.parts.split(","):
        folder_name, _ = torch_v1.PARTS[part]
        config = {**COMMON[part], **configs[part]}
        state = state_of(part, config)
        if args.scale == "full" and part in PUBLISHED:
            check_published(part, state, PUBLISHED[part])
        torch.manual_seed(SEED + list(COMMON).index(part))
        folder = args.out_dir / folder_name
        write_part(folder, "model.safetensors", state, args.dtype, functools.partial(random_tensor, part))
        write_json(folder / "config.json", config)

    shutil.copytree(TOKENIZER, args.out_dir / "tokenizer", dirs_exist_ok=True)
    index = {"_class_name": "WuerstchenV1Pipeline", "format_version": 1, **configs["index"], "text_length": TEXT_LENGTH}
    write_json(args.out_dir / "model_index.json", index)


if __name__ == "__main__":
    main()
