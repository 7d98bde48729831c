"""Requests drawn from /openapi.json by schemathesis, against a running peer: python benchmarks/fuzz_http.py [CASES]

At least CASES (5,000 without a number) are drawn, valid and invalid, in rounds with other seeds, since of an operation
without parameters there is but one case; the name of the model is that of the peer's in half of them. Checked are
statuses, content types and bodies as documented, and that nothing is a server's error. The event stream is left out,
since it has no end. Needs `pip install -e '.[clients]'`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ask, running_peers, status

from gossipml.api.openapi import OPERATIONS
from gossipml.daemon.home import Home

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    asked = [operation for operation in OPERATIONS if operation.name != "events"]
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": "xor", "max_rounds": 3, "lan": False}
        with running_peers(Path(folder), [options]) as (api,):
            while status(api)["state"] != "averaging":
                time.sleep(0.1)
            token = Home(Path(folder) / "peer0").path / "api-token"
            document = Path(folder) / "openapi.json"
            document.write_text(json.dumps(prepared(ask(api, "/openapi.json"))))
            drawing = [
                "run", str(document), "--url", f"http://{api}", "--exclude-path", "/v1/events",
                "--checks", CHECKS, "--max-examples", str(max(1, cases // len(asked))), "--phases", "fuzzing",
                "--header", f"Authorization: Bearer {token.read_text().strip()}",
                "--continue-on-failure", "--no-color", "--workers", "4",
            ]  # fmt: skip
            drawn, seed, code = 0, 0, 0
            while drawn < cases and not code:
                seed += 1
                command = [sys.executable, "-m", "schemathesis.cli", *drawing, "--seed", str(seed)]
                done = subprocess.run(command, check=False, timeout=900, stdout=subprocess.PIPE, text=True)
                print(done.stdout, flush=True)
                found = re.search(r"(\d+) generated", done.stdout)
                drawn, code = drawn + (int(found[1]) if found else 0), done.returncode or (0 if found else 1)
            alive = status(api)["state"]
    print(f"{drawn} cases in {seed} rounds, {'something' if code else 'nothing'} found; the peer is {alive} afterwards")
    sys.exit(code)


def prepared(document: Any) -> Any:  # Any: JSON
    """The document, with two names for models: of one that is there, and of one that is not. Without the timeout in the
    body of an inference request, which is rightly answered by 504 when it is a few microseconds."""
    del document["components"]["schemas"]["InferRequest"]["properties"]["parameters"]["properties"]
    for item in document["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": ["xor", "nothing"]}
    return document


if __name__ == "__main__":
    main()
