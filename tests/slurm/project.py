"""A project on a running cluster: checkout, data, cluster.env, jobs; spaces in every path."""

import json
import shlex
import shutil
import sys
from pathlib import Path

from cluster import Cluster, wait_for
from conftest import ROOT


class Project:
    """Submits its checkout's `slurm/finetune_starcoderbase.sh` with the tiny model on two nodes."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory / "my project"
        self.save = self.directory / "run 1"
        self.log = self.directory / "main log.txt"
        self.checkout = directory / "my checkout"
        self.directory.mkdir(parents=True)
        shutil.copytree(ROOT / "slurm", self.checkout / "slurm", ignore=shutil.ignore_patterns("cluster.env"))
        for folder in ("dataset", "preprocess", "launch", "convert", "evaluation"):
            (self.checkout / folder).symlink_to(ROOT / folder)
        self.configure()

    def configure(self, **variables: str | Path) -> None:
        """Write the checkout's cluster.env: a CPU cluster, and `variables`.

        The environment takes precedence.
        """
        variables = {
            "GPUS_PER_NODE": "0",
            "VENV": sys.prefix,
            "SCRATCH": self.directory,
            "MAX_REQUEUES": "5",
            "OMP_NUM_THREADS": "1",
        } | variables
        lines = [f"{name}=${{{name}:-{shlex.quote(str(value))}}}\n" for name, value in variables.items()]
        (self.checkout / "slurm" / "cluster.env").write_text("".join(lines))

    def submit(
        self, *options: str, env: dict[str, str] | None = None, flags: tuple[str, ...] = (), save: Path | None = None
    ) -> int:
        return self.cluster.sbatch(
            "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=30", f"--output={self.log}", *options,
            self.checkout / "slurm" / "finetune_starcoderbase.sh",
            "--preset", "tiny", "--from-scratch", "--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=1", "--seq-length=256",
            "--global-batch-size=1", "--data-prefix=data", "--tokenizer-file=tokenizer.json", "--train-iters=30", "--lr-warmup-iters=0",
            "--save", save or self.save, *flags,
            cwd=self.directory, env=env or {},
        )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_text(self, what: str, seconds: float = 30, times: int = 1) -> None:
        wait_for(lambda: self.text().count(what) >= times, seconds, lambda: f"no {what!r} in the log:\n{self.text()}")

    def end(self, job: int, seconds: float = 60) -> dict[str, str]:
        return self.cluster.wait_job(job, seconds=seconds, log=self.log)

    def starts(self) -> list[dict]:
        return [json.loads(line) for line in (self.save / "starts.jsonl").read_text().splitlines()]
