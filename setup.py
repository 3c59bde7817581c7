"""What pyproject.toml cannot say: which folders the wheel carries. Install: pip install -c constraints.txt -e ."""

from setuptools import find_packages, setup

# Folders of the top level that the wheel carries inside the package; atlantis_ds/bundled.py finds them in both places.
BUNDLED = {"ds_configs": ["*.json"], "slurm": ["*.sh", "*.sbatch"], "recipes": ["*.yaml", "studies/*.yaml"]}

setup(
    packages=[*find_packages(include=["atlantis_ds", "atlantis_ds.*"]), *(f"atlantis_ds.{name}" for name in BUNDLED)],
    package_dir={f"atlantis_ds.{name}": name for name in BUNDLED},
    package_data={
        "atlantis_ds": ["py.typed"],
        "atlantis_ds.config": ["*.json"],
        "atlantis_ds.pages": ["*.html", "*.css", "*.js"],
        **{f"atlantis_ds.{name}": patterns for name, patterns in BUNDLED.items()},
    },
)
