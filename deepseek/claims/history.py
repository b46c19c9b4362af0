"""Ask git whether code has changed since a result was measured."""

import ast
import hashlib
import re
import subprocess
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

DIRTY = "-dirty"
"""Suffix of a commit that was measured with uncommitted changes."""

UNDECODABLE = "surrogateescape"
"""Codec error handler that keeps bytes that are not UTF-8 (as in a Latin-1 file) distinct."""

NAME = re.compile(r"\w[\w.-]*")
"""A commit as `git describe` names it; others could be several lines or an option."""


class History:
    """Contents of a checkout's files at different commits, compared by git's digests.

    A result is compared with the commit that is checked out; uncommitted changes do not count. Nor
    do comments, docstrings and layout of Python files, as no measurement depends on them.
    """

    def __init__(self, checkout: Path) -> None:
        """Compare within `checkout`. If it is not a git repository, nothing is known."""
        self.checkout = checkout
        self._digests: dict[str, str | None] = {}
        self._codes: dict[str, str] = {}

    def head(self) -> str | None:
        """Return the commit that is checked out, abbreviated; None: unknown."""
        digest = self._git("rev-parse", "--short", "HEAD")
        return digest.strip() if digest else None

    def changed(self, commit: str, paths: Iterable[str]) -> list[str] | None:
        """Return the paths whose code differs between a commit and the one checked out.

        Args:
            commit: commit of a result, which may end in "-dirty".
            paths: files and folders, from the root of the checkout.

        Returns:
            The paths; None if git is not there or does not know the commit, or if there are none
            but the commit was measured with uncommitted changes, which nobody knows.
        """
        paths = list(paths)
        clean_commit = commit.removesuffix(DIRTY)
        if not NAME.fullmatch(clean_commit):
            return None
        pairs = {path: (f"{clean_commit}:{path}", f"HEAD:{path}") for path in paths}
        commits = (f"{clean_commit}^{{commit}}", "HEAD^{commit}")
        self._ask(*commits, *chain.from_iterable(pairs.values()))
        if any(self._digests[name] is None for name in commits):
            return None
        changed_paths = [
            path
            for path, (before, now) in pairs.items()
            if self._digests[before] is None
            or (
                self._digests[before] != self._digests[now]
                and self._code_changed(clean_commit, path)
            )
        ]
        return None if commit.endswith(DIRTY) and not changed_paths else changed_paths

    def version(self, paths: Iterable[str], command: str) -> str:
        """Return a digest of a command and of the content of paths at the commit that is checked
        out.

        Args:
            paths: files and folders, from the root of the checkout.
            command: the command.
        """
        names = [f"HEAD:{path}" for path in paths]
        self._ask(*names)
        content = "\n".join([command, *(str(self._digests[name]) for name in names)])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def _code_changed(self, commit: str, path: str) -> bool:
        """Return whether the code of a file, or of a file in a folder, differs from that at the
        commit `commit`.
        """
        diff = self._git("diff", "--raw", "--no-renames", "--no-abbrev", commit, "HEAD", "--", path)
        if diff is None:
            return True
        for line in diff.splitlines():
            change, _, name = line.partition("\t")
            _, _, before, now, status = change.split()
            if status != "M" or not name.endswith(".py") or self._code(before) != self._code(now):
                return True
        return False

    def _code(self, blob: str) -> str:
        """Return a digest of the code of a Python file, by the digest of its content."""
        if blob not in self._codes:
            source = self._git("cat-file", "blob", blob)
            code = blob if source is None else python_code(source)
            self._codes[blob] = hashlib.sha256(code.encode(errors=UNDECODABLE)).hexdigest()
        return self._codes[blob]

    def _ask(self, *names: str) -> None:
        """Ask git for the digests of objects; None: there is no such object."""
        unknown_names = [name for name in dict.fromkeys(names) if name not in self._digests]
        if not unknown_names:
            return
        answer = self._git(
            "cat-file", "--batch-check=%(objectname)", text="\n".join(unknown_names) + "\n"
        )
        lines = answer.splitlines() if answer else [""] * len(unknown_names)
        for name, line in zip(unknown_names, lines, strict=True):
            self._digests[name] = line if line and " " not in line else None

    def _git(self, *words: str, text: str = "") -> str | None:
        try:
            process = subprocess.run(
                ["git", *words],  # noqa: S607 - whichever git the user has
                cwd=self.checkout,
                input=text,
                capture_output=True,
                encoding="utf-8",
                errors=UNDECODABLE,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return process.stdout


def python_code(source: str) -> str:
    """Return the code of a Python file: its syntax tree without docstrings, comments and layout.

    Args:
        source: text of the file. If it is not valid Python, it is returned as it is.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return source
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                setattr(
                    node,
                    block,
                    [statement for statement in statements if not _is_comment(statement)],
                )
    return ast.dump(tree)


def _is_comment(statement: ast.AST) -> bool:
    """Return whether a statement is only a string, such as a docstring."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
