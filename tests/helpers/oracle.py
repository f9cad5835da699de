"""FedSP a second time, in the most naive way: one text at a time, and nothing taken from the
package.
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


def read(c):
    """The training texts: token ids, and where the answer begins."""
    tokenizer, most = AutoTokenizer.from_pretrained(c["model"]["name"]), c["data"]["max_length"]
    for row in map(json.loads, Path(c["data"]["source"], "train.jsonl").read_text().splitlines()):
        ids = tokenizer(row["context"] + " " + row["choices"][row["label"]]).input_ids
        yield (
            ids[-most:],
            len(tokenizer(row["context"].rstrip()).input_ids) - max(0, len(ids) - most),
        )


def first_prompt(c, model):
    n, std, inner = (c["prompt"][key] for key in ("num_tokens", "init_std", "projection"))
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    width = getattr(model, "num_key_value_heads", heads) * model.hidden_size // heads
    shapes = {
        "embedding": (n, width),
        "transform.0.weight": (inner, width),
        "transform.0.bias": (inner,),
    }
    shapes |= {
        "transform.2.weight": (layers * 2 * width, inner),
        "transform.2.bias": (layers * 2 * width,),
    }
    for name, shape in shapes.items() if inner else [("prompt", (n, layers * 2 * width))]:
        scale = 0 if "bias" in name else shape[1] ** -0.5 if "weight" in name else std
        numbers = draw(c["run"]["seed"], f"prompt {name}").standard_normal(shape, "f")
        yield name, torch.tensor(numbers * scale, requires_grad=True)


def soft_tokens(p):
    if "prompt" in p:
        return p["prompt"]
    inner = torch.tanh(p["embedding"] @ p["transform.0.weight"].T + p["transform.0.bias"])
    return inner @ p["transform.2.weight"].T + p["transform.2.bias"]


def put(prompt, depth, new, old):
    """Give a prompt of `depth` layers the values of one of `old`: means of neighbours downwards,
    repetition upwards.
    """
    mix = torch.kron(
        torch.eye(few := min(depth, old)), torch.full((depth // few, old // few), few / old)
    )
    for name, x in new.items():
        if axis := {"prompt": 2, "transform.2.weight": 1, "transform.2.bias": 1}.get(name):
            by_layer = x.detach().unflatten(axis - 1, (old, -1)).movedim(axis - 1, 0)
            x = torch.tensordot(mix, by_layer, 1).movedim(0, axis - 1).flatten(axis - 1, axis)
        prompt[name].data = x.detach().clone()


def run(model, weights, prompt, ids):
    """Log-probabilities [tokens, vocabulary] and last hidden states [tokens, width] of one text
    behind a prompt.
    """
    soft, cache = soft_tokens(prompt) if prompt else torch.empty(0), DynamicCache()
    head = model.config.hidden_size // model.config.num_attention_heads
    for i, layer in enumerate(soft.chunk(model.config.num_hidden_layers, 1) if prompt else ()):
        cache.update(
            *(x.unflatten(1, (-1, head)).transpose(0, 1)[None] for x in layer.chunk(2, 1)), i
        )
    where = torch.arange(len(soft), len(soft) + len(ids))[None]
    options = {"position_ids": where, "past_key_values": cache, "output_hidden_states": True}
    found = functional_call(model, weights, (torch.tensor([ids]),), options)
    return found.logits[0].log_softmax(-1), found.hidden_states[-1][0]


def train(c, rounds, moving, losses, texts, *order):
    """Each `next` takes the AdamW steps of a round; moments, schedule and place in the texts go on
    to the next one.
    """
    o, moving, total = c["optimizer"], list(dict.fromkeys(moving.values())), c["steps"] * rounds
    warm = round(o["warmup"] * total)
    adam = torch.optim.AdamW(
        moving, 0, (o["beta1"], o["beta2"]), o["epsilon"], o["weight_decay"], foreach=False
    )
    for step in range(total):
        places = [divmod(step * c["batch_size"] + i, len(texts)) for i in range(c["batch_size"])]
        batch = [texts[draw(*order, epoch).permutation(len(texts))[i]] for epoch, i in places]
        loss = torch.cat([losses(*text) for text in batch]).mean()  # of all tokens that have one
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        norm = sum(g.square().sum() for g in gradients if g is not None) ** 0.5
        for p, g in zip(moving, gradients):
            p.grad = None if g is None else g * min(1, (o["clip"] or norm) / norm)
        adam.param_groups[0]["lr"] = o["learning_rate"] * min(
            (step + 1) / warm, (total - step) / (total - warm)
        )
        adam.step()
        if (step + 1) % c["steps"] == 0:
            yield


def fedsp(c):
    """Yields the server's prompts after each round."""
    rounds, seed, name, of_client = (
        c["federation"]["rounds"],
        c["run"]["seed"],
        c["model"]["name"],
        c["client"],
    )
    G = AutoModelForCausalLM.from_pretrained(name).eval()
    theta, layers, depth = (
        dict(G.named_parameters()),
        G.config.num_hidden_layers,
        c["auxiliary"]["depth"],
    )
    A = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(name, num_hidden_layers=depth)
    ).eval()
    own = {n: w.detach().clone().requires_grad_() for n, w in theta.items()}
    phi = {
        n: own[re.sub(r"\.\d+\.", ".0.", n)] for n, _ in A.named_parameters()
    }  # the first block, shared
    P, texts = dict(first_prompt(c, G.config)), list(read(c))
    parts = np.array_split(
        draw(seed, "iid partition").permutation(len(texts)), c["federation"]["clients"] + 1
    )
    shard, *shards = [[texts[i] for i in part] for part in parts]

    def distance(ids, _):
        return (run(A, phi, None, ids[:-1])[1] - run(G, theta, None, ids[:-1])[1]).square().mean(1)

    def answer(model, weights, prompt):
        return lambda ids, start: (
            -run(model, weights, prompt, ids)[0][range(start - 1, len(ids) - 1), ids[start:]]
        )

    next(train(c["distillation"]["stage"], 1, phi, distance, shard, seed, "order distillation"))
    server = train(
        c["server"]["tuning"], rounds, P, answer(G, theta, P), shard, seed, "order server", -1
    )
    clients = []
    for k, shard in enumerate(shards):
        phi_k, P_k = copy.deepcopy(phi), copy.deepcopy(P)
        model = train(
            of_client["alignment"],
            rounds,
            phi_k,
            answer(A, phi_k, P_k),
            shard,
            seed,
            "order alignment",
            k,
        )
        tuned = train(
            of_client["tuning"], rounds, P_k, answer(A, phi_k, P_k), shard, seed, "order prompt", k
        )
        clients.append((P_k, model, tuned))
    for _ in range(rounds):
        for P_k, *stages in clients:
            put(P_k, depth, P, layers)
            _ = [next(stage) for stage in stages]
        put(
            P, layers, {n: sum(P_k[n] for P_k, *_ in clients) / len(clients) for n in P}, depth
        )  # equal samples
        next(server)
        yield {n: p.detach().numpy().copy() for n, p in P.items()}


def finetune(c):
    """Yields the global model's weights after each round."""
    rounds, seed, name = c["federation"]["rounds"], c["run"]["seed"], c["model"]["name"]
    G = AutoModelForCausalLM.from_pretrained(name).eval()
    theta, texts = dict(G.named_parameters()), list(read(c))
    parts = np.array_split(
        draw(seed, "iid partition").permutation(len(texts)), c["federation"]["clients"] + 1
    )
    shard, *shards = [[texts[i] for i in part] for part in parts]

    def answer(weights):
        return lambda ids, start: (
            -run(G, weights, None, ids)[0][range(start - 1, len(ids) - 1), ids[start:]]
        )

    server = train(
        c["server"]["tuning"], rounds, theta, answer(theta), shard, seed, "order server", -1
    )
    clients = []
    for k, shard in enumerate(shards):
        own = copy.deepcopy(theta)
        tuned = train(
            c["client"]["tuning"], rounds, own, answer(own), shard, seed, "order prompt", k
        )
        clients.append((own, tuned))
    for _ in range(rounds):
        for own, tuned in clients:
            for n, w in own.items():
                w.data = theta[n].detach().clone()
            next(tuned)
        for n, w in theta.items() if clients else ():
            w.data = sum(own[n].detach() for own, _ in clients) / len(clients)  # equal samples
        next(server)
        yield {n: w.detach().numpy().copy() for n, w in theta.items()}
