"""Which device trains."""

from __future__ import annotations

import pytest
import torch

from gossipml.errors import UserError
from gossipml.models.worker_main import _choose_device


def test_a_gpu_that_is_not_there_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use --device cpu, or auto"):
        _choose_device("cuda")
    assert _choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("asked", "chosen"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_a_gpu_is_used_unless_the_cpu_is_asked_for(asked: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _choose_device(asked) == torch.device(chosen)
