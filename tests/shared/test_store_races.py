"""Several processes write, name, delete, sweep and die in one store; it stays whole."""

import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.engine import EngineManifest, EngineSelector
from shared.errors import EngineNotFound
from shared.store import LocalStore, pull
from shared.store.pins import Pin, pinned_digests
from tests.shared.engines import INT8, REPOSITORY, engine_key, publish_engine, weight_bytes

# Publishes engines of few models and layers, deletes and sweeps without grace, as fast as it can.
STORM = """
import random, sys
from shared.errors import EngineNotFound
from shared.store import LocalStore
from tests.shared.engines import engine_key, publish_engine, weight_bytes
store = LocalStore(sys.argv[1])
dice = random.Random(int(sys.argv[2]))
for step in range(int(sys.argv[3])):
    key = engine_key(model=str(dice.randrange(4)))
    action = dice.choice(['publish', 'publish', 'delete', 'sweep', 'list'])
    if action == 'publish':
        with store.pin():
            weights = weight_bytes(3000, dice.randrange(3))
            engine = publish_engine(store, key, graph=key.digest.encode(), weights=weights)
            assert engine.key == key
    elif action == 'delete':
        try:
            store.delete(key.digest)
        except EngineNotFound:
            pass
    elif action == 'sweep':
        store.sweep(grace_s=0)
    else:
        store.list()
    print(action, flush=True)
"""


def storm(root: Path, seed: int, num_steps: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", STORM, str(root), str(seed), str(num_steps)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def require_whole(store: LocalStore) -> None:
    for engine in store.list():
        store.verify(engine)
    names = {path.name for path in (store.root / "engines").iterdir()}
    assert {engine.key.digest for engine in store.list()} == names, "a named engine lacks a blob"


@pytest.mark.parametrize("seed", [1, 2])
def test_store_stays_whole_while_processes_race(tmp_path: Path, seed: int) -> None:
    """Law 7: a sweep takes nothing that an engine names or a build has just written."""
    children = [storm(tmp_path, seed * 100 + i, 60) for i in range(3)]
    for child in children:
        child.communicate()
    assert [child.returncode for child in children] == [0, 0, 0]
    require_whole(LocalStore(tmp_path))


def test_pins_that_are_released_while_a_sweep_reads_them_are_no_error(tmp_path: Path) -> None:
    """Between its looks at the folder, at a file and at the file's lock any of them may go."""
    for _ in range(20):
        pins = [Pin(tmp_path) for _ in range(400)]
        for pin in pins:
            pin.add("sha256:1")

        def release(pins: list[Pin] = pins) -> None:
            for pin in pins:
                pin.release()

        releasing = threading.Thread(target=release)
        releasing.start()
        while releasing.is_alive():
            assert pinned_digests(tmp_path) <= {"sha256:1"}
        releasing.join()
        assert pinned_digests(tmp_path) == set()


def test_store_stays_whole_when_writers_are_killed(tmp_path: Path) -> None:
    """Law 7: whatever a writer was doing when it died, no half engine is visible."""
    dice = random.Random(7)
    for seed in range(6):
        child = storm(tmp_path, seed, 1000)
        assert child.stdout is not None
        for _ in range(dice.randrange(1, 12)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.communicate()
        store = LocalStore(tmp_path)
        require_whole(store)
        engine = publish_engine(store, engine_key(model="after"), weights=weight_bytes(10, seed))
        assert store.get(engine.name) == engine
    store.sweep(grace_s=0)
    require_whole(store)
    assert not list((tmp_path / "partial").iterdir())
    assert not list((tmp_path / "pins").iterdir())


MODELS = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, 2)


class StoreMachine(RuleBasedStateMachine):
    """Any order of operations, against a dictionary of what should be there."""

    def __init__(self) -> None:
        super().__init__()
        # hypothesis gives no fixtures here
        self.folder = tempfile.TemporaryDirectory()
        self.store = LocalStore(Path(self.folder.name) / "store")
        self.other = LocalStore(Path(self.folder.name) / "other")
        self.engines: dict[str, EngineManifest] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(model=MODELS, seed=SEEDS)
    def publish(self, model: str, seed: int) -> None:
        key = engine_key(model=model)
        engine = publish_engine(self.store, key, model, weights=weight_bytes(300, seed))
        assert self.engines.setdefault(model, engine) == engine

    @rule(model=MODELS)
    def delete(self, model: str) -> None:
        name = engine_key(model=model).digest
        if model in self.engines:
            assert self.store.delete(name) == self.engines.pop(model)
        else:
            with pytest.raises(EngineNotFound):
                self.store.delete(name)

    @rule(grace_s=st.sampled_from([0.0, 3600.0]))
    def sweep(self, grace_s: float) -> None:
        self.store.sweep(grace_s)

    @rule()
    def open_again(self) -> None:
        self.store = LocalStore(self.store.root)

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), layer=st.integers(0, 1))
    def lose_a_layer_and_pull_it_again(self, data: st.DataObject, layer: int) -> None:
        engine = self.engines[data.draw(st.sampled_from(sorted(self.engines)))]
        pull(self.store, engine, self.other)
        path = self.store.blob_path(engine.layers[layer].digest)
        path.write_bytes(path.read_bytes()[:-1])
        assert engine not in self.store.list()
        assert pull(self.other, engine, self.store) == engine

    @invariant()
    def engines_are_there_and_good(self) -> None:
        assert set(self.store.list()) == set(self.engines.values())
        for model, engine in self.engines.items():
            assert self.store.get(engine.name) == engine
            assert self.store.find(EngineSelector(model, "cpu", INT8)) == engine
            self.store.verify(engine)


StoreMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestStore = StoreMachine.TestCase
