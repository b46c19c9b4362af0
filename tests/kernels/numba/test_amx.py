"""Products of AMX tiles equal NumPy's, on each thread that has configured its tiles."""

import numpy as np
import pytest
from numba import njit

from deepseek.kernels.numba import amx

pytestmark = pytest.mark.skipif(not amx.available(), reason="this processor has no tiles")


@njit
def add_bytes(a, b, c, unsigned):
    amx.configure()
    amx.load(0, c, 64)
    amx.load(1, a, 64)
    amx.load(2, b, 128)
    if unsigned:
        amx.add_unsigned(0, 1, 2)
    else:
        amx.add_signed(0, 1, 2)
    amx.store(0, c, 64)
    amx.release()


@njit
def pairs(a, b, c):
    amx.configure()
    amx.zero(7)
    amx.load(5, a, 64)
    amx.load(6, b, 64)
    amx.add_pairs(7, 5, 6)
    amx.store(7, c, 64)
    amx.release()


@pytest.mark.parametrize("unsigned", [False, True])
def test_sums_of_bytes_are_exact(unsigned):
    random = np.random.default_rng(0)
    a_RK = random.integers(-128, 128, (16, 64), np.int8)
    # 16 x (16 columns, 4 bytes), each row followed by one of another tile.
    b = random.integers(0, 256, (16, 2, 16, 4), np.uint8)
    c_RC = random.integers(-1000, 1000, (16, 16), np.int32)
    b_KC = b[:, 0].transpose(0, 2, 1).reshape(64, 16)
    signed = b_KC if unsigned else b_KC.view(np.int8)
    wanted_RC = c_RC + a_RK.astype(np.int32) @ signed.astype(np.int32)
    add_bytes(a_RK.ctypes.data, b.ctypes.data, c_RC.ctypes.data, unsigned)
    assert np.array_equal(c_RC, wanted_RC)


def test_pairs_of_bf16_add_up_in_fp32():
    random = np.random.default_rng(1)
    a_RK = random.integers(-8, 9, (16, 32)).astype(np.float32)
    b_KC = random.integers(-8, 9, (32, 16)).astype(np.float32)
    a = (a_RK.view(np.uint32) >> 16).astype(np.uint16)
    b = (b_KC.view(np.uint32) >> 16).astype(np.uint16).reshape(16, 2, 16).transpose(0, 2, 1).copy()
    c_RC = np.ones((16, 16), np.float32)
    pairs(a.ctypes.data, b.ctypes.data, c_RC.ctypes.data)
    assert np.array_equal(c_RC, a_RK @ b_KC)  # small integers, whose sums are exact


@njit
def few_rows(a, b, c, rows):
    amx.configure_rows(rows)
    amx.load(0, c, 64)
    amx.load(4, a, 64)
    amx.load(6, b, 64)
    amx.add_signed(0, 4, 6)
    amx.store(0, c, 64)
    amx.release()


@pytest.mark.parametrize("rows", [1, 3, 15, 16])
def test_tiles_of_fewer_rows_leave_the_others_alone(rows):
    a, c = np.ones((16, 64), np.int8), np.zeros((16, 16), np.int32)
    few_rows(a.ctypes.data, a.ctypes.data, c.ctypes.data, rows)
    assert (c[:rows] == 64).all() and (c[rows:] == 0).all()
