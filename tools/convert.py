#!/usr/bin/env python3
"""Converts the authors' published v1 checkpoints into a model folder of this library.

    python tools/convert.py --stage-a vqgan_f4_v1_500k.pt --stage-b model_stage_b.pt --stage-c model_stage_c.pt \
        --text-encoder CLIP-ViT-H-14-laion2B-s32B-b79K --output wuerstchen-v1 [--dtype f16]

  --stage-a        {"state_dict": ...}, of VQModel
  --stage-b        {"ema_state_dict" or "state_dict": ..., "effnet_state_dict": ...}, of Paella and the image encoder
  --stage-c        {"ema_state_dict" or "state_dict": ...}, of Prior
  --text-encoder   a folder as transformers saves it: config.json, model.safetensors or pytorch_model.bin, and the
                   tokenizer's files (or name their folder with --tokenizer). A whole CLIP will do; its picture half
                   is left out.

EMA weights are taken where a file has them (--no-ema: not). The arguments of the constructors are inferred from the
shapes of the tensors. Three things leave no trace in a shape: the number of attention heads, the strides of the image
encoder, and what is done to its output. The first two are known for the published models and are asked for
(--stage-b-nhead, --stage-c-nhead, --encoder-strides) for any other. The image encoder of the v1 of the paper gives
its output as it is, --encoder-output-add 0 --encoder-output-div 1, the default; weights that were trained after the
authors' change "0 1 scaling of data for v2" (commit 62fcb00) need 1 and 42.

Needs torch and safetensors. Nothing in a checkpoint is executed (weights_only).
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Heads per level of Stage B and of Stage C, by the widths of the published models.
STAGE_B_NHEAD = {(640, 1280, 1280): [-1, 16, 16]}
STAGE_C_NHEAD = {1536: 24, 1280: 16}
# Strides of the stages of EfficientNetV2 S and L, by their number.
ENCODER_STRIDES = {6: [1, 2, 2, 2, 1, 2], 7: [1, 2, 2, 2, 1, 2, 1]}
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]


class ConversionError(Exception):
    """What is wrong with the input, for the user."""


# --- reading ---

def load_pt(path):
    """A checkpoint as a dictionary, without running anything that it holds."""
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path}: expected a file, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConversionError(f"{path}: expected a checkpoint of plain tensors, found: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


def state_of(content, names, path):
    """The first of the named dictionaries; a bare dictionary of tensors is taken as it is."""
    for name in names:
        if isinstance(content.get(name), dict):
            return strip(content[name], f"{path}: {name}")
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return strip(content, path)
    raise ConversionError(f"{path}: expected {' or '.join(names)}, found {', '.join(map(str, list(content)[:10]))}")


def strip(state, place):
    """Keys without the prefixes of DistributedDataParallel and torch.compile; values must be tensors."""
    out = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(f"{place}: {key}: expected a tensor, found {type(value).__name__}")
        while key.startswith(("module.", "_orig_mod.")):
            key = key.split(".", 1)[1]
        out[key] = value
    return out


class Shapes:
    """The tensors of one part, with errors that name what is missing."""

    def __init__(self, state, place):
        self.state, self.place = state, place

    def __call__(self, key, rank):
        if key not in self.state:
            raise ConversionError(f"{self.place}: {key}: expected a tensor, found none of this name")
        shape = list(self.state[key].shape)
        if len(shape) != rank:
            raise ConversionError(f"{self.place}: {key}: expected {rank} dimensions, found {shape}")
        return shape

    def has(self, key):
        return key in self.state

    def numbers(self, pattern):
        """The sorted numbers that `pattern`, which has one group, finds in the keys."""
        return sorted({int(m.group(1)) for m in (re.match(pattern, key) for key in self.state) if m})


# --- configurations, inferred from shapes ---

def stage_a_config(shapes, args):
    downs = shapes.numbers(r"down_blocks\.(\d+)\.weight$")
    levels = len(downs) + 1
    residual = shapes.numbers(r"up_blocks\.(\d+)\.gammas$")
    ups = shapes.numbers(r"up_blocks\.(\d+)\.weight$")
    deepest = [n for n in residual if not ups or n < ups[0]]
    codebook, c_latent = shapes("vquantizer.codebook.weight", 2)
    c_hidden = shapes("up_blocks.0.0.weight", 4)[0]
    if shapes("in_block.1.weight", 4)[0] * 2 ** (levels - 1) != c_hidden:
        raise ConversionError(f"{shapes.place}: expected widths that double per level, found {levels} levels")
    return {"_class_name": "VQModel", "levels": levels, "bottleneck_blocks": len(deepest), "c_hidden": c_hidden,
            "c_latent": c_latent, "codebook_size": codebook, "scale_factor": args.scale_factor}


def block_kind(shapes, prefix):
    for kind, key in (("C", "depthwise.weight"), ("A", "kv_mapper.1.weight"), ("T", "mapper.weight"),
                      ("F", "channelwise.0.weight")):
        if shapes.has(f"{prefix}.{key}"):
            return kind
    raise ConversionError(f"{shapes.place}: {prefix}: expected a block of kind C, T, A or F, found another")


def repeated(sequence):
    """The shortest text that gives `sequence` when repeated, and how often."""
    for length in range(1, len(sequence) + 1):
        if len(sequence) % length == 0 and sequence[:length] * (len(sequence) // length) == sequence:
            return sequence[:length], len(sequence) // length
    raise ConversionError("expected at least one block in every level, found none")


def stage_b_config(shapes, args):
    num_labels, c_in = shapes("in_mapper.0.weight", 2)
    c_cond, byt5_embd = shapes("byt5_mapper.weight", 2)
    width, unshuffled = shapes("embedding.1.weight", 4)[:2]
    patch_size = round((unshuffled / c_in) ** 0.5)
    c_hidden, blocks, level_config, c_r, kernel = [width], [], [], 64, 3
    for level in shapes.numbers(r"down_blocks\.(\d+)\."):
        if level > 0:
            c_hidden.append(shapes(f"down_blocks.{level}.0.1.weight", 4)[0])
        sequence = ""
        for number in shapes.numbers(rf"down_blocks\.{level}\.(\d+)\."):
            prefix = f"down_blocks.{level}.{number}"
            if level > 0 and number == 0:
                continue
            sequence += block_kind(shapes, prefix)
            if sequence[-1] == "T":
                c_r = shapes(f"{prefix}.mapper.weight", 2)[1]
            if sequence[-1] == "C":
                kernel = shapes(f"{prefix}.depthwise.weight", 4)[-1]
        unit, count = repeated(sequence)
        level_config.append(unit)
        blocks.append(count)
    nhead = args.stage_b_nhead or STAGE_B_NHEAD.get(tuple(c_hidden))
    if nhead is None:
        raise ConversionError(f"{shapes.place}: the widths {c_hidden} are not the published model's: give --stage-b-nhead")
    if len(nhead) != len(c_hidden):
        raise ConversionError(f"--stage-b-nhead: expected {len(c_hidden)} numbers, found {len(nhead)}")
    nhead = [heads if "A" in unit else -1 for heads, unit in zip(nhead, level_config)]
    for heads, level_width in zip(nhead, c_hidden):
        if heads == 0 or level_width % heads:
            raise ConversionError(f"--stage-b-nhead: expected a divisor of {level_width}, found {heads}")
    return {"_class_name": "Paella", "c_in": c_in, "c_out": shapes("clf.1.weight", 4)[0] // patch_size ** 2,
            "num_labels": num_labels, "c_r": c_r, "patch_size": patch_size, "c_cond": c_cond, "c_hidden": c_hidden,
            "nhead": nhead, "blocks": blocks, "level_config": level_config,
            "effnet_embd": shapes("effnet_mapper.weight", 2)[1], "byt5_embd": byt5_embd, "kernel_size": kernel,
            "dropout": args.dropout, "self_attn": True}


def stage_c_config(shapes, args):
    c, c_in = shapes("projection.weight", 4)[:2]
    count = len(shapes.numbers(r"blocks\.(\d+)\."))
    if count == 0 or count % 3:
        raise ConversionError(f"{shapes.place}: expected a multiple of 3 blocks, found {count}")
    nhead = args.stage_c_nhead or STAGE_C_NHEAD.get(c)
    if nhead is None:
        raise ConversionError(f"{shapes.place}: the width {c} is not a published model's: give --stage-c-nhead")
    if c % nhead:
        raise ConversionError(f"--stage-c-nhead: expected a divisor of {c}, found {nhead}")
    return {"_class_name": "Prior", "c_in": c_in, "c": c, "c_cond": shapes("cond_mapper.0.weight", 2)[1],
            "c_r": shapes("blocks.1.mapper.weight", 2)[1], "depth": count // 3, "nhead": nhead,
            "latent_size": [12, 12], "dropout": args.dropout}


def encoder_stage(shapes, stage, stride):
    """One entry of the image encoder's `blocks`."""
    layers = len(shapes.numbers(rf"backbone\.{stage}\.(\d+)\.block\."))
    prefix = f"backbone.{stage}.0.block"
    parts = shapes.numbers(rf"backbone\.{stage}\.0\.block\.(\d+)\.0\.weight$")
    first, last = (shapes(f"{prefix}.{n}.0.weight", 4) for n in (parts[0], parts[-1]))
    squeezed = bool(shapes.numbers(rf"backbone\.{stage}\.0\.block\.(\d+)\.fc1\.weight$"))
    if not squeezed:
        kind, width, kernel, expanded = "FusedMBConv", first[1], first[2], first[0] if len(parts) > 1 else first[1]
    elif len(parts) == 3:
        kind, width, kernel, expanded = "MBConv", first[1], shapes(f"{prefix}.{parts[1]}.0.weight", 4)[2], first[0]
    else:
        kind, width, kernel, expanded = "MBConv", first[0], first[2], first[0]
    return {"type": kind, "expand_ratio": expanded // width, "kernel": kernel, "stride": stride, "in_channels": width,
            "out_channels": last[0], "layers": layers}


def encoder_config(shapes, args):
    numbers = shapes.numbers(r"backbone\.(\d+)\.\d+\.block\.")
    strides = args.encoder_strides or ENCODER_STRIDES.get(len(numbers))
    if strides is None or len(strides) != len(numbers):
        raise ConversionError(f"{shapes.place}: give --encoder-strides, one for each of {len(numbers)} stages")
    c_latent, last_channel = shapes("mapper.0.weight", 4)[:2]
    return {"_class_name": "EfficientNetEncoder",
            "blocks": [encoder_stage(shapes, n, stride) for n, stride in zip(numbers, strides)],
            "stem_channels": shapes("backbone.0.0.weight", 4)[0], "last_channel": last_channel, "c_latent": c_latent,
            "norm_eps": 0.001, "norm_momentum": 0.1, "stochastic_depth_prob": 0.2,
            "output_add": args.encoder_output_add, "output_div": args.encoder_output_div,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


# --- writing ---

def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_part(folder, state, config, dtype):
    """model.safetensors and config.json; integers keep their type."""
    folder.mkdir(parents=True)
    out = {}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            out[key] = tensor.to(torch.int64).clone().contiguous()
            continue
        converted = tensor.to(dtype).clone().contiguous()
        if not torch.isfinite(converted).all():
            cause = "has values" if not torch.isfinite(tensor).all() else f"has values too large for {dtype}"
            raise ConversionError(f"{folder.name}: {key}: expected finite numbers, found a tensor that {cause}")
        out[key] = converted
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def convert_text_encoder(source, output, dtype):
    source = Path(source)
    if not (source / "config.json").is_file():
        raise ConversionError(f"{source}: expected a folder with config.json, found none")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    config.setdefault("architectures", ["CLIPTextModel"])
    index = source / "model.safetensors.index.json"
    if (source / "model.safetensors").is_file():
        state = load_file(source / "model.safetensors")
    elif index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        state = {key: value for shard in shards for key, value in load_file(source / Path(shard).name).items()}
    else:
        state = state_of(load_pt(source / "pytorch_model.bin"), ["state_dict"], source / "pytorch_model.bin")
    text = ("text_model.", "text_projection.", "embeddings.", "encoder.", "final_layer_norm.")
    state = {key: value for key, value in state.items() if key.startswith(text)}
    names = ["embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"]
    if not any(name in state for name in names):
        raise ConversionError(f"{source}: expected {names[0]}, found none")
    write_part(output, state, config, dtype)


def convert_tokenizer(source, output):
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(path.name in ("tokenizer.json", "vocab.json") for path in found):
        raise ConversionError(f"{source}: expected tokenizer.json, or vocab.json and merges.txt, found neither")
    output.mkdir(parents=True)
    for path in found:
        shutil.copyfile(path, output / path.name)


def convert(args):
    output, dtype = Path(args.output), DTYPES[args.dtype]
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output}: expected a new or empty folder, found something in it")
    weights = ["state_dict"] if args.no_ema else ["ema_state_dict", "state_dict"]
    content = load_pt(args.stage_a)
    state = state_of(content, ["state_dict"], args.stage_a)
    write_part(output / "stage_a", state, stage_a_config(Shapes(state, args.stage_a), args), dtype)
    content = load_pt(args.stage_b)
    state = state_of(content, weights, args.stage_b)
    write_part(output / "stage_b", state, stage_b_config(Shapes(state, args.stage_b), args), dtype)
    if not isinstance(content.get("effnet_state_dict"), dict):
        raise ConversionError(f"{args.stage_b}: expected effnet_state_dict (the image encoder), found none")
    state = strip(content["effnet_state_dict"], f"{args.stage_b}: effnet_state_dict")
    config = encoder_config(Shapes(state, f"{args.stage_b}: effnet_state_dict"), args)
    write_part(output / "image_encoder", state, config, dtype)
    content = load_pt(args.stage_c)
    state = state_of(content, weights, args.stage_c)
    write_part(output / "stage_c", state, stage_c_config(Shapes(state, args.stage_c), args), dtype)
    del content, state
    convert_text_encoder(args.text_encoder, output / "text_encoder", dtype)
    convert_tokenizer(Path(args.tokenizer or args.text_encoder), output / "tokenizer")
    defaults = {"stage_c_steps": 60, "stage_c_guidance": args.stage_c_guidance, "stage_c_sampler": "ddpm",
                "stage_b_steps": 8, "stage_b_guidance": 2.0, "stage_b_temperature": [0.7, 0.3],
                "stage_b_choice": "multinomial"}
    # Last, so that a folder with it is complete.
    write_json(output / "model_index.json", {"_class_name": "WuerstchenV1Pipeline", "format_version": 1,
               "image_size": args.image_size, "image_encoder_size": args.image_encoder_size,
               "text_attention_mask": True, "defaults": defaults})


def parse_arguments(argv):
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--stage-a", "--stage-b", "--stage-c", "--text-encoder", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tokenizer", help="the tokenizer's folder (default: the text encoder's)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--no-ema", action="store_true", help="take state_dict even if there are EMA weights")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--image-encoder-size", type=int, default=384)
    parser.add_argument("--stage-c-guidance", type=float, default=4.0)
    parser.add_argument("--scale-factor", type=float, default=0.3764)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--stage-b-nhead", type=numbers, help="heads per level: --stage-b-nhead=-1,16,16")
    parser.add_argument("--stage-c-nhead", type=int)
    parser.add_argument("--encoder-strides", type=numbers, help="one per stage: 1,2,2,2,1,2,1")
    parser.add_argument("--encoder-output-add", type=float, default=0.0)
    parser.add_argument("--encoder-output-div", type=float, default=1.0)
    return parser.parse_args(argv)


def main(argv=None):
    try:
        convert(parse_arguments(argv))
    except ConversionError as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
