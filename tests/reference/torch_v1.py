"""The networks of Würstchen v1 in plain PyTorch: what a PyTorch user runs.

Written from the paper and from the facts that its checkpoints need, as eager modules in PyTorch's own layout
`[N, C, H, W]`. It serves two ends: the stages' rival in `benches/`, and a second opinion on the reference data
(`check_torch_v1.py`). It shares no code with the library.

Every class takes the values of its folder's `config.json`; its `state_dict` has the names of the published
checkpoints, so `load_state_dict(strict=True)` accepts them.

    folder          class           input                                               output
    text_encoder/   TextEncoder     ids [N, T], mask [N, T]                             [N, T, width]
    stage_c/        StageC          noised [N, 16, h, w], t [N], text [N, T, width]     noise [N, 16, h, w]
    stage_b/        StageB          tokens [N, H, W], t [N], latents, text              logits [N, labels, H, W]
    stage_a/        StageA          tokens [N, H, W]                                    picture [N, 3, 4H, 4W]
    image_encoder/  ImageEncoder    picture [N, 3, S, S], normalised                    latents [N, 16, h, w]
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-6


# ---------------------------------------------------------------- blocks that Stage B and Stage C share


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W], without affine parameters."""

    def __init__(self, channels):
        super().__init__(channels, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2: out = gamma * (x * Nx) + beta + x, Nx = Gx / mean of Gx over channels, on [N, H, W, C]."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x):
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


def channel_mlp(channels):
    """c -> 4c -> c on channels-last input. Index 3 is the published module's dropout, off outside training."""
    hidden = 4 * channels
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.GELU(), GlobalResponseNorm(hidden), nn.Dropout(0.0), nn.Linear(hidden, channels)
    )


class ResBlock(nn.Module):
    """x + MLP(LayerNorm(depthwise(x))). A skip joins before the convolution: its groups then see two channels."""

    def __init__(self, channels, skip_channels=0, kernel=3):
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels + skip_channels, channels, kernel_size=kernel, padding=kernel // 2, groups=channels
        )
        self.norm = LayerNorm2d(channels)
        self.channelwise = channel_mlp(channels)

    def forward(self, x, skip=None):
        residual = x
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        x = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        return self.channelwise(x).permute(0, 3, 1, 2) + residual


class FeedForwardBlock(nn.Module):
    """A ResBlock without its convolution ("F" in a level's configuration)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.channelwise = channel_mlp(channels)

    def forward(self, x):
        return x + self.channelwise(self.norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimestepBlock(nn.Module):
    """x * (1 + a) + b with (a, b) linear in the embedding of t."""

    def __init__(self, channels, t_channels):
        super().__init__()
        self.mapper = nn.Linear(t_channels, 2 * channels)

    def forward(self, x, t_embedding):
        a, b = self.mapper(t_embedding.to(x.dtype))[:, :, None, None].chunk(2, dim=1)
        return x * (1 + a) + b


class Attention2d(nn.Module):
    """Multi-head attention of the sites of [N, C, H, W] to themselves (if `self_attn`) and to a condition."""

    def __init__(self, channels, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(channels, heads, bias=True, batch_first=True)

    def forward(self, x, kv, self_attn):
        n, c, h, w = x.shape
        x = x.reshape(n, c, h * w).permute(0, 2, 1)
        if self_attn:
            kv = torch.cat([x, kv], dim=1)
        x = self.attn(x, kv, kv, need_weights=False)[0]
        return x.permute(0, 2, 1).reshape(n, c, h, w)


class AttnBlock(nn.Module):
    """x + attention(LayerNorm(x), Linear(SiLU(condition)))."""

    def __init__(self, channels, cond_channels, heads, self_attn):
        super().__init__()
        self.self_attn = self_attn
        self.norm = LayerNorm2d(channels)
        self.attention = Attention2d(channels, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(cond_channels, channels))

    def forward(self, x, cond):
        return x + self.attention(self.norm(x), self.kv_mapper(cond), self.self_attn)


def timestep_embedding(t, channels, max_positions=10000):
    """sin and cos of t * 10000 * frequency, in float32; a zero column if `channels` is odd."""
    half = channels // 2
    step = math.log(max_positions) / (half - 1)
    frequencies = torch.arange(half, device=t.device).float().mul(-step).exp()
    phase = (t * max_positions)[:, None] * frequencies[None, :]
    embedding = torch.cat([phase.sin(), phase.cos()], dim=1)
    return F.pad(embedding, (0, 1)) if channels % 2 else embedding


# ---------------------------------------------------------------- Stage C


class StageC(nn.Module):
    """The text-conditional prior: predicts the noise in an image latent (`Prior` in the authors' code)."""

    def __init__(self, c_in=16, c=1536, c_cond=1024, c_r=64, depth=32, nhead=24, **_):
        super().__init__()
        self.c_r = c_r
        self.projection = nn.Conv2d(c_in, c, kernel_size=1)
        self.cond_mapper = nn.Sequential(nn.Linear(c_cond, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(ResBlock(c))
            self.blocks.append(TimestepBlock(c, c_r))
            self.blocks.append(AttnBlock(c, c, nhead, self_attn=True))
        self.out = nn.Sequential(LayerNorm2d(c), nn.Conv2d(c, 2 * c_in, kernel_size=1))

    def forward(self, x, t, text):
        noised = x
        x = self.projection(x)
        cond = self.cond_mapper(text)
        t_embedding = timestep_embedding(t, self.c_r)
        for block in self.blocks:
            x = run_block(block, x, t_embedding, cond)
        a, b = self.out(x).chunk(2, dim=1)
        return (noised - a) / ((1 - b).abs() + 1e-5)


def run_block(block, x, t_embedding, cond, skip=None):
    """Calls a block with what its kind needs."""
    if isinstance(block, ResBlock):
        return block(x, skip)
    if isinstance(block, TimestepBlock):
        return block(x, t_embedding)
    if isinstance(block, AttnBlock):
        return block(x, cond)
    return block(x)


# ---------------------------------------------------------------- Stage B


class StageB(nn.Module):
    """The token predictor: a U-Net over image tokens (`Paella` in the authors' code)."""

    def __init__(
        self, c_in=256, c_out=256, num_labels=8192, c_r=64, patch_size=2, c_cond=1024, c_hidden=(640, 1280, 1280),
        nhead=(-1, 16, 16), blocks=(4, 12, 4), level_config=("CT", "CTA", "CTA"), effnet_embd=16, byt5_embd=1024,
        kernel_size=3, self_attn=True, **_,
    ):  # fmt: skip
        super().__init__()
        self.c_r = c_r
        levels = len(c_hidden)

        self.byt5_mapper = nn.Linear(byt5_embd, c_cond)
        self.effnet_mapper = nn.Linear(effnet_embd, c_cond)
        self.seq_norm = nn.LayerNorm(c_cond, eps=NORM_EPS, elementwise_affine=False)

        self.in_mapper = nn.Sequential(
            nn.Embedding(num_labels, c_in), nn.LayerNorm(c_in, eps=NORM_EPS, elementwise_affine=False)
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size), nn.Conv2d(c_in * patch_size**2, c_hidden[0], 1), LayerNorm2d(c_hidden[0])
        )

        def block(kind, level, skip_channels=0):
            channels = c_hidden[level]
            if kind == "C":
                return ResBlock(channels, skip_channels, kernel_size)
            if kind == "T":
                return TimestepBlock(channels, c_r)
            if kind == "A":
                return AttnBlock(channels, c_cond, nhead[level], self_attn)
            if kind == "F":
                return FeedForwardBlock(channels)
            raise ValueError(f"level_config: a block of kind {kind!r}")

        self.down_blocks = nn.ModuleList()
        for level in range(levels):
            modules = nn.ModuleList()
            if level > 0:
                down = nn.Conv2d(c_hidden[level - 1], c_hidden[level], kernel_size=2, stride=2)
                modules.append(nn.Sequential(LayerNorm2d(c_hidden[level - 1]), down))
            for _ in range(blocks[level]):
                modules.extend(block(kind, level) for kind in level_config[level])
            self.down_blocks.append(modules)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            modules = nn.ModuleList()
            for _ in range(blocks[level]):
                for kind in level_config[level]:
                    joins = len(modules) == 0 and level < levels - 1
                    modules.append(block(kind, level, c_hidden[level] if joins else 0))
            if level > 0:
                up = nn.ConvTranspose2d(c_hidden[level], c_hidden[level - 1], kernel_size=2, stride=2)
                modules.append(nn.Sequential(LayerNorm2d(c_hidden[level]), up))
            self.up_blocks.append(modules)

        self.clf = nn.Sequential(
            LayerNorm2d(c_hidden[0]), nn.Conv2d(c_hidden[0], c_out * patch_size**2, 1), nn.PixelShuffle(patch_size)
        )
        self.out_mapper = nn.Sequential(LayerNorm2d(c_out), nn.Conv2d(c_out, num_labels, 1, bias=False))

    def condition(self, latents, text):
        """The attention condition: image tokens (row-major), then text tokens."""
        image = self.effnet_mapper(latents.flatten(2).permute(0, 2, 1))
        return self.seq_norm(torch.cat([image, self.byt5_mapper(text)], dim=1))

    def forward(self, tokens, t, latents, text):
        t_embedding = timestep_embedding(t, self.c_r)
        cond = self.condition(latents, text)
        x = self.embedding(self.in_mapper(tokens).permute(0, 3, 1, 2))

        level_outputs = []
        for level in self.down_blocks:
            for block in level:
                x = run_block(block, x, t_embedding, cond)
            level_outputs.insert(0, x)

        x = level_outputs[0]
        for i, level in enumerate(self.up_blocks):
            for j, block in enumerate(level):
                x = run_block(block, x, t_embedding, cond, level_outputs[i] if i > 0 and j == 0 else None)
        return self.out_mapper(self.clf(x))


def sample_tokens(logits, guidance, temperature, generator=None):
    """One token per site from guided logits. `logits` [2N, labels, H, W]: the conditional half first."""
    cond, uncond = logits.chunk(2)
    guided = cond * guidance + uncond * (1 - guidance)
    probabilities = (guided / temperature).softmax(dim=1)
    n, labels, h, w = probabilities.shape
    rows = probabilities.permute(0, 2, 3, 1).reshape(-1, labels)
    return torch.multinomial(rows, 1, generator=generator)[:, 0].view(n, h, w)


# ---------------------------------------------------------------- Stage A


class StageAResBlock(nn.Module):
    """Depthwise convolution and MLP, each behind a LayerNorm with a scalar scale, shift and gate."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS, elementwise_affine=False)
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, kernel_size=3, groups=channels)
        )
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS, elementwise_affine=False)
        self.channelwise = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        g = self.gammas
        y = self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * (1 + g[0]) + g[1]
        x = x + self.depthwise(y) * g[2]
        y = self.norm2(x.permute(0, 2, 3, 1)) * (1 + g[3]) + g[4]
        return x + self.channelwise(y).permute(0, 3, 1, 2) * g[5]


class Quantizer(nn.Module):
    """Nearest row of a codebook."""

    def __init__(self, size, channels):
        super().__init__()
        self.codebook = nn.Embedding(size, channels)

    def forward(self, z):
        """`z` [N, H, W, C] -> codes of the same shape, indices [N, H, W]."""
        flat = z.reshape(-1, z.shape[-1])
        codes = self.codebook.weight
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ codes.T + codes.square().sum(1)
        indices = distance.argmin(dim=1).view(z.shape[:-1])
        return self.codebook(indices), indices


class StageA(nn.Module):
    """The VQGAN between pixels and tokens (`VQModel` in the authors' code)."""

    def __init__(
        self, levels=2, bottleneck_blocks=12, c_hidden=384, c_latent=4, codebook_size=8192, scale_factor=0.3764, **_
    ):
        super().__init__()
        self.scale_factor = scale_factor
        widths = [c_hidden // 2**i for i in reversed(range(levels))]

        self.in_block = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(3 * 4, widths[0], kernel_size=1))
        down = []
        for i, width in enumerate(widths):
            if i > 0:
                down.append(nn.Conv2d(widths[i - 1], width, kernel_size=4, stride=2, padding=1))
            down.append(StageAResBlock(width, 4 * width))
        down.append(nn.Sequential(nn.Conv2d(widths[-1], c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent)))
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = Quantizer(codebook_size, c_latent)

        up = [nn.Sequential(nn.Conv2d(c_latent, widths[-1], kernel_size=1))]
        for i in reversed(range(levels)):
            deepest = i == levels - 1
            up.extend(StageAResBlock(widths[i], 4 * widths[i]) for _ in range(bottleneck_blocks if deepest else 1))
            if i > 0:
                up.append(nn.ConvTranspose2d(widths[i], widths[i - 1], kernel_size=4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], 3 * 4, kernel_size=1), nn.PixelShuffle(2))

    def encode(self, image):
        """Picture -> (codes / scale, latents / scale, indices, codebook loss + 0.25 * commitment loss)."""
        z = self.down_blocks(self.in_block(image))
        codes, indices = self.vquantizer(z.permute(0, 2, 3, 1))
        codes = codes.permute(0, 3, 1, 2)
        codebook_loss = (codes - z.detach()).square().mean()
        commit_loss = (z - codes.detach()).square().mean()
        return codes / self.scale_factor, z / self.scale_factor, indices, codebook_loss + 0.25 * commit_loss

    def decode(self, latents):
        return self.out_block(self.up_blocks(latents * self.scale_factor))

    def decode_indices(self, indices):
        """Codes are looked up and decoded as they are: no scale factor."""
        return self.out_block(self.up_blocks(self.vquantizer.codebook(indices).permute(0, 3, 1, 2)))

    forward = decode_indices


# ---------------------------------------------------------------- image encoder


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm, SiLU (if `activation`)."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, activation=True, eps=1e-3, momentum=0.1):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False)
        layers = [conv, nn.BatchNorm2d(c_out, eps=eps, momentum=momentum)]
        super().__init__(*layers, *([nn.SiLU()] if activation else []))


class SqueezeExcitation(nn.Module):
    """x * sigmoid(fc2(SiLU(fc1(mean over H and W))))."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(self.avgpool(x)))))


class MobileBlock(nn.Module):
    """EfficientNetV2's MBConv or FusedMBConv, with a residual where shapes allow one."""

    def __init__(self, kind, c_in, c_out, expand_ratio, kernel, stride, norm):
        super().__init__()
        hidden = c_in * expand_ratio
        if kind == "FusedMBConv" and expand_ratio == 1:
            layers = [ConvNorm(c_in, c_out, kernel, stride, **norm)]
        elif kind == "FusedMBConv":
            layers = [
                ConvNorm(c_in, hidden, kernel, stride, **norm),
                ConvNorm(hidden, c_out, 1, activation=False, **norm),
            ]
        elif kind == "MBConv":
            layers = [ConvNorm(c_in, hidden, 1, **norm)] if expand_ratio != 1 else []
            layers += [
                ConvNorm(hidden, hidden, kernel, stride, groups=hidden, **norm),
                SqueezeExcitation(hidden, max(1, c_in // 4)),
                ConvNorm(hidden, c_out, 1, activation=False, **norm),
            ]
        else:
            raise ValueError(f"blocks: a block of type {kind!r}")
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        return x + self.block(x) if self.residual else self.block(x)


class ImageEncoder(nn.Module):
    """EfficientNetV2 features and a 1x1 head: the picture behind Stage C's latents."""

    def __init__(
        self, blocks, stem_channels, last_channel, c_latent=16, norm_eps=1e-3, norm_momentum=0.1, output_add=0.0,
        output_div=1.0, **_,
    ):  # fmt: skip
        super().__init__()
        self.output_add, self.output_div = output_add, output_div
        norm = {"eps": norm_eps, "momentum": norm_momentum}
        stages = [ConvNorm(3, stem_channels, 3, stride=2, **norm)]
        for b in blocks:
            stage = []
            for i in range(b["layers"]):
                c_in, stride = (b["in_channels"], b["stride"]) if i == 0 else (b["out_channels"], 1)
                stage.append(
                    MobileBlock(b["type"], c_in, b["out_channels"], b["expand_ratio"], b["kernel"], stride, norm)
                )
            stages.append(nn.Sequential(*stage))
        stages.append(ConvNorm(blocks[-1]["out_channels"], last_channel, 1, **norm))
        self.backbone = nn.Sequential(*stages)
        self.mapper = nn.Sequential(nn.Conv2d(last_channel, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent))

    def forward(self, x):
        return (self.mapper(self.backbone(x)) + self.output_add) / self.output_div


# ---------------------------------------------------------------- text tower


class TextAttention(nn.Module):
    """Self-attention with separate projections, as CLIP checkpoints store them."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x, allowed):
        n, length, width = x.shape
        split = lambda y: y.view(n, length, self.heads, width // self.heads).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(y.transpose(1, 2).reshape(n, length, width))


class TextMlp(nn.Module):
    """fc1, activation, fc2."""

    def __init__(self, width, hidden, activation):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class TextLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width, heads, hidden, activation, eps):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.self_attn = TextAttention(width, heads)
        self.mlp = TextMlp(width, hidden, activation)

    def forward(self, x, allowed):
        x = x + self.self_attn(self.layer_norm1(x), allowed)
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """CLIP's text tower. The condition of both stages is `forward`'s output at every position, padding included."""

    def __init__(
        self, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, vocab_size,
        max_position_embeddings=77, hidden_act="gelu", layer_norm_eps=1e-5, projection_dim=None, architectures=(), **_,
    ):  # fmt: skip
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.embeddings.position_embedding = nn.Embedding(max_position_embeddings, hidden_size)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            TextLayer(hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        if "CLIPTextModelWithProjection" in architectures:
            self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def forward(self, ids, mask=None):
        """`mask` [N, T]: 1 for a token, 0 for padding, which is masked as a key on top of the causal mask."""
        length = ids.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()[None, None]
        if mask is not None:
            allowed = allowed & mask.bool()[:, None, None, :]
        positions = torch.arange(length, device=ids.device)
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding(positions)
        for layer in self.encoder.layers:
            x = layer(x, allowed)
        return self.final_layer_norm(x)

    def load_state_dict(self, state, strict=True, assign=False):
        """Also takes the older names: a `text_model.` prefix and a stored `position_ids` buffer."""
        names = {name.removeprefix("text_model."): value for name, value in state.items()}
        names.pop("embeddings.position_ids", None)
        return super().load_state_dict(names, strict=strict, assign=assign)


# ---------------------------------------------------------------- folders

PARTS = {
    "text": ("text_encoder", TextEncoder),
    "image": ("image_encoder", ImageEncoder),
    "a": ("stage_a", StageA),
    "b": ("stage_b", StageB),
    "c": ("stage_c", StageC),
}


def load_network(kind, folder, dtype=torch.float32):
    """The network of class `kind` with the `config.json` and `model.safetensors` of `folder`, ready for inference."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        network = kind(**config)
    network.to_empty(device="cpu").to(dtype)
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return network.eval().requires_grad_(False)


def load_part(part, model_folder, dtype=torch.float32):
    """The network of a part ("text", "image", "a", "b" or "c") of a whole model folder."""
    name, kind = PARTS[part]
    return load_network(kind, Path(model_folder) / name, dtype)
