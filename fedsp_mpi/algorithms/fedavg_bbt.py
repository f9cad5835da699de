"""FedAvg-BBT, FedBPT's baseline (Sun et al., 2023, section 5.1): what clients' searches know is
averaged.

Each client goes on with the whole state of the averaged search, evolution paths included, and the
server averages all of it by the clients' examples (FedAvg).
"""

from __future__ import annotations

from fedsp_mpi.aggregation.fedavg import Updates, weighted_mean
from fedsp_mpi.algorithms.fedbpt import FedBPT, SearchClient, SearchServer
from fedsp_mpi.tensors import NamedTensors
from fedsp_mpi.training.cma_es import CmaEs


class AveragingServer(SearchServer):
    """Averages the state of the clients' searches."""

    def aggregate(self, updates: Updates) -> NamedTensors:
        """Return the mean of every value, weighted by the clients' examples."""
        return weighted_mean(updates)


class ContinuingClient(SearchClient):
    """Continues the averaged search where the last round ended."""

    def start_search(self, broadcast: NamedTensors, round: int) -> CmaEs:
        """Return the broadcast search, with its paths, after the iterations of earlier rounds."""
        search = CmaEs.of(broadcast)
        search.generation = (round - 1) * self._settings.iterations
        return search


class FedAvgBBT(FedBPT):
    """The whole state of a search travels."""

    server_class = AveragingServer
    client_class = ContinuingClient


METHOD = FedAvgBBT()
