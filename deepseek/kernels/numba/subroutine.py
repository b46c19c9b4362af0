"""Functions that kernels call.

`numba.jit` optimises each function by itself, compiles it to machine code and wraps it for Python,
for each type of its arguments. A kernel is optimised and compiled as a whole, with all that it
calls, and needs neither the machine code nor the wrapper: without them, compiling the engine's step
takes 0.6 of the time (docs/log/kernels.md, 2026-11-27).
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import jit
from numba.core import sigutils
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher


class _Linkable(JITCodeLibrary):
    """A code library that is only linked into others."""

    def _optimize_final_module(self) -> None:
        """Optimise once, where numba does it twice: the kernel that this is linked into is
        optimised again as a whole.
        """
        passes, builder = self._codegen._module_pass_manager(
            loop_vectorize=self._codegen._loopvect,
            slp_vectorize=False,
            opt=self._codegen._opt_level,
            cost="cheap",
        )
        passes.run(self._final_module, builder)

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _SubroutineCompiler(Compiler):
    """Numba's compiler without machine code and wrappers."""

    def __init__(self, typing: Any, target: Any, _library: None, *rest: Any) -> None:
        super().__init__(typing, target, _Linkable(target.codegen(), "subroutine"), *rest)
        self.state.flags.no_compile = True
        self.state.flags.no_cpython_wrapper = True
        self.state.flags.no_cfunc_wrapper = True


class _Subroutine(CPUDispatcher):
    """The dispatcher that numba's compiler finds where a kernel calls a subroutine."""

    def compile(self, sig: Any) -> object:
        """Return the key under which numba finds the function for these types of arguments."""
        arguments, _ = sigutils.normalize_signature(sig)
        with global_compiler_lock:
            if arguments not in self.overloads:
                result = self._compiler.compile(arguments, None)
                result = result._replace(entry_point=object())
                self.targetctx.insert_user_function(
                    result.entry_point, result.fndesc, [result.library]
                )
                self.overloads[arguments] = result
            return self.overloads[arguments].entry_point

    @cached_property
    def _alone(self) -> Callable[..., Any]:
        """The function compiled to machine code of its own, to be called from Python."""
        return jit(**self.targetoptions)(self.py_func)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function from Python, as tests do."""
        return self._alone(*arguments)


def subroutine(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a function for the kernels that call it. Use it as a decorator.

    Args:
        function: the function.
        options: those of `numba.jit`, such as `fastmath` and `error_model`.
    """
    if function is None:
        return lambda decorated: subroutine(decorated, **options)
    return _Subroutine(
        function, targetoptions={"nopython": True, **options}, pipeline_class=_SubroutineCompiler
    )
