"""Learning rates of keys that are left out: by what is tuned; a rate that is given wins."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from fedsp_mpi import config
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.rates import FILE
from helpers.paths import ROOT

RATES = yaml.safe_load(FILE.read_text(encoding="utf-8"))
PAPER = 5e-4


def resolved(**sections: Any) -> Config:
    return config.checked({"model": {"name": "some/model"}, **sections})


def rates_of(settings: Config) -> tuple[float, float]:
    return (
        settings.client.tuning.optimizer.learning_rate,
        settings.server.tuning.optimizer.learning_rate,
    )


@pytest.mark.parametrize(
    ("sections", "rate"),
    [
        ({}, RATES["prefix"]),
        ({"prompt": {"kind": "input"}}, RATES["input"]),
        ({"prompt": {"kind": "input", "init": "random", "encoder": "lstm"}}, RATES["encoder"]),
        ({"prompt": {"init": "random", "projection": 8}}, RATES["projection"]),
        ({"method": "finetune"}, RATES["weights"]),
        ({"recipe": "paper"}, PAPER),
        ({"recipe": "paper", "method": "finetune"}, PAPER),
    ],
)
def test_the_rate_is_that_of_what_is_tuned(sections, rate):
    assert rates_of(resolved(**sections)) == (rate, rate)


def test_a_rate_that_is_given_wins_and_other_keys_leave_the_default():
    given = {"tuning": {"steps": 3, "optimizer": {"learning_rate": 0.25}}}
    clipped = {"tuning": {"optimizer": {"clip": 1.0}}}
    assert rates_of(resolved(client=given, server=clipped)) == (0.25, RATES["prefix"])
    assert rates_of(resolved(client=None, server={"tuning": None})) == (RATES["prefix"],) * 2


def test_a_search_has_no_rate_of_its_own():
    file = ROOT / "configs" / "methods" / "fedbpt.yaml"
    assert rates_of(config.load(file, ["model.name=any"])) == (PAPER, PAPER)


@pytest.mark.parametrize(("steps", "rate"), [(0, PAPER), (2, RATES["prefix"])])
def test_translation_has_the_rate_of_prompts_once_it_has_steps(steps, rate):
    """Sweeps of earlier versions, which have none, are continued: nothing changes for them."""
    found = resolved(server={"translation": {"steps": steps}})
    assert found.server.translation.optimizer.learning_rate == rate
    assert found.client.alignment.optimizer.learning_rate == PAPER


@pytest.mark.parametrize(
    "sections", [{"prompt": "prefix"}, {"server": 3}, {"server": {"translation": 3}}]
)
def test_what_is_misplaced_is_refused_with_its_key(sections):
    with pytest.raises(ConfigError, match="expected a section"):
        resolved(**sections)


def test_a_resolved_configuration_is_read_back_the_same(tmp_path):
    settings = resolved(prompt={"kind": "input"})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(settings), encoding="utf-8")
    assert config.load(file) == settings
