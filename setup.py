"""Packaging of aimfair; every value comes from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXTRAS = ("lab", "explore", "llm", "hub", "timm", "imagenet", "peft", "tensorboard", "trackio", "ray", "s3", "docs", "dev")


def read_settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


class BuildWithNotebooks(build_py):
    "Ships the experiment notebooks as assets, so that `aimfair reproduce` works outside a checkout; git keeps one copy."

    def notebook_copies(self):
        target = Path(self.build_lib) / "aimfair" / "assets" / "experiments"
        return {path: target / path.name for path in sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))}

    def run(self):
        super().run()
        if self.editable_mode:  # an editable install reads them from nbs/experiments
            return
        for source, target in self.notebook_copies().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        copies = [] if self.editable_mode else self.notebook_copies().values()
        return super().get_outputs(include_bytecode) + [str(path) for path in copies]


settings = read_settings()
python_versions = [f"3.{minor}" for minor in range(int(settings["min_python"].split(".")[1]), 14)]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in python_versions),
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["aimfair", "aimfair.*"], exclude=["aimfair.assets*"]),
    package_data={"aimfair": ["assets/**"]},
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in EXTRAS},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
)
