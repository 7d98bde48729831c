"""The trainer of the simulations keeps to the interface."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy

from gossipml.env.simulated import World, run_simulation
from gossipml.errors import LocalError, UserError
from gossipml.models.trainer import Trainer
from gossipml.simulations.numpy_trainer import NumpyTrainer, make_points


def test_a_version_goes_from_one_trainer_into_another() -> None:
    async def scenario(world: World) -> None:
        one, other = make_points(3, 2)
        first: Trainer = NumpyTrainer(world.env("a"), one)
        second: Trainer = NumpyTrainer(world.env("b"), other)
        served: Trainer = NumpyTrainer(world.env("c"), other, train=False)
        await first.train(200)
        export = await first.export()
        assert export.content == (await first.export()).content
        assert safetensors.numpy.load(export.content)["weight"].shape == (5, 8)
        assert await first.evaluate() == export.evaluation
        before = await second.snapshot("float32")
        assert await second.score(export.content) == export.evaluation.validation_accuracy
        assert await second.snapshot("float32") == before
        await second.load(export.content)
        assert await second.snapshot("float32") == await first.snapshot("float32")
        with pytest.raises(UserError, match="loaded yet"):
            await served.predict(b"[0, 0, 0, 0, 0, 0, 0, 0]")
        await served.load(export.content)
        assert await served.predict(b"[1, 0, 1, 0, 0, 0, 0, 0]") == await first.predict(b"[1, 0, 1, 0, 0, 0, 0, 0]")
        assert await served.evaluate() is None
        assert await served.score(export.content) is None
        for call in (served.export, served.save):
            with pytest.raises(LocalError, match="only serves"):
                await call()
        with pytest.raises(LocalError, match="only serves"):
            await served.train(1)

    run_simulation(scenario, seed=1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": np.zeros((5, 8), np.float32)},
        {"weight": np.zeros((8, 5), np.float32), "bias": np.zeros(5, np.float32)},
        {"weight": np.full((5, 8), np.nan, np.float32), "bias": np.zeros(5, np.float32)},
    ],
)
def test_a_version_of_another_model_is_refused(tensors: dict[str, np.ndarray]) -> None:
    async def scenario(world: World) -> None:
        trainer = NumpyTrainer(world.env("a"), make_points(3, 1)[0])
        content = safetensors.numpy.save(tensors)
        before = trainer.parameters
        for bad in (content, content[:-1], b""):
            with pytest.raises(UserError, match="cannot be used with 'points'"):
                await trainer.load(bad)
        assert (trainer.parameters == before).all()

    run_simulation(scenario, seed=1)
