"""Configuration to inputs: whose text it is decides which."""

from __future__ import annotations

from fedsp_mpi.config import Config
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs
from fedsp_mpi.run.tier_inputs import TierInputs
from fedsp_mpi.run.user_silos import UserSiloInputs


def inputs_of(config: Config) -> ExperimentInputs:
    """Return the inputs of an experiment, whose clients share a source, have silos, or experts."""
    if config.federation.silos:
        return silo_inputs_of(config)
    return TierInputs(config) if config.method_facts.has_tiers else ExperimentInputs(config)


def silo_inputs_of(config: Config) -> SiloInputs:
    """Return the inputs of an experiment whose clients have silos; they may have experts, too."""
    return UserSiloInputs(config) if config.method_facts.has_tiers else SiloInputs(config)
