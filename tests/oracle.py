"""FedSP a second time, in the most naive way: one text at a time, and nothing taken from the package."""

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


def read(c, most):
    """The training texts: token ids, and where the answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(c["model"]["name"])
    for line in Path(c["data"]["source"], "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["context"] + " " + row["choices"][row["label"]]).input_ids
        yield ids[-most:], len(tokenizer(row["context"].rstrip()).input_ids) - max(0, len(ids) - most)


def first_prompt(c, width, out):
    seed, std, n, inner = c["run"]["seed"], *(c["prompt"][key] for key in ("init_std", "num_tokens", "projection"))
    shapes = {"embedding": (n, width), "transform.0.weight": (inner, width), "transform.0.bias": (inner,)}
    shapes |= {"transform.2.weight": (out, inner), "transform.2.bias": (out,)}
    for name, shape in shapes.items() if inner else [("prompt", (n, out))]:
        scale = 0 if "bias" in name else shape[1] ** -0.5 if "weight" in name else std
        yield name, (torch.tensor(draw(seed, f"prompt {name}").standard_normal(shape, "f")) * scale).requires_grad_()


def soft_tokens(p):
    if "prompt" in p:
        return p["prompt"]
    inner = torch.tanh(p["embedding"] @ p["transform.0.weight"].T + p["transform.0.bias"])
    return inner @ p["transform.2.weight"].T + p["transform.2.bias"]


def put(prompt, depth, new, old):
    """Assign the values `new` of a prompt of `old` layers: fewer layers get means of neighbours, more get repetitions."""
    few = min(depth, old)
    mix = torch.kron(torch.eye(few), torch.full((depth // few, old // few), few / old))
    for name, x in new.items():
        if axis := {"prompt": -1, "transform.2.weight": -2, "transform.2.bias": -1}.get(name):
            by_layer = x.detach().unflatten(axis, (old, -1)).movedim(axis - 1, 0)
            x = torch.tensordot(mix, by_layer, 1).movedim(0, axis - 1).flatten(axis - 1, axis)
        prompt[name].data = x.detach().clone()


def run(model, weights, ids, prompt=None):
    """Log-probabilities [tokens, vocabulary] and last hidden states [tokens, width] of one text behind a prompt."""
    soft, cache = soft_tokens(prompt) if prompt else torch.zeros(0, 1), DynamicCache()
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    for i, layer in enumerate(soft.chunk(model.config.num_hidden_layers, 1) if prompt else ()):
        cache.update(*(x.unflatten(1, (heads, -1)).transpose(0, 1)[None] for x in layer.chunk(2, 1)), i)
    where = torch.arange(len(soft), len(soft) + len(ids))[None]
    options = {"position_ids": where, "past_key_values": cache, "output_hidden_states": True}
    found = functional_call(model, weights, (torch.tensor([ids]),), options)
    return found.logits[0].log_softmax(-1), found.hidden_states[-1][0]


class Stage:
    """AdamW on one owner's texts. Moments, schedule and the place in the texts last as long as the object."""

    def __init__(self, c, rounds, moving, texts, *order):
        self.moving, self.texts, self.order, self.done = list(dict.fromkeys(moving.values())), texts, order, 0
        self.steps, self.size, self.o, self.total = c["steps"], c["batch_size"], c["optimizer"], c["steps"] * rounds
        betas, decay = (self.o["beta1"], self.o["beta2"]), self.o["weight_decay"]
        self.adam = torch.optim.AdamW(self.moving, 0, betas, self.o["epsilon"], decay, foreach=False)

    def train(self, losses):
        """`losses` gives one for each token of a text; a step takes the mean over all tokens of its batch."""
        for _ in range(self.steps):
            places = [divmod(self.done * self.size + i, len(self.texts)) for i in range(self.size)]
            texts = [self.texts[draw(*self.order, epoch).permutation(len(self.texts))[i]] for epoch, i in places]
            tokens = [loss for text in texts for loss in losses(*text)]
            gradients = torch.autograd.grad(sum(tokens) / len(tokens), self.moving, allow_unused=True)
            norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
            for p, g in zip(self.moving, gradients):
                p.grad = None if g is None else g * min(1, (self.o["clip"] or norm) / norm)
            warm = round(self.o["warmup"] * self.total)
            slope = (self.done + 1) / warm if self.done < warm else (self.total - self.done) / (self.total - warm)
            self.adam.param_groups[0]["lr"], self.done = self.o["learning_rate"] * slope, self.done + 1
            self.adam.step()


def fedsp(c):
    """Yields the server's prompts after each round."""
    rounds, num_clients, seed, name = *(c["federation"][key] for key in ("rounds", "clients")), c["run"]["seed"], c["model"]
    G = AutoModelForCausalLM.from_pretrained(name).eval()
    theta, layers = dict(G.named_parameters()), G.config.num_hidden_layers
    depth = c["auxiliary"]["depth"] or layers
    A = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, num_hidden_layers=depth)).eval()
    own = {n: w.detach().clone().requires_grad_() for n, w in theta.items()}
    phi = {n: own[re.sub(r"\.(h|layers)\.\d+\.", r".\1.0.", n)] for n, _ in A.named_parameters()}
    texts = list(read(c, c["data"]["max_length"]))
    shards = np.array_split(draw(seed, "iid partition").permutation(len(texts)), num_clients + 1)
    shards = [[texts[i] for i in shard] for shard in shards]

    def distance(ids, _):
        return (run(A, phi, ids[:-1])[1] - run(G, theta, ids[:-1])[1]).square().mean(1)

    def answer(model, weights, prompt):
        return lambda ids, start: -run(model, weights, ids, prompt)[0][range(start - 1, len(ids) - 1), ids[start:]]

    Stage(c["distillation"]["stage"], 1, phi, shards[0], seed, "order distillation").train(distance)
    P = dict(first_prompt(c, width := heads(G) * G.config.hidden_size // G.config.num_attention_heads, layers * 2 * width))
    server = Stage(c["server"]["tuning"], rounds, P, shards[0], seed, "order server", -1)
    clients = []
    for k in range(num_clients):
        phi_k, P_k = copy.deepcopy(phi), {n: torch.empty(0) for n in P}
        stages = (("alignment", phi_k), ("prompt", P_k))
        clients += [(phi_k, P_k, *(Stage(c["client"][s], rounds, moving, shards[k + 1], seed, f"order {s}", k) for s, moving in stages))]
    for _ in range(rounds):
        for phi_k, P_k, alignment, tuning in clients:
            put(P_k, depth, P, layers)
            alignment.train(answer(A, phi_k, P_k))
            tuning.train(answer(A, phi_k, P_k))
        # every client has processed as many samples as any other, so all weigh the same
        put(P, layers, {n: sum(P_k[n] for _, P_k, *_ in clients) / num_clients for n in P}, depth)
        server.train(answer(G, theta, P))
        yield {n: p.detach().numpy().copy() for n, p in P.items()}
