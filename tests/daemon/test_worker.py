"""The training process, for real: each test starts one."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy
import trio

from gossipml.config import PeerConfig
from gossipml.daemon.worker import WorkerDied, open_worker
from gossipml.errors import LocalError, UserError
from gossipml.models.encoding import encode, encoded_size
from gossipml.models.trainer import Trainer

pytestmark = pytest.mark.real

NETWORK = b"n" * 16
START_SECONDS = 90  # torch takes 2 to 10, on a busy machine

SPEC = """
import sys, torch
from gossipml.models.builtin import DigitsMlp

print("printed while loading")
print(input() if False else "no input here", file=sys.__stdout__, flush=True)

class Loud(DigitsMlp):
    name = "loud"

    def ingest(self, samples):
        print("ingesting", len(samples))
        if len(samples) == 7:
            raise RuntimeError("seven is too many")
        if len(samples) == 8:
            sys.exit(3)
        return super().ingest(samples)

class Broken(DigitsMlp):
    name = "broken"

    def loss(self, outputs, targets):
        raise ValueError("no loss today")

class Large(DigitsMlp):
    name = "large"

    def build(self):
        return torch.nn.Sequential(torch.nn.Linear(64, 20000), torch.nn.ReLU(), torch.nn.Linear(20000, 10))
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "loud_model.py"
    path.write_text(SPEC)
    return path


def parameters(snapshot: bytes) -> np.ndarray:
    return np.frombuffer(snapshot, dtype=np.float32)


async def test_training_goes_on_while_everything_else_is_asked() -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(part=(1, 4)), NETWORK) as worker:
            trainer: Trainer = worker
            info = worker.info
            assert trainer.layout.model == "digits-mlp" and trainer.layout.size == 4810
            assert (info.source, info.device, info.threads) == ("digits", worker.info.device, 1)
            assert info.described.inputs[0].shape == (-1, 64) and [t.name for t in info.described.outputs] == [
                "probabilities",
                "label",
            ]
            assert info.described.labels == tuple("0123456789")
            assert info.train_samples + info.validation_samples == 359 and info.test_samples == 364
            assert trainer.steps_per_epoch == info.train_samples // 16

            finished = trio.Event()
            asked = 0

            async def train() -> None:
                report = await trainer.train(2000)
                assert (report.steps, report.samples) == (2000, 32000)
                assert report.seconds > 0 and 0 < report.loss < 2
                finished.set()

            async def ask() -> None:
                nonlocal asked
                while not finished.is_set():
                    update = await trainer.snapshot("int8")
                    assert len(update) == encoded_size("int8", 4810)
                    report = await trainer.merge(update, "int8", 0.1)
                    assert report.applied and report.distance >= 0
                    answer = json.loads(await trainer.predict(json.dumps([0] * 64).encode()))
                    assert len(answer["probabilities"]) == 10
                    asked += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(train)
                for _ in range(3):
                    nursery.start_soon(ask)
                evaluation = await trainer.evaluate()
                assert evaluation is not None and 0 <= evaluation.accuracy <= 1
            assert asked > 10
            evaluation = await trainer.evaluate()
            assert evaluation is not None and evaluation.accuracy > 0.85


async def test_two_processes_train_one_model_as_one_does_and_end_with_the_worker() -> None:
    found = []
    with trio.fail_after(START_SECONDS):
        for workers in (1, 2):
            config = PeerConfig(device="cpu", threads=workers, workers=workers)
            async with open_worker(config, NETWORK) as worker:
                beginning = await worker.snapshot("float32")
                await worker.train(20)
                assert (await worker.merge(beginning, "float32", 0.5)).applied
                await worker.train(20)
                found.append(parameters(await worker.snapshot("float32")))
                helpers = psutil.Process(worker.pid).children()
                assert (worker.info.workers, len(helpers)) == (workers, workers - 1)
        _, alive = psutil.wait_procs(helpers, timeout=START_SECONDS)
    assert not alive
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)


async def test_a_round_brings_its_snapshot() -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(), NETWORK) as worker:
            report = await worker.train(5, "int8")
            assert report.snapshot == await worker.snapshot("int8")
            assert 0 < report.work <= report.seconds * 1.01 + 0.001
            assert (await worker.train(5)).snapshot == b""


async def test_refusals_come_back_and_hurt_nothing() -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(model="xor"), NETWORK) as worker:
            size = worker.layout.size
            before = await worker.snapshot("float32")
            for update, reason in (
                (b"", "0 bytes"),
                (b"\xff" * 4 * size, "holds the value nan"),
                (b"x" * (4 * size + 1), f"{size} parameters take {4 * size}"),
            ):
                report = await worker.merge(update, "float32", 0.5)
                assert not report.applied and reason in report.reason
            assert not (await worker.merge(before, "morse", 0.5)).applied
            for weight in (2.0, float("nan")):
                with pytest.raises(UserError, match="from 0 to 1"):
                    await worker.merge(before, "float32", weight)
            with pytest.raises(UserError, match="the input 'b' is missing"):
                await worker.predict(b'{"a": 1}')
            with pytest.raises(UserError, match="saved state is damaged"):
                await worker.restore(b"not a state")
            assert await worker.snapshot("float32") == before


async def test_several_models_are_merged_at_once() -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(model="xor", merge="median"), NETWORK) as worker:
            own = parameters(await worker.snapshot("float32"))
            others = [encode("float32", own + np.float32(step)) for step in (1.0, 2.0)]
            reports = await worker.merge_together([(others[0], "float32"), (others[1], "float32")])
            assert [report.applied for report in reports] == [True, True]
            assert parameters(await worker.snapshot("float32")) == pytest.approx(own + 1.0)
            own = parameters(await worker.snapshot("float32"))
            reports = await worker.merge_together(
                [(b"\xff" * len(others[0]), "float32"), (others[0], "float32"), (others[1], "float32")]
            )
            assert [(report.applied, report.fault) for report in reports] == [
                (False, True),
                (True, False),
                (True, False),
            ]
            assert "nan" in reports[0].reason


async def test_a_second_worker_goes_on_bit_for_bit() -> None:
    with trio.fail_after(2 * START_SECONDS):
        async with open_worker(PeerConfig(part=(2, 4), seed=3), NETWORK) as first:
            initial = await first.snapshot("float32")
            await first.train(30)
            state = await first.save()
            await first.train(30)
            expected = await first.save()
        async with open_worker(PeerConfig(part=(2, 4), seed=3), NETWORK) as second:
            assert await second.snapshot("float32") == initial
            await second.restore(state)
            await second.train(30)
            assert await second.save() == expected


async def test_what_the_users_code_prints_raises_and_exits(model_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gossipml.worker")
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(model=f"{model_file}:Loud"), NETWORK) as worker:
            await worker.train(5)
            with pytest.raises(UserError, match="the model's code failed: RuntimeError: seven is too many"):
                await worker.predict(json.dumps([[0] * 64] * 7).encode())
            assert json.loads(await worker.predict(json.dumps([0] * 64).encode()))["label"]
            with pytest.raises(WorkerDied, match="exit status 3"):
                await worker.predict(json.dumps([[0] * 64] * 8).encode())
    printed = caplog.text
    assert "printed while loading" in printed and "no input here" in printed and "ingesting 7" in printed
    assert "seven is too many" in printed, "the traceback is in the log"


async def test_a_failing_round_leaves_the_worker_alive(model_file: Path) -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(model=f"{model_file}:Broken"), NETWORK) as worker:
            for _ in range(2):
                with pytest.raises(UserError, match="ValueError: no loss today"):
                    await worker.train(5)
            assert (await worker.merge(await worker.snapshot("int8"), "int8", 0.5)).applied


async def test_a_large_model_goes_through_the_shared_files(model_file: Path) -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(model=f"{model_file}:Large"), NETWORK) as worker:
            assert worker.layout.size == 64 * 20000 + 20000 + 20000 * 10 + 10  # 6 MB
            await worker.train(2)
            state = await worker.save()
            assert len(state) > 3 * 4 * worker.layout.size
            update = await worker.snapshot("float32")
            moved = parameters(update) * np.float32(0.999)
            assert (await worker.merge(encode("float32", moved), "float32", 1.0)).applied
            assert np.allclose(parameters(await worker.snapshot("float32")), moved, atol=1e-6)
            await worker.restore(state)
            assert await worker.snapshot("float32") == update


async def test_versions_are_exported_scored_and_loaded_while_gossip_goes_on() -> None:
    with trio.fail_after(2 * START_SECONDS):
        async with (
            open_worker(PeerConfig(part=(1, 4)), NETWORK) as first,
            open_worker(PeerConfig(part=(2, 4)), NETWORK) as second,
        ):
            await first.train(200)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.train, 100)
                for _ in range(3):
                    nursery.start_soon(first.snapshot, "int8")
                    nursery.start_soon(first.export)
            export = await first.export()
            assert export.evaluation.accuracy > 0.85
            tensors = safetensors.numpy.load(export.content)
            assert {name: array.shape for name, array in tensors.items()} == {
                "0.weight": (64, 64),
                "0.bias": (64,),
                "2.weight": (10, 64),
                "2.bias": (10,),
            }
            before = await second.snapshot("float32")
            score = await second.score(export.content)
            assert score is not None and score > 0.7
            assert await second.snapshot("float32") == before
            for call in (second.load, second.score):
                with pytest.raises(UserError, match="the version cannot be used with 'digits-mlp'"):
                    await call(export.content[:-4])
            await second.load(export.content)
            evaluation = await second.evaluate()
            assert evaluation is not None
            assert (evaluation.validation_accuracy, evaluation.served) == (score, "average")
            assert (await second.train(5)).steps == 5


async def test_a_worker_that_only_serves_needs_no_data(tmp_path: Path) -> None:
    config = PeerConfig(model="mnist-mlp", data=f"mnist:{tmp_path}/nothing", train=False)
    request = json.dumps([0] * 784).encode()
    with trio.fail_after(START_SECONDS):
        async with open_worker(config, NETWORK) as worker:
            assert worker.layout.size == 79510
            assert (worker.info.source, worker.info.train_samples, worker.info.test_samples) == ("", 0, 0)
            assert worker.steps_per_epoch == 1
            with pytest.raises(UserError, match="no version of 'mnist-mlp' has been loaded"):
                await worker.predict(request)
            content = safetensors.numpy.save(
                {
                    "0.weight": np.zeros((100, 784), np.float32),
                    "0.bias": np.zeros(100, np.float32),
                    "2.weight": np.zeros((10, 100), np.float32),
                    "2.bias": np.arange(10, dtype=np.float32),
                }
            )
            assert await worker.score(content) is None
            assert await worker.evaluate() is None
            await worker.load(content)
            assert json.loads(await worker.predict(request))["label"] == "9"
            for call, arguments in (
                (worker.train, (1,)),
                (worker.snapshot, ("int8",)),
                (worker.merge, (b"", "int8", 0.5)),
                (worker.export, ()),
                (worker.save, ()),
                (worker.restore, (b"",)),
            ):
                with pytest.raises(LocalError, match="only serves"):
                    await call(*arguments)
            assert json.loads(await worker.predict(request))["label"] == "9"


async def test_kill_9_fails_everything_that_waits() -> None:
    failed = 0
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(), NETWORK) as worker:
            update = await worker.snapshot("int8")

            async def expect_death(call: object, *arguments: object) -> None:
                nonlocal failed
                with pytest.raises(WorkerDied, match="killed by SIGKILL"):
                    while True:
                        await call(*arguments)  # type: ignore[operator]
                failed += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_death, worker.train, 10**9)
                for _ in range(3):
                    nursery.start_soon(expect_death, worker.snapshot, "int8")
                    nursery.start_soon(expect_death, worker.merge, update, "int8", 0.5)
                    nursery.start_soon(expect_death, worker.predict, json.dumps([0] * 64).encode())
                nursery.start_soon(expect_death, worker.evaluate)
                await trio.sleep(0.2)
                os.kill(worker.pid, signal.SIGKILL)
            assert failed == 11
            for call in (worker.save, worker.evaluate, worker.export):
                with pytest.raises(WorkerDied):
                    await call()
            with pytest.raises(WorkerDied):
                await worker.restore(b"")


async def test_cancelled_requests_leave_slots_and_channel_in_order() -> None:
    with trio.fail_after(START_SECONDS):
        async with open_worker(PeerConfig(), NETWORK) as worker:
            update = await worker.snapshot("int8")
            for delay in np.linspace(0, 0.02, 30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(worker.train, 100_000)
                    nursery.start_soon(worker.snapshot, "float32")
                    nursery.start_soon(worker.merge, update, "int8", 0.1)
                    nursery.start_soon(worker.save)
                    await trio.sleep(float(delay))
                    nursery.cancel_scope.cancel()
            with trio.fail_after(10):  # the cancelled rounds of a hundred seconds are over
                assert (await worker.train(1)).steps == 1
            assert (await worker.merge(await worker.snapshot("int8"), "int8", 0.1)).applied
            await worker.restore(await worker.save())


@pytest.mark.parametrize(
    "config, says",
    [
        (PeerConfig(model="digit-mlp"), "did you mean 'digits-mlp'"),
        (PeerConfig(model="mnist-mlp"), "has no data of its own"),
        (PeerConfig(model="mnist-mlp", data="digits"), "choose another --data or --model"),
        (PeerConfig(data="mnist:/no/such"), "does not exist"),
        (PeerConfig(split="half"), "no split rule 'half'"),
        (PeerConfig(part=(1, 500)), "at most 143 parts"),
    ],
    ids=["model", "no data", "wrong data", "no folder", "rule", "parts"],
)
async def test_what_cannot_be_trained_is_a_user_error(config: PeerConfig, says: str) -> None:
    with trio.fail_after(START_SECONDS):
        with pytest.raises(UserError) as caught:
            async with open_worker(config, NETWORK):
                pytest.fail("the worker started")
    assert says in str(caught.value)


async def test_leaving_ends_the_process_and_carries_errors_unwrapped() -> None:
    with trio.fail_after(START_SECONDS):
        with pytest.raises(ZeroDivisionError):
            async with open_worker(PeerConfig(model="xor"), NETWORK) as worker:
                pid = worker.pid
                raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_cancelling_the_start_ends_the_process() -> None:
    with trio.move_on_after(0.3) as scope:
        async with open_worker(PeerConfig(), NETWORK):
            pytest.fail("torch loads in 0.3 s?")
    assert scope.cancelled_caught
