"""The command line of `recipes/train.py`, which is read before torch is imported: a portable recipe pins the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from lars.exact import portable
from lars.recipe import strict_yaml


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """`config`, `check`, `processes` and `overrides`; ends the process where they make no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the recipe")
    parser.add_argument("--check", action="store_true", help="validate recipe and data, train nothing")
    parser.add_argument("--processes", type=int, help="with --check: the process count to check for")
    parser.add_argument("overrides", nargs="*", help="key=value", metavar="key=value")
    return parser.parse_args(arguments)


def pin(arguments: list[str]) -> None:
    """Set the variables if the recipe that is named asks for `runtime.portable`, whatever starts the run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(arguments)
    if "torch" in sys.modules or not known.config:
        return
    try:
        written, _ = strict_yaml.read(Path(known.config), "recipe")
        keys = OmegaConf.from_dotlist([item for item in rest if "=" in item and not item.startswith("-")])
        portable_wanted = OmegaConf.select(OmegaConf.merge(written, keys), "runtime.portable")
    except Exception:  # whatever a bad recipe makes of it: whoever runs it says what is wrong
        return
    if portable_wanted is True:
        portable.set_variables()
