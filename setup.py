"""What pyproject.toml cannot say: a wheel carries configs/ as jepa_scale/configs, where the package finds them."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithConfigs(build_py):
    def _configs(self) -> dict[Path, Path]:
        files = [path for path in sorted((HERE / "configs").rglob("*")) if path.is_file()]
        return {file: Path(self.build_lib) / "jepa_scale" / file.relative_to(HERE) for file in files}

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the repository's own are found
            for source, target in self._configs().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: int = 1) -> list[str]:
        mine = [] if self.editable_mode else [str(path) for path in self._configs().values()]
        return [*super().get_outputs(include_bytecode), *mine]


setup(cmdclass={"build_py": BuildWithConfigs})
