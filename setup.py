"""The checkout is the package: its root is `fastgpt2`, its folders are `fastgpt2.kernels`, `.gpt2` and `.bench`.

Folders are mapped instead of moved because PyPI's `kernels` (HuggingFace) is imported by transformers: a top-level
`kernels` of ours would overwrite it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Leaves setup.py out of the wheel: the package folder is the checkout root, where it lies beside `__init__.py`."""

    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if m[1] != "setup"]


ROOT = Path(__file__).parent
# Every folder of these that holds code: kernels/ and bench/ have no __init__.py, so that setuptools' own search, which
# asks for one, or else takes each folder, would find too few or too many.
FILES = [file for folder in ("kernels", "gpt2", "bench") for file in (ROOT / folder).rglob("*.py")]
PACKAGES = sorted({".".join(("fastgpt2", *file.parent.relative_to(ROOT).parts)) for file in FILES})

DATA = ["datasets>=3"]
WATCH = ["tensorboard>=2.14", "wandb>=0.17"]
TEST = [
    *DATA,
    "hypothesis>=6.100",
    "numpy>=1.26",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "accelerate>=1",  # an example
    "build>=1.2",
    "kernels>=0.17",  # HuggingFace's, beside which ours must live, and which reads what `bench/hub` writes
    "setuptools>=77",
    "tensorboard>=2.14",
    "wheel",
]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
CLIENTS = [  # tools that tests put on the model
    "lightning>=2.4",
    "lm_eval>=0.4.8",
    "opacus>=1.5",
    "peft>=0.15",
    "torchao>=0.10",
    "torchinfo>=1.8",
    "trl>=0.20",
]

setup(
    name="fastgpt2",
    version="0.1.0",
    description="GPT-2 in PyTorch with Triton kernels for attention, LayerNorm and GELU, each behind a switch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="The fastgpt2 authors",
    keywords=["gpt-2", "triton", "pytorch", "attention", "transformer", "kernels"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_dir={"fastgpt2": ""},
    packages=["fastgpt2", *PACKAGES],
    package_data={"fastgpt2": ["py.typed"]},
    cmdclass={"build_py": BuildPackage},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=4.45",
        "tiktoken>=0.7",
        "tokenizers>=0.21",  # comes with transformers; DecodeStream is new in it
        "safetensors>=0.4.3",
        "huggingface_hub>=0.24",
        "rich>=13",
        "tyro>=1",
        "pyyaml>=6",
        "matplotlib>=3.8",
        "numpy>=1.26",
    ],
    extras_require={
        "test": TEST,
        "clients": CLIENTS,
        "data": DATA,
        "watch": WATCH,
        "docs": DOCS,
        "hub": ["transformers[kernels]"],  # each transformers enables one short range of versions only
        "dev": [*TEST, *CLIENTS, *DATA, *WATCH, *DOCS, "ruff>=0.9", "mypy>=1.14", "pre-commit>=4"],
    },
    entry_points={"console_scripts": ["fastgpt2=fastgpt2.gpt2.cli:main"]},
)
