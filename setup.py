from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mtseg",
    version="0.1.0",
    description="Semi-supervised segmentation of medical volumes in plain PyTorch, Mean Teacher first",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["mtseg", "mtseg.*"]),
    package_data={"mtseg.winograd": ["convolutions.c"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.2", "numpy", "scipy", "tqdm", "h5py"],
    extras_require={
        "nifti": ["nibabel"],
        "nrrd": ["pynrrd"],
        "images": ["pillow", "tifffile"],
        "plot": ["matplotlib>=3.10", "scikit-image"],
        "export": ["onnx", "onnxruntime"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "test": [
            *("pytest", "pytest-xdist", "ruff==0.17.5", "medpy", "monai", "nibabel", "pynrrd", "SimpleITK", "wandb"),
            *("tensorboard", "matplotlib>=3.10", "scikit-image", "pillow", "tifffile", "onnx", "onnxruntime"),
            *("markdown-it-py", "transformers", "safetensors"),
        ],
    },
)
