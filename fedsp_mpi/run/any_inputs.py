"""Configuration to inputs: whose text it is decides which."""

from __future__ import annotations

from fedsp_mpi.config import Config
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import SiloInputs
from fedsp_mpi.run.tier_inputs import TierInputs


def inputs_of(config: Config) -> ExperimentInputs:
    """Return the inputs of an experiment, whose clients share a source, have silos, or experts."""
    if config.method_facts.has_tiers:
        return TierInputs(config)
    return SiloInputs(config) if config.federation.silos else ExperimentInputs(config)
