from setuptools import find_packages, setup

# The top-level folders are installed below one name: bare `kernels`, `models` and `train` would collide
# with other distributions.
setup(
    packages=[*find_packages(include=["srit", "srit.*"]), "srit.kernels", "srit.models", "srit.train",
              "srit.runs"],
    package_dir={
        "srit": "srit",
        "srit.kernels": "kernels",
        "srit.models": "models",
        "srit.train": "train",
        "srit.runs": "runs",
    },
    package_data={"srit": ["templates/*.jinja"], "srit.runs": ["*.yaml"]},
)
