"""The direction of imports (ARCHITECTURE: an arrow points at what is imported; nothing imports upward)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import gossipml

PACKAGE = Path(gossipml.__file__).parent

FOUNDATION = {
    "errors",
    "ids",
    "identity",
    "token",
    "keys",
    "orders",
    "membership",
    "certificates",
    "codec",
    "config",
    "strict_json",
    "env",
    "__version__",
    "",
}

# part -> the parts of gossipml that it may import beside itself and the foundation
ALLOWED: dict[str, set[str]] = {
    "foundation": set(),
    "models": set(),
    "peer": set(),
    "dht": set(),
    "api": set(),
    "daemon": {"api", "peer", "dht", "models"},
    "simulations": {"models", "peer", "dht", "daemon"},  # docs/decisions/0002: the daemon's own node on a virtual Env
    "cli": {"daemon", "simulations", "models"},
}

# Modules of the standard library that touch the world: only behind the seam `gossipml.env`.
WORLD = {"time", "random", "secrets", "socket", "select", "selectors", "ssl"}
# What each part may use of them beside the seam, with the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("gossipml.models.worker_main", "select"): "the blocking loop of the worker process",
    ("gossipml.models.worker_main", "time"): "the worker measures its own speed",
    ("gossipml.models.crew", "select"): "the caller and helpers of one step wait for each other",
    ("gossipml.models.crew", "time"): "who waits asks for a while before it sleeps",
    ("gossipml.models.kernels_split", "time"): "which way to use the cores is fastest here is measured",
    ("gossipml.models.central", "time"): "the process that peers are compared with measures its own speed",
}
TRIO_FREE = ("models",)
# Protocol code: plain state machines, no trio at all.
PURE = (
    "peer.wire",
    "peer.session",
    "peer.herald",
    "peer.gossip",
    "peer.gossip_events",
    "peer.view",
    "peer.failure",
    "peer.ages",
    "peer.conduct",
    "peer.beacon",
    "peer.discovery",
    "peer.rates",
    "peer.swarm_wire",
    "peer.picker",
    "peer.download",
    "peer.upload",
    "peer.swarm_ports",
    "dht.seal",
    "dht.messages",
    "dht.records",
    "dht.storage",
    "dht.routing",
    "dht.lookup",
    "dht.limits",
    "dht.node",
    "daemon.idle",
    "daemon.schedule",
)


def part_of(module: str) -> str:
    """`gossipml.peer.wire` -> `peer`; foundation modules -> `foundation`."""
    pieces = module.split(".")
    name = pieces[1] if len(pieces) > 1 else ""
    if name in FOUNDATION:
        return "foundation"
    return "cli" if name == "__main__" else name


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("gossipml", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, wherever it stands, except under `if TYPE_CHECKING`."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            skipped.update(inner for child in node.body for inner in ast.walk(child))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written with the full name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_walk_sees_every_part() -> None:
    seen = {part_of(name) for name, _ in modules()}
    assert seen == set(ALLOWED), "a new part needs a rule"


def test_nothing_imports_upward() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imports(tree)
        if target.split(".")[0] == "gossipml"
        and (there := part_of(target)) not in ("foundation", here := part_of(name))
        and there not in ALLOWED[here]
    ]
    assert wrong == []


def test_generic_top_level_names_are_never_imported() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        for target in imports(tree)
        if target.split(".")[0] in {"peer", "dht", "models", "simulations"}
    ]
    assert wrong == []


def test_only_the_seam_touches_the_world() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules()
        if not name.startswith("gossipml.env.")
        for target in imports(tree)
        if target.split(".")[0] in WORLD
        and (name, target.split(".")[0]) not in EXCEPTIONS
        and target not in ("random.Random", "random")  # the type; its use is checked below
    ]
    assert wrong == []


def test_random_is_only_a_type() -> None:
    wrong = []
    for name, tree in modules():
        if name.startswith("gossipml.env."):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "random"
                and node.attr != "Random"
            ):
                wrong.append(f"{name}:{node.lineno} uses random.{node.attr}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("random.Random", "Random") and not node.args:
                wrong.append(f"{name}:{node.lineno} makes a generator without a seed")
    assert wrong == []


def test_protocol_code_has_no_io() -> None:
    banned = {"trio", "asyncio", "threading", "subprocess", "os", "pathlib", *WORLD} - {"random"}
    names = {f"gossipml.{pure}" for pure in PURE}
    found = set()
    for name, tree in modules():
        if name in names:
            found.add(name)
            assert not (banned & {target.split(".")[0] for target in imports(tree)}), name
    assert found == names, "a protocol module moved: keep the list right"


def test_models_know_neither_trio_nor_a_socket() -> None:
    for name, tree in modules():
        if part_of(name) in TRIO_FREE:
            assert not {"trio", "socket", "asyncio"} & {target.split(".")[0] for target in imports(tree)}, name


def test_the_daemon_never_imports_torch() -> None:
    for name, tree in modules():
        if part_of(name) in ("foundation", "peer", "dht", "api", "daemon", "cli"):
            assert "torch" not in {target.split(".")[0] for target in imports(tree)}, name
