"""What the Node client's build says to who builds it for the first time."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.clients.runners import CLIENTS

NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="there is no Node here")
@pytest.mark.parametrize("python", ["/nowhere/python", sys.executable], ids=["none", "bare"])
def test_build_without_its_python_says_in_a_line_what_it_needs(python: str) -> None:
    environment = {**os.environ, "PYTHON": python}
    if python == sys.executable:
        # An interpreter that finds none of the packages that are installed.
        environment["PYTHONHOME"] = "/nowhere"
    run = subprocess.run(
        [str(NODE), "generate.mjs"],
        cwd=CLIENTS / "node",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    needs = "a Python with grpcio-tools and googleapis-common-protos"
    assert run.stderr == f"{python} is not {needs}; PYTHON names one.\n"
