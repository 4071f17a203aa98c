#!/usr/bin/env python3
"""The rival of v2: times diffusers' own modules, eager, on one part of a model, in float32 on the CPU.

    python3 benches/rival_diffusers.py --model DIR --part c|b|a|text|text-b [--threads N] [--repeats N]

    text     the prior's text tower on two prompts, with the mask of their padding
    text-b   the decoder's, likewise
    c        one step of the prior for one picture: the network on both halves, guidance, the scheduler's step
    b        one step of the decoder for one picture, without guidance as by default, and the scheduler's step
    a        latents of one picture to pixels

One warm-up, then `--repeats` timed passes. Prints one line of JSON. Only the part's own folder is loaded. Needs the
packages of `tests/reference/requirements.txt`.
"""

import rival

PRIOR_GUIDANCE = 4.0
PRIOR_STEPS, DECODER_STEPS = 30, 12
# What the prior pipeline makes of its latents.
LATENT_MEAN, LATENT_STD = 42.0, 1.0


def load(part, folder):
    import torch
    from diffusers.pipelines.deprecated import wuerstchen
    from transformers import CLIPTextModel, logging

    logging.disable_progress_bar()
    kinds = {"c": wuerstchen.WuerstchenPrior, "b": wuerstchen.WuerstchenDiffNeXt, "a": wuerstchen.PaellaVQModel}
    return kinds.get(part, CLIPTextModel).from_pretrained(folder, dtype=torch.float32).eval()


def step_of(part, network, sizes):
    """A closure that runs one pass and returns its result."""
    import torch
    from diffusers import DDPMWuerstchenScheduler

    generator = torch.Generator().manual_seed(rival.SEED)
    place = rival.placed(network)
    random = lambda *shape: place(torch.randn(*shape, generator=generator))  # noqa: E731
    if part.startswith("text"):
        ids, mask = map(place, rival.prompts(sizes.text_length))
        return lambda: network(ids, attention_mask=mask).last_hidden_state

    if part == "a":
        latents = random(1, network.config.latent_channels, sizes.grid, sizes.grid)
        return lambda: network.decode(latents * network.config.scale_factor).sample.clamp(0, 1)

    scheduler = DDPMWuerstchenScheduler.from_pretrained(sizes.folder("c-scheduler" if part == "c" else "b-scheduler"))
    scheduler.set_timesteps(PRIOR_STEPS if part == "c" else DECODER_STEPS)
    t = place(scheduler.timesteps[len(scheduler.timesteps) // 2].expand(1))
    if part == "c":
        x = random(1, network.config.c_in, sizes.latent, sizes.latent)
        text = random(2, sizes.text_length, network.config.c_cond)

        def step_c():
            noise, uncond = network(torch.cat([x, x]), r=torch.cat([t, t]), c=text).chunk(2)
            noise = torch.lerp(uncond, noise, PRIOR_GUIDANCE)
            return scheduler.step(noise, t, x).prev_sample

        return step_c

    x = random(1, network.config.c_in, sizes.grid, sizes.grid)
    image = random(1, network.config.effnet_embd, sizes.latent, sizes.latent) * LATENT_MEAN - LATENT_STD
    text = random(1, sizes.text_length, network.config.clip_embd)
    return lambda: scheduler.step(network(x, r=t, effnet=image, clip=text), t, x).prev_sample


def main():
    args = rival.arguments(__doc__.splitlines()[0], ["text", "text-b", "c", "b", "a"])
    from flops import Sizes

    sizes = Sizes(args.model)
    rival.time_part(
        args, "diffusers", lambda: load(args.part, sizes.folder(args.part)),
        lambda network: step_of(args.part, network, sizes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
