"""What pyproject.toml cannot say: the packages of two roots. One called `kernels` would shadow Hugging Face's."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sgg_fast", "sgg_fast.*"]), *find_packages("kernels")],
    package_dir={"sgg_kernels": "kernels/sgg_kernels"},
    package_data={
        "sgg_fast": ["py.typed"],
        "sgg_fast.app": ["static/*"],
        "sgg_fast.doctor": ["counts.json"],
        "sgg_fast.toy": ["weights/*", "weights/*/*", "pipeline/*", "pipeline/*/*"],
        "sgg_kernels": ["py.typed"],
    },
)
