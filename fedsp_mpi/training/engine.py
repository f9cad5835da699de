"""Plain torch or DeepSpeed behind the same calls: add a gradient, take a step, export the state."""

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
    """Return the learning rate of a step: linear warm-up, then linear decay, or always the same.

    With a linear schedule and W = round(warmup * total): (step + 1) / W of the full rate while step
    < W, then (total - step) / (total - W). No step has rate 0, so none is wasted; past the end the
    last rate stays.

    Args:
        settings: full rate, schedule, and the share of warm-up.
        step: from 0.
        total_steps: length of the schedule.
    """
    if settings.schedule == "constant":
        return settings.learning_rate
    num_warmup = round(settings.warmup * total_steps)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / num_warmup
    num_left = max(total_steps - step, 1)
    return settings.learning_rate * num_left / max(total_steps - num_warmup, 1)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters as configured."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class TorchEngine:
    """AdamW with schedule and clipping.

    Args:
        parameters: what is trained, fp32.
        settings: optimizer and schedule.
        total_steps: length of the schedule.
        group: the ranks that step together, each with the gradient of its part.
        proximal: FedProx's mu (Li et al., 2020, arXiv 1812.06127, algorithm 2): the loss has a term
            mu / 2 ||w - w_t||^2 more, where w_t are the parameters at the last call of `anchor`.

    Attributes:
        steps_done: steps of the schedule so far.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        settings: OptimizerConfig,
        total_steps: int,
        *,
        group: ServerGroup = SINGLE_RANK,
        proximal: float = 0.0,
    ) -> None:
        self.group = group
        self._proximal = proximal
        self._anchors: list[Tensor] = []
        self.steps_done = 0
        self._settings = settings
        self._total_steps = total_steps
        self._parameters = list(parameters)
        self._optimizer = adamw(self._parameters, settings)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, a scalar."""
        loss.backward()

    def step(self) -> None:
        """Sum the gradient over the ranks, clip it, update the parameters, and clear it."""
        self.group.sum(
            parameter.grad for parameter in self._parameters if parameter.grad is not None
        )
        self._pull_to_anchors()
        if self._settings.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip)
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = learning_rate(self._settings, self.steps_done, self._total_steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def anchor(self) -> None:
        """Remember the parameters as they are: the proximal term pulls towards them from now on."""
        if self._proximal:
            self._anchors = [parameter.detach().clone() for parameter in self._parameters]

    def _pull_to_anchors(self) -> None:
        """Add the gradient of the proximal term, mu (w - w_t)."""
        for parameter, anchor in zip(self._parameters, self._anchors):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=self._proximal)

    def zero_grad(self) -> None:
        """Drop a gradient that was not used, after an error."""
        self._optimizer.zero_grad(set_to_none=True)

    def to(self, device: torch.device) -> None:
        """Move the optimizer's moments, unless they are on the device already."""
        for moments in self._optimizer.state.values():
            for name, value in moments.items():
                if name != "step" and value.device != device:
                    moments[name] = value.to(device)

    def state(self) -> State:
        """Return everything that a later step depends on, except the parameters.

        The arrays are views where the parameters are on the CPU.
        """
        moments = _moments(self._optimizer, self._parameters)
        return {"steps_done": np.array(self.steps_done), **moments}

    def load_state(self, state: State) -> None:
        """Continue from `state()`.

        Where the parameters are on the CPU, the engine writes to these arrays from now on.
        """
        self.steps_done = int(state["steps_done"])
        _load_moments(self._optimizer, self._parameters, state)


def _moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> dict[str, np.ndarray]:
    """Return the optimizer's state as "index of the parameter/name"."""
    moments = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            moments[f"{index}/{name}"] = value.cpu().numpy()
    return moments


def _load_moments(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], state: State
) -> None:
    """Set the optimizer's state of every parameter that `state` has moments of."""
    for index, parameter in enumerate(parameters):
        moments = part_of_state(state, str(index))
        if moments:
            optimizer.state[parameter] = {
                name: torch.from_numpy(value).to(parameter.device)
                for name, value in moments.items()
            }


class JointEngine:
    """Engines over different parameters that step on one loss, on one rank."""

    def __init__(self, *engines: TorchEngine) -> None:
        self.group = SINGLE_RANK
        self._engines = engines

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, a scalar, for all engines."""
        loss.backward()

    def step(self) -> None:
        """Take one step with every engine."""
        for engine in self._engines:
            engine.step()


class DeepSpeedEngine:
    """The same calls over a DeepSpeed engine, which exists on the server's ranks alone.

    Args:
        model: the module that is trained, on its device.
        settings: optimizer and schedule.
        total_steps: length of the schedule.
        num_micro_batches: calls of `backward` for one of `step`, the same on every rank.
        zero_stage: 0 to 3: what the ranks hold in parts (nothing; moments; gradients too; weights
            too).
        group: the ranks that step together.

    Attributes:
        version: of DeepSpeed.
        steps_done: steps of the schedule so far.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerConfig,
        total_steps: int,
        *,
        num_micro_batches: int,
        zero_stage: int,
        group: ServerGroup = SINGLE_RANK,
    ) -> None:
        deepspeed = _import_deepspeed(group)
        self.group = group
        self.version = deepspeed.__version__
        self.zero_stage = zero_stage
        self.steps_done = 0
        self._deepspeed = deepspeed
        self._settings = settings
        self._total_steps = total_steps
        self._num_micro_batches = num_micro_batches
        self._num_backward = 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(self._parameters, settings),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": num_micro_batches,
                "gradient_clipping": settings.clip or 0.0,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss, a scalar.

        DeepSpeed takes means over micro-batches and ranks, which is undone here. The forward pass
        does not go through its engine, so ZeRO is told that another one has begun; otherwise it
        would take the last micro-batch for all of them.
        """
        if self.zero_stage:
            self._engine.optimizer.clear_backward_seen_flag()
        num_averaged = self._num_micro_batches * self.group.size
        self._engine.backward(loss * num_averaged if num_averaged > 1 else loss)
        self._num_backward += 1
        if self._num_backward % self._num_micro_batches:
            # This counts the micro-batch; the last one is counted by `step`.
            self._engine.step()

    def step(self) -> None:
        """Clip the gradient, update the parameters, and clear it."""
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = learning_rate(self._settings, self.steps_done, self._total_steps)
        self._engine.step()
        self.steps_done += 1

    def state(self) -> State:
        """Return the same as TorchEngine; only without sharding, where each rank has all of it."""
        assert self.zero_stage == 0
        moments = _moments(self._optimizer, self._parameters)
        return {"steps_done": np.array(self.steps_done), **moments}

    def load_state(self, state: State) -> None:
        """Continue from `state()`, as TorchEngine does."""
        assert self.zero_stage == 0
        self.steps_done = int(state["steps_done"])
        _load_moments(self._optimizer, self._parameters, state)

    def close(self) -> None:
        """Give every rank all weights, and leave DeepSpeed.

        Of several ranks it keeps the process groups, whose threads live as long as the process.
        """
        # Only stage 3 shards weights; they are copied before the engine frees them.
        parameters = list(self._engine.module.parameters()) if self.zero_stage == 3 else []
        with self._deepspeed.zero.GatheredParameters(parameters):
            values = [parameter.data.clone() for parameter in parameters]
        self._engine.destroy()
        for parameter, value in zip(parameters, values):
            parameter.data = value
        if self.group.size == 1:
            self._deepspeed.comm.destroy_process_group()


def _import_deepspeed(group: ServerGroup) -> Any:
    """Import DeepSpeed over the process group of the server's ranks; a single rank makes its own.

    Left to itself, `init_distributed` looks for MPI and would wait for the clients. On a CPU it
    also compiles a shared-memory operator, which needs a compiler and a minute, so that operator is
    marked as not available.
    """
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    # It uses names of torch.distributed that have newer ones.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks = {"RANK": group.rank, "WORLD_SIZE": group.size, "LOCAL_RANK": group.device.index or 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    if group.size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    deepspeed.init_distributed(
        "nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
