"""Low-rank adapters by federated averaging: clients hold the whole model, frozen, and adapters
travel (Hu et al., 2021, arXiv 2106.09685; FlexLoRA, Bai et al., 2024, arXiv 2402.11505).
"""

from __future__ import annotations

from fedsp_mpi.aggregation.contributors import among_contributors
from fedsp_mpi.aggregation.lora import mean_of_products
from fedsp_mpi.algorithms.base import (
    ClientContext,
    HandedOut,
    Method,
    MethodInputs,
    Server,
    ServerContext,
)
from fedsp_mpi.algorithms.finetune import WeightClient, weight_client, weight_server
from fedsp_mpi.models import auxiliary
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.lora import Lora
from fedsp_mpi.tensors import NamedTensors


class LowRank(Method):
    """Adapters travel; the model is handed out once, whole."""

    metrics = ("loss_model_first", "loss_model_last", "seconds_model", "seconds_other")

    def build_server(self, context: ServerContext) -> Server:
        """Return the server that tunes the merged adapters."""
        config = context.inputs.config
        adapters = Lora(context.model, config.lora).initialise(config.run.seed)
        rule = context.rule
        if config.lora.merge == "products":
            rule = among_contributors(mean_of_products)
        return weight_server(context, adapters, rule)

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the whole model; the adapters come with every round; see `Method.hand_out`."""
        adapters = server.export().schema
        weights = auxiliary.pack_whole(client_model)
        return HandedOut(
            model_config=client_model.model.config,
            tensors=NamedTensors.join({"model/": weights}),
            down=adapters,
            up=adapters,
        )

    def build_client(self, context: ClientContext) -> WeightClient:
        """Return the clients of one process."""
        settings = context.inputs.config.lora
        model = context.build_model(False).round_weights()
        return weight_client(
            context,
            model,
            Lora(model, settings),
            initial=context.tensors.select("model/"),
            rank_of=settings.rank_of if settings.ranks else None,
        )


METHOD = LowRank()
