"""Writes docs/recipes.md: the recipes from the head comments in gin/, the settings from signatures and docstrings.

    python docs/make_recipes.py

tests/test_recipes_document.py writes the document anew and compares.
"""

import argparse
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path

import gin

from conadv_tf import config
from conadv_tf.models import applications
from conadv_tf.run import kept_config

GIN = Path(config.recipe_folder())
DOCUMENT = Path(__file__).with_name("recipes.md")
# The settings, in the order in which a run reads them.
CHAPTERS = {
    "Data": ("data", "digits", "tfrecords", "tfds", "synthetic", "stream", "autoaugment", "subset"),
    "Training": ("train", "model", "lars", "sgd", "adamw", "lamb", "rmsprop", "learning_rate", "loss"),
    "Method": ("attack", "conadv", "adversarial", "sam"),
    "Execution": ("mirrored", "divergence", "monitor"),
}
INTRODUCTION = """\
# Recipes

Written by `python docs/make_recipes.py`; edit that script, the recipes or the docstrings, not this file.

A recipe is a [gin](https://github.com/google/gin-config) file in [gin/](../gin). It holds values, one a line:
`configurable.parameter = value`.

```sh
python train.py --gin_file=digits_conadv.gin
python train.py --gin_file=digits_conadv.gin --gin_file=method/disadv.gin --gin_param="attack.epsilon_pixels=4"
```

## How recipes compose

- `--gin_file` names a recipe, as given or below gin/. It may be repeated; later files go over earlier ones.
- `--gin_param` binds one value and goes over all files. It may be repeated.
- Parts have a folder each: [batch/](../gin/batch) (batch size and what goes with it), [method/](../gin/method),
  [data/](../gin/data), [scale/](../gin/scale) (the [scale models](results.md)). A part replaces another of its folder:
  with `--gin_file=96k_conadv.gin --gin_file=method/aa.gin` the method is AutoAugment's.
- A recipe may `include` others.
- The settings of a data source bear its name. The settings of another source than `data.source` are not used: the file
  of data/ that is given last decides alone.

A wrong name, a wrong type, a missing file, a macro that nothing uses: one line, exit code 2, nothing trained. A
`--gin_param` that the run does not use ends it in the same way. What a recipe sets in vain is listed as "not used by
this run". Imports, calls of functions and scopes are refused: a recipe runs no code.

A run keeps its settings, defaults included, in `config.gin` in its folder. In the same folder it goes on with the same
settings only. These may change, since they say how a run is executed and not what it computes:
{execution}.
"""
MOVED = """\
## Settings that have moved

A recipe or flag with an old name is refused with a line that says the new one. A kept `config.gin` is read under the
new names.

| old | new |
|---|---|
"""


def document() -> str:
    """The whole document."""
    config.register()
    names = ", ".join(f"`{name}`" for name in kept_config.EXECUTION_SETTINGS)
    execution = textwrap.fill(names, 120, break_long_words=False)
    moved = "".join(f"| `{old}` | {_places(new)} |\n" for old, new in config.MOVED.items())
    parts = [INTRODUCTION.format(execution=execution), recipes(), settings(), MOVED + moved]
    return "\n".join(parts)


def _places(new: str) -> str:
    """The settings that a moved one may be now: one, or one for each source that has it."""
    parameter = new.rpartition(".")[2]
    sources = [source for source in config.sources() if parameter in config.parameters(source)]
    names = [new.format(source=source) for source in sources] if "{source}" in new else [new]
    return " or ".join(f"`{name}`" for name in names)


def recipes() -> str:
    """The tables of whole recipes and of their parts."""
    whole = sorted(GIN.glob("*.gin"), key=_order)
    lines = ["## The recipes", "", "| recipe | | source of its values | result |", "|---|---|---|---|"]
    lines += [_recipe_row(path) for path in whole]
    lines += ["", "### Parts", "", "| part | |", "|---|---|"]
    parts = sorted((path for path in GIN.rglob("*/*.gin")), key=_order)
    lines += [f"| {_link(path)} | {_summary(path)} |" for path in parts]
    return "\n".join(lines) + "\n"


def _order(path: Path) -> tuple[str, int, str]:
    """By folder, then by batch size, then by name."""
    number = re.match(r"\d+", path.name)
    return str(path.parent), int(number.group()) if number else 0, path.name


def _link(path: Path) -> str:
    name = path.relative_to(GIN).as_posix()
    return f"[{name}](../gin/{name})"


def _head(path: Path) -> str:
    """The head comment of a recipe without its marks."""
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def _summary(path: Path) -> str:
    """The first sentence of a head comment, without its full stop."""
    paragraph = " ".join(_head(path).split("\n\n")[0].split())
    return _cell(re.split(r"\.(?: |$)", paragraph)[0])


def _recipe_row(path: Path) -> str:
    entries = dict(re.findall(r"^(\w+) {2,}(\S.*(?:\n {4,}\S.*)*)", _head(path), re.MULTILINE))
    found = [f"{name.lower()}: {entries[name]}" for name in ("Paper", "Expect") if name in entries]
    outcome = found[0] if found else "not measured here"
    cells = (_link(path), _summary(path), _cell(entries.get("Source", "")), _cell(outcome))
    return f"| {' | '.join(cells)} |"


def settings() -> str:
    """The tables of settings, a chapter for each part of a run."""
    known = set(config.configurables())
    listed = [name for names in CHAPTERS.values() for name in names]
    if known != set(listed):
        raise SystemExit(f"docs/make_recipes.py: put {sorted(known ^ set(listed))} into CHAPTERS, or take it out")
    lines = ["## Every setting", ""]
    for chapter, names in CHAPTERS.items():
        lines += [f"### {chapter}", ""]
        for name in names:
            lines += [*_table(name), ""]
            if name == "model":
                named = ", ".join(f"`{each}`" for each in applications.names())
                lines += [f"Classifiers of `tf_keras.applications` that `model.name` may be: {named}.", ""]
    return "\n".join(lines)


def _table(name: str) -> list[str]:
    configurable = gin.get_configurable(name)
    text = inspect.getdoc(configurable) or ""
    meanings = descriptions(text)
    lines = [f"**{name}**: {_cell(text.split(chr(10) + chr(10))[0])}", ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for parameter, described in config.parameters(name).items():
        default = _cell(f"`{described.default!r}`")
        lines.append(
            f"| `{name}.{parameter}` | {type_text(described.annotation)} | {default} | {_cell(meanings[parameter])} |"
        )
    return lines


def descriptions(docstring: str) -> dict[str, str]:
    """The descriptions under "Args:" or "Attributes:" of a docstring, by name."""
    section = re.search(r"^(?:Args|Attributes):\n((?:  .*\n?|\n(?=  ))*)", docstring, re.MULTILINE)
    entries, found = section.group(1) if section else "", {}
    for names, text in re.findall(r"^  ([\w, ]+): (.*(?:\n {4,}.*)*)", entries, re.MULTILINE):
        found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def type_text(annotation: typing.Any) -> str:
    """A type as a reader knows it: "int or None"."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(map(type_text, typing.get_args(annotation)))
    if annotation is types.NoneType:
        return "None"
    if typing.get_origin(annotation):
        return f"list of {type_text(typing.get_args(annotation)[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "True or False"}[annotation.__name__]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def main() -> None:
    """Writes the document."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    DOCUMENT.write_text(document())
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
