"""Scores without the package: from a stock model by hand, and by lm-eval."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from fedsp_mpi.data.tokens import Text
from fedsp_mpi.models.prompts import Prompt, key_values
from helpers import tiny


@torch.no_grad()
def by_hand(path: object, prompt: Prompt | None, text: Text) -> tuple[float, bool]:
    """Summed log-likelihood of a text's answer and whether it is greedy: stock model, whole
    sequence, no batch.

    The last tokens that fit into the model behind the prompt are read; the very last token is
    predicted, not read.
    """
    model = AutoModelForCausalLM.from_pretrained(path).eval() if isinstance(path, str) else path
    before = prompt.spec.num_tokens if prompt else 0
    room = tiny.POSITIONS - before + 1
    ids, size = text.ids[-room:], len(text.ids) - text.answer
    inputs = torch.from_numpy(ids[:-1]).long()[None]
    if prompt is None:
        logits = model(input_ids=inputs).logits
    elif prompt.spec.kind == "input":
        embedded = model.get_input_embeddings()(inputs)
        logits = model(inputs_embeds=torch.cat([prompt.matrix()[None], embedded], dim=1)).logits[
            :, before:
        ]
    else:
        cache = DynamicCache()
        for number, (key, value) in enumerate(key_values(prompt)):
            cache.update(key, value, number)
        places = torch.arange(before, before + inputs.shape[1])[None]
        logits = model(input_ids=inputs, past_key_values=cache, position_ids=places).logits
    log, answer = logits[0].double().log_softmax(-1)[-size:], torch.from_numpy(ids[-size:]).long()
    return float(sum(log[i, token] for i, token in enumerate(answer))), bool(
        (log.argmax(-1) == answer).all()
    )


def lm_eval_results(model, tokenizer, name: str, data, limit: int | None, monkeypatch, config=None):
    """lm-eval's scores and log-likelihoods of a task over the given data, through its own model
    class, in fp32.
    """
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import __file__ as tasks_file

    rooms = [str(Path(tasks_file).parent / room) for room in ("arc", "webqs")]
    manager = TaskManager(include_path=rooms, include_defaults=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name=None, **_: data)
    task = manager.load(config or name)["tasks"][name]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, backend="causal")
    found = evaluator.evaluate(
        lm=lm, task_dict={name: task}, limit=limit, bootstrap_iters=10, log_samples=True
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return found["results"][name], [
        [tuple(r) for r in sample["filtered_resps"]] for sample in samples
    ]
