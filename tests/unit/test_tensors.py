"""Named fp32 views of one vector, schemas, and the protection of the global model's memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from fedsp_mpi import rng
from fedsp_mpi.tensors import Batch, Contract, NamedTensors, Schema, SealedTensorError, seal

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.x": torch.tensor(7.0),
    "b.y": torch.arange(4.0) + 10,
}


@pytest.fixture(autouse=True)
def unsealed():
    seal.clear()
    yield
    seal.clear()


# -- named tensors ---------------------------------------------------------------------------------


def test_packed_tensors_lie_side_by_side_in_one_vector():
    packed = NamedTensors.pack(TENSORS)
    assert packed.schema == (("a", (2, 3)), ("b.x", ()), ("b.y", (4,)))
    assert (
        packed.flat.tolist() == [0, 1, 2, 3, 4, 5, 7, 10, 11, 12, 13]
        and packed.flat.dtype == np.float32
    )
    assert (
        list(packed) == ["a", "b.x", "b.y"] and len(packed) == 3 and packed.schema.num_values == 11
    )
    assert packed["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and packed["b.x"].shape == ()
    packed["b.y"][0] = -1
    assert packed.flat[7] == -1


def test_packing_copies_whatever_the_layout_and_the_type():
    half = torch.tensor([0.1, 2.0], dtype=torch.bfloat16)
    turned = torch.arange(6.0).reshape(2, 3).T
    packed = NamedTensors.pack(
        {"half": half, "turned": turned, "wide": torch.tensor([0.5], dtype=torch.float64)}
    )
    assert packed["half"].tolist() == half.float().tolist()
    assert packed["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and packed["wide"].tolist() == [
        0.5
    ]
    turned[0, 0] = 99
    assert packed["turned"][0, 0] == 0
    trained = torch.nn.Parameter(torch.ones(2))
    assert NamedTensors.pack({"p": trained}).torch()["p"].requires_grad is False


def test_torch_tensors_are_the_same_memory():
    packed = NamedTensors.pack(TENSORS)
    views = packed.torch()
    assert {name: view.tolist() for name, view in views.items()} == {
        n: x.tolist() for n, x in TENSORS.items()
    }
    views["a"][1, 2] = 50
    assert packed.flat[5] == 50 and packed["a"][1, 2] == 50
    assert (
        packed.copy().flat is not packed.flat
        and packed.copy()["a"].tolist() == packed["a"].tolist()
    )
    assert not np.shares_memory(packed.copy().flat, packed.flat)


def test_join_puts_the_parts_name_in_front_and_select_takes_it_off():
    first = NamedTensors.pack(TENSORS)
    second = NamedTensors.pack({"a": torch.ones(2)})
    joined = NamedTensors.join({"first/": first, "second/": second})
    assert list(joined) == ["first/a", "first/b.x", "first/b.y", "second/a"]
    for name, part in {"first/": first, "second/": second}.items():
        selected = joined.select(name)
        assert selected.schema == part.schema and (selected.flat == part.flat).all()
    selected = joined.select("first/b.")
    assert list(selected) == ["x", "y"]
    assert selected["y"].tolist() == [10, 11, 12, 13]
    joined.select("second/")["a"][0] = 5
    assert joined["second/a"].tolist() == [5, 1]  # no copy
    assert list(joined.select("third/")) == [] and joined.select("third/").flat.size == 0


def test_only_a_contiguous_fp32_vector_of_the_right_length_will_do():
    schema = Schema.of([("a", [2, 2])])
    matrix = np.zeros((4, 2), dtype=np.float32)
    for wrong in (np.zeros(4), np.zeros((2, 2), np.float32), matrix[:, 0], np.zeros(4, ">f4")):
        with pytest.raises(ValueError, match=r"found a .* expected a contiguous float32 vector"):
            NamedTensors(schema, wrong)
    for size in (3, 5):
        with pytest.raises(ValueError, match=rf"found {size} values, expected 4 for \['a'\]"):
            NamedTensors(schema, np.zeros(size, np.float32))
    assert NamedTensors(Schema(), np.zeros(0, np.float32)).schema.num_values == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finite(value):
    packed = NamedTensors.pack(TENSORS)
    assert packed.is_finite()
    packed.flat[-1] = value
    assert not packed.is_finite()


# -- schemas ---------------------------------------------------------------------------------------


def schema(**shapes: list[int]) -> Schema:
    return Schema.of(shapes.items())


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (schema(a=[2, 3], c=[4]), "client 3: found tensor 'c' [4], expected 'b' [4]"),
        (schema(a=[3, 2], b=[4]), "client 3: found tensor 'a' [3, 2], expected 'a' [2, 3]"),
        (schema(b=[4], a=[2, 3]), "client 3: found tensor 'b' [4], expected 'a' [2, 3]"),
        (schema(a=[2, 3]), "client 3: found 1 tensors, expected 2; the first that differs is 'b'"),
        (
            schema(a=[2, 3], b=[4], d=[1]),
            "client 3: found 3 tensors, expected 2; the first that differs is 'd'",
        ),
        (schema(), "client 3: found 0 tensors, expected 2; the first that differs is 'a'"),
    ],
)
def test_a_schema_says_where_it_differs(actual, message):
    expected = schema(a=[2, 3], b=[4])
    expected.require(expected, "client 3")
    with pytest.raises(ValueError) as error:
        actual.require(expected, "client 3")
    assert str(error.value) == message


def test_equal_schemas_share_a_digest_and_others_do_not():
    base = schema(a=[2, 3], b=[4])
    assert (
        base.digest == NamedTensors.pack({"a": torch.zeros(2, 3), "b": torch.ones(4)}).schema.digest
    )
    assert isinstance(base.digest, bytes) and len(base.digest) == 16
    different = [
        schema(b=[4], a=[2, 3]),
        schema(a=[3, 2], b=[4]),
        schema(a=[6], b=[4]),
        schema(a=[2, 3], c=[4]),
    ]
    different += [schema(a=[2, 3]), schema(a=[2, 3], b=[4], c=[1]), schema(a=[2], b=[34]), schema()]
    assert len({item.digest for item in [base, *different]}) == len(different) + 1
    assert Contract(base, base).up.digest == base.digest


def test_a_digest_is_the_same_in_another_process():
    code = (
        "from fedsp_mpi.tensors import Schema; print(Schema.of([('a', (2, 3)), ('b', "
        "(4,))]).digest.hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == schema(a=[2, 3], b=[4]).digest.hex()


# -- the seal --------------------------------------------------------------------------------------


@pytest.fixture
def weight() -> torch.nn.Parameter:
    """Return a protected weight of the global model."""
    parameter = torch.nn.Parameter(torch.randn(8, 6))
    seal.add([("layer.weight", parameter)])
    return parameter


VIEWS = {
    "the tensor": lambda w: w,
    "its data": lambda w: w.data,
    "a row": lambda w: w[3],
    "the transposed": lambda w: w.T,
    "a reshaped": lambda w: w.data.view(-1)[5:9],
    "other bits": lambda w: w.data.view(torch.int32),
    "by way of numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "a part by way of numpy": lambda w: torch.from_numpy(w.detach().numpy()[2:]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_no_view_of_a_sealed_tensor_is_packed(weight, view):
    with pytest.raises(
        SealedTensorError,
        match=r"p is the memory of 'layer.weight' of the global model.*expected a",
    ):
        NamedTensors.pack({"fine": torch.zeros(2), "p": view(weight)})


def test_no_numpy_view_of_a_sealed_tensor_becomes_a_message(weight):
    flat = weight.detach().numpy().reshape(-1)
    for part in (flat, flat[1:], flat[-1:], flat[10:20]):
        with pytest.raises(SealedTensorError, match=r"'layer\.weight'"):
            NamedTensors(Schema.of([("p", [part.size])]), part)


def test_copies_and_other_tensors_are_fine(weight):
    copies = {
        "clone": weight.detach().clone(),
        "sum": weight + 0,
        "contiguous": weight.T.contiguous(),
    }
    packed = NamedTensors.pack({**copies, "prompt": torch.zeros(3)})
    assert torch.equal(packed.torch()["clone"], weight.detach())
    flat = weight.detach().numpy().reshape(-1).copy()
    assert NamedTensors(Schema.of([("p", [flat.size])]), flat).flat is flat


def test_the_neighbours_of_sealed_memory_are_free():
    memory = torch.zeros(30)
    apart = [memory[:10], memory[10:20], memory[20:]]
    outer = [np.zeros(10, dtype=np.float32) for _ in range(2)]
    seal.add([("middle", torch.from_numpy(apart[1].numpy()))])
    for part in (apart[0], apart[2], torch.from_numpy(outer[0])):
        assert NamedTensors(Schema.of([("p", [10])]), part.numpy()).flat.size == 10
    with pytest.raises(SealedTensorError):
        NamedTensors(Schema.of([("p", [10])]), memory[11:21].numpy())


def test_sealed_memory_is_held_so_that_nothing_else_gets_its_address():
    addresses = []
    for _ in range(20):
        weight = torch.randn(1000)
        addresses.append(weight.data_ptr())
        seal.add([("w", weight)])
        del weight
    assert len(set(addresses)) == 20
    assert NamedTensors.pack({"p": torch.zeros(1000)}).flat.size == 1000


def test_tied_weights_are_sealed_under_their_first_name_and_forgotten_when_the_seal_is_cleared():
    tied = torch.nn.Parameter(torch.zeros(4))
    seal.add([("embedding", tied), ("head", tied)])
    with pytest.raises(SealedTensorError, match="'embedding'"):
        NamedTensors.pack({"p": tied})
    seal.clear()
    assert NamedTensors.pack({"p": tied})["p"].tolist() == [0, 0, 0, 0]


# -- batches, randomness ---------------------------------------------------------------------------


def test_a_batch_on_the_cpu_stays_itself():
    batch = Batch(*(torch.zeros(2, 3, dtype=torch.int64) for _ in range(3)))
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and all(tensor.device.type == "meta" for tensor in moved[:3])


def test_randomness_is_keyed_by_its_meaning():
    assert rng.key(1, "order", 2, 3) == rng.key(1, "order", 2, 3) < 2**63
    keys = [
        rng.key(*arguments)
        for arguments in [
            (1, "a"),
            (2, "a"),
            (1, "b"),
            (1, "a", 0),
            (1, "a", 1),
            (1, "a", 1, 2),
            (1, "a", 12),
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert rng.key(1, "first prompt") == 4802943619673794631  # the same on every machine, for ever
    draws = [rng.generator(5, "x", 1).standard_normal(4).tolist() for _ in range(2)]
    assert draws[0] == draws[1] != rng.generator(5, "x", 2).standard_normal(4).tolist()
    rng.seed_torch(1, "client", 2, 3)
    first = torch.rand(3)
    torch.rand(5)
    rng.seed_torch(1, "client", 2, 3)
    assert torch.equal(torch.rand(3), first)
