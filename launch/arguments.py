"""Arguments that several verbs of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="a study file")]
StudyDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="folder of a study")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings that win over the file's")
]
World = Annotated[
    int | None, typer.Option(min=1, max=1_000_000, help="ranks of each run; default: as few as its layout needs")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]
