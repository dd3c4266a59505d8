"""Runs in the sandbox, in a work tree of the task's commit: applies a patch, puts the tests in place, runs them.

Standard library and git only; repo_tests.py sends it in as source text. Standard input is a request, JSON in one line
(see `Request` there), and the patch. The last line of what it prints is the verdict.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

NO_PYTEST = 97
_SHADOWS = ("sitecustomize.py", "usercustomize.py", "pytest.py", "pytest", "_pytest")
"""At the root they would be imported instead of what runs the tests."""


def try_patch() -> None:
    """Do what standard input says and print the verdict."""
    request = json.loads(sys.stdin.buffer.readline())
    patch = sys.stdin.buffer.read()
    if not request["command"] and importlib.util.find_spec("pytest") is None:
        raise SystemExit(NO_PYTEST)
    applied = _apply(patch, request["kept"])
    verdict = {"applied": applied, "fail_to_pass": 0, "pass_to_pass": 0}
    if applied:
        for path, text in request["files"].items():
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w", encoding="utf-8", newline="") as file:
                file.write(text)
        passed = _passed(_report(request))
        for names in ("fail_to_pass", "pass_to_pass"):
            verdict[names] = sum(canonical(name) in passed for name in request[names])
    print()
    print(json.dumps(verdict))


def canonical(name: str) -> str:
    """One name for `tests/test_a.py::TestB::test_c[1]` and for `tests.test_a.TestB.test_c[1]`, as reports have it."""
    head, bracket, parameters = name.partition("[")
    return re.sub(r"\.py::|::|/", ".", head) + bracket + parameters


def _apply(patch: bytes, kept: Sequence[str]) -> bool:
    """Apply it but for the files that match; whether it could be applied."""
    added = [name for name in _SHADOWS if not os.path.exists(name)]
    patterns = [*kept, *added, *(f"{name}/*" for name in added)]
    excluded = [f"--exclude={pattern}" for pattern in patterns]
    command = ["git", "apply", "--whitespace=nowarn", *excluded, "-"]
    return subprocess.run(command, input=patch, capture_output=True, check=False).returncode == 0


def _report(request: dict[str, Any]) -> str:
    """Run the tests; where their report is, or should be."""
    path = os.path.join(tempfile.mkdtemp(), "report.xml")
    report = ("-p", "no:cacheprovider", f"--junitxml={path}")
    pytest = [sys.executable, "-m", "pytest", "-q", *report, *request["modules"]]
    subprocess.run(
        ["bash", "-c", request["command"]] if request["command"] else pytest,
        env=os.environ | {"REPORT": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return path


def _passed(report: str) -> set[str]:
    """The tests that a JUnit report says passed, each time it names them."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return set()  # there were no tests, or what ran them was ended
    passed: set[str] = set()
    others: set[str] = set()
    for case in cases:
        name = canonical(f"{case.get('classname', '')}.{case.get('name', '')}".lstrip("."))
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        (others if ended else passed).add(name)
    return passed - others
