"""The servers that `serving.py` measures gossipml against: python serving_rivals.py litserve|fastapi PORT

Each answers POST /predict with the class and the probabilities of 784 floats, by the same network as `mnist-wide`, one
torch thread. LitServe as its documentation has it, batching on; FastAPI in one process under uvicorn with httptools and
uvloop.
"""

from __future__ import annotations

import sys
from typing import Any

import fastapi
import litserve
import pydantic
import torch
import uvicorn

from gossipml.models.builtin_pictures import MnistWide

SPEC = MnistWide()


def build() -> torch.nn.Module:
    torch.set_num_threads(1)
    return SPEC.build().eval()


def answers(model: torch.nn.Module, batch: list[list[float]]) -> list[dict[str, Any]]:  # Any: JSON
    """Label and probabilities of each sample (784,)."""
    with torch.inference_mode():
        outputs = model(torch.tensor(batch) / 255)
    return list(SPEC.egest(outputs.numpy()))


class Api(litserve.LitAPI):  # type: ignore[misc]  # a package without types
    def setup(self, device: str) -> None:
        self.network = build()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # it would take a name for a query parameter
        values: list[float] = request["input"]
        return values

    def predict(self, batch: list[list[float]]) -> list[dict[str, Any]]:
        return answers(self.network, batch)

    def batch(self, inputs: list[list[float]]) -> list[list[float]]:
        return inputs

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def run_litserve(port: int) -> None:
    api = Api(max_batch_size=64, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=port, host="127.0.0.1", log_level="warning", generate_client_file=False)


class Sample(pydantic.BaseModel):
    input: list[float]


def run_fastapi(port: int) -> None:
    app, network = fastapi.FastAPI(), build()

    async def predict(sample: Sample) -> dict[str, Any]:
        return answers(network, [sample.input])[0]

    app.post("/predict")(predict)  # no decorator: where fastapi is missing mypy would call it untyped
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", loop="uvloop", http="httptools")


if __name__ == "__main__":
    {"litserve": run_litserve, "fastapi": run_fastapi}[sys.argv[1]](int(sys.argv[2]))
