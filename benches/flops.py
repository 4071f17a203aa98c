"""Floating-point operations of one pass through each network, by formula: 2 per multiply-add of a matrix product or a
convolution. Norms, activations and softmax are left out, as is usual.

    python3 benches/flops.py MODEL_DIR           the table, held to PyTorch's own counter
"""

import json
import sys
from pathlib import Path

BATCH = 2  # the conditional and the unconditional half


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


class Sizes:
    """Grids and widths of a model folder's default picture."""

    def __init__(self, model):
        self.model = Path(model)
        index = self.config(".", "model_index.json")
        self.text_length = index.get("text_length", 77)
        self.pixels = index["image_size"]
        self.tokens = index["image_size"] // 4
        self.latent = index["image_encoder_size"] // 32

    def config(self, part, name="config.json"):
        return json.loads((self.model / part / name).read_text())


def text(s):
    """The text tower on BATCH prompts: (all, 0)."""
    c = s.config("text_encoder")
    t, w, hidden = s.text_length, c["hidden_size"], c["intermediate_size"]
    layer = linear(t, w, 4 * w) + attention(t, t, w) + 2 * linear(t, w, hidden)
    return BATCH * c["num_hidden_layers"] * layer, 0


def stage_c(s):
    """One step at BATCH: (all, the part that depends on the text alone)."""
    c, sites, t = s.config("stage_c"), s.latent**2, s.text_length
    w, c_r = c["c"], c["c_r"]
    attn, attn_text = attn_block(sites, t, w, w)
    invariant = c["depth"] * attn_text + linear(t, c["c_cond"], w) + linear(t, w, w)
    block = res_block(sites, w) + linear(1, c_r, 2 * w) + attn - attn_text
    ends = linear(sites, c["c_in"], w) + linear(sites, w, 2 * c["c_in"])
    return BATCH * (c["depth"] * block + ends + invariant), BATCH * invariant


def stage_b(s):
    """One step at BATCH, logits included: (all, the part that depends on text and latents alone)."""
    c = s.config("stage_b")
    cond = s.latent**2 + s.text_length
    widths, patch = c["c_hidden"], c["patch_size"]
    levels = len(widths)
    side = [s.tokens // patch // 2**i for i in range(levels)]
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
    total += linear(s.tokens**2, c["c_out"], c["num_labels"])
    return BATCH * (total + invariant), BATCH * invariant


def stage_a(s):
    """Decoding one picture: (all, 0)."""
    c, sites = s.config("stage_a"), s.tokens**2
    widths = [c["c_hidden"] // 2**i for i in reversed(range(c["levels"]))]
    total = linear(sites, c["c_latent"], widths[-1])
    for i in reversed(range(c["levels"])):
        blocks = c["bottleneck_blocks"] if i == c["levels"] - 1 else 1
        total += blocks * res_block(sites, widths[i])
        if i > 0:
            total += 2 * sites * 16 * widths[i] * widths[i - 1]  # transposed 4x4
            sites *= 4
    return total + linear(sites, widths[0], 12), 0


PARTS = {"text": text, "c": stage_c, "b": stage_b, "a": stage_a}


def gflop(model):
    """{part: (GFLOP of a pass, GFLOP of it that does not change between steps)}."""
    sizes = Sizes(model)
    return {part: tuple(f / 1e9 for f in count(sizes)) for part, count in PARTS.items()}


def counted(model, part):
    """The same by PyTorch's counter, on the rival's network without memory for values."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "reference"))
    import torch
    import torch_v1
    from torch.utils.flop_counter import FlopCounterMode

    s = Sizes(model)
    folder, kind = torch_v1.PARTS[part]
    with torch.device("meta"):
        network = kind(**s.config(folder)).eval()
        ids = torch.zeros(BATCH, s.text_length, dtype=torch.long)
        width = s.config("text_encoder")["hidden_size"]
        cond, t = torch.zeros(BATCH, s.text_length, width), torch.zeros(BATCH)
        latents = torch.zeros(BATCH, 16, s.latent, s.latent)
        tokens = torch.zeros(BATCH, s.tokens, s.tokens, dtype=torch.long)
        inputs = {"text": (ids,), "c": (latents, t, cond), "b": (tokens, t, latents, cond), "a": (tokens[:1],)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*inputs[part])
    return counter.get_total_flops() / 1e9


if __name__ == "__main__":
    for part, (whole, invariant) in gflop(sys.argv[1]).items():
        check = counted(sys.argv[1], part)
        print(f"{part:<5} {whole:>9.1f} GFLOP, of it {invariant:>6.1f} the same in every step; counted {check:>9.1f}")
