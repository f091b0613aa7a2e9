"""Packaging. `kernels/` is installed as `sgg_kernels`: a package called `kernels` would shadow Hugging Face's."""

from pathlib import Path

from setuptools import find_packages, setup

APP = ["starlette", "uvicorn"]
TEST = ["pytest", "pytest-xdist", "hypothesis", *APP]
BROWSER = ["playwright>=1.65,<1.66", "axe-playwright-python"]
BENCH = ["matplotlib", "torch_geometric"]

setup(
    name="sgg_fast",
    version="0.1.0",
    description="Scene graph to image on Stable Diffusion: SGG-IG, built for speed on one GPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["sgg_fast", "sgg_fast.*"]), "sgg_kernels", "sgg_kernels.reference"],
    package_dir={"sgg_kernels": "kernels"},
    package_data={
        "sgg_fast.toy": ["weights/*.safetensors", "pipeline/*", "pipeline/*/*"],
        "sgg_fast.app": ["static/*"],
    },
    entry_points={"console_scripts": ["sgg-app = sgg_fast.app.__main__:main"]},
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
        "app": APP,
        "test": TEST,
        "dev": [*TEST, *BENCH, *BROWSER, "ruff", "mypy"],
        "bench": BENCH,
        "eval": ["torch-fidelity"],
    },
)
