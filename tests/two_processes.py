"""Starts a test file once more, as a script in two processes, and reads what they found."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2", "--master_port={port}")
# `--cpu` starts one process only. Without it two start, and the script says that they are to use the CPU.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port={port}")


def run_in_two(script: str, folder: Path, launcher: tuple[str, ...] = TORCHRUN, **environment: str) -> Any:
    """What the script has written to results.json in the folder, which is its only argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [option.format(port=port) for option in launcher]
    paths = os.pathsep.join(["src", "tests", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", *launch, script, str(folder)],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text("utf-8"))
