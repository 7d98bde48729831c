from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import nn

from gossipml.errors import UserError
from gossipml.models.batches import INGEST_ONCE, Samples, ShuffledOrder
from gossipml.models.builtin import DigitsMlp, MnistMlp, Xor
from gossipml.models.central import train_central
from gossipml.models.data import Dataset, Labelled, LocalData, load_source, take_part
from gossipml.models.encoding import encode
from gossipml.models.flat import FlatModule, build_flat
from gossipml.models.optimise import FlatSgd
from gossipml.models.partition import Part, Rule
from gossipml.models.predict import answer
from gossipml.models.spec import Array, Classifier, Sgd
from gossipml.models.training import LocalTrainer

CPU = torch.device("cpu")
NETWORK = b"network"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(data: Dataset, part: int = 1, parts: int = 4, spec: Classifier | None = None, rule: Rule | None = None):  # type: ignore[no-untyped-def]
    local = take_part(data, rule or Rule("iid"), Part(part, parts), 0)
    return LocalTrainer(spec or DigitsMlp(), local, network_id=NETWORK, seed=part)


def train(trainer: LocalTrainer, steps: int) -> float:
    trainer.begin_round()
    for _ in range(steps):
        trainer.step()
    return trainer.end_round()


class Rich(DigitsMlp):
    """Batch norm, dropout, Adam."""

    name = "rich"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 10))

    def optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer | Sgd:
        return torch.optim.Adam(parameters, lr=0.01)


# The flat vector


def test_parameters_and_buffers_are_views_of_the_vector() -> None:
    flat, layout = build_flat(Rich(), NETWORK, CPU)
    assert layout.size == flat.size == 64 * 20 + 20 + 20 + 20 + 20 * 10 + 10 + 20 + 20
    assert flat.parameter_count == flat.size - 40
    flat.vector.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in flat.module.parameters())
    flat.module(torch.rand(8, 64)).sum().backward()
    assert flat.gradient.abs().sum() > 0
    assert bool((flat.vector[flat.parameter_count :] != 0.5).all()), "batch norm wrote its buffers into the vector"


def test_another_vector_is_held_for_a_while() -> None:
    flat, _ = build_flat(DigitsMlp(), NETWORK, CPU)
    inputs = torch.rand(3, 64)
    before = flat.module(inputs)
    with flat.holding(torch.zeros(flat.size)) as module:
        assert not module(inputs).any()
    assert torch.equal(flat.module(inputs), before)


def test_every_process_derives_the_same_initial_parameters() -> None:
    code = (
        "import hashlib, torch\n"
        "from gossipml.models.flat import build_flat\n"
        "from gossipml.models.builtin import DigitsMlp\n"
        "torch.manual_seed(torch.seed())\n"
        "flat, layout = build_flat(DigitsMlp(), b'network', torch.device('cpu'))\n"
        "print(layout.digest, hashlib.sha256(flat.vector.numpy().tobytes()).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
    ours, layout = build_flat(DigitsMlp(), NETWORK, CPU)
    assert layout.digest.encode() in outputs.pop()
    other, _ = build_flat(DigitsMlp(), b"another network", CPU)
    assert not torch.equal(ours.vector, other.vector)


def test_building_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_flat(DigitsMlp(), NETWORK, CPU)
    assert torch.equal(torch.rand(1), expected)


def test_the_digest_knows_names_and_shapes() -> None:
    class Wider(DigitsMlp):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(64, 65), nn.ReLU(), nn.Linear(65, 10))

    class Renamed(DigitsMlp):
        name = "digits-other"

    digests = {build_flat(spec(), NETWORK, CPU)[1].digest for spec in (DigitsMlp, Wider, Renamed)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "build, says",
    [
        (lambda: nn.Linear(4, 2).double(), "'weight' of 'odd' is torch.float64"),
        (nn.ReLU, "has 0 parameters"),
        (lambda: 3, "gave a int, not a torch.nn.Module"),
        (lambda: nn.Linear(-1, 2), "failed: RuntimeError"),
        (lambda: nn.Linear(torch.seed() % 1000 + 1, 2), "other parameters each time"),
        (lambda: nn.PReLU(3, init=float("nan")), "not finite"),
    ],
)
def test_modules_that_cannot_be_averaged_are_refused(build, says: str) -> None:  # type: ignore[no-untyped-def]
    class Odd(DigitsMlp):
        name = "odd"

    Odd.build = lambda self: build()  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        build_flat(Odd(), NETWORK, CPU)
    assert says in str(caught.value)


# Steps


@pytest.mark.parametrize(
    "sgd",
    [
        Sgd(0.1),
        Sgd(0.1, momentum=0.9),
        Sgd(0.1, momentum=0.5, weight_decay=0.01),
    ],
)
def test_flat_sgd_is_torchs_sgd(sgd: Sgd) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    twin = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    twin.load_state_dict(module.state_dict())
    flat = FlatModule(module, CPU)
    ours = FlatSgd(flat, sgd)
    theirs = torch.optim.SGD(
        twin.parameters(),
        lr=sgd.learning_rate,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
    )
    for _ in range(10):
        inputs = torch.rand(5, 6)
        flat.gradient.mul_(ours.keep)
        module(inputs).square().mean().backward()
        ours.step()
        theirs.zero_grad()
        twin(inputs).square().mean().backward()
        theirs.step()
    for mine, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)


def test_frozen_parameters_stay(digits: Dataset) -> None:
    class Frozen(DigitsMlp):
        def build(self) -> nn.Module:
            module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
            module[0].weight.requires_grad = False
            return module

        def optimiser(self, parameters: Iterable[nn.Parameter]) -> Sgd:
            return Sgd(0.1, weight_decay=0.1)

    trainer = make(digits, spec=Frozen())
    before = trainer._x.clone()
    train(trainer, 5)
    assert torch.equal(trainer._x[: 64 * 8], before[: 64 * 8])
    assert not torch.equal(trainer._x[64 * 8 :], before[64 * 8 :])


def test_a_batch_is_ingested_alone_when_all_would_be_too_much() -> None:
    count = INGEST_ONCE // (784 * 4) + 1
    images = np.random.RandomState(0).randint(0, 256, (count, 28, 28)).astype(np.float32)  # not bytes
    large = Samples(MnistMlp(), Labelled(images, np.arange(count, dtype=np.int64)), CPU)
    small = Samples(MnistMlp(), Labelled(images[:100], np.arange(100, dtype=np.int64)), CPU)
    assert large._ingested is None and small._ingested is not None
    for one, other in zip(large.at(torch.tensor([7, 3])), small.at(torch.tensor([7, 3])), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(large.between(5, 9)[0], small.between(5, 9)[0])


def test_batches_of_many_bytes_come_from_the_bytes_without_ingest_or_a_copy() -> None:
    count = INGEST_ONCE // (784 * 4) + 1
    images = np.random.RandomState(0).randint(0, 256, (count, 28, 28)).astype(np.uint8)
    spec = MnistMlp()
    expected = torch.from_numpy(spec.ingest(images[[7, 3]]))
    samples = Samples(spec, Labelled(images, np.arange(count, dtype=np.int64)), CPU)
    assert samples._ingested is not None and samples._ingested.data_ptr() == images.ctypes.data

    def ingest(samples: Array) -> Array:
        raise AssertionError("not for each batch")

    spec.ingest = ingest  # type: ignore[method-assign]
    assert torch.equal(samples.at(torch.tensor([7, 3]))[0], expected)


def test_an_epoch_gives_each_sample_once_and_continues_after_restore() -> None:
    order = ShuffledOrder(10, 3, seed=1)
    epoch = torch.cat([order.next_indices() for _ in range(3)]).tolist()
    assert len(set(epoch)) == 9
    saved = order.save()
    expected = [order.next_indices().tolist() for _ in range(9)]
    other = ShuffledOrder(10, 3, seed=2)
    other.restore(saved)
    assert [other.next_indices().tolist() for _ in range(9)] == expected
    assert ShuffledOrder(2, 32, seed=0).next_indices().tolist() in ([0, 1], [1, 0])


def test_the_coming_batch_is_known_before_it_is_taken_except_over_the_end_of_an_epoch() -> None:
    order = ShuffledOrder(10, 3, seed=1)
    for _ in range(3):
        coming = order.coming()
        assert coming is not None
        assert coming.tolist() == order.next_indices().tolist()
    assert order.coming() is None
    order.next_indices()
    assert order.coming() is not None


def test_central_training_reaches_95_percent(digits: Dataset) -> None:
    result = train_central(DigitsMlp(), digits, epochs=12)
    assert result.accuracy > 0.955
    early = train_central(DigitsMlp(), digits, epochs=12, until=0.9)
    assert early.accuracy >= 0.9 and early.steps < result.steps


def test_xor_is_learnt() -> None:
    result = train_central(Xor(), load_source("xor"), epochs=60)
    assert result.accuracy == 1.0


# Exchange


def test_averaging_over_uneven_parts_comes_close_to_central(digits: Dataset) -> None:
    peers = [make(digits, part, 4, rule=Rule("dirichlet", 0.5)) for part in range(1, 5)]
    for _ in range(30):
        for number, peer in enumerate(peers):
            train(peer, 20)
            update = peer.snapshot("int8")
            for other in peers[:number] + peers[number + 1 :]:
                assert other.merge(update, "int8", 0.5).applied
    found = [peer.evaluate() for peer in peers]
    assert min(each.accuracy for each in found) > 0.95
    assert {each.served for each in found} == {"average"}


def test_merge_moves_by_the_weight(digits: Dataset) -> None:
    trainer = make(digits)
    before = trainer._x.clone()
    target = before + 0.01
    report = trainer.merge(encode("float32", target.numpy()), "float32", 0.25)
    assert report.applied and report.distance == pytest.approx(0.01 * trainer.layout.size**0.5, rel=1e-3)
    assert torch.allclose(trainer._x, before + 0.0025, atol=1e-6)


def test_a_liars_update_is_clipped(digits: Dataset) -> None:
    trainer = make(digits)
    before = trainer._x.clone()
    own = float(before.norm())
    report = trainer.merge(encode("float32", (before * -1000).numpy()), "float32", 1.0)
    assert report.distance == pytest.approx(1001 * own, rel=1e-3)
    assert float((trainer._x - before).norm()) == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8", "zip"])
def test_hostile_updates_change_nothing(digits: Dataset, encoding: str) -> None:
    trainer = make(digits)
    before = trainer._x.clone()
    for size in (0, 1, trainer.layout.size, 2 * trainer.layout.size, 4 * trainer.layout.size, 4886, 5000):
        report = trainer.merge(b"\xff" * size, encoding, 0.5)
        if report.applied:  # int8 of that length, scales of NaN: never
            pytest.fail(f"{size} bytes of 0xff were merged")
        assert report.reason
    assert torch.equal(trainer._x, before)
    with pytest.raises(UserError):
        trainer.merge(trainer.snapshot("int8"), "int8", float("nan"))


def test_divergence_goes_back_to_the_average(digits: Dataset) -> None:
    class Wild(DigitsMlp):
        learning_rate = 1e20

    trainer = make(digits, spec=Wild())
    with pytest.raises(UserError, match=r"diverged.*lower the learning rate"):
        train(trainer, 20)
    assert bool(trainer._x.isfinite().all())
    assert trainer.merge(trainer.snapshot("float32"), "float32", 0.5).applied


def test_a_model_that_changes_the_shape_of_its_parameters_is_told_so(digits: Dataset) -> None:
    class Growing(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            layer = self[0]
            assert isinstance(layer, nn.Linear)
            if self.training:
                layer.weight = nn.Parameter(torch.zeros(10, 64))
            outputs: torch.Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
            return outputs

    class Grows(DigitsMlp):
        name = "grows"

        def build(self) -> nn.Module:
            return Growing(nn.Linear(64, 10))

    trainer = make(digits, spec=Grows())
    trainer.begin_round()
    trainer.step()
    with pytest.raises(UserError, match=r"changed its parameters while training \(0\.weight \[10, 64\]\); make all"):
        trainer.end_round()


def test_while_diverged_nothing_is_merged(digits: Dataset) -> None:
    trainer = make(digits)
    update = trainer.snapshot("int8")
    trainer._x[0] = float("nan")
    assert trainer.merge(update, "int8", 0.5).reason.startswith("our own parameters are not finite")


def test_evaluation_can_be_interleaved_with_training_and_prediction(digits: Dataset) -> None:
    trainer = make(digits)
    train(trainer, 20)
    trainer.begin_round()
    expected = trainer.evaluate()
    steps = trainer.evaluating()
    chunks = 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            assert done.value == expected
            break
        chunks += 1
        trainer.step()
        answer(trainer.spec, json.dumps(digits.test.inputs[0].tolist()).encode(), trainer.forward())
        trainer.merge(trainer.snapshot("int8"), "int8", 0.5)
    assert chunks >= 4


def test_a_peer_alone_serves_what_is_better_and_one_with_uneven_data_trusts_the_average(digits: Dataset) -> None:
    alone = make(digits)
    train(alone, 100)  # the average is still the beginning
    assert alone.evaluate().served == "local"
    uneven = make(digits, rule=Rule("labels", 4))
    behind = uneven.snapshot("float32")
    train(uneven, 100)
    assert uneven.merge(behind, "float32", 0.0).applied
    uneven._average.copy_(uneven._x)
    uneven._average[-10:] += 1.0 * torch.arange(10)  # somewhat worse on every class
    worse = uneven.evaluate()
    assert worse.served == "average"
    assert worse.validation_accuracy < 1


def test_after_training_peers_agree_on_their_averages_over_time(digits: Dataset) -> None:
    first, second = (make(digits, part, 2, rule=Rule("labels", 5)) for part in (1, 2))
    peers = [first, second]
    for _ in range(20):
        for peer in peers:
            train(peer, 10)
        for peer, other in ((first, second), (second, first)):
            assert peer.merge(other.snapshot("int8"), "int8", 0.5).applied
    averages = [peer._average.clone() for peer in peers]
    for peer in peers:
        assert float((peer._average - peer._x).norm()) > 0.1 * float(peer._x.norm())
        peer.settle()
    for _ in range(30):
        models = [peer.snapshot("int8-top10") for peer in peers]
        assert first.merge(models[1], "int8-top10", 0.5).applied
        assert second.merge(models[0], "int8-top10", 0.5).applied
    for peer in peers:
        assert torch.equal(peer._average, peer._x)
        apart = float((peer._x - sum(averages) / 2).norm())
        assert apart < 0.2 * float((averages[0] - averages[1]).norm()), "all but agreed"
    before = first._average.clone()
    train(first, 1)
    assert first.merge(second.snapshot("int8"), "int8", 0.0).applied
    assert float((first._average - before).norm()) < 0.2 * float((first._x - before).norm()), "slowly again"


def test_predictions_name_the_right_digit(digits: Dataset) -> None:
    trainer = make(digits, 1, 1)
    for _ in range(5):
        train(trainer, 100)
    trainer.evaluate()
    request = {"instances": digits.test.inputs[:50].tolist()}
    answers = json.loads(answer(trainer.spec, json.dumps(request).encode(), trainer.forward()))["predictions"]
    right = [int(each["label"]) == target for each, target in zip(answers, digits.test.targets, strict=False)]
    assert sum(right) >= 46


# Going on later


@pytest.mark.parametrize("spec", [DigitsMlp(), Rich()], ids=["sgd", "adam, dropout, batch norm"])
def test_restore_continues_bit_for_bit(digits: Dataset, spec: Classifier) -> None:
    first = make(digits, spec=spec)
    train(first, 30)
    first.merge(encode("float32", (first._x * 0.9).numpy()), "float32", 0.5)
    first.evaluate()
    saved = first.save()
    train(first, 40)
    expected = first.save()
    second = make(digits, spec=spec)
    train(second, 3)
    second.restore(saved)
    assert second.save() == saved
    train(second, 40)
    assert second.save() == expected


def test_a_state_of_another_model_or_a_damaged_one_is_refused_and_changes_nothing(digits: Dataset) -> None:
    trainer = make(digits)
    train(trainer, 5)
    saved = trainer.save()
    with pytest.raises(UserError, match=r"is of the model 'rich' .*trains 'digits-mlp'"):
        trainer.restore(make(digits, spec=Rich()).save())
    header = int.from_bytes(saved[:8], "little")
    for bad in (
        b"",
        saved[:7],
        saved[:-1],
        saved + b"\0",
        b"\xff" * len(saved),
        saved.replace(trainer._x[:9].numpy().tobytes(), np.full(9, np.nan, dtype=np.float32).tobytes()),
        saved.replace(b"gossipml-state-1", b"gossipml-state-9"),
        saved[:8] + b"[" * header + saved[8 + header :],
        saved.replace(b"F32", b"I32"),
        saved.replace(b"optimiser.velocity", b"optimiser.velocitx"),
    ):
        with pytest.raises(UserError, match="remove the file"):
            trainer.restore(bad)
    assert trainer.save() == saved


def test_a_state_from_a_part_of_another_size_keeps_the_parameters(digits: Dataset) -> None:
    first, second = make(digits, 1, 4), make(digits, 1, 7)
    train(first, 10)
    second.restore(first.save())
    assert torch.equal(first._x, second._x)
    train(second, 100)


def test_ingest_must_give_one_row_a_sample() -> None:
    class Odd(DigitsMlp):
        def ingest(self, samples: Array) -> Array:
            return np.zeros((1, 64), dtype=np.float32)

    labelled = Labelled(np.zeros((20, 64), dtype=np.uint8), np.zeros(20, dtype=np.int64))
    with pytest.raises(UserError, match="one row a sample"):
        LocalTrainer(Odd(), LocalData(labelled, labelled, labelled), network_id=NETWORK, seed=0)
