"""Clipped and noisy updates: the noise's distribution, the bound that epsilon rests on, and a run
with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedsp_mpi.algorithms.privacy import LocalDPClient, laplace, privatize
from fedsp_mpi.record import read
from fedsp_mpi.report import difference
from fedsp_mpi.tensors import NamedTensors, Schema, Update
from helpers.configs import load, refused
from helpers.runs import FAULTY, FEDPROMPT, short, short_run

SIZE = 1000


def seeded(seed: int):
    """Bytes that can be drawn again."""
    return np.random.default_rng(seed).bytes


def halves(num: int) -> bytes:
    """Bits of u = 1/2 + 2^-53 with the sign minus, whose noise is scale ln 2."""
    return np.full(num // 8, 1 << 63, dtype="<u8").tobytes()


def silent(num: int) -> bytes:
    """Bits of u = 1, whose noise is 0."""
    return b"\xff" * num


def vector(values: Any) -> NamedTensors:
    flat = np.asarray(values, dtype=np.float32)
    return NamedTensors(Schema.of([("prompt", (len(flat),))]), flat)


def noise(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_noise_is_laplace(scale):
    """Against its distribution function; a Kolmogorov-Smirnov distance of 1.95 / sqrt(n) has a
    chance of 1 in 1000.
    """
    num = 200_000
    found = np.sort(laplace(num, scale, seeded(1)))
    below = np.where(found < 0, np.exp(found / scale) / 2, 1 - np.exp(-found / scale) / 2)
    places = np.arange(num) / num
    assert max(
        np.abs(below - places).max(), np.abs(below - places - 1 / num).max()
    ) < 1.95 / math.sqrt(num)
    assert np.abs(found).mean() == pytest.approx(scale, rel=0.01)


def test_single_draws_by_hand():
    assert laplace(2, 3.0, halves) == pytest.approx([3 * math.log(2)] * 2)
    assert laplace(3, 2.0, silent).tolist() == [0.0] * 3
    smallest = laplace(1, 1.0, lambda num: bytes(num))
    assert abs(smallest[0]) == pytest.approx(53 * math.log(2))


def test_the_operating_system_is_asked_each_time():
    assert not np.array_equal(laplace(50, 1.0), laplace(50, 1.0))


@pytest.mark.parametrize("clip", [0.5, 10.0])
def test_a_long_update_is_shortened_to_the_clip(clip):
    received, tuned = vector(noise(0)), vector(noise(1))
    found = privatize(received, tuned, clip=clip, scale=1.0, random_bytes=silent)
    whole = tuned.flat.astype(float) - received.flat
    wanted = received.flat + whole * clip / np.abs(whole).sum()
    assert np.abs(found.flat - wanted).max() < 1e-6
    assert np.abs(found.flat.astype(float) - received.flat).sum() == pytest.approx(clip, rel=1e-3)


def test_a_short_update_stays_as_it_is():
    received = vector(noise(0))
    tuned = vector(received.flat + 1e-4 * noise(1))
    assert np.array_equal(
        privatize(received, tuned, clip=1.0, scale=1.0, random_bytes=silent).flat, tuned.flat
    )
    assert np.array_equal(
        privatize(received, received, clip=1.0, scale=1.0, random_bytes=silent).flat, received.flat
    )


def test_any_two_updates_are_at_most_twice_the_clip_apart():
    """The sensitivity that epsilon = 2 clip / scale is reckoned with; opposite updates reach it."""
    received, clip = vector(np.zeros(SIZE)), 2.0
    one = privatize(
        received, vector(noise(1)), clip=clip, scale=1.0, random_bytes=silent
    ).flat.astype(float)
    other = privatize(
        received, vector(-noise(1)), clip=clip, scale=1.0, random_bytes=silent
    ).flat.astype(float)
    third = privatize(
        received, vector(9 * noise(2)), clip=clip, scale=1.0, random_bytes=silent
    ).flat.astype(float)
    assert np.abs(one - other).sum() == pytest.approx(2 * clip, rel=1e-5)
    assert np.abs(one - third).sum() <= 2 * clip


def test_noise_is_added_to_every_value_and_cut_in_stretches(monkeypatch):
    received, tuned = vector(np.zeros(SIZE)), vector(noise(1))
    found = privatize(received, tuned, clip=1.0, scale=5.0, random_bytes=seeded(3)).flat
    plain = privatize(received, tuned, clip=1.0, scale=5.0, random_bytes=silent).flat
    assert np.abs(found - plain).mean() == pytest.approx(5.0, rel=0.15) and (found != plain).all()
    monkeypatch.setattr("fedsp_mpi.algorithms.privacy._CHUNK_VALUES", 64)
    assert np.array_equal(
        privatize(received, tuned, clip=1.0, scale=5.0, random_bytes=seeded(3)).flat, found
    )


class _Fixed:
    """A client that always comes to the same."""

    states = "its benches"

    def local_update(self, client: int, round: int, down: NamedTensors) -> Update:
        down.flat[:] = 7  # a client may work in what it got
        metrics = {"loss_prompt_last": 1.5, "seconds_prompt": 2.0, "prompt_norm": 3.0}
        return Update(client, 3.0, vector(noise(1)), metrics)


def test_what_goes_up_is_private_and_tells_neither_loss_nor_own_metrics():
    received = vector(noise(0))
    found = LocalDPClient(_Fixed(), 1.0, 1.0, random_bytes=silent).local_update(
        4, 1, received.copy()
    )
    assert np.array_equal(
        found.tensors.flat,
        privatize(received, vector(noise(1)), clip=1.0, scale=1.0, random_bytes=silent).flat,
    )
    assert (found.client, found.weight, found.metrics) == (4, 3.0, {"seconds_prompt": 2.0})
    assert LocalDPClient(_Fixed(), 1.0, 1.0).states == "its benches"


def test_other_tensors_than_came_down_are_refused():
    with pytest.raises(ValueError, match="update that is to be private"):
        privatize(vector(noise(0)), vector(noise(0, SIZE - 1)), clip=1.0, scale=1.0)


@pytest.mark.parametrize(
    "method", [FEDPROMPT, ("method=finetune", "client.tuning.optimizer.learning_rate=1e-3")]
)
def test_a_run_with_noise_ends_and_is_another_one_each_time(tmp_path, method):
    more = (
        *method,
        "client.privacy.clip=1",
        "client.privacy.noise_scale=1e-4",
        "federation.rounds=1",
    )
    one, other = short(tmp_path / "one", *more), short(tmp_path / "other", *more)
    assert one.status == "complete" and difference(one, other) != []
    assert (
        np.isnan(one.clients["loss_prompt_last"]).all()
        and np.isnan(one.clients["loss_model_last"]).all()
    )
    told = {
        "clip": 1.0,
        "noise_scale": 1e-4,
        "epsilon": 20000.0,
        "epsilon_all": 20000.0,
        "rounds_again": 0,
    }
    assert one.sections["privacy"] == told


def test_half_a_setting_is_refused(tmp_path):
    refused(
        lambda: load(tmp_path, {}, "client.privacy.clip=1"),
        "client.privacy",
        "noise_scale None",
        "both or none",
    )
    both = ("client.privacy.noise_scale=1", "client.privacy.clip=0")
    refused(lambda: load(tmp_path, {}, *both), "client.privacy.clip", "above 0")


@pytest.mark.slow
def test_rounds_that_are_done_again_cost_epsilon_again(tmp_path):
    """Killed in round 2 of 3, after the noisy updates have left: their noise is drawn anew, and
    both draws count.
    """
    own = (
        "client.privacy.clip=1",
        "client.privacy.noise_scale=1",
        "federation.rounds=3",
        "checkpoint.every=1",
    )
    killed = short_run(2, tmp_path, "run", *own, program=(FAULTY, "kill:merge:0:2"), status=None)
    assert killed.returncode != 0
    short_run(2, tmp_path, "run", *own, "run.resume=must")
    told = read(tmp_path / "run").sections["privacy"]
    assert (told["epsilon"], told["rounds_again"], told["epsilon_all"]) == (2.0, 1, 8.0)
