"""The packages of the wheel; all else is in pyproject.toml, which cannot find mapped ones.

`components/` and `pipelines/` stay at the top level, where platform engineers look, and are
installed as `srccore.components` and `srccore.pipelines`.
"""

from setuptools import find_packages, setup

mapped = find_packages(include=["components", "components.*", "pipelines", "pipelines.*"])
setup(
    packages=[
        *find_packages(include=["srccore", "srccore.*"]),
        *(f"srccore.{name}" for name in mapped),
    ],
    package_dir={
        "srccore": "srccore",
        "srccore.components": "components",
        "srccore.pipelines": "pipelines",
    },
)
