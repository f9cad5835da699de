"""Plain torch or DeepSpeed behind the same three calls: backward, step, and the number of steps
done.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsp_mpi.config.training import OptimizerConfig
from fedsp_mpi.tensors import State, part_of_state
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`: linear warm-up, then linear
    decay.

    With W = round(warmup * total): (step + 1) / W of the full rate while step < W, then (total -
    step) / (total - W). No step has rate 0, so none is wasted; past the end the last rate stays.
    """
    warm = round(settings.warmup * total_steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * max(total_steps - step, 1) / max(total_steps - warm, 1)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameters` as configured."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class TorchEngine:
    """AdamW, schedule and clipping over some parameters.

    Args:
        parameters: what is trained, fp32.
        settings: optimizer and schedule.
        total_steps: length of the schedule.
        team: the ranks that step together, each with the gradient of its part.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: OptimizerConfig,
        total_steps: int,
        team: ServerGroup = SINGLE_RANK,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer = adamw(self._parameters, settings)
        self._settings, self._total, self.team = settings, total_steps, team
        self.steps_done = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def step(self) -> None:
        """Clip, update, forget the gradient."""
        self.team.sum(
            parameter.grad for parameter in self._parameters if parameter.grad is not None
        )
        if self._settings.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.steps_done, self._total)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def forget_gradient(self) -> None:
        """Drop a gradient that was not used, after an error."""
        self._optimizer.zero_grad(set_to_none=True)

    def to(self, device: torch.device) -> None:
        """Move the optimizer's moments; nothing is copied that is there already."""
        for moments in self._optimizer.state.values():
            for name, value in moments.items():
                if name != "step" and value.device != device:
                    moments[name] = value.to(device)

    def state(self) -> State:
        """Everything that a later step depends on, beside the parameters: views, where they lie on
        the CPU.
        """
        return {
            "steps_done": np.array(self.steps_done),
            **_moments(self._optimizer, self._parameters),
        }

    def load_state(self, state: State) -> None:
        """Go on from `state()`, whose arrays are the engine's from now on, where the parameters are
        on the CPU.
        """
        self.steps_done = int(state["steps_done"])
        _load_moments(self._optimizer, self._parameters, state)


def _moments(optimizer: Any, parameters: Sequence[nn.Parameter]) -> State:
    found = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            found[f"{index}/{name}"] = value.cpu().numpy()
    return found


def _load_moments(optimizer: Any, parameters: Sequence[nn.Parameter], state: State) -> None:
    for index, parameter in enumerate(parameters):
        if moments := part_of_state(state, str(index)):
            tensors = {
                name: torch.from_numpy(value).to(parameter.device)
                for name, value in moments.items()
            }
            optimizer.state[parameter] = tensors


class JointEngine:
    """Engines over different parameters that step on one loss."""

    def __init__(self, *engines: TorchEngine) -> None:
        self._engines, self.team = engines, SINGLE_RANK

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` for all of them."""
        loss.backward()

    def step(self) -> None:
        """Each clips, updates and forgets its own."""
        for engine in self._engines:
            engine.step()


class DeepSpeedEngine:
    """The same three calls over a DeepSpeed engine, which lives on the server's ranks alone.

    Args:
        model: the module that is trained, on its device.
        settings: optimizer and schedule.
        total_steps: length of the schedule.
        num_micro_batches: calls of `backward` for one of `step`, the same on every rank of the
            team.
        zero_stage: 0 to 3: what the team's ranks hold in parts (nothing; moments; gradients too;
            weights too).
        team: the ranks that step together.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerConfig,
        total_steps: int,
        num_micro_batches: int,
        zero_stage: int,
        team: ServerGroup = SINGLE_RANK,
    ) -> None:
        self._deepspeed = deepspeed = _import_deepspeed(team)
        self.team = team
        self.version, self.zero_stage = deepspeed.__version__, zero_stage
        self._settings, self._total, self._micro = settings, total_steps, num_micro_batches
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(self._trained, settings),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": num_micro_batches,
                "gradient_clipping": settings.clip or 0.0,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self.steps_done = 0
        self._calls = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; the engine takes means over micro-batches and ranks, which is
        undone here.

        The forward pass goes past the engine, so ZeRO is told that another one has begun; otherwise
        it would take the last micro-batch for all of them.
        """
        if self.zero_stage:
            self._engine.optimizer.clear_backward_seen_flag()
        share = self._micro * self.team.size
        self._engine.backward(loss * share if share > 1 else loss)
        self._calls += 1
        if self._calls % self._micro:
            self._engine.step()  # counts the micro-batch; the last one is counted by `step`

    def step(self) -> None:
        """Clip, update, forget the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.steps_done, self._total)
        self._engine.step()
        self.steps_done += 1

    def state(self) -> State:
        """As TorchEngine's; only without sharding, where each rank has all of it."""
        assert self.zero_stage == 0
        return {"steps_done": np.array(self.steps_done), **_moments(self._optimizer, self._trained)}

    def load_state(self, state: State) -> None:
        """Go on from `state()`, as TorchEngine does."""
        assert self.zero_stage == 0
        self.steps_done = int(state["steps_done"])
        _load_moments(self._optimizer, self._trained, state)

    def close(self) -> None:
        """Give every rank the whole weights, and leave DeepSpeed: nothing of it outlives the
        distillation.
        """
        parameters = list(self._engine.module.parameters()) if self.zero_stage == 3 else []
        with self._deepspeed.zero.GatheredParameters(parameters):
            whole = [parameter.data.clone() for parameter in parameters]
        self._engine.destroy()
        for parameter, value in zip(parameters, whole):
            parameter.data = value
        if self.team.size == 1:
            self._deepspeed.comm.destroy_process_group()


def _import_deepspeed(team: ServerGroup) -> Any:
    """Import DeepSpeed over the process group of the server's ranks; a server of one rank makes one
    of its own.

    Left to itself, `init_distributed` looks for MPI and would wait for the clients; and on a CPU it
    compiles a shared-memory operator, which needs a compiler and a minute, so that operator is
    marked as not available.
    """
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # it uses older names
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks = {"RANK": team.rank, "WORLD_SIZE": team.size, "LOCAL_RANK": team.device.index or 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    if team.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
