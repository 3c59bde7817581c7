"""Packaging of atlantis_ds. Install with the constraints file: pip install -c constraints.txt -e ."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("atlantis_ds/__init__.py").read_text().splitlines() if "__version__" in line
)
# Folders of the top level that the wheel carries inside the package; atlantis_ds/bundled.py finds them in both places.
BUNDLED = {"ds_configs": ["*.json"], "slurm": ["*.sh", "*.sbatch"], "recipes": ["*.yaml", "studies/*.yaml"]}

setup(
    name="atlantis_ds",
    version=version,
    description="Importance-weighted fine-tuning of language models with DeepSpeed",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["atlantis_ds", "atlantis_ds.*"]), *(f"atlantis_ds.{name}" for name in BUNDLED)],
    package_dir={f"atlantis_ds.{name}": name for name in BUNDLED},
    package_data={
        "atlantis_ds": ["py.typed"],
        "atlantis_ds.config": ["*.json"],
        "atlantis_ds.pages": ["*.html", "*.css", "*.js"],
        **{f"atlantis_ds.{name}": patterns for name, patterns in BUNDLED.items()},
    },
    install_requires=[
        "accelerate",
        "arviz-stats",
        "datasets",
        "deepspeed>=0.18.4",
        "jinja2",
        "matplotlib",
        "ninja",
        "peft",
        "protobuf",  # transformers converts SentencePiece tokenizers with it
        "psutil",
        "pyarrow",
        "pydantic>=2.7",
        "pyyaml",
        "rich",
        "safetensors",
        "scikit-learn",
        "sentencepiece",
        "torch>=2.6",
        "transformers>=5",
        "typer",
    ],
    extras_require={
        "qlora": ["bitsandbytes"],
        "gguf": ["gguf"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        "trackio": ["trackio"],
        "test": [
            "gguf",
            "hypothesis",
            "kubeflow-trainer-api",
            "mlflow-skinny",
            "mpi4py",
            "mypy",
            "openmpi",
            "pytest",
            "ruff",
            "tensorboard",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["atlantis-ds=atlantis_ds.cli:main"]},
)
