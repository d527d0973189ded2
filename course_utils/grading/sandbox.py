"""The box in which learners' code runs: what it can see, and the command that starts Python inside it.

In the box there are Python, its packages and the course, all read-only, an empty /tmp of limited size, and no network;
no home folder, no submissions, no report. It is made by bubblewrap, where that works. Elsewhere notebooks are checked
in ordinary processes, with limits on time and memory, which stop accidents and nobody who means harm.
"""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

TMP_MB = 256
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/alternatives")
# Enough to become another user, to stop that user's processes and to remove what they left; nothing for the mounts.
AS_ROOT = ("CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER")


def packages() -> list[Path]:
    """The folders of the course's own two packages."""
    found = [Path(__file__).resolve().parent.parent]
    spec = find_spec("solutions")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).resolve().parent)
    return found


def environment() -> dict[str, str]:
    """All that the processes in the box get from outside."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "TMPDIR": "/tmp",
        "USER": "learner",
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(package.parent) for package in packages())),
        "PYTHONHASHSEED": "0",  # sets and dictionaries in the same order each time
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def readable() -> list[Path]:
    """What Python needs to run, besides the system's folders."""
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_paths()["purelib"]}
    libraries = {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    found = {Path(path) for path in prefixes | libraries} | {Path(sys.executable).resolve().parent, *packages()}
    return sorted(path for path in found if path.is_dir() and path != Path("/") and not path.is_relative_to("/usr"))


def bubblewrap() -> list[str]:
    """The beginning of a command line; what follows runs as process 1 of its own world, and ends with this process.

    As process 1 it cannot be killed from inside, and when it ends, everything inside ends.
    """
    command = ["bwrap", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # no user namespace: limits on processes do not hold for root's user, whatever its name
        command += ["--cap-drop", "ALL", *(word for capability in AS_ROOT for word in ("--cap-add", capability))]
    else:
        command += ["--unshare-user"]
    # Before the rest: the course or Python may lie below /tmp (or /dev/shm), where these would hide them.
    command += ["--proc", "/proc", "--dev", "/dev"]
    command += ["--perms", "0755", "--size", str(TMP_MB * 2**20), "--tmpfs", "/tmp"]
    visible = [*map(Path, SYSTEM + ETC), *readable()]
    read_only = ["/dev", "/"]
    for parent in sorted({parent for path in visible for parent in path.parents if parent != Path("/")}):
        if any(parent.is_relative_to(path) for path in visible):
            continue
        command += ["--perms", "0755"]
        if parent.parent == Path("/tmp"):  # the way to the course is no place where a notebook leaves something
            command += ["--tmpfs", str(parent)]
            read_only.insert(0, str(parent))
        else:
            command += ["--dir", str(parent)]
    for path in visible:
        if path.is_symlink() and str(path) in SYSTEM:
            command += ["--symlink", str(path.readlink()), str(path)]
        else:
            command += ["--ro-bind-try", str(path), str(path)]
    for name, value in environment().items():
        command += ["--setenv", name, value]
    return [*command, "--chdir", "/tmp", *(word for place in read_only for word in ("--remount-ro", place))]


@functools.cache
def choose() -> tuple[str, str]:
    """Which sandbox works here, and, where it is "none", why."""
    if shutil.which("bwrap") is None:
        return "none", "bubblewrap is not installed" if sys.platform == "linux" else "bubblewrap needs Linux"
    try:
        command = [*bubblewrap(), sys.executable, "-c", "import course_utils"]
        subprocess.run(command, check=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else str(error)
        if why.startswith("bwrap: execvp") or not why.startswith("bwrap:"):
            return "none", f"in bubblewrap's box this Python does not find what it needs: {why}"
        return "none", f"bubblewrap does not work here: {why}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "none", f"bubblewrap does not work here: {error}"
    return "bubblewrap", ""


def command(sandbox: str) -> list[str]:
    """The command that starts `course_utils.grading.server` in such a sandbox."""
    server = [sys.executable, "-m", "course_utils.grading.server"]
    return [*bubblewrap(), *server, "boxed"] if sandbox == "bubblewrap" else server
