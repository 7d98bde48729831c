"""Asks a peer that serves xor by KServe's own client: python kserve_client.py HOST:PORT json|binary"""

# mypy: ignore-errors
# kserve is not among the packages that are checked.

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig


async def main(api: str, binary: bool) -> None:
    client, base = InferenceRESTClient(RESTConfig(protocol="v2")), f"http://{api}"
    given = InferInput("input", [4, 2], "FP32")
    given.set_data_from_numpy(np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32), binary_data=binary)
    answer = await client.infer(base, InferRequest("xor", [given]), model_name="xor")
    (result,) = (output for output in answer.outputs if output.name == "result")
    seen = {
        "live": await client.is_server_live(base),
        "ready": await client.is_server_ready(base),
        "model": await client.is_model_ready(base, "xor"),
        "result": result.as_numpy().reshape(-1).tolist(),
    }
    print(json.dumps(seen))


asyncio.run(main(sys.argv[1], sys.argv[2] == "binary"))
