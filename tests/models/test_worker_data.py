"""The training process with data that decide the model's shape, and with data that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from gossipml.config import PeerConfig
from gossipml.daemon.worker import open_worker
from gossipml.errors import UserError
from tests.models.pictures import fill

pytestmark = pytest.mark.real

NETWORK = b"n" * 16
START_SECONDS = 90  # torch takes 2 to 10, on a busy machine


@pytest.fixture
def trees(tmp_path: Path) -> str:
    rows = "".join(f"{n % 40},{n * n % 7},{'oak' if n % 40 > 19 else 'elm'}\n" for n in range(200))
    (tmp_path / "trees.csv").write_text("width,height,kind\n" + rows)
    return f"csv:{tmp_path / 'trees.csv'}#kind"


async def test_a_model_of_any_width_trains_on_a_table_and_serves_elsewhere(trees: str) -> None:
    with trio.fail_after(2 * START_SECONDS):
        async with open_worker(PeerConfig(model="logistic", data=trees), NETWORK) as worker:
            assert worker.info.described.features == ("width", "height") and worker.info.described.labels == (
                "elm",
                "oak",
            )
            for _ in range(4):
                await worker.train(100)
                await worker.evaluate()
            export = await worker.export()
            assert export.evaluation.accuracy > 0.9
        async with open_worker(PeerConfig(model="logistic", data=trees, train=False), NETWORK) as worker:
            await worker.load(export.content)
            answers = [
                json.loads(await worker.predict(json.dumps({"width": width, "height": 3}).encode()))
                for width in (35, 2)
            ]
            assert [each["label"] for each in answers] == ["oak", "elm"]


async def test_pictures_train_from_their_folder(tmp_path: Path) -> None:
    with trio.fail_after(START_SECONDS):
        source = fill(tmp_path, {"cat": 20, "dog": 20}, size=(40, 30))
        async with open_worker(PeerConfig(model="cifar-cnn", data=f"images:{source}"), NETWORK) as worker:
            report = await worker.train(2)
            assert report.steps == 2 and worker.info.train_samples + worker.info.validation_samples == 32


@pytest.mark.parametrize(
    "table, says",
    [
        ("x,kind\n" + "1,oak\n" * 20, "has one class only, 'oak'"),
        ("x,kind\n" + "1,oak\n2,elm\n" * 3, "holds 6 samples; gossipml needs 10"),
        ("x,kind\n" + "1,oak\n2,\n" * 20, "has no label in line 3"),
    ],
)
async def test_wrong_data_stop_the_start_with_a_sentence(tmp_path: Path, table: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(table)
    with trio.fail_after(START_SECONDS):
        with pytest.raises(UserError) as caught:
            async with open_worker(PeerConfig(model="logistic", data=f"csv:{tmp_path / 't.csv'}#kind"), NETWORK):
                pytest.fail("it started")
        assert says in str(caught.value)
