"""Floating-point operations of one pass through each network, by formula: 2 per multiply-add of a matrix product or a
convolution. Norms, activations, resizing and softmax are left out, as is usual.

    python3 benches/flops.py MODEL_DIR           the table, held to PyTorch's own counter
"""

import json
import math
import sys
from pathlib import Path

BATCH = 2  # the conditional and the unconditional half

# The folder of each part, by generation.
FOLDERS = {
    1: {"text": "text_encoder", "c": "stage_c", "b": "stage_b", "a": "stage_a"},
    2: {
        "text": "prior_text_encoder", "text-b": "text_encoder", "c": "prior_prior", "b": "decoder", "a": "vqgan",
        "c-scheduler": "prior_scheduler", "b-scheduler": "scheduler",
    },
}  # fmt: skip
V2_SIDE_PX = 1024  # the picture's; the index has none
V2_RESOLUTION_MULTIPLE, V2_LATENT_DIM_SCALE = 42.67, 10.67


def linear(rows, c_in, c_out):
    return 2 * rows * c_in * c_out


def attention(queries, keys, width):
    """softmax(q k^T) v for one sample, all heads."""
    return 2 * 2 * queries * keys * width


def attn_block(sites, cond_tokens, width, c_cond):
    """One AttnBlock, one sample, with self-attention; the text part is the cost that does not change between steps."""
    text = linear(cond_tokens, c_cond, width) + linear(cond_tokens, width, 2 * width)
    own = linear(sites, width, 4 * width)  # q, k, v, out
    return own + attention(sites, sites + cond_tokens, width) + text, text


def res_block(sites, width, skip=0, kernel=3):
    return 2 * sites * kernel**2 * (width + skip) + 2 * linear(sites, width, 4 * width)


def generation(model):
    """1 or 2, by the index of the model folder."""
    kind = json.loads((Path(model) / "model_index.json").read_text())["_class_name"]
    return 1 if kind == "WuerstchenV1Pipeline" else 2


class Sizes:
    """Grids and widths of a model folder's default picture."""

    def __init__(self, model):
        self.model = Path(model)
        self.generation = generation(model)
        index = json.loads((self.model / "model_index.json").read_text())
        self.text_length = index.get("text_length", 77)
        if self.generation == 1:
            self.grid = index["image_size"] // 4
            self.latent = index["image_encoder_size"] // 32
        else:
            self.latent = math.ceil(V2_SIDE_PX / V2_RESOLUTION_MULTIPLE)
            self.grid = int(self.latent * V2_LATENT_DIM_SCALE)

    def folder(self, part):
        return self.model / FOLDERS[self.generation][part]

    def config(self, part):
        return json.loads((self.folder(part) / "config.json").read_text())


def text(s, part="text"):
    """A text tower on BATCH prompts: (all, 0)."""
    c = s.config(part)
    t, w, hidden = s.text_length, c["hidden_size"], c["intermediate_size"]
    layer = linear(t, w, 4 * w) + attention(t, t, w) + 2 * linear(t, w, hidden)
    return BATCH * c["num_hidden_layers"] * layer, 0


def stage_c(s):
    """One step at BATCH: (all, the part that depends on the text alone)."""
    c, sites, t = s.config("c"), s.latent**2, s.text_length
    w, c_r = c["c"], c["c_r"]
    attn, attn_text = attn_block(sites, t, w, w)
    invariant = c["depth"] * attn_text + linear(t, c["c_cond"], w) + linear(t, w, w)
    block = res_block(sites, w) + linear(1, c_r, 2 * w) + attn - attn_text
    ends = linear(sites, c["c_in"], w) + linear(sites, w, 2 * c["c_in"])
    return BATCH * (c["depth"] * block + ends + invariant), BATCH * invariant


def stage_b(s):
    """One step at BATCH, logits included: (all, the part that depends on text and latents alone)."""
    c = s.config("b")
    cond = s.latent**2 + s.text_length
    widths, patch = c["c_hidden"], c["patch_size"]
    levels = len(widths)
    side = [s.grid // patch // 2**i for i in range(levels)]
    invariant = linear(s.latent**2, c["effnet_embd"], c["c_cond"]) + linear(s.text_length, c["byt5_embd"], c["c_cond"])
    total = 0
    for i, w in enumerate(widths):
        sites = side[i] ** 2
        for kind in c["level_config"][i] * c["blocks"][i] * 2:  # down and up
            if kind == "C":
                total += res_block(sites, w, kernel=c["kernel_size"])
            elif kind == "T":
                total += linear(1, c["c_r"], 2 * w)
            elif kind == "A":
                attn, attn_text = attn_block(sites, cond, w, c["c_cond"])
                total += attn - attn_text
                invariant += attn_text
        if i < levels - 1:
            total += 2 * sites * c["kernel_size"] ** 2 * w  # the skip half of the first up block
            total += 2 * linear(side[i + 1] ** 2, 4 * w, widths[i + 1])  # down and up convolution
    total += linear(side[0] ** 2, c["c_in"] * patch**2, widths[0]) + linear(
        side[0] ** 2, widths[0], c["c_out"] * patch**2
    )
    total += linear(s.grid**2, c["c_out"], c["num_labels"])
    return BATCH * (total + invariant), BATCH * invariant


def decoder(s):
    """v2: one step of one picture without guidance: (all, what ours does not repeat).

    That is what depends on the text alone and, of each block that the image embedding joins, the layer over its
    `c_cond` mapped channels: ours has it folded with the mapper into one over the `effnet_embd` channels."""
    c, t = s.config("b"), s.text_length
    widths, patch, c_cond, image = c["c_hidden"], c["patch_size"], c["c_cond"], c["effnet_embd"]
    levels = len(widths)
    side = [s.grid // patch // 2**i for i in range(levels)]
    total = spared = linear(t, c["clip_embd"], c_cond)
    for i, w in enumerate(widths):
        sites, inject = side[i] ** 2, c["inject_effnet"][i]
        for kind in c["level_config"][i] * c["blocks"][i] * 2:  # down and up
            if kind == "C":
                total += res_block(sites, w, kernel=c["kernel_size"])
                if inject:
                    total += linear(sites, c_cond, 4 * w)
                    spared += linear(sites, c_cond, 4 * w) - linear(sites, image, 4 * w)
            elif kind == "T":
                total += linear(1, c["c_r"], 2 * w)
            elif kind == "A":
                attn, attn_text = attn_block(sites, t, w, c_cond)
                total += attn
                spared += attn_text
        if inject:
            total += 2 * linear(sites, image, c_cond)
            spared += 2 * linear(sites, image, c_cond)
        if i < levels - 1:
            total += linear(sites, w, 4 * w)  # the skip half of the first up block
            total += 2 * linear(side[i + 1] ** 2, 4 * w, widths[i + 1])  # down and up convolution
    total += linear(side[0] ** 2, c["c_in"] * patch**2, widths[0])
    total += linear(side[0] ** 2, widths[0], 2 * c["c_out"] * patch**2)
    return total, spared


def stage_a(s):
    """Decoding one picture: (all, 0)."""
    c, sites = s.config("a"), s.grid**2
    c_hidden, c_latent = (c["c_hidden"], c["c_latent"]) if s.generation == 1 else (c["embed_dim"], c["latent_channels"])
    widths = [c_hidden // 2**i for i in reversed(range(c["levels"]))]
    total = linear(sites, c_latent, widths[-1])
    for i in reversed(range(c["levels"])):
        blocks = c["bottleneck_blocks"] if i == c["levels"] - 1 else 1
        total += blocks * res_block(sites, widths[i])
        if i > 0:
            total += 2 * sites * 16 * widths[i] * widths[i - 1]  # transposed 4x4
            sites *= 4
    return total + linear(sites, widths[0], 12), 0


PARTS = {
    1: {"text": text, "c": stage_c, "b": stage_b, "a": stage_a},
    2: {"text": text, "text-b": lambda s: text(s, "text-b"), "c": stage_c, "b": decoder, "a": stage_a},
}


def gflop(model):
    """{part: (GFLOP of a pass, GFLOP of it that ours does not repeat in every step)}."""
    sizes = Sizes(model)
    return {part: tuple(f / 1e9 for f in count(sizes)) for part, count in PARTS[sizes.generation].items()}


def network_and_inputs(s, part):
    """The rival's network, without memory for values, and what a pass takes."""
    import torch

    grid = (s.grid, s.grid)
    ids, t = torch.zeros(BATCH, s.text_length, dtype=torch.long), torch.zeros(BATCH)
    cond = torch.zeros(BATCH, s.text_length, s.config("text")["hidden_size"])
    latents = torch.zeros(BATCH, 16, s.latent, s.latent)
    if s.generation == 1:
        import torch_v1

        tokens = torch.zeros(BATCH, *grid, dtype=torch.long)
        inputs = {"text": (ids,), "c": (latents, t, cond), "b": (tokens, t, latents, cond), "a": (tokens[:1],)}
        network = torch_v1.PARTS[part][1](**s.config(part))
        return network.eval(), inputs[part]

    from diffusers.pipelines.deprecated import wuerstchen
    from transformers import CLIPTextConfig, CLIPTextModel

    if part.startswith("text"):
        return CLIPTextModel(CLIPTextConfig(**s.config(part))).eval(), (ids,)
    kinds = {"c": wuerstchen.WuerstchenPrior, "b": wuerstchen.WuerstchenDiffNeXt, "a": wuerstchen.PaellaVQModel}
    network = kinds[part].from_config(s.config(part)).eval()
    if part == "c":
        return network, (latents, t, cond)
    x = torch.zeros(1, s.config("a")["latent_channels"], *grid)
    if part == "a":
        network.forward = network.decode
        return network, (x,)
    return network, (x, t[:1], latents[:1], torch.zeros(1, s.text_length, s.config("b")["clip_embd"]))


def counted(model, part):
    """The same by PyTorch's counter."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "reference"))
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, inputs = network_and_inputs(Sizes(model), part)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*inputs)
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    for part, (whole, spared) in gflop(sys.argv[1]).items():
        check = counted(sys.argv[1], part)
        print(f"{part:<7} {whole:>9.1f} GFLOP, of it {spared:>7.1f} not repeated by ours; counted {check:>9.1f}")
