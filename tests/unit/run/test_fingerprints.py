"""Digests in records of earlier versions stay comparable: they depend on values, not on names."""

import numpy as np
import torch

from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokens import Text
from fedsp_mpi.files import fingerprint


def test_digests_are_those_that_records_of_earlier_versions_hold():
    example = Example("Q?", " a", ("a", "b"), (0,), "", "row 0 of test")
    texts = [Text(np.array([1, 2, 3], np.int32), 2), Text(np.array([4, 5], np.int32), 1, 0)]
    assert fingerprint.of_rows([example.as_text()]) == "5da199eee7413cfc3d1230bc765d5332"
    assert fingerprint.of_texts(texts) == "de352e6e64431ad07d3e5e8ad1bf678f"
    assert fingerprint.of_weights({"a": torch.arange(3.0)}) == "2412327d77c76df325303a9c02c8e733"
