"""The engine's thread ends with its engine, and a forked process has none."""

import gc
import multiprocessing
import sys
import weakref

import pytest
from tiny_model import tiny_model
from waiting import PATIENCE, wait_for

from deepseek.engine.engine import Engine
from deepseek.engine.request import EngineStoppedError, Request
from deepseek.engine.sampler import Sampling

LONG = Request((5, 17, 80, 200, 33), Sampling(max_new_tokens=50), ignore_end=True)


def test_an_engine_that_nobody_closed_is_freed_after_its_last_answer() -> None:
    loaded = tiny_model()
    engine = Engine(*loaded)
    generations = engine.submit_all([LONG, LONG])
    freed_engine, freed_model = weakref.ref(engine), weakref.ref(loaded.model)
    del engine, loaded
    assert freed_engine() is None
    assert [len(list(generation)) for generation in generations] == [50, 50]
    del generations

    def is_freed() -> bool:
        gc.collect()
        return freed_model() is None

    wait_for(is_freed)


def refuse_here(engine: Engine) -> None:
    """End this process with a code of its own if it is told that the engine does not run in it."""
    with pytest.raises(EngineStoppedError, match="a fork copies no threads"):
        engine.submit(LONG)
    sys.exit(7)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_that_the_engine_does_not_run_there() -> None:
    with Engine(*tiny_model()) as engine:
        child = multiprocessing.get_context("fork").Process(target=refuse_here, args=(engine,))
        child.start()
        child.join(PATIENCE)
        child.kill()
        assert child.exitcode == 7
