"""Federated pre-training: clients train all weights on documents of their own, from scratch or from
a model that there is (Chen et al., 2023, arXiv 2307.08925).

Local training and the exchange are those of fine-tuning. With `federation.outer.optimizer: diloco`
this is DiLoCo (Douillard et al., 2023, arXiv 2311.08105): AdamW inside, whose state clients keep,
and Nesterov's momentum outside.
"""

from __future__ import annotations

from fedsp_mpi.algorithms.finetune import Finetune


class Pretrain(Finetune):
    """Weights travel; texts are blocks of documents, of which every token is predicted."""


METHOD = Pretrain()
