"""Packaging. `kernels/` holds the package `sgg_kernels`: one called `kernels` would shadow Hugging Face's."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest", "pytest-xdist", "hypothesis"]
BENCH = ["matplotlib", "torch_geometric"]

setup(
    name="sgg_fast",
    version="0.1.0",
    description="Scene graph to image on Stable Diffusion: SGG-IG, built for speed on one GPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sgg_fast", "sgg_fast.*"]), *find_packages("kernels")],
    package_dir={"sgg_kernels": "kernels/sgg_kernels"},
    package_data={"sgg_fast.toy": ["weights/*", "pipeline/*", "pipeline/*/*"]},
    install_requires=[
        "torch>=2.10,<2.14",
        "triton>=3.6",
        "xformers>=0.0.35",
        "diffusers>=0.42",
        "transformers>=5.0",
        "bitsandbytes>=0.50",
        "deepspeed>=0.19.7,<0.19.8",
        "numpy>=2",
        "safetensors",
        "h5py",
        "pycocotools",
        "Pillow",
        "tqdm",
        "tensorboard",
        "ninja",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, *BENCH, "ruff", "mypy"],
        "bench": BENCH,
        "eval": ["torch-fidelity"],
    },
)
