"""The engine's thread ends with its engine, and a forked process has none."""

import gc
import weakref

from tiny_model import tiny_model
from waiting import wait_for

from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
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
