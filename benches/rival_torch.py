#!/usr/bin/env python3
"""The rival of v1: times eager PyTorch on one part of a model, in float32 on the CPU.

    python3 benches/rival_torch.py --model DIR --part c|b|a|text [--threads N] [--repeats N]

    text   the text tower on two prompts
    c      one Stage C step of one picture: the network on the conditional and unconditional half, guidance, DDPM update
    b      one Stage B step of one picture: both halves to logits, guidance, softmax, multinomial, renoising
    a      tokens of one picture to pixels

One warm-up, then `--repeats` timed passes. Prints one line of JSON. The networks are `tests/reference/torch_v1.py`.
"""

import sys

import rival

STAGE_C_GUIDANCE, STAGE_B_GUIDANCE, TEMPERATURE = 4.0, 2.0, 0.7
# A middle step: the cosine schedule's cumulative alphas before and after.
T, ALPHA_BAR, ALPHA_BAR_NEXT = 0.5, 0.49, 0.52


def step_of(part, network, sizes):
    """A closure that runs one pass and returns its result."""
    import torch
    import torch_v1

    generator = torch.Generator().manual_seed(rival.SEED)
    place = rival.placed(network)
    random = lambda *shape: place(torch.randn(*shape, generator=generator))  # noqa: E731
    if part == "text":
        ids, mask = map(place, rival.prompts(sizes.text_length))
        return lambda: network(ids, mask)

    text = random(2, sizes.text_length, sizes.config("text")["hidden_size"])
    t = place(torch.full((1,), T))
    if part == "c":
        x = random(1, 16, sizes.latent, sizes.latent)

        def step_c():
            noise, uncond = network(torch.cat([x, x]), t.expand(2), text).chunk(2)
            noise = torch.lerp(uncond, noise, STAGE_C_GUIDANCE)
            alpha = ALPHA_BAR / ALPHA_BAR_NEXT
            mean = (x - (1 - alpha) / (1 - ALPHA_BAR) ** 0.5 * noise) / alpha**0.5
            sigma = ((1 - alpha) * (1 - ALPHA_BAR_NEXT) / (1 - ALPHA_BAR)) ** 0.5
            return mean + sigma * torch.randn_like(mean)

        return step_c

    labels = sizes.config("b")["num_labels"]
    tokens = place(torch.randint(0, labels, (1, sizes.grid, sizes.grid), generator=generator))
    if part == "a":
        return lambda: network.decode_indices(tokens).clamp(0, 1)

    latents = random(1, 16, sizes.latent, sizes.latent)
    latents = torch.cat([latents, torch.zeros_like(latents)])

    def step_b():
        logits = network(torch.cat([tokens, tokens]), t.expand(2), latents, text)
        sampled = torch_v1.sample_tokens(logits, STAGE_B_GUIDANCE, TEMPERATURE)
        return torch.where(torch.rand(tokens.shape, device=tokens.device) <= T - 1 / 8, tokens, sampled)

    return step_b


def main():
    args = rival.arguments(__doc__.splitlines()[0], ["text", "c", "b", "a"])
    sys.path.append(str(rival.HERE.parent / "tests" / "reference"))
    import torch_v1
    from flops import Sizes

    rival.time_part(
        args, "torch", lambda: torch_v1.load_part(args.part, args.model),
        lambda network: step_of(args.part, network, Sizes(args.model)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
