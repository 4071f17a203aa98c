#!/usr/bin/env python3
"""Holds `torch_v1.py` to the reference data: largest error of every tensor, relative to that tensor's largest value.

    python3 tests/reference/check_torch_v1.py        exits 1 if any error is above 1e-5 or any index differs

Needs the packages of `benches/requirements.txt`.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import torch_v1

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TOLERANCE = 1e-5
failures = []


class Case:
    """A case of the reference data: its tensors, and what was compared."""

    def __init__(self, name):
        self.name = name
        self.tensors = load_file(FIXTURES / "cases" / f"{name}.safetensors")
        self.facts = json.loads((FIXTURES / "cases" / f"{name}.json").read_text())
        self.about = {t["name"]: t for t in self.facts["tensors"]}
        self.folder = FIXTURES / self.facts["models"][0]
        self.compared = set()
        self.worst = (0.0, "-")

    def input(self, name):
        tensor = self.tensors[name]
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def check(self, name, got):
        want = self.tensors[name]
        self.compared.add(name)
        if got.shape != want.shape:
            return self.fail(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if not want.is_floating_point():
            wrong = int((got != want).sum())
            return self.fail(f"{name}: {wrong} of {want.numel()} differ") if wrong else None
        largest = max(float(want.abs().max()), 1e-12)
        error = float((got.double() - want.double()).abs().max()) / largest
        self.worst = max(self.worst, (error, name))
        if not error <= TOLERANCE:
            self.fail(f"{name}: relative error {error:.2e}, allowed {TOLERANCE:.0e}")

    def fail(self, message):
        failures.append(f"{self.name}: {message}")

    def finish(self):
        outputs = {name for name, t in self.about.items() if t["role"] == "output"}
        print(f"{self.name:<26} {len(self.compared):>3}/{len(outputs):<3} {self.worst[0]:.2e}  {self.worst[1]}")


def record_outputs(modules):
    """Keeps the output of each module of {name: module}; read after the forward pass."""
    outputs = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
    return outputs


def check_text(case):
    network = torch_v1.load_network(torch_v1.TextEncoder, case.folder)
    config = json.loads((case.folder / "config.json").read_text())
    ids, mask = case.input("ids"), case.input("attention_mask")
    layers = network.encoder.layers
    outputs = record_outputs({f"hidden_states.{i + 1}": layer for i, layer in enumerate(layers)})
    layers[0].register_forward_pre_hook(lambda _m, args: outputs.__setitem__("hidden_states.0", args[0]))
    for prefix, m in (("", mask), ("nomask.", None)):
        hidden = network(ids, m)
        eos = config["eos_token_id"]
        end = ids.argmax(1) if eos == 2 else (ids == eos).int().argmax(1)
        pooled = hidden[torch.arange(len(ids)), end]
        results = {"last_hidden_state": hidden, "pooler_output": pooled, **outputs}
        results["hidden_states_minus2"] = outputs[f"hidden_states.{len(layers) - 1}"]
        if hasattr(network, "text_projection"):
            results["text_embeds"] = network.text_projection(pooled)
        for name, value in results.items():
            if prefix + name in case.tensors:
                case.check(prefix + name, value)


def check_image(case):
    network = torch_v1.load_network(torch_v1.ImageEncoder, case.folder)
    outputs = record_outputs({f"stage.{i}": stage for i, stage in enumerate(network.backbone)})
    outputs_mapper = record_outputs({"mapper_out": network.mapper, "features": network.backbone})
    case.check("out", network(case.input("x")))
    for name, value in {**outputs, **outputs_mapper}.items():
        case.check(name, value)


def check_stage_a(case):
    network = torch_v1.load_network(torch_v1.StageA, case.folder)
    layers = {f"enc.{i}": layer for i, layer in enumerate(network.down_blocks)}
    outputs = record_outputs({"enc.in": network.in_block, "pre_scale_latents": network.down_blocks, **layers})
    quantised, latents, indices, loss = network.encode(case.input("image"))
    for name, value in {
        "quantised": quantised,
        "latents": latents,
        "indices": indices,
        "loss": loss,
        **outputs,
    }.items():
        case.check(name, value)
    case.check("decoded_quantised", network.decode(case.input("quantised")))
    case.check("decoded_latents", network.decode(case.input("latents")))
    case.check("decoded_indices", network.decode_indices(case.input("rand_indices")))


def check_stage_b(case):
    network = torch_v1.load_network(torch_v1.StageB, case.folder)
    outputs = record_outputs({"embedding": network.embedding, "clf": network.clf, "in_mapper": network.in_mapper})
    outputs_down = record_outputs({f"down.{i}": level[-1] for i, level in enumerate(network.down_blocks)})
    outputs_up = record_outputs({"up": network.up_blocks[-1][-1]})
    for k in range(8):
        if f"{k}.tokens" not in case.tensors:
            break
        tokens, t, latents, text = (case.input(f"{k}.{name}") for name in ("tokens", "r", "effnet", "byt5"))
        case.check(f"{k}.logits", network(tokens, t, latents, text))
        case.check(f"{k}.r_embed", torch_v1.timestep_embedding(t, network.c_r))
        case.check(f"{k}.c_embed", network.condition(latents, text))
        for name, value in {**outputs, **outputs_down, **outputs_up}.items():
            case.check(f"{k}.{name}", value)


def check_stage_c(case):
    network = torch_v1.load_network(torch_v1.StageC, case.folder)
    outputs = record_outputs({f"block.{i}": block for i, block in enumerate(network.blocks)})
    outputs_ends = record_outputs({"ab": network.out, "c_embed": network.cond_mapper})
    for k in range(8):
        if f"{k}.x" not in case.tensors:
            break
        t = case.input(f"{k}.r")
        case.check(f"{k}.noise", network(case.input(f"{k}.x"), t, case.input(f"{k}.c")))
        case.check(f"{k}.r_embed", torch_v1.timestep_embedding(t, network.c_r))
        for name, value in {**outputs, **outputs_ends}.items():
            case.check(f"{k}.{name}", value)


CHECKS = {
    "text_encoder": check_text,
    "text_encoder_quick_gelu": check_text,
    "text_encoder_legacy": check_text,
    "text_encoder_bigg": check_text,
    "image_encoder": check_image,
    "stage_a": check_stage_a,
    "stage_a_levels3": check_stage_a,
    "stage_b_forward": check_stage_b,
    "stage_b_alt_forward": check_stage_b,
    "stage_c_forward": check_stage_c,
}

if __name__ == "__main__":
    print(f"{'case':<26} compared worst     of")
    with torch.inference_mode():
        for name, check in CHECKS.items():
            case = Case(name)
            check(case)
            case.finish()
    for failure in failures:
        print("FAILED", failure)
    print(f"{len(CHECKS)} cases, {len(failures)} failures")
    sys.exit(bool(failures))
