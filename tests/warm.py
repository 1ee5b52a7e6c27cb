"`ltnb` commands as processes that are forked from one which has imported torch: a start takes no seconds."

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "diffusers.models.unets.unet_2d", "ltnb.diffult", "ltnb.ldmlr"])


def in_child(program, args, cwd, env, folder):
    "What the forked process does: the surroundings of a command, then the command"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    os.fsync = lambda fd: None  # as in the tests' own process
    for fd, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as f:
            os.dup2(f.fileno(), fd)
    if program is None:
        from ltnb.cli import main

        sys.exit(main(args))
    sys.argv = ["-c", *args]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


class Command:
    "A process of its own, with what a `subprocess.Popen` of `ltnb ARGS`, or of a Python program, is asked here"

    def __init__(self, *args, program=None, cwd=None, env=None):
        self.kept = tempfile.TemporaryDirectory()
        self.folder = Path(self.kept.name)
        told = (program, [str(a) for a in args], str(cwd or os.getcwd()), {**os.environ, **(env or {})}, self.folder)
        self.process = FORKS.Process(target=in_child, args=told)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=900):
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired("ltnb", timeout)
        return self.poll()

    def done(self, timeout=900):
        "The finished process: its exit code, and what it said"
        code = self.wait(timeout)
        out, err = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def pair(*args, program, **where):
    "A Python program in two processes that meet without a launcher: both finished"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LTNB_TEAM_TIMEOUT": "240"}
    both = [Command(*args, program=program, env={**env, "RANK": str(r)}, **where) for r in (0, 1)]
    try:
        return [p.done(400) for p in both]
    finally:
        for p in both:
            p.kill()
