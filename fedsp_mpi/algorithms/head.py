"""A classification head by federated averaging: clients hold the whole model, frozen, and train a
linear map on its last hidden states by cross entropy; the map travels (the baseline `fedclassifier`
of AUG-FedPrompt, arXiv 2212.00192, there with all weights trained).

A text's representation is what the model's own head would read: the state at the text's last token,
at the mask token, or behind T5's gap. The answers are numbers of classes instead of words
(`data/class_numbers.py`), so training, validation and scoring are those of the other methods.
"""

from __future__ import annotations

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
from fedsp_mpi.models.class_head import ClassHead
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.tensors import NamedTensors


class Head(Method):
    """A head travels; the model is handed out once, whole."""

    metrics = ("loss_model_first", "loss_model_last", "seconds_model", "seconds_other")

    def build_server(self, context: ServerContext) -> Server:
        """Return the server that averages heads, and tunes the mean if it has text to tune on."""
        head = ClassHead(context.model, len(context.inputs.classes))
        return weight_server(context, head, context.rule)

    def hand_out(
        self, inputs: MethodInputs, server: Server, client_model: LanguageModel
    ) -> HandedOut:
        """Return the whole model, and a head for its shape; see `Method.hand_out`."""
        head = server.export()
        weights = auxiliary.pack_whole(client_model)
        return HandedOut(
            model_config=client_model.model.config,
            tensors=NamedTensors.join({"model/": weights, "": head}),
            down=head.schema,
            up=head.schema,
        )

    def build_client(self, context: ClientContext) -> WeightClient:
        """Return the clients of one process."""
        model = context.build_model(False).round_weights()
        num_classes = len(context.tensors["head.bias"])
        return weight_client(
            context,
            model,
            ClassHead(model, num_classes),
            initial=context.tensors.select("model/"),
        )


METHOD = Head()
