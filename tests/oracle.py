"""FedSP a second time, as naively as it can be said: one text at a time, and nothing taken from the package.

Weights and prompts are mappings of tensors, a text is (token ids, where the answer begins), and a configuration is the
mapping of a YAML file in which every key that is used here is spelled out.
"""

import copy
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache


def draw(*meaning):
    digest = hashlib.blake2b(":".join(map(str, meaning)).encode(), digest_size=8).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little") >> 1))


def read(config, most):
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["name"])
    for line in Path(config["data"]["source"], "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["context"] + " " + row["choices"][row["label"]]).input_ids
        answer = len(tokenizer(row["context"].rstrip()).input_ids)
        yield ids[-most:], answer - max(0, len(ids) - most)  # a long text loses its beginning


def first_prompt(seed, num_tokens, width, out, std, projection):
    shapes = {"prompt": (num_tokens, out)}
    if projection:
        shapes = {"embedding": (num_tokens, width), "transform.0.weight": (projection, width)}
        shapes |= {"transform.0.bias": (projection,), "transform.2.weight": (out, projection), "transform.2.bias": (out,)}
    prompt = {n: torch.tensor(draw(seed, f"prompt {n}").standard_normal(s, "float32")) for n, s in shapes.items()}
    scale = {"weight": lambda x: x.shape[1] ** -0.5, "bias": lambda x: 0.0}
    return {n: (x * scale.get(n.split(".")[-1], lambda _: std)(x)).requires_grad_() for n, x in prompt.items()}


def to_depth(prompt, old, new):
    """To fewer layers by the mean of neighbours, to more by repetition."""
    fewer, more, mapped = min(old, new), max(old, new), {}
    groups = [[i for i in range(more) if i * fewer // more == j] for j in range(fewer)]
    for name, x in prompt.items():
        axis = {"prompt": 1, "transform.2.weight": 0, "transform.2.bias": 0}.get(name)
        layers = [] if axis is None else x.detach().chunk(old, axis)
        down = [sum(layers[i] for i in group) / len(group) for group in groups] if new < old and layers else layers
        up = [layer for layer, group in zip(down, groups) for _ in group] if new > old else down
        mapped[name] = torch.cat(up, axis) if layers else x.detach()
    return mapped


def run(model, weights, ids, prompt=None):
    """Log-probabilities [tokens, vocabulary] and last hidden states [tokens, width] of one text behind a prompt."""
    cache, before = DynamicCache(), 0
    if prompt:
        p = prompt | {"soft": prompt.get("prompt")}
        if "embedding" in p:
            inner = torch.tanh(p["embedding"] @ p["transform.0.weight"].T + p["transform.0.bias"])
            p["soft"] = inner @ p["transform.2.weight"].T + p["transform.2.bias"]
        heads, before = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads), len(p["soft"])
        for i, layer in enumerate(p["soft"].chunk(model.config.num_hidden_layers, 1)):
            key, value = (x.unflatten(1, (heads, -1)).transpose(0, 1)[None] for x in layer.chunk(2, 1))
            cache.update(key, value, i)
    places = torch.arange(before, before + len(ids))[None]
    options = {"position_ids": places, "past_key_values": cache, "output_hidden_states": True}
    found = functional_call(model, weights, (torch.tensor([ids]),), options)
    return found.logits[0].log_softmax(-1), found.hidden_states[-1][0]


class Stage:
    """AdamW on one owner's texts. Moments, schedule and the place in the texts last as long as the object."""

    def __init__(self, settings, rounds, moving, texts, *order):
        self.moving, self.texts, self.order = list(dict.fromkeys(moving.values())), texts, order
        self.done, self.steps, self.size, self.o = 0, settings["steps"], settings["batch_size"], settings["optimizer"]
        self.total, betas = self.steps * rounds, (self.o["beta1"], self.o["beta2"])
        options = {"betas": betas, "eps": self.o["epsilon"], "weight_decay": self.o["weight_decay"], "foreach": False}
        self.adam = torch.optim.AdamW(self.moving, **options)

    def train(self, losses):
        """The loss of a step is the mean of what `losses` gives for each token, over all tokens of the batch."""
        for step in range(self.done, self.done + self.steps):
            tokens, n = [], len(self.texts)
            for place in range(step * self.size, (step + 1) * self.size):
                tokens += losses(*self.texts[draw(*self.order, place // n).permutation(n)[place % n]])
            gradients = torch.autograd.grad(sum(tokens) / len(tokens), self.moving, allow_unused=True)
            norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
            for p, g in zip(self.moving, gradients):
                p.grad = None if g is None else g * min(1, (self.o["clip"] or norm) / norm)
            warm = round(self.o["warmup"] * self.total)
            slope = (step + 1) / warm if step < warm else (self.total - step) / (self.total - warm)
            self.adam.param_groups[0]["lr"] = self.o["learning_rate"] * slope
            self.adam.step()
        self.done += self.steps


def fedsp(config):
    """Yields the server's prompts after each round."""
    seed, rounds, clients = config["run"]["seed"], config["federation"]["rounds"], config["federation"]["clients"]
    ...
