"""The work that other frameworks share with this package: batches, prompts, plain training.

    python work.py CONFIG DEST [KEY=VALUE ...]

Writes DEST: the model as a folder, the first prompt, and the batches of all clients, cut and
padded, so that a framework has nothing to prepare. `Work` reads them, and trains with stock peft as
one does by hand. It needs torch, transformers and peft alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

Example = dict[str, torch.Tensor]


class Work:
    """What a process of a framework trains and validates with.

    Args:
        folder: that `export` has written.

    Attributes:
        settings: numbers of rounds, clients and steps, and of the optimizer.
        num_examples: of each client.
    """

    def __init__(self, folder: str | Path) -> None:
        import peft
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(folder)
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.num_examples: list[int] = self.settings["num_examples"]
        torch.set_num_threads(self.settings["threads"])
        self._batches = torch.load(folder / "batches.pt")
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        prefix = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.settings["num_tokens"]
        )
        self.model = peft.get_peft_model(base, prefix)
        self.model.eval()  # the package's clients have no dropout either
        self.weight = self.model.prompt_encoder["default"].embedding.weight
        self.load(self.first_prompt(folder))

    @staticmethod
    def first_prompt(folder: str | Path) -> np.ndarray:
        """Return the prompt that all begin with, fp32 [tokens, values]."""
        return np.load(Path(folder) / "prompt.npy")

    def load(self, prompt: np.ndarray | torch.Tensor) -> None:
        """Take over a prompt, fp32 [tokens, values]."""
        with torch.no_grad():
            self.weight.copy_(torch.as_tensor(prompt))

    def prompt(self) -> np.ndarray:
        """Return a copy of the prompt, fp32 [tokens, values]."""
        return self.weight.detach().numpy().copy()

    def train(self, client: int, round: int) -> float:
        """Tune the prompt by a client's steps of a round, from 1; return the last step's loss."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            [self.weight], lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        first = (round - 1) * settings["steps"]
        loss = torch.tensor(0.0)
        for batch in self._batches["clients"][client][first : first + settings["steps"]]:
            optimizer.zero_grad()
            loss = self.model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([self.weight], settings["clip"])
            optimizer.step()
        return loss.item()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss of the validation texts' answers, in nats a token."""
        total = tokens = 0.0
        for batch in self._batches["validation"]:
            answers = int((batch["labels"] != -100).sum())
            total += self.model(**batch).loss.item() * answers
            tokens += answers
        return total / tokens


def export(config_file: str, destination: str, overrides: list[str]) -> None:
    """Write the work of a configuration into a folder."""
    from torch.nn import functional as F

    from fedsp_mpi.config import load
    from fedsp_mpi.data.tokens import collate
    from fedsp_mpi.models import backbone
    from fedsp_mpi.models.prompts import Prompt
    from fedsp_mpi.run.inputs import ExperimentInputs
    from fedsp_mpi.tensors import Batch

    config = load(config_file, ["client.tuning.max_padding=null", *overrides])
    inputs = ExperimentInputs(config)
    inputs.check()
    folder = Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    model = backbone.load_global(inputs.model_name, device=torch.device("cpu"))
    model.model.save_pretrained(folder / "model")
    prompt = Prompt(inputs.prompt_spec).initialise(config.run.seed, config.prompt.init_std)
    np.save(folder / "prompt.npy", prompt.matrix().detach().numpy())

    def with_labels(batch: Batch) -> Example:
        # The package leaves out the last token, which no position asks about.
        return {
            "input_ids": F.pad(batch.input_ids, (0, 1)),
            "attention_mask": F.pad(batch.attention_mask, (0, 1)),
            "labels": F.pad(batch.targets, (1, 0), value=-100),
        }

    stage = config.client.tuning
    clients = range(config.federation.clients)
    batches = []
    for client in clients:
        of_client = inputs.batches(client + 1, stage, "prompt")
        steps = range(stage.steps * config.federation.rounds)
        batches.append([with_labels(of_client.step(step)[0]) for step in steps])
    texts = inputs.validation
    starts = range(0, len(texts), stage.batch_size)
    validation = [with_labels(collate(texts[at : at + stage.batch_size])) for at in starts]
    torch.save({"clients": batches, "validation": validation}, folder / "batches.pt")
    settings = {
        "rounds": config.federation.rounds,
        "clients": config.federation.clients,
        "num_examples": [len(inputs.shard(client + 1)) for client in clients],
        "steps": stage.steps,
        "num_tokens": config.prompt.num_tokens,
        "learning_rate": stage.optimizer.learning_rate,
        "weight_decay": stage.optimizer.weight_decay,
        "clip": stage.optimizer.clip,
        "threads": config.client.compute.threads,
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        export(sys.argv[1], sys.argv[2], sys.argv[3:])
    except ValueError as error:  # a mistake in the configuration, or in what it names
        sys.exit(f"work.py: {error}")
